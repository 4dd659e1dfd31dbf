//! Each limit of a connection: obeyed and violated.

use std::io::{ErrorKind, Read, Write};
use std::thread;
use std::time::{Duration, Instant};

use socket2::{SockFilter, SockRef};

use crate::harness::{Client, MODES, Server, fixture, guest};

/// The time limit. Clients that obey stay far below.
const SHORT: &str = "1s";

/// How long a slow client waits between two bytes.
const PAUSE: Duration = Duration::from_millis(200);

/// Pauses that together last more than twice the limit.
const PAUSES: u32 = 11;

/// The outcome in the log when `limit` has ended a connection.
fn ended_by(limit: &str) -> String {
    format!("outcome=limit: {limit} limit=\"{limit}\"")
}

/// Waits until the server resets the connection.
fn wait_for_reset(client: &mut Client) {
    let (_, end) = client.read_all();
    let error = end.expect_err("the connection ends in order");
    assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}");
}

/// Exchanges single bytes with an echo, with pauses.
fn chat(client: &mut Client) {
    for _ in 0..PAUSES {
        client.send("x");
        assert_eq!(client.read(1), "x");
        // The pause itself is under test.
        thread::sleep(PAUSE);
    }
}

#[test]
fn idle_timeout_ends_idle_but_not_slow_connections() {
    for mode in MODES {
        let server = Server::start(mode, &guest("echo"), &["--idle-timeout", SHORT]);
        let mut idle = server.connect();
        idle.send("x");
        assert_eq!(idle.read(1), "x");
        let mut slow = server.connect();
        chat(&mut slow);
        wait_for_reset(&mut idle);
        server.wait_for_log(&["id=1 ", &ended_by("idle-timeout")]);
        slow.finish();
        assert_eq!(slow.read_to_end(), "");
        server.wait_for_log(&["id=2 ", "outcome=ok"]);
    }
}

#[test]
fn idle_timeout_ends_a_sleeping_guest() {
    for mode in MODES {
        let server = Server::start(mode, &fixture("sleeps_forever"), &["--idle-timeout", SHORT]);
        wait_for_reset(&mut server.connect());
        server.wait_for_log(&["id=1 ", &ended_by("idle-timeout")]);
    }
}

#[test]
fn keepalive_detects_a_vanished_client() {
    for mode in MODES {
        let limits = ["--keepalive", SHORT, "--idle-timeout", "off"];
        let server = Server::start(mode, &guest("echo"), &limits);
        let (mut vanished, mut alive) = (server.connect(), server.connect());
        for client in [&mut vanished, &mut alive] {
            client.send("x");
            assert_eq!(client.read(1), "x");
        }
        // The filter drops all packets, so keepalive probes get no answer.
        SockRef::from(&vanished.0)
            .attach_filter(&[SockFilter::new(0x06, 0, 0, 0)])
            .unwrap();
        let peer = vanished.peer_field();
        server.wait_for_log(&[&peer, "outcome=client gone", "limit=\"keepalive\""]);
        // The other client was as silent, but its kernel answered the probes.
        alive.send("y");
        assert_eq!(alive.read(1), "y");
    }
}

#[test]
fn first_byte_timeout_resets_silent_clients() {
    for mode in MODES {
        let server = Server::start(mode, &guest("echo"), &["--first-byte-timeout", SHORT]);
        let mut silent = server.connect();
        let mut active = server.connect();
        active.send("x");
        assert_eq!(active.read(1), "x");
        wait_for_reset(&mut silent);
        server.wait_for_log(&["bytes_in=0 ", &ended_by("first-byte-timeout")]);
        // After the first byte the limit does not apply.
        thread::sleep(2 * PAUSE);
        active.send("y");
        assert_eq!(active.read(1), "y");
    }
}

#[test]
fn first_byte_timeout_spares_guests_that_send_first() {
    for mode in MODES {
        // The guest never reads, and sends for longer than the limit.
        let server = Server::start(mode, &fixture("flood"), &["--first-byte-timeout", "200ms"]);
        let mut client = server.connect();
        let (start, mut buffer) = (Instant::now(), [0; 4096]);
        while start.elapsed() < Duration::from_secs(1) {
            assert!(client.0.read(&mut buffer).unwrap() > 0);
        }
    }
}

#[test]
fn write_timeout_resets_clients_that_do_not_read() {
    for mode in MODES {
        let server = Server::start(mode, &fixture("flood"), &["--write-timeout", SHORT]);
        let mut reader = server.connect();
        reader.0.read_exact(&mut [0]).unwrap();
        let deaf = server.connect();
        let line = thread::scope(|scope| {
            let line = scope.spawn(|| server.wait_for_log(&[&ended_by("write-timeout")]));
            let mut buffer = vec![0; 1 << 16];
            while !line.is_finished() {
                reader.0.read_exact(&mut buffer).unwrap();
            }
            line.join().unwrap()
        });
        assert!(line.contains("id=2 "), "{line}");
        reader.0.read_exact(&mut [0; 100_000]).unwrap();
        drop(deaf);
    }
}

#[test]
fn write_timeout_spares_clients_that_read_slowly() {
    for mode in MODES {
        let server = Server::start(mode, &fixture("flood"), &["--write-timeout", SHORT]);
        let mut client = server.connect();
        let mut buffer = vec![0; 128 << 10];
        for _ in 0..PAUSES {
            client.0.read_exact(&mut buffer).unwrap();
            // A full socket buffer becomes writable again when a good part of it is empty.
            thread::sleep(PAUSE);
        }
        assert_eq!(server.log_lines("limit=").len(), 0, "{server:?}");
    }
}

#[test]
fn max_lifetime_ends_connections() {
    for mode in MODES {
        let server = Server::start(mode, &guest("echo"), &["--max-lifetime", SHORT]);
        // A short connection is not affected.
        let mut short = server.connect();
        short.send("x");
        short.finish();
        assert_eq!(short.read_to_end(), "x");
        server.wait_for_log(&["id=1 ", "outcome=ok"]);
        let mut client = server.connect();
        let start = Instant::now();
        let mut echo = || {
            client.0.write_all(b"x")?;
            client.0.read_exact(&mut [0])
        };
        let end = loop {
            match echo() {
                Ok(()) => thread::sleep(PAUSE / 10),
                Err(error) => break error,
            }
        };
        assert_eq!(end.kind(), ErrorKind::ConnectionReset);
        assert!(start.elapsed() > Duration::from_millis(900));
        server.wait_for_log(&["id=2 ", &ended_by("max-lifetime")]);
    }
}

#[test]
fn max_bytes_in_limits_received_bytes() {
    for mode in MODES {
        let server = Server::start(mode, &guest("echo"), &["--max-bytes-in", "10KiB"]);
        let mut obeying = server.connect();
        obeying.send(vec![b'x'; 10 << 10]);
        obeying.finish();
        assert_eq!(obeying.read_to_end().len(), 10 << 10);
        server.wait_for_log(&["id=1 ", "bytes_in=10240", "outcome=ok"]);
        let mut violating = server.connect();
        violating.send(vec![b'x'; (10 << 10) + 1]);
        wait_for_reset(&mut violating);
        server.wait_for_log(&["id=2 ", "bytes_in=10240", &ended_by("max-bytes-in")]);
    }
}

#[test]
fn max_bytes_out_limits_sent_bytes() {
    for mode in MODES {
        let server = Server::start(mode, &guest("echo"), &["--max-bytes-out", "10KiB"]);
        let mut obeying = server.connect();
        obeying.send(vec![b'x'; 10 << 10]);
        obeying.finish();
        assert_eq!(obeying.read_to_end().len(), 10 << 10);
        server.wait_for_log(&["id=1 ", "bytes_out=10240", "outcome=ok"]);
        let mut violating = server.connect();
        violating.send(vec![b'x'; (10 << 10) + 1]);
        wait_for_reset(&mut violating);
        server.wait_for_log(&["id=2 ", "bytes_out=10240", &ended_by("max-bytes-out")]);
    }
}

#[test]
fn connection_limits_can_be_off() {
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
