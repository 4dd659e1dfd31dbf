//! Outgoing connections of guests.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use crate::harness::{Client, MODES, Server, fixture, run, wasinetd};

/// A server that answers a line with `pong`. Its thread runs until the tests end.
struct Upstream {
    address: SocketAddr,
    /// Connections accepted so far.
    accepted: Arc<AtomicUsize>,
}

impl Upstream {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let accepted = Arc::new(AtomicUsize::new(0));
        let counter = accepted.clone();
        thread::spawn(move || {
            for mut client in listener.incoming().flatten() {
                counter.fetch_add(1, Ordering::Relaxed);
                let mut line = String::new();
                let _ = BufReader::new(&client).read_line(&mut line);
                let _ = client.write_all(b"pong\n");
            }
        });
        Self { address, accepted }
    }

    fn port(&self) -> u16 {
        self.address.port()
    }

    fn accepted(&self) -> usize {
        self.accepted.load(Ordering::Relaxed)
    }
}

fn serve(mode: &str, grants: &[String]) -> Server {
    let flags = grants.iter().flat_map(|grant| ["--allow-connect", grant]);
    Server::start(mode, &fixture("connects"), &flags.collect::<Vec<_>>())
}

/// Sends a line to the guest and returns its answer.
fn ask(client: &mut Client, line: &str) -> String {
    client.send(format!("{line}\n"));
    client.read_line()
}

const LIMITED: &str = "limit=\"allow-connect\"";

#[test]
fn a_guest_connects_to_granted_addresses() {
    let upstream = Upstream::start();
    let port = upstream.port();
    for mode in MODES {
        for grant in [
            format!("127.0.0.1:{port}"),
            format!("127.0.0.0/8:{port}"),
            format!("localhost:{port}/127.0.0.0/8"),
        ] {
            let server = serve(mode, std::slice::from_ref(&grant));
            let host = if grant.starts_with("localhost") {
                "localhost"
            } else {
                "127.0.0.1"
            };
            let mut client = server.connect();
            let answer = ask(&mut client, &format!("ask {host}:{port}"));
            assert_eq!(answer, "ok pong", "{grant}\n{server:?}");
            client.finish();
            assert_eq!(client.read_to_end(), "");
            let line = server.wait_for_log(&["connection ended", "outcome=ok"]);
            assert!(!line.contains("limit="), "{line}");
        }
    }
}

#[test]
fn a_guest_cannot_connect_to_other_addresses() {
    let (granted, other) = (Upstream::start(), Upstream::start());
    let port = other.port();
    for mode in MODES {
        let server = serve(mode, &[granted.address.to_string()]);
        for request in [
            format!("ask 127.0.0.1:{port}"),
            format!("ask 127.0.0.2:{}", granted.port()),
            format!("ask localhost:{}", granted.port()),
            format!("ask [::1]:{}", granted.port()),
            format!("ask 0.0.0.0:{}", granted.port()),
        ] {
            let mut client = server.connect();
            let answer = ask(&mut client, &request);
            assert!(answer.starts_with("error "), "{request}: {answer}");
        }
        server.wait_for_log(&["connection ended", LIMITED]);
    }
    assert_eq!((granted.accepted(), other.accepted()), (0, 0));
}

#[test]
fn a_guest_can_neither_listen_nor_send_datagrams() {
    let grants = ["127.0.0.0/8:1".into(), "0.0.0.0/0:2".into()];
    for mode in MODES {
        let server = serve(mode, &grants);
        for request in [
            "listen 0.0.0.0:0",
            "listen 127.0.0.1:0",
            "listen 127.0.0.1:1",
            "send 127.0.0.1:1",
        ] {
            let answer = ask(&mut server.connect(), request);
            assert!(answer.starts_with("error "), "{request}: {answer}");
        }
    }
}

#[test]
fn a_granted_name_does_not_reach_private_addresses_unless_allowed() {
    let upstream = Upstream::start();
    let port = upstream.port();
    for mode in MODES {
        for grant in [
            format!("localhost:{port}"),
            format!("localhost:{port}/10.0.0.0/8"),
        ] {
            let server = serve(mode, &[grant]);
            let answer = ask(&mut server.connect(), &format!("ask localhost:{port}"));
            assert!(answer.starts_with("error "), "{answer}");
            server.wait_for_log(&[
                "WARN",
                "localhost",
                "127.0.0.1",
                "allow-connect NAME:PORT/CIDR",
            ]);
            server.wait_for_log(&["connection ended", LIMITED]);
        }
    }
    assert_eq!(upstream.accepted(), 0);
}

#[test]
fn a_resolved_address_is_allowed_only_for_the_instance_that_resolved_it() {
    let upstream = Upstream::start();
    let port = upstream.port();
    for mode in MODES {
        let server = serve(mode, &[format!("localhost:{port}/127.0.0.1/32")]);
        let by_address = format!("ask 127.0.0.1:{port}");
        let mut first = server.connect();
        assert!(ask(&mut first, &by_address).starts_with("error "));
        assert_eq!(ask(&mut first, &format!("ask localhost:{port}")), "ok pong");
        assert_eq!(ask(&mut first, &by_address), "ok pong");
        let mut second = server.connect();
        assert!(ask(&mut second, &by_address).starts_with("error "));
    }
}

#[test]
fn outgoing_connections_count_as_open_files() {
    // 100 connections in sequence exceed the limit in total, but never at once.
    let upstream = Upstream::start();
    for mode in MODES {
        let server = serve(mode, &[upstream.address.to_string()]);
        let mut client = server.connect();
        for _ in 0..100 {
            let answer = ask(&mut client, &format!("ask {}", upstream.address));
            assert_eq!(answer, "ok pong");
        }
        let over_limit = format!("hold 33 {}", upstream.address);
        client.send(format!("{over_limit}\n"));
        assert!(client.read_all().1.is_err());
        server.wait_for_log(&["connection ended", "limit=\"max-open-files\""]);
        let within_limit = format!("hold 5 {}", upstream.address);
        assert_eq!(ask(&mut server.connect(), &within_limit), "ok done");
    }
}

#[test]
fn check_accepts_a_connecting_guest_only_with_its_grant() {
    let check = |flags: &[&str]| {
        let mut command = wasinetd();
        command.arg("check").args(flags);
        run(command.arg(fixture("connects")))
    };
    assert_eq!(check(&[]).status.code(), Some(65));
    let accepted = check(&["--allow-connect", "127.0.0.1:1"]);
    assert_eq!(accepted.status.code(), Some(0));
    let text = String::from_utf8_lossy(&accepted.stdout).into_owned();
    assert!(text.contains("wasi:sockets/tcp@0.2"), "{text}");
}
