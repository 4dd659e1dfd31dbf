//! The small services that inetd had in itself, and the scratch store, with the clients that people use.

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, SystemTime};

use crate::harness::{MODES, Server, guest, output};

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
    for mode in MODES {
        let server = Server::start(mode, &guest("discard"), &[]);
        assert_eq!(nc(&server, &vec![b'x'; 3 << 20]), "");
        server.wait_for_log(&["bytes_in=3145728", "bytes_out=0", "outcome=ok"]);
    }
}

#[test]
fn echo_sends_all_back() {
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
        let before = server.processor_time();
        let client = server.connect();
        server.wait_for_log(&["id=1 ", "limit=\"write-timeout\""]);
        let used = server.processor_time() - before;
        assert!(used < Duration::from_secs(1), "{used:?}");
        drop(client);
    }
}

#[test]
fn qotd_tells_one_of_many() {
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
