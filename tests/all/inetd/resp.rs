//! The scratch store, which speaks the protocol of Redis, tested with its tools and raw clients.

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::thread;

use crate::harness::{Client, MODES, PATIENCE, Server, guest, has_program, output};

use super::clock::seconds;

/// Runs redis-cli with `lines` as its input and returns its output.
fn redis_cli(server: &Server, arguments: &[&str], lines: &str) -> String {
    let mut cli = Command::new("redis-cli")
        .arg("-p")
        .arg(server.address().port().to_string())
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("redis-cli is installed");
    let mut stdin = cli.stdin.take().expect("stdin is piped");
    stdin
        .write_all(lines.as_bytes())
        .expect("redis-cli reads its input");
    drop(stdin);
    let output = cli.wait_with_output().expect("redis-cli is our child");
    assert!(output.status.success(), "{output:?}\n{server:?}");
    String::from_utf8(output.stdout).expect("the output is UTF-8")
}

#[test]
fn redis_cli_gets_a_separate_store_per_connection() {
    if !has_program("redis-benchmark", "redis-tools") {
        return;
    }
    for mode in MODES {
        let server = Server::start(mode, &guest("resp"), &[]);
        let stdout = redis_cli(
            &server,
            &["--no-raw"],
            "SET greeting \"hello, world\" EX 100\nAPPEND greeting !\nGET greeting\nTTL greeting\n\
             INCR n\nRPUSH l a b c\nLRANGE l 0 -1\nHSET h f 1\nHGETALL h\nLPUSH greeting x\nNOSUCH\n\
             GET greeting x\nSET short 1 PX 1\nCONFIG GET save\nDBSIZE\n",
        );
        // DBSIZE, the last answer, depends on whether the short-lived key has expired.
        let without_last = stdout
            .trim_end()
            .rsplit_once('\n')
            .expect("there are several lines")
            .0;
        assert_eq!(
            without_last,
            "OK\n(integer) 13\n\"hello, world!\"\n(integer) 100\n(integer) 1\n(integer) 3\n\
             1) \"a\"\n2) \"b\"\n3) \"c\"\n(integer) 1\n1) \"f\"\n2) \"1\"\n\
             (error) WRONGTYPE Operation against a key holding the wrong kind of value\n\
             (error) ERR unknown command 'NOSUCH', with args beginning with: \n\
             (error) ERR wrong number of arguments for 'get' command\nOK\n1) \"save\"\n2) \"\""
        );
        // The next connection gets an empty store.
        assert_eq!(redis_cli(&server, &["GET", "greeting"], ""), "\n");
        assert_eq!(redis_cli(&server, &["-2", "DBSIZE"], ""), "0\n");
        let info = redis_cli(&server, &["INFO"], "");
        assert!(info.contains("redis_version:7"), "{info}");
        server.wait_for_log(&["connection ended", "id=1 ", "outcome=ok"]);
    }
}

#[test]
fn a_key_expires_after_its_ttl() {
    for mode in MODES {
        let server = Server::start(mode, &guest("resp"), &[]);
        let mut client = server.connect();
        let before = seconds();
        client.send("SET a 1 PX 1500\r\nPTTL a\r\n");
        assert_eq!(client.read_line(), "+OK");
        let left: u64 = client.read_line()[1..].parse().unwrap();
        assert!((1..=1500).contains(&left), "{left}");
        loop {
            client.send("EXISTS a\r\n");
            if client.read_line() == ":0" {
                break;
            }
            assert!(seconds() < before + 30, "the key never expires");
        }
        // Not before its time. The clock counts whole seconds.
        assert!(seconds() > before);
    }
}

#[test]
fn redis_benchmark_completes_without_errors() {
    if !has_program("redis-benchmark", "redis-tools") {
        return;
    }
    for mode in MODES {
        let server = Server::start_alone(mode, &guest("resp"), &[]);
        let tests = "ping_inline,ping_mbulk,set,get,incr,lpush,rpush,lpop,rpop,sadd,hset,spop,\
                     lrange_100,mset";
        for pipeline in ["1", "16", "1000"] {
            let mut benchmark = Command::new("redis-benchmark");
            benchmark.arg("-p").arg(server.address().port().to_string());
            benchmark.args([
                "-n", "5000", "-c", "20", "--csv", "-t", tests, "-P", pipeline,
            ]);
            let output = output(&mut benchmark);
            let (stdout, stderr) = (
                String::from_utf8_lossy(&output.stdout),
                String::from_utf8_lossy(&output.stderr),
            );
            assert!(output.status.success(), "{output:?}\n{server:?}");
            for name in ["PING_INLINE", "SET", "SPOP", "LRANGE_100", "MSET (10 keys)"] {
                assert!(
                    stdout.contains(name),
                    "no {name} in {stdout}\n{stderr}\n{server:?}"
                );
            }
            assert!(
                !stdout.contains("rror") && !stderr.contains("rror"),
                "{output:?}"
            );
        }
        for outcome in ["trap", "guest error", "limit"] {
            let lines = server.log_lines(&format!("outcome={outcome}"));
            assert!(lines.is_empty(), "{lines:?}");
        }
    }
}

#[test]
fn a_request_can_be_split_anywhere() {
    for mode in MODES {
        let server = Server::start(mode, &guest("resp"), &[]);
        let mut client = server.connect();
        let request = b"*3\r\n$6\r\nAPPEND\r\n$1\r\na\r\n$3\r\n\r\nx\r\nSTRLEN a\r\n";
        let answer = |n: usize| format!(":{0}\r\n:{0}\r\n", 3 * n);
        for split in 0..request.len() {
            client.send(&request[..split]);
            client.send(&request[split..]);
            let expected = answer(split + 1);
            assert_eq!(client.read(expected.len()), expected, "split at {split}");
        }
        for byte in request {
            client.send([*byte]);
        }
        let expected = answer(request.len() + 1);
        assert_eq!(client.read(expected.len()), expected);
    }
}

#[test]
fn a_long_pipeline_can_be_sent_before_reading_any_answer() {
    for mode in MODES {
        let server = Server::start(mode, &guest("resp"), &[]);
        let mut client = server.connect();
        client.send("INCR a\r\n".repeat(200_000));
        client.finish();
        let answers: String = (1..=200_000).map(|n| format!(":{n}\r\n")).collect();
        assert!(client.read_to_end() == answers);
        server.wait_for_log(&["connection ended", "outcome=ok"]);
    }
}

#[test]
fn protocol_errors_are_answered_before_an_orderly_close() {
    let too_long = "1".repeat(100_000);
    let binary: String = (0..=127_u8)
        .map(char::from)
        .filter(|c| *c != '\n')
        .collect();
    for mode in MODES {
        let server = Server::start(mode, &guest("resp"), &[]);
        for (input, error) in [
            ("*2147483648\r\n", "invalid multibulk length"),
            ("*-9223372036854775809\r\n", "invalid multibulk length"),
            ("*1\r\n$-1\r\n", "invalid bulk length"),
            ("*2\r\n$3\r\nGET\r\n$1073741824\r\n", "invalid bulk length"),
            ("*1\r\n$18446744073709551615\r\n", "invalid bulk length"),
            ("*2\r\n$3\r\nGET\r\nkey\r\n", "expected '$', got 'k'"),
            (
                "*1\r\n$4\r\nPINGPONG\r\n",
                "expected a line end after a bulk string",
            ),
            ("PING \"\r\n", "unbalanced quotes in request"),
            (&too_long, "too big inline request"),
            (&format!("*{too_long}"), "too big mbulk count string"),
            (&format!("*1\r\n${too_long}"), "too big bulk count string"),
        ] {
            let mut client = server.connect();
            client.send(format!("PING\r\n{input}"));
            let expected = format!("+PONG\r\n-ERR Protocol error: {error}\r\n");
            assert_eq!(client.read_to_end(), expected);
        }
        // Zero or negative counts are neither a request nor an error.
        let mut client = server.connect();
        client.send("*-1\r\n*0\r\n\r\n*-2147483648\r\nPING\r\n");
        assert_eq!(client.read_line(), "+PONG");
        client.send(format!(
            "{}\r\n\u{fffd}\0 \x01\r\nPING\r\n",
            binary.replace(['"', '\''], "")
        ));
        for _ in 0..2 {
            let answer = client.read_line();
            assert!(answer.starts_with("-ERR unknown command"), "{answer:?}");
        }
        assert_eq!(client.read_line(), "+PONG");
        client.finish();
        assert_eq!(client.read_to_end(), "");
        for outcome in ["trap", "guest error", "limit"] {
            let lines = server.log_lines(&format!("outcome={outcome}"));
            assert!(lines.is_empty(), "{lines:?}");
        }
    }
}

/// Encodes a request as an array of bulk strings.
fn encode(words: &[&str]) -> String {
    let mut request = format!("*{}\r\n", words.len());
    for word in words {
        request += &format!("${}\r\n{word}\r\n", word.len());
    }
    request
}

/// A client of the store that sends many requests at once.
struct StoreClient<'a> {
    server: &'a Server,
    client: Client,
}

impl<'a> StoreClient<'a> {
    fn connect(server: &'a Server) -> Self {
        let client = server.connect();
        client.0.set_read_timeout(Some(4 * PATIENCE)).unwrap();
        Self { server, client }
    }

    /// Sends `requests` and reads this number of answer lines at the same time.
    fn exchange(&self, requests: String, answers: usize) -> Vec<String> {
        let mut sender = self.client.0.try_clone().unwrap();
        thread::scope(|scope| {
            // The reader reports a server that closes the connection.
            scope.spawn(move || _ = sender.write_all(requests.as_bytes()));
            let lines = BufReader::new(&self.client.0).lines().take(answers);
            let lines: Result<_, _> = lines.collect();
            lines.unwrap_or_else(|error| panic!("{error}\n{:?}", self.server))
        })
    }
}

fn is_oom(answer: &str) -> bool {
    answer.starts_with("-OOM")
}

fn any_oom(answers: &[String]) -> bool {
    answers.iter().any(|answer| is_oom(answer))
}

/// A request that stores 1 MiB under the key `kN`.
fn set_large(n: usize) -> String {
    encode(&["SET", &format!("k{n}"), &"x".repeat(1 << 20)])
}

#[test]
fn a_full_store_answers_oom_and_keeps_serving() {
    for mode in MODES {
        // The guest computes for half a minute here, close to the default limit.
        let server = Server::start(mode, &guest("resp"), &["--cpu-time", "10m"]);
        let client = StoreClient::connect(&server);
        fill_with_each_type(&client);
        assert_emptied_lists_free_memory(&client);
        assert_largest_answers_fit(&client);
        drop(client);
        server.wait_for_log(&["connection ended", "outcome=ok"]);
    }
}

/// Fills the store with each type of value until an answer says that memory is exhausted.
fn fill_with_each_type(client: &StoreClient) {
    let half = "x".repeat((1 << 19) + 1);
    let many = |command: &str, key: &dyn Fn(usize) -> String| -> String {
        (0..300_000)
            .map(|n| format!("{command} {}\r\n", key(n)))
            .collect()
    };
    let doubled = |n| {
        let key = format!("k{n}");
        encode(&["APPEND", &key, &half]) + &encode(&["APPEND", &key, "x"])
    };
    // Large values, values that grow by doubling, values of many parts, and mostly tables.
    for (name, requests, answers) in [
        ("strings", (0..20).map(set_large).collect::<String>(), 20),
        ("doubled", (0..20).map(doubled).collect(), 40),
        ("keys", many("SET", &|n| format!("{n} x")), 300_000),
        ("list", many("RPUSH l", &|_| "x".into()), 300_000),
        ("set", many("SADD s", &|n| n.to_string()), 300_000),
        ("hash", many("HSET h", &|n| format!("{n} x")), 300_000),
    ] {
        let answers = client.exchange(requests, answers);
        assert!(any_oom(&answers), "{name}: the store never fills");
        assert!(!is_oom(&answers[0]), "{name}: the store was not emptied");
        assert_eq!(
            client.exchange("FLUSHALL\r\nPING\r\n".into(), 2),
            ["+OK", "+PONG"]
        );
    }
}

/// Lists that shrink from many elements to one give their memory back.
fn assert_emptied_lists_free_memory(client: &StoreClient) {
    for n in 0..20 {
        let requests = format!("RPUSH l{n} x\r\n").repeat(200_000);
        assert!(
            !any_oom(&client.exchange(requests, 200_000)),
            "in round {n}"
        );
        let requests = format!("RPOP l{n}\r\n").repeat(199_999);
        // Each answer has two lines.
        client.exchange(requests, 2 * 199_999);
    }
    assert_eq!(
        client.exchange("DBSIZE\r\nFLUSHALL\r\n".into(), 2),
        [":20", "+OK"]
    );
}

/// The largest answer of the largest store arrives, and larger requests and answers are refused.
fn assert_largest_answers_fit(client: &StoreClient) {
    let requests: String = (0..14).map(set_large).collect();
    assert!(!any_oom(&client.exchange(requests, 14)));
    let answer = client.exchange(
        encode(&["MGET", "k0", "k1", "k2", "k3", "k4", "k5", "k6"]),
        15,
    );
    assert_eq!(
        answer.iter().map(String::len).sum::<usize>(),
        2 + 7 * ((1 << 20) + 8)
    );
    let keys = vec!["k0"; 50_000];
    let answer = client.exchange(encode(&[&["MGET"], &keys[..]].concat()), 1);
    assert_eq!(answer, ["-ERR answer exceeds 8388608 bytes"]);
    let large = "x".repeat(1 << 20);
    let almost_as_large = "x".repeat((1 << 20) - 10);
    let request = encode(&["MSET", "k0", &large, "k1", &almost_as_large]);
    let answer = client.exchange(request, 1);
    assert!(is_oom(&answer[0]));
    assert_eq!(client.exchange("PING\r\n".into(), 1), ["+PONG"]);
}

#[test]
fn a_client_between_requests_does_not_delay_the_drain() {
    for mode in MODES {
        let mut server = Server::start(mode, &guest("resp"), &[]);
        let mut client = server.connect();
        client.send("PING\r\n");
        assert_eq!(client.read_line(), "+PONG");
        let mut busy = server.connect();
        busy.send("PING\r\nPI");
        assert_eq!(busy.read_line(), "+PONG");
        server.signal(rustix::process::Signal::TERM);
        assert_eq!(client.read_to_end(), "");
        busy.send("NG\r\n");
        assert_eq!(busy.read_to_end(), "+PONG\r\n");
        assert_eq!(server.wait().code(), Some(0), "{server:?}");
    }
}
