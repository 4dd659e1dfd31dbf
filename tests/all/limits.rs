//! Each limit, obeyed and met.

use std::io::{ErrorKind, Read};
use std::time::Duration;

use rustix::process::{Resource, Rlimit, prlimit};

use crate::harness::{MODES, Server, guest};

#[test]
fn as_many_connections_as_allowed_are_served_at_once() {
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
fn one_more_waits_in_the_backlog_until_a_place_is_free() {
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
        assert_eq!(server.open_sockets(), before, "it was accepted");
        drop(first);
        third
            .0
            .set_read_timeout(Some(crate::harness::PATIENCE))
            .unwrap();
        assert_eq!(third.read(1), "y");
    }
}

#[test]
fn one_place_is_enough_for_many_listeners() {
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
fn running_out_of_files_is_logged_and_survived() {
    for mode in MODES {
        let server = Server::start(mode, &guest("echo"), &[]);
        let mut before = server.connect();
        before.send("x");
        assert_eq!(before.read(1), "x");
        let limit = |current| Rlimit {
            current: Some(current),
            maximum: Some(10_000),
        };
        // No file that is opened from now on can be numbered below a limit of one.
        prlimit(Some(server.pid()), Resource::Nofile, limit(1)).unwrap();
        let mut during = server.connect();
        during.send("y");
        server.wait_for_log(&["WARN", "cannot accept connections", "Too many open files"]);
        // Those that are open go on.
        before.send("x");
        assert_eq!(before.read(1), "x");
        prlimit(Some(server.pid()), Resource::Nofile, limit(10_000)).unwrap();
        assert_eq!(during.read(1), "y");
        server.wait_for_log(&["accepting connections again"]);
    }
}

#[test]
fn the_soft_limit_on_open_files_is_raised_to_the_hard_one() {
    let server = Server::start("spawn", &guest("echo"), &[]);
    let limits =
        std::fs::read_to_string(format!("/proc/{}/limits", server.pid().as_raw_nonzero())).unwrap();
    let line = limits
        .lines()
        .find(|line| line.starts_with("Max open files"))
        .unwrap();
    let mut figures = line.split_whitespace().skip(3);
    assert_eq!(figures.next(), figures.next(), "{line}");
}
