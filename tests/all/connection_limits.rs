//! Each limit of a connection, obeyed and violated.

use std::io::{ErrorKind, Read, Write};
use std::thread;
use std::time::{Duration, Instant};

use socket2::{SockFilter, SockRef};

use crate::harness::{Client, MODES, Server, fixture, guest};

/// What a limit is in these tests. The time of a client that obeys is far from it.
const SHORT: &str = "1s";

/// A client says so little at once.
const PAUSE: Duration = Duration::from_millis(200);

/// More than two times the limit, in pauses.
const PAUSES: u32 = 11;

fn limited(limit: &str) -> String {
    format!("outcome=limit: {limit} limit=\"{limit}\"")
}

/// Waits until the server resets the connection.
fn reset(client: &mut Client) -> Duration {
    let start = Instant::now();
    let (_, end) = client.read_all();
    let error = end.expect_err("the connection ends in order");
    assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}");
    start.elapsed()
}

/// Says a byte, and hears it, again and again.
fn chat(client: &mut Client) {
    for _ in 0..PAUSES {
        client.send("x");
        assert_eq!(client.read(1), "x");
        // What is tested is what happens while nothing does.
        thread::sleep(PAUSE);
    }
}

#[test]
fn an_idle_connection_is_ended_and_a_slow_one_is_not() {
    for mode in MODES {
        let server = Server::start(mode, &guest("echo"), &["--idle-timeout", SHORT]);
        let mut idle = server.connect();
        idle.send("x");
        assert_eq!(idle.read(1), "x");
        let mut slow = server.connect();
        chat(&mut slow);
        reset(&mut idle);
        server.wait_for_log(&["id=1 ", &limited("idle-timeout")]);
        slow.finish();
        assert_eq!(slow.read_to_end(), "");
        server.wait_for_log(&["id=2 ", "outcome=ok"]);
    }
}

#[test]
fn a_guest_that_sleeps_for_a_year_is_ended() {
    for mode in MODES {
        let server = Server::start(mode, &fixture("sleeps_forever"), &["--idle-timeout", SHORT]);
        reset(&mut server.connect());
        server.wait_for_log(&["id=1 ", &limited("idle-timeout")]);
    }
}

#[test]
fn a_client_that_is_gone_without_a_word_is_noticed() {
    for mode in MODES {
        let limits = ["--keepalive", SHORT, "--idle-timeout", "off"];
        let server = Server::start(mode, &guest("echo"), &limits);
        let (mut gone, mut there) = (server.connect(), server.connect());
        for client in [&mut gone, &mut there] {
            client.send("x");
            assert_eq!(client.read(1), "x");
        }
        // Nothing that comes reaches it any more, so that nothing answers: as if its system was gone.
        SockRef::from(&gone.0)
            .attach_filter(&[SockFilter::new(0x06, 0, 0, 0)])
            .unwrap();
        let peer = format!("peer={} ", gone.0.local_addr().unwrap());
        server.wait_for_log(&[&peer, "outcome=client gone", "limit=\"keepalive\""]);
        // As silent, and its system answers.
        there.send("y");
        assert_eq!(there.read(1), "y");
    }
}

#[test]
fn who_connects_and_says_nothing_is_not_waited_for() {
    for mode in MODES {
        let server = Server::start(mode, &guest("echo"), &["--first-byte-timeout", SHORT]);
        let mut silent = server.connect();
        let mut speaks = server.connect();
        speaks.send("x");
        assert_eq!(speaks.read(1), "x");
        reset(&mut silent);
        server.wait_for_log(&["bytes_in=0 ", &limited("first-byte-timeout")]);
        // It was for the first byte only.
        thread::sleep(2 * PAUSE);
        speaks.send("y");
        assert_eq!(speaks.read(1), "y");
    }
}

#[test]
fn a_guest_that_speaks_first_is_not_cut_short() {
    for mode in MODES {
        // It never reads, and writes for longer than that.
        let server = Server::start(mode, &fixture("flood"), &["--first-byte-timeout", "200ms"]);
        let mut client = server.connect();
        let (start, mut buffer) = (Instant::now(), [0; 4096]);
        while start.elapsed() < Duration::from_secs(1) {
            assert!(client.0.read(&mut buffer).unwrap() > 0);
        }
    }
}

#[test]
fn who_does_not_read_is_not_waited_for() {
    for mode in MODES {
        let server = Server::start(mode, &fixture("flood"), &["--write-timeout", SHORT]);
        let mut reads = server.connect();
        reads.0.read_exact(&mut [0]).unwrap();
        let deaf = server.connect();
        let line = thread::scope(|scope| {
            let line = scope.spawn(|| server.wait_for_log(&[&limited("write-timeout")]));
            let mut buffer = vec![0; 1 << 16];
            while !line.is_finished() {
                reads.0.read_exact(&mut buffer).unwrap();
            }
            line.join().unwrap()
        });
        assert!(line.contains("id=2 "), "{line}");
        reads.0.read_exact(&mut [0; 100_000]).unwrap();
        drop(deaf);
    }
}

#[test]
fn who_reads_slowly_is_waited_for() {
    for mode in MODES {
        let server = Server::start(mode, &fixture("flood"), &["--write-timeout", SHORT]);
        let mut client = server.connect();
        let mut buffer = vec![0; 128 << 10];
        for _ in 0..PAUSES {
            client.0.read_exact(&mut buffer).unwrap();
            // The kernel takes some megabytes more only when a good part of those it has are gone.
            thread::sleep(PAUSE);
        }
        assert_eq!(server.log_lines("limit=").len(), 0, "{server:?}");
    }
}

#[test]
fn a_connection_lives_so_long() {
    for mode in MODES {
        let server = Server::start(mode, &guest("echo"), &["--max-lifetime", SHORT]);
        // One that is done earlier is not concerned.
        let mut short = server.connect();
        short.send("x");
        short.finish();
        assert_eq!(short.read_to_end(), "x");
        server.wait_for_log(&["id=1 ", "outcome=ok"]);
        let mut client = server.connect();
        let start = Instant::now();
        let mut say = || {
            client.0.write_all(b"x")?;
            client.0.read_exact(&mut [0])
        };
        let end = loop {
            match say() {
                Ok(()) => thread::sleep(PAUSE / 10),
                Err(error) => break error,
            }
        };
        assert_eq!(end.kind(), ErrorKind::ConnectionReset);
        assert!(start.elapsed() > Duration::from_millis(900));
        server.wait_for_log(&["id=2 ", &limited("max-lifetime")]);
    }
}

#[test]
fn so_much_is_received() {
    for mode in MODES {
        let server = Server::start(mode, &guest("echo"), &["--max-bytes-in", "10KiB"]);
        let mut obeys = server.connect();
        obeys.send(vec![b'x'; 10 << 10]);
        obeys.finish();
        assert_eq!(obeys.read_to_end().len(), 10 << 10);
        server.wait_for_log(&["id=1 ", "bytes_in=10240", "outcome=ok"]);
        let mut violates = server.connect();
        violates.send(vec![b'x'; (10 << 10) + 1]);
        reset(&mut violates);
        server.wait_for_log(&["id=2 ", "bytes_in=10240", &limited("max-bytes-in")]);
    }
}

#[test]
fn so_much_is_sent() {
    for mode in MODES {
        let server = Server::start(mode, &guest("echo"), &["--max-bytes-out", "10KiB"]);
        let mut obeys = server.connect();
        obeys.send(vec![b'x'; 10 << 10]);
        obeys.finish();
        assert_eq!(obeys.read_to_end().len(), 10 << 10);
        server.wait_for_log(&["id=1 ", "bytes_out=10240", "outcome=ok"]);
        let mut violates = server.connect();
        violates.send(vec![b'x'; (10 << 10) + 1]);
        reset(&mut violates);
        server.wait_for_log(&["id=2 ", "bytes_out=10240", &limited("max-bytes-out")]);
    }
}

#[test]
fn limits_can_be_off() {
    let off: Vec<_> = [
        "--idle-timeout",
        "--first-byte-timeout",
        "--write-timeout",
        "--max-lifetime",
        "--max-bytes-in",
        "--max-bytes-out",
    ]
    .into_iter()
    .flat_map(|flag| [flag, "off"])
    .collect();
    let server = Server::start("concurrent", &guest("echo"), &off);
    let mut client = server.connect();
    client.send("x");
    assert_eq!(client.read(1), "x");
}
