//! Tests of whole conversations over mock streams.

use std::cell::{Cell, RefCell};
use std::pin::Pin;
use std::task::Context;

use futures::executor::block_on;
use futures::future::{pending, ready};
use futures::io::{AsyncRead, AsyncReadExt, BufReader, repeat};
use futures_test::io::{AsyncReadTestExt, AsyncWriteTestExt};
use futures_test::task::noop_context;

use super::*;
use crate::protocol::{MAX_ANSWER, MAX_BULK};
use crate::store::MAX_USED;

/// The answers to `input`, received in pieces of `step` bytes.
fn talk(input: impl AsRef<[u8]>, step: usize) -> String {
    let mut written = Vec::new();
    let reader = input.as_ref().limited(step).interleave_pending();
    let writer = (&mut written)
        .limited_write(step)
        .interleave_pending_write();
    block_on(serve(BufReader::new(reader), writer, 7, || 0, pending())).unwrap();
    String::from_utf8(written).unwrap()
}

/// Encodes a request.
fn request(words: &[&[u8]]) -> Vec<u8> {
    let mut request = format!("*{}\r\n", words.len()).into_bytes();
    for word in words {
        request.extend(format!("${}\r\n", word.len()).into_bytes());
        request.extend_from_slice(word);
        request.extend_from_slice(b"\r\n");
    }
    request
}

impl Conversation {
    /// The answer to the request of `words`.
    fn ask(&mut self, words: &[&[u8]], now: Time) -> String {
        let request = request(words);
        assert_eq!(self.answer(&request, now), request.len());
        let answer = String::from_utf8_lossy(self.unsent()).into_owned();
        self.sent(self.unsent().len());
        answer
    }

    /// The answer to a request written as words with spaces between them.
    fn say(&mut self, words: &str, now: Time) -> String {
        let words: Vec<_> = words.split(' ').map(str::as_bytes).collect();
        self.ask(&words, now)
    }
}

#[test]
fn string_commands_answer_as_in_redis() {
    assert_answers(&[
        ("SET a 1", "+OK"),
        ("GET a", "$1 1"),
        ("GET b", "$-1"),
        ("SET a 2 NX", "$-1"),
        ("SET b 2 XX", "$-1"),
        ("SET a 2 XX GET", "$1 1"),
        ("SET a 2 NX XX", "-ERR syntax error"),
        ("SET a 2 EX 0", "-ERR invalid expire time in 'set' command"),
        (
            "SET a 2 EX 9223372036854775807",
            "-ERR invalid expire time in 'set' command",
        ),
        (
            "SET a 2 PX x",
            "-ERR value is not an integer or out of range",
        ),
        ("INCR a", ":3"),
        ("DECR a", ":2"),
        ("INCRBY a 5", ":7"),
        ("DECRBY a 10", ":-3"),
        ("INCRBY a 9223372036854775807", ":9223372036854775804"),
        ("INCRBY a 4", "-ERR increment or decrement would overflow"),
        (
            "DECRBY a -9223372036854775808",
            "-ERR decrement would overflow",
        ),
        ("APPEND b x", ":1"),
        ("APPEND b yz", ":3"),
        ("INCR b", "-ERR value is not an integer or out of range"),
        ("STRLEN b", ":3"),
        ("STRLEN none", ":0"),
        ("MSET c 1 d 2", "+OK"),
        (
            "MSET c 1 d",
            "-ERR wrong number of arguments for 'mset' command",
        ),
        ("MGET c none d", "*3 $1 1 $-1 $1 2"),
        ("GETDEL c", "$1 1"),
        ("EXISTS c d d", ":2"),
        ("TYPE d", "+string"),
        ("DEL c d", ":1"),
        ("UNLINK a b", ":2"),
        ("DBSIZE", ":0"),
    ]);
}

#[test]
fn list_commands_answer_as_in_redis() {
    assert_answers(&[
        ("RPUSH l c d", ":2"),
        ("LPUSH l b a", ":4"),
        ("LRANGE l 0 -1", "*4 $1 a $1 b $1 c $1 d"),
        ("LRANGE l -3 1", "*1 $1 b"),
        ("LRANGE l 3 1", "*0"),
        ("LPOP l", "$1 a"),
        ("RPOP l 2", "*2 $1 d $1 c"),
        ("LPOP l -1", "-ERR value is out of range, must be positive"),
        ("LLEN l", ":1"),
        (
            "GET l",
            "-WRONGTYPE Operation against a key holding the wrong kind of value",
        ),
        ("MGET l", "*1 $-1"),
        ("RPOP l", "$1 b"),
        ("LPOP l", "$-1"),
        ("LPOP l 1", "*-1"),
        ("TYPE l", "+none"),
    ]);
}

#[test]
fn set_commands_answer_as_in_redis() {
    assert_answers(&[
        ("SADD s a b a", ":2"),
        ("SCARD s", ":2"),
        ("SISMEMBER s a", ":1"),
        ("SREM s b c", ":1"),
        ("SMEMBERS s", "*1 $1 a"),
        ("SPOP s", "$1 a"),
        ("SPOP s", "$-1"),
        ("SPOP s 1", "*0"),
    ]);
}

#[test]
fn hash_commands_answer_as_in_redis() {
    assert_answers(&[
        ("HSET h f 1 g 2", ":2"),
        ("HSET h f 3", ":0"),
        (
            "HSET h f",
            "-ERR wrong number of arguments for 'hset' command",
        ),
        ("HGET h f", "$1 3"),
        ("HEXISTS h z", ":0"),
        ("HGETALL h", "*4 $1 f $1 3 $1 g $1 2"),
        ("HLEN h", ":2"),
        ("KEYS *", "*1 $1 h"),
        ("KEYS [a-g]", "*0"),
        ("HDEL h f g z", ":2"),
        ("EXISTS h", ":0"),
    ]);
}

#[test]
fn connection_commands_answer_as_in_redis() {
    assert_answers(&[
        ("PING", "+PONG"),
        ("ping x", "$1 x"),
        ("ECHO x", "$1 x"),
        ("SELECT 0", "+OK"),
        ("SELECT 1", "-ERR DB index is out of range"),
        ("CONFIG GET save", "*2 $4 save $0 "),
        (
            "CONFIG SET save x",
            "-ERR unknown subcommand 'SET'. Try CONFIG HELP.",
        ),
        ("CLIENT ID", ":7"),
        ("CLIENT GETNAME", "$-1"),
        ("CLIENT SETNAME me", "+OK"),
        ("CLIENT GETNAME", "$2 me"),
        ("COMMAND INFO get", "*1 *6 $3 get :2 *1 +readonly :1 :1 :1"),
        (
            "COMMAND DOCS",
            "-ERR unknown subcommand 'DOCS'. Try COMMAND HELP.",
        ),
        ("HELLO 3", "-NOPROTO unsupported protocol version"),
        (
            "HELLO 2",
            "*14 $6 server $5 redis $7 version $5 7.0.0 $5 proto :2 $2 id :7 $4 mode \
             $10 standalone $4 role $6 master $7 modules *0",
        ),
        ("FLUSHDB", "+OK"),
        ("FLUSHALL ASYNC", "+OK"),
        ("FLUSHALL NOW", "-ERR syntax error"),
        ("GET", "-ERR wrong number of arguments for 'get' command"),
        (
            "GET a b",
            "-ERR wrong number of arguments for 'get' command",
        ),
        (
            "ZADD z 1 a",
            "-ERR unknown command 'ZADD', with args beginning with: 'z' '1' 'a' ",
        ),
        ("INFO keyspace", "$12 # Keyspace "),
    ]);
}

/// Sends requests on one connection and compares the answers, with spaces for line ends. The store
/// has to be empty at the end.
fn assert_answers(requests: &[(&str, &str)]) {
    let mut conversation = Conversation::new(7);
    for (request, answer) in requests {
        let received = conversation.say(request, 0);
        assert_eq!(
            received.replace("\r\n", " "),
            format!("{answer} "),
            "for {request}"
        );
    }
    assert_eq!(conversation.session.store.used(), 0);
}

#[test]
fn keys_expire_as_in_redis() {
    let mut conversation = Conversation::new(7);
    for (now, request, answer) in [
        (0, "SET a 1 EX 10", "+OK"),
        (0, "SET b 1 PX 10", "+OK"),
        (9, "PTTL b", ":1"),
        (10, "GET b", "$-1"),
        (10, "PERSIST b", ":0"),
        (10, "TTL b", ":-2"),
        (400, "TTL a", ":10"),
        (400, "INCR a", ":2"),
        (9_999, "EXISTS a", ":1"),
        (9_999, "PERSIST a", ":1"),
        (9_999, "PERSIST a", ":0"),
        (10_000, "TTL a", ":-1"),
        (10_000, "EXPIRE a 5", ":1"),
        (10_000, "EXPIRE a 4 GT", ":0"),
        (10_000, "EXPIRE a 6 LT", ":0"),
        (10_000, "EXPIRE a 6 NX", ":0"),
        (10_000, "PEXPIRE a 6000 XX", ":1"),
        (10_000, "SET a 3 KEEPTTL", "+OK"),
        (15_999, "DBSIZE", ":1"),
        (16_000, "DBSIZE", ":0"),
        (16_000, "SET a 1 PXAT 16001", "+OK"),
        (16_000, "GET a", "$1 1"),
        (16_001, "INCR a", ":1"),
        (16_001, "TTL a", ":-1"),
        (16_001, "EXPIRE a -1", ":1"),
        (16_001, "EXISTS a", ":0"),
    ] {
        let received = conversation.say(request, now);
        assert_eq!(
            received.replace("\r\n", " "),
            format!("{answer} "),
            "{request} at {now}"
        );
    }
    assert_eq!(conversation.session.store.used(), 0);
}

#[test]
fn a_pipeline_is_answered_in_order_for_any_read_size() {
    let input = "*2\r\n$4\r\nINCR\r\n$1\r\na\r\n".repeat(300) + "PING last\r\n";
    let expected: String = (1..=300).map(|n| format!(":{n}\r\n")).collect();
    for step in [1, 7, 1000, 1 << 20] {
        assert_eq!(
            talk(&input, step),
            format!("{expected}$4\r\nlast\r\n"),
            "by {step}"
        );
    }
}

#[test]
fn quit_and_protocol_errors_end_the_conversation() {
    assert_eq!(talk("PING\r\nQUIT\r\nPING\r\n", 1000), "+PONG\r\n+OK\r\n");
    assert_eq!(
        talk("PING\r\n*1\r\n$-5\r\nPING\r\n", 3),
        "+PONG\r\n-ERR Protocol error: invalid bulk length\r\n"
    );
    // A truncated request gets no answer.
    assert_eq!(talk("PING\r\n*1\r\n$4\r\nPI", 3), "+PONG\r\n");
}

#[test]
fn a_draining_server_waits_for_the_end_of_a_request() {
    let written = RefCell::default();
    let ends = |input: &'static [u8]| {
        written.take();
        let reader = BufReader::new(input.chain(SilentClient));
        let writer = LimitedWriter::unlimited(&written);
        let future = pin!(serve(reader, writer, 7, || 0, ready(())));
        future.poll(&mut noop_context()).is_ready()
    };
    assert!(ends(b""));
    assert!(ends(b"PING\r\n"));
    assert_eq!(written.borrow().concat(), b"+PONG\r\n");
    assert!(!ends(b"PING\r\nPI"));
    assert!(!ends(b"*1\r\n"));
}

/// A client that sends nothing more and stays connected.
struct SilentClient;

impl AsyncRead for SilentClient {
    fn poll_read(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        _: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        Poll::Pending
    }
}

/// A writer that accepts a number of bytes and then blocks. Records each write.
struct LimitedWriter<'a> {
    written: &'a RefCell<Vec<Vec<u8>>>,
    remaining: usize,
}

impl<'a> LimitedWriter<'a> {
    fn unlimited(written: &'a RefCell<Vec<Vec<u8>>>) -> Self {
        Self {
            written,
            remaining: usize::MAX,
        }
    }
}

impl AsyncWrite for LimitedWriter<'_> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.remaining == 0 {
            return Poll::Pending;
        }
        let n = bytes.len().min(self.remaining);
        self.remaining -= n;
        self.written.borrow_mut().push(bytes[..n].into());
        Poll::Ready(Ok(n))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[test]
fn a_pipeline_is_answered_in_one_write() {
    let written = RefCell::default();
    let input = b"PING\r\n".repeat(5_000);
    // The input takes eight reads.
    let reader = BufReader::with_capacity(4096, input.as_slice());
    let writer = LimitedWriter::unlimited(&written);
    block_on(serve(reader, writer, 7, || 0, pending())).unwrap();
    assert_eq!(written.borrow().concat(), b"+PONG\r\n".repeat(5_000));
    assert_eq!(written.borrow().len(), 1);
}

#[test]
fn reading_stops_when_the_client_does_not_take_answers() {
    let sent = Cell::new(0);
    let written = RefCell::default();
    let reader = BufReader::new(EndlessPings(&sent));
    let writer = LimitedWriter {
        written: &written,
        remaining: 1_000,
    };
    let future = pin!(serve(reader, writer, 7, || 0, pending()));
    assert!(future.poll(&mut noop_context()).is_pending());
    assert_eq!(written.borrow().concat().len(), 1_000);
    // Each request has six bytes, and its answer seven.
    let answered = sent.get() / 6 * 7;
    let expected = MAX_UNSENT..MAX_UNSENT + 100_000;
    assert!(expected.contains(&answered), "{answered}");
}

/// A client that sends `PING` without end. Counts the bytes.
struct EndlessPings<'a>(&'a Cell<usize>);

impl AsyncRead for EndlessPings<'_> {
    fn poll_read(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        for byte in &mut *buffer {
            *byte = b"PING\r\n"[self.0.get() % 6];
            self.0.set(self.0.get() + 1);
        }
        Poll::Ready(Ok(buffer.len()))
    }
}

#[test]
fn an_endless_line_is_refused() {
    let written = RefCell::default();
    let reader = BufReader::new(repeat(b'x'));
    let writer = LimitedWriter::unlimited(&written);
    block_on(serve(reader, writer, 7, || 0, pending())).unwrap();
    assert_eq!(
        written.borrow().concat(),
        b"-ERR Protocol error: too big inline request\r\n"
    );
}

#[test]
fn a_full_store_refuses_writes_until_keys_are_removed() {
    let oom = "-OOM command not allowed when used memory > 'maxmemory'.\r\n";
    let value = vec![b'x'; 1000];
    for command in ["SET", "APPEND", "RPUSH", "SADD", "HSET", "MSET"] {
        let mut conversation = Conversation::new(7);
        let add = |conversation: &mut Conversation, n: usize| {
            let name = n.to_string();
            let item = [name.as_bytes(), &value[..]].concat();
            let key = name.as_bytes();
            let words: Vec<&[u8]> = match command {
                "HSET" => vec![b"HSET", b"h", key, &item],
                "SADD" | "RPUSH" => vec![command.as_bytes(), b"k", &item],
                _ => vec![command.as_bytes(), key, &item],
            };
            conversation.ask(&words, 0)
        };
        let full = (0..).find(|n| add(&mut conversation, *n) == oom).unwrap();
        assert!(full > 10_000, "{command}: {full}");
        let used = conversation.session.store.used();
        assert!(
            (MAX_USED - 5_000..=MAX_USED).contains(&used),
            "{command}: {used}"
        );
        // Reads still work.
        assert!(conversation.say("DBSIZE", 0).starts_with(':'));
        for key in ["0", "1", "k", "h"] {
            conversation.say(&format!("DEL {key}"), 0);
        }
        assert_ne!(add(&mut conversation, full), oom, "{command}");
    }
}

#[test]
fn expired_keys_free_memory() {
    let mut conversation = Conversation::new(7);
    let value = vec![b'x'; MAX_BULK];
    let mut set = |n: usize, now| {
        let key = n.to_string();
        conversation.ask(&[b"SET", key.as_bytes(), &value, b"PX", b"10"], now)
    };
    assert_eq!((0..15).filter(|n| set(*n, 0) == "+OK\r\n").count(), 15);
    assert!(set(15, 9).starts_with("-OOM"));
    assert_eq!(set(15, 10), "+OK\r\n");
}

#[test]
fn strings_and_answers_are_bounded() {
    let mut conversation = Conversation::new(7);
    let value = vec![b'x'; MAX_BULK];
    assert_eq!(conversation.ask(&[b"SET", b"a", &value], 0), "+OK\r\n");
    assert_eq!(
        conversation.say("APPEND a x", 0),
        "-ERR string exceeds maximum allowed size (proto-max-bulk-len)\r\n"
    );
    assert_eq!(conversation.say("STRLEN a", 0), format!(":{MAX_BULK}\r\n"));
    let too_long = format!("-ERR answer exceeds {MAX_ANSWER} bytes\r\n");
    assert_eq!(
        conversation.say("MGET a a a a a a a", 0).len(),
        4 + 7 * (MAX_BULK + 12)
    );
    assert_eq!(conversation.say("MGET a a a a a a a a", 0), too_long);
    // A pop whose answer is too long removes nothing.
    for key in ["l", "s"] {
        let command: &[u8] = if key == "l" { b"RPUSH" } else { b"SADD" };
        for n in 0..9 {
            let item = [&[n], &value[1..]].concat();
            conversation.ask(&[command, key.as_bytes(), &item], 0);
        }
        let pop = if key == "l" { "LPOP l 9" } else { "SPOP s 9" };
        assert_eq!(conversation.say(pop, 0), too_long);
        let count = if key == "l" { "LLEN l" } else { "SCARD s" };
        assert_eq!(conversation.say(count, 0), ":9\r\n");
        conversation.say(&format!("DEL {key}"), 0);
    }
}
