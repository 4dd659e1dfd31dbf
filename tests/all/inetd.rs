//! The gallery of guests, but for `hello`: the small services that inetd is known for, and the scratch
//! store, with the clients that people use.

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, SystemTime};

use crate::harness::{MODES, PATIENCE, Server, guest, has_program, output};

/// OpenBSD's: others take other arguments.
fn has_nc() -> bool {
    let help = Command::new("nc").arg("-h").output();
    let is = help.is_ok_and(|help| String::from_utf8_lossy(&help.stderr).contains("OpenBSD"));
    if !is {
        eprintln!("left out: there is no nc of OpenBSD here; apt-get install netcat-openbsd");
    }
    is
}

/// What nc receives when it sends `input` and closes its side.
fn nc(server: &Server, input: &[u8]) -> String {
    let mut nc = Command::new("nc")
        .arg("-N")
        .arg(server.address().ip().to_string())
        .arg(server.address().port().to_string())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("nc is installed");
    let mut stdin = nc.stdin.take().expect("it is piped");
    let output = thread::scope(|scope| {
        scope.spawn(move || {
            // A server may end before it has all.
            let _ = stdin.write_all(input);
        });
        nc.wait_with_output().expect("it is our child")
    });
    assert!(output.status.success(), "{output:?}\n{server:?}");
    String::from_utf8(output.stdout).expect("it is text")
}

fn seconds() -> u64 {
    let now = SystemTime::UNIX_EPOCH.elapsed();
    now.expect("the clock is set").as_secs()
}

#[test]
fn daytime_tells_the_time() {
    if !has_nc() {
        return;
    }
    for mode in MODES {
        let server = Server::start(mode, &guest("daytime"), &[]);
        let before = seconds();
        // Whatever the client sends.
        for input in ["", "what time is it?\r\n"] {
            let line = nc(&server, input.as_bytes());
            let date = output(Command::new("date").args(["+%s", "--date", line.trim_end()]));
            let told = String::from_utf8_lossy(&date.stdout).trim().parse();
            let told: u64 = told.unwrap_or_else(|error| panic!("{error}: {date:?} of {line:?}"));
            assert!((before..=seconds()).contains(&told), "{line:?}");
            assert!(line.ends_with(" GMT\r\n"), "{line:?}");
        }
        server.wait_for_log(&["connection ended", "id=1 ", "bytes_out=31", "outcome=ok"]);
    }
}

#[test]
fn discard_takes_all_and_says_nothing() {
    if !has_nc() {
        return;
    }
    for mode in MODES {
        let server = Server::start(mode, &guest("discard"), &[]);
        assert_eq!(nc(&server, &vec![b'x'; 3 << 20]), "");
        server.wait_for_log(&["bytes_in=3145728", "bytes_out=0", "outcome=ok"]);
    }
}

#[test]
fn echo_sends_all_back() {
    if !has_nc() {
        return;
    }
    for mode in MODES {
        let server = Server::start(mode, &guest("echo"), &[]);
        let text = "What is received comes back.\n".repeat(50_000);
        assert!(nc(&server, text.as_bytes()) == text);
        server.wait_for_log(&["bytes_in=1450000", "bytes_out=1450000", "outcome=ok"]);
    }
}

/// The line of chargen with this number.
fn chargen_line(n: usize) -> String {
    (0..72)
        .map(|i| char::from(b' ' + ((n + i) % 95) as u8))
        .collect()
}

#[test]
fn chargen_sends_its_lines_until_the_client_is_gone() {
    if !has_nc() {
        return;
    }
    for mode in MODES {
        let server = Server::start(mode, &guest("chargen"), &[]);
        // Its standard input ends, and without -N it keeps its side open all the same.
        let mut nc = Command::new("nc")
            .arg(server.address().ip().to_string())
            .arg(server.address().port().to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("nc is installed");
        let stdout = BufReader::new(nc.stdout.take().expect("it is piped"));
        for (n, line) in stdout.split(b'\n').take(50_000).enumerate() {
            assert_eq!(line.unwrap(), (chargen_line(n) + "\r").as_bytes());
        }
        nc.kill().expect("it runs");
        nc.wait().expect("it is our child");
        let line = server.wait_for_log(&["connection ended", "id=1 "]);
        assert!(
            line.contains("outcome=client gone") || line.contains("outcome=ok"),
            "{line}"
        );
    }
}

#[test]
fn chargen_ends_in_order_with_the_clients_side() {
    for mode in MODES {
        let server = Server::start(mode, &guest("chargen"), &[]);
        let mut client = server.connect();
        assert_eq!(client.read(72), chargen_line(0));
        // What the client sends is no reason to do otherwise.
        client.send(vec![b'x'; 100_000]);
        client.finish();
        let rest = client.read_to_end();
        assert!(rest.starts_with(&format!("\r\n{}\r\n", chargen_line(1))));
        server.wait_for_log(&["id=1 ", "bytes_in=100000", "outcome=ok"]);
        // Nor is it one that it does not read.
        let client = server.connect();
        client.finish();
        server.wait_for_log(&["id=2 ", "outcome=ok"]);
    }
}

#[test]
fn chargen_waits_for_a_client_that_takes_nothing() {
    for mode in MODES {
        let server = Server::start(mode, &guest("chargen"), &["--write-timeout", "2s"]);
        let before = server.cpu_time();
        let client = server.connect();
        server.wait_for_log(&["id=1 ", "limit=\"write-timeout\""]);
        let used = server.cpu_time() - before;
        assert!(used < Duration::from_secs(1), "{used:?}");
        drop(client);
    }
}

#[test]
fn qotd_tells_one_of_many() {
    if !has_nc() {
        return;
    }
    for mode in MODES {
        let directory = tempfile::tempdir().unwrap();
        let granted = format!("{}::/quotes", directory.path().display());
        // Without a grant, with one of a directory without quotes, and with some.
        let ours = "One by us.\n  -- Anonymous\n%\nAnother.\n";
        for arguments in [&[][..], &["--dir", &granted], &["--dir", &granted]] {
            let server = Server::start(mode, &guest("qotd"), arguments);
            let mut told = std::collections::BTreeSet::new();
            // One in a million would be the same all the time.
            for _ in 0..20 {
                told.insert(server.connect().read_to_end());
            }
            told.insert(nc(&server, b""));
            assert!(told.len() > 1, "{told:?}");
            for quote in &told {
                assert!(quote.len() < 512 && quote.ends_with("\r\n"), "{quote:?}");
            }
            if directory.path().join("quotes.txt").exists() {
                let expected = ["Another.\r\n", "One by us.\r\n  -- Anonymous\r\n"];
                assert!(told.iter().eq(expected), "{told:?}");
            } else if !arguments.is_empty() {
                std::fs::write(directory.path().join("quotes.txt"), ours).unwrap();
            }
        }
        let file = directory.path().join("quotes.txt");
        std::fs::write(file, "x".repeat(600)).unwrap();
        let server = Server::start(mode, &guest("qotd"), &["--dir", &granted]);
        server.connect().read_all().1.unwrap_err();
        server.wait_for_log(&["outcome=guest error: /quotes/quotes.txt has no quote"]);
    }
}

#[test]
fn ident_tells_nobody() {
    if !has_nc() {
        return;
    }
    for mode in MODES {
        let server = Server::start(mode, &guest("ident"), &[]);
        assert_eq!(
            nc(&server, b"6193, 23\r\n 1 ,\t65535 \n6193, 0\r\nwho?\r\n"),
            "6193, 23 : ERROR : HIDDEN-USER\r\n1, 65535 : ERROR : HIDDEN-USER\r\n\
             6193, 0 : ERROR : INVALID-PORT\r\n0, 0 : ERROR : INVALID-PORT\r\n"
        );
        server.wait_for_log(&["connection ended", "id=1 ", "outcome=ok"]);
    }
}

const HIDDEN: &str = "6193, 23 : ERROR : HIDDEN-USER";
const INVALID: &str = "0, 0 : ERROR : INVALID-PORT";

#[test]
fn ident_takes_a_request_in_any_pieces() {
    for mode in MODES {
        let server = Server::start(mode, &guest("ident"), &[]);
        let request = b"6193 , 23\r\n";
        let mut client = server.connect();
        for split in 0..request.len() {
            client.send(&request[..split]);
            client.send(&request[split..]);
            assert_eq!(client.read_line(), HIDDEN, "split at {split}");
        }
        for byte in request {
            client.send([*byte]);
        }
        assert_eq!(client.read_line(), HIDDEN);
        client.finish();
        assert_eq!(client.read_to_end(), "");
        server.wait_for_log(&["connection ended", "outcome=ok"]);
    }
}

#[test]
fn ident_answers_nonsense_and_ends_with_a_line_that_is_too_long() {
    for mode in MODES {
        let server = Server::start(mode, &guest("ident"), &[]);
        let mut client = server.connect();
        let binary: Vec<u8> = (0..=255).filter(|byte| *byte != b'\n').collect();
        for nonsense in [&binary[..], b"", b"\0\0", b"-1, 23", b"1,2,3"] {
            client.send([nonsense, b"\r\n"].concat());
            assert_eq!(client.read_line(), INVALID, "for {nonsense:?}");
        }
        let longest = format!("6193, {}23\r\n", " ".repeat(992));
        client.send(&longest);
        assert_eq!(client.read_line(), HIDDEN);
        client.send(longest.replace(',', " ,"));
        assert_eq!(client.read_line(), INVALID);
        assert_eq!(client.read_to_end(), "");
        server.wait_for_log(&["connection ended", "id=1 ", "outcome=ok"]);
        // One that has no end does not take memory until it has one.
        let mut client = server.connect();
        client.send(vec![b'1'; 200_000]);
        assert_eq!(client.read_line(), INVALID);
        server.wait_for_log(&["connection ended", "id=2 ", "outcome=ok"]);
    }
}

/// What redis-cli prints when it is given these lines.
fn redis_cli(server: &Server, arguments: &[&str], lines: &str) -> String {
    let mut cli = Command::new("redis-cli")
        .arg("-p")
        .arg(server.address().port().to_string())
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("redis-cli is installed");
    let mut stdin = cli.stdin.take().expect("it is piped");
    stdin.write_all(lines.as_bytes()).expect("it reads");
    drop(stdin);
    let output = cli.wait_with_output().expect("it is our child");
    assert!(output.status.success(), "{output:?}\n{server:?}");
    String::from_utf8(output.stdout).expect("it is text")
}

#[test]
fn redis_cli_has_a_store_for_each_connection() {
    if !has_program("redis-benchmark", "redis-tools") {
        return;
    }
    for mode in MODES {
        let server = Server::start(mode, &guest("resp"), &[]);
        let said = redis_cli(
            &server,
            &["--no-raw"],
            "SET greeting \"hello, world\" EX 100\nAPPEND greeting !\nGET greeting\nTTL greeting\n\
             INCR n\nRPUSH l a b c\nLRANGE l 0 -1\nHSET h f 1\nHGETALL h\nLPUSH greeting x\nNOSUCH\n\
             GET greeting x\nSET short 1 PX 1\nCONFIG GET save\nDBSIZE\n",
        );
        let before_the_last = said.trim_end().rsplit_once('\n').expect("there are many").0;
        assert_eq!(
            before_the_last,
            "OK\n(integer) 13\n\"hello, world!\"\n(integer) 100\n(integer) 1\n(integer) 3\n\
             1) \"a\"\n2) \"b\"\n3) \"c\"\n(integer) 1\n1) \"f\"\n2) \"1\"\n\
             (error) WRONGTYPE Operation against a key holding the wrong kind of value\n\
             (error) ERR unknown command 'NOSUCH', with args beginning with: \n\
             (error) ERR wrong number of arguments for 'get' command\nOK\n1) \"save\"\n2) \"\""
        );
        // Of the next connection it is another store.
        assert_eq!(redis_cli(&server, &["GET", "greeting"], ""), "\n");
        assert_eq!(redis_cli(&server, &["-2", "DBSIZE"], ""), "0\n");
        let info = redis_cli(&server, &["INFO"], "");
        assert!(info.contains("redis_version:7"), "{info}");
        server.wait_for_log(&["connection ended", "id=1 ", "outcome=ok"]);
    }
}

#[test]
fn a_key_expires_by_the_clock() {
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
            assert!(seconds() < before + 30, "it never expires");
        }
        // Not before its time; these are whole seconds.
        assert!(seconds() > before);
    }
}

#[test]
fn redis_benchmark_runs_through() {
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
fn a_request_may_come_in_any_pieces() {
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
fn all_of_a_long_pipeline_may_be_sent_before_any_answer_is_read() {
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
fn what_is_not_the_protocol_is_answered_and_ends_in_order() {
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
        // Less than none is no request, and no error.
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

/// A request of these words.
fn resp(words: &[&str]) -> String {
    let mut request = format!("*{}\r\n", words.len());
    for word in words {
        request += &format!("${}\r\n{word}\r\n", word.len());
    }
    request
}

#[test]
fn who_fills_the_store_reads_of_an_error_and_goes_on() {
    let large = "x".repeat(1 << 20);
    let half = "x".repeat((1 << 19) + 1);
    for mode in MODES {
        let server = Server::start(mode, &guest("resp"), &[]);
        let client = server.connect();
        client.0.set_read_timeout(Some(4 * PATIENCE)).unwrap();
        let all = |requests: String, answers: usize| -> Vec<String> {
            let mut writing = client.0.try_clone().unwrap();
            thread::scope(|scope| {
                // A server that ends is found out by reading.
                scope.spawn(move || _ = writing.write_all(requests.as_bytes()));
                let lines = BufReader::new(&client.0).lines().take(answers);
                let lines: Result<_, _> = lines.collect();
                lines.unwrap_or_else(|error| panic!("{error}\n{server:?}"))
            })
        };
        let is_oom = |answer: &String| answer.starts_with("-OOM");
        // What is large, what grows by doubling, what has many parts, and what is mostly tables.
        let many = |command: &str, key: &dyn Fn(usize) -> String| -> String {
            (0..300_000)
                .map(|n| format!("{command} {}\r\n", key(n)))
                .collect()
        };
        let string = |n| resp(&["SET", &format!("k{n}"), &large]);
        let doubled = |n| {
            let key = format!("k{n}");
            let (half, one) = (resp(&["APPEND", &key, &half]), resp(&["APPEND", &key, "x"]));
            half + &one
        };
        for (name, requests, answers) in [
            ("strings", (0..20).map(string).collect::<String>(), 20),
            ("doubled", (0..20).map(doubled).collect(), 40),
            ("keys", many("SET", &|n| format!("{n} x")), 300_000),
            ("list", many("RPUSH l", &|_| "x".into()), 300_000),
            ("set", many("SADD s", &|n| n.to_string()), 300_000),
            ("hash", many("HSET h", &|n| format!("{n} x")), 300_000),
        ] {
            let answers = all(requests, answers);
            assert!(answers.iter().any(is_oom), "{name} take no end");
            assert!(!is_oom(&answers[0]), "{name} find no room");
            assert_eq!(all("FLUSHALL\r\nPING\r\n".into(), 2), ["+OK", "+PONG"]);
        }
        // Lists that were large and have one element left have given back the rest.
        for n in 0..20 {
            let requests = format!("RPUSH l{n} x\r\n").repeat(200_000);
            assert!(!all(requests, 200_000).iter().any(is_oom), "in round {n}");
            let pop = format!("LPOP l{n}\r\n")
                .repeat(199_999)
                .replace("LPOP", "RPOP");
            // Each is answered by two lines.
            all(pop, 2 * 199_999);
        }
        assert_eq!(all("DBSIZE\r\nFLUSHALL\r\n".into(), 2), [":20", "+OK"]);
        // The largest store, with the largest answer, behind the largest request.
        let requests: String = (0..14).map(string).collect();
        assert!(!all(requests, 14).iter().any(is_oom));
        let answer = all(
            resp(&["MGET", "k0", "k1", "k2", "k3", "k4", "k5", "k6"]),
            15,
        );
        assert_eq!(
            answer.iter().map(String::len).sum::<usize>(),
            2 + 7 * ((1 << 20) + 8)
        );
        let keys = vec!["k0"; 50_000];
        let answer = all(resp(&[&["MGET"], &keys[..]].concat()), 1);
        assert_eq!(answer, ["-ERR answer exceeds 8388608 bytes"]);
        let answer = all(
            resp(&["MSET", "k0", &large, "k1", &"x".repeat((1 << 20) - 10)]),
            1,
        );
        assert!(is_oom(&answer[0]));
        assert_eq!(all("PING\r\n".into(), 1), ["+PONG"]);
        drop(client);
        server.wait_for_log(&["connection ended", "outcome=ok"]);
    }
}

#[test]
fn a_client_that_is_between_two_requests_holds_up_no_drain() {
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
