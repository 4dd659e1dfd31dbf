//! The services that inetd is known for, tested with nc and raw clients.

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use crate::harness::{MODES, Server, guest, output};

use super::clock::seconds;

/// Whether OpenBSD's nc is installed. Other variants take other arguments.
fn has_nc() -> bool {
    let help = Command::new("nc").arg("-h").output();
    let installed =
        help.is_ok_and(|help| String::from_utf8_lossy(&help.stderr).contains("OpenBSD"));
    if !installed {
        eprintln!("skipped: OpenBSD nc is not installed; apt-get install netcat-openbsd");
    }
    installed
}

/// Sends `input` with nc, closes the sending side, and returns the bytes that nc received.
fn nc(server: &Server, input: &[u8]) -> String {
    let mut nc = Command::new("nc")
        .arg("-N")
        .arg(server.address().ip().to_string())
        .arg(server.address().port().to_string())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("nc is installed");
    let mut stdin = nc.stdin.take().expect("stdin is piped");
    let output = thread::scope(|scope| {
        scope.spawn(move || {
            // The server may close the connection before it has read everything.
            let _ = stdin.write_all(input);
        });
        nc.wait_with_output().expect("nc is our child")
    });
    assert!(output.status.success(), "{output:?}\n{server:?}");
    String::from_utf8(output.stdout).expect("the output is UTF-8")
}

#[test]
fn daytime_sends_the_current_time() {
    if !has_nc() {
        return;
    }
    for mode in MODES {
        let server = Server::start(mode, &guest("daytime"), &[]);
        let before = seconds();
        // The answer does not depend on the request.
        for input in ["", "what time is it?\r\n"] {
            let line = nc(&server, input.as_bytes());
            let date = output(Command::new("date").args(["+%s", "--date", line.trim_end()]));
            let time = String::from_utf8_lossy(&date.stdout).trim().parse();
            let time: u64 = time.unwrap_or_else(|error| panic!("{error}: {date:?} of {line:?}"));
            assert!((before..=seconds()).contains(&time), "{line:?}");
            assert!(line.ends_with(" GMT\r\n"), "{line:?}");
        }
        server.wait_for_log(&["connection ended", "id=1 ", "bytes_out=31", "outcome=ok"]);
    }
}

#[test]
fn discard_reads_everything_and_sends_nothing() {
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
fn echo_returns_everything_it_receives() {
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

/// Line `n` of chargen's output.
fn chargen_line(n: usize) -> String {
    (0..72)
        .map(|i| char::from(b' ' + ((n + i) % 95) as u8))
        .collect()
}

#[test]
fn chargen_sends_lines_until_the_client_disconnects() {
    if !has_nc() {
        return;
    }
    for mode in MODES {
        let server = Server::start(mode, &guest("chargen"), &[]);
        // Without -N, nc keeps its sending side open when standard input ends.
        let mut nc = Command::new("nc")
            .arg(server.address().ip().to_string())
            .arg(server.address().port().to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("nc is installed");
        let stdout = BufReader::new(nc.stdout.take().expect("stdout is piped"));
        for (n, line) in stdout.split(b'\n').take(50_000).enumerate() {
            assert_eq!(line.unwrap(), (chargen_line(n) + "\r").as_bytes());
        }
        nc.kill().expect("nc is running");
        nc.wait().expect("nc is our child");
        let line = server.wait_for_log(&["connection ended", "id=1 "]);
        assert!(
            line.contains("outcome=client gone") || line.contains("outcome=ok"),
            "{line}"
        );
    }
}

#[test]
fn chargen_ends_its_stream_after_the_client_finishes() {
    for mode in MODES {
        let server = Server::start(mode, &guest("chargen"), &[]);
        let mut client = server.connect();
        assert_eq!(client.read(72), chargen_line(0));
        // Input from the client changes nothing.
        client.send(vec![b'x'; 100_000]);
        client.finish();
        let rest = client.read_to_end();
        assert!(rest.starts_with(&format!("\r\n{}\r\n", chargen_line(1))));
        server.wait_for_log(&["id=1 ", "bytes_in=100000", "outcome=ok"]);
        // A client that does not read changes nothing either.
        let client = server.connect();
        client.finish();
        server.wait_for_log(&["id=2 ", "outcome=ok"]);
    }
}

#[test]
fn chargen_uses_little_cpu_while_a_client_does_not_read() {
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
fn qotd_sends_one_of_many_quotes() {
    if !has_nc() {
        return;
    }
    for mode in MODES {
        let directory = tempfile::tempdir().unwrap();
        let granted = format!("{}::/quotes", directory.path().display());
        // Without a grant, with an empty directory granted, and with a directory that has quotes.
        let quotes = "One by us.\n  -- Anonymous\n%\nAnother.\n";
        for arguments in [&[][..], &["--dir", &granted], &["--dir", &granted]] {
            let server = Server::start(mode, &guest("qotd"), arguments);
            let mut seen = std::collections::BTreeSet::new();
            // 21 equal quotes in a row would be one chance in a million.
            for _ in 0..20 {
                seen.insert(server.connect().read_to_end());
            }
            seen.insert(nc(&server, b""));
            assert!(seen.len() > 1, "{seen:?}");
            for quote in &seen {
                assert!(quote.len() < 512 && quote.ends_with("\r\n"), "{quote:?}");
            }
            if directory.path().join("quotes.txt").exists() {
                let expected = ["Another.\r\n", "One by us.\r\n  -- Anonymous\r\n"];
                assert!(seen.iter().eq(expected), "{seen:?}");
            } else if !arguments.is_empty() {
                std::fs::write(directory.path().join("quotes.txt"), quotes).unwrap();
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
fn ident_answers_hidden_user() {
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
fn ident_accepts_a_request_split_anywhere() {
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
fn ident_answers_malformed_lines_and_closes_after_an_overlong_one() {
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
        // A line without an end is refused before it takes memory.
        let mut client = server.connect();
        client.send(vec![b'1'; 200_000]);
        assert_eq!(client.read_line(), INVALID);
        server.wait_for_log(&["connection ended", "id=2 ", "outcome=ok"]);
    }
}
