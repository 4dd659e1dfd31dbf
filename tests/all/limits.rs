//! Connection and file limits, obeyed and exceeded.

use std::io::{ErrorKind, Read};
use std::time::Duration;

use rustix::process::{Resource, Rlimit, prlimit};

use crate::harness::{MODES, Server, guest};

#[test]
fn connections_up_to_the_limit_are_served_at_once() {
    for mode in MODES {
        let server = Server::start(mode, &guest("echo"), &["--max-connections", "3"]);
        let mut clients: Vec<_> = (0..3).map(|_| server.connect()).collect();
        for client in &mut clients {
            client.send("x");
            assert_eq!(client.read(1), "x");
        }
    }
}

#[test]
fn a_connection_over_the_limit_waits_in_the_backlog() {
    for mode in MODES {
        let server = Server::start(mode, &guest("echo"), &["--max-connections", "2"]);
        let mut first = server.connect();
        let mut second = server.connect();
        for client in [&mut first, &mut second] {
            client.send("x");
            assert_eq!(client.read(1), "x");
        }
        let before = server.open_sockets();
        let mut third = server.connect();
        third.send("y");
        third
            .0
            .set_read_timeout(Some(Duration::from_millis(300)))
            .unwrap();
        let early = third.0.read(&mut [0]).map_err(|error| error.kind());
        assert!(
            matches!(early, Err(ErrorKind::WouldBlock | ErrorKind::TimedOut)),
            "{early:?}"
        );
        assert_eq!(
            server.open_sockets(),
            before,
            "the third connection was accepted"
        );
        drop(first);
        third
            .0
            .set_read_timeout(Some(crate::harness::PATIENCE))
            .unwrap();
        assert_eq!(third.read(1), "y");
    }
}

#[test]
fn a_limit_of_one_connection_serves_several_listeners() {
    for mode in MODES {
        let server = Server::start_with_source_limit(
            mode,
            &guest("echo"),
            &[
                "--max-connections",
                "1",
                "--listen",
                "127.0.0.1:0",
                "--listen",
                "127.0.0.1:0",
            ],
        );
        for address in [0, 1, 0, 1].map(|n| server.addresses()[n]) {
            let mut client = crate::harness::Client::connect(address).unwrap();
            client.send("x");
            client.finish();
            assert_eq!(client.read_to_end(), "x");
        }
    }
}

#[test]
fn running_out_of_file_descriptors_is_logged_and_survived() {
    for mode in MODES {
        let server = Server::start(mode, &guest("echo"), &[]);
        let mut before = server.connect();
        before.send("x");
        assert_eq!(before.read(1), "x");
        let limit = |current| Rlimit {
            current: Some(current),
            maximum: Some(10_000),
        };
        // With a limit of one, every new descriptor number is too high.
        prlimit(Some(server.pid()), Resource::Nofile, limit(1)).unwrap();
        let mut during = server.connect();
        during.send("y");
        server.wait_for_log(&["WARN", "cannot accept connections", "Too many open files"]);
        // Open connections are not affected.
        before.send("x");
        assert_eq!(before.read(1), "x");
        prlimit(Some(server.pid()), Resource::Nofile, limit(10_000)).unwrap();
        assert_eq!(during.read(1), "y");
        server.wait_for_log(&["accepting connections again"]);
    }
}

#[test]
fn the_soft_open_file_limit_is_raised_to_the_hard_limit() {
    let server = Server::start("spawn", &guest("echo"), &[]);
    let text =
        std::fs::read_to_string(format!("/proc/{}/limits", server.pid().as_raw_nonzero())).unwrap();
    let line = text
        .lines()
        .find(|line| line.starts_with("Max open files"))
        .unwrap();
    let mut limits = line.split_whitespace().skip(3);
    assert_eq!(limits.next(), limits.next(), "{line}");
}
