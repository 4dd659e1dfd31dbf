//! Who may connect, how many at once, and how fast: obeyed and violated.

use std::io::ErrorKind;
use std::time::{Duration, Instant};

use crate::harness::{Client, MODES, PATIENCE, Server, guest, run, wasinetd};

/// Whether the server answers this client. If not, it has reset it.
fn is_served(client: &mut Client) -> bool {
    use std::io::{Read, Write};
    // It may be reset before it has said anything.
    let said = client.0.write_all(b"x");
    match said.and_then(|()| client.0.read_exact(&mut [0])) {
        Ok(()) => true,
        Err(error) => {
            let kind = error.kind();
            assert!(
                matches!(kind, ErrorKind::ConnectionReset | ErrorKind::BrokenPipe),
                "{error}"
            );
            false
        }
    }
}

/// Whether a new client from `source` is answered.
fn serves(server: &Server, source: &str) -> bool {
    let client = server.connect_from(source);
    // It may be reset before its system has told it that it is connected.
    client.is_ok_and(|mut client| is_served(&mut client))
}

const HERE: &str = "127.0.0.1";

#[test]
fn who_is_denied_is_reset_and_others_are_served() {
    for mode in MODES {
        let server = Server::start(mode, &guest("echo"), &["--deny", "127.0.0.2"]);
        assert!(!serves(&server, "127.0.0.2"));
        server.wait_for_log(&["WARN", "refused a client", "limit=deny", "127.0.0.2"]);
        assert!(serves(&server, "127.0.0.3"));
    }
}

#[test]
fn only_who_is_allowed_is_served() {
    for mode in MODES {
        let arguments = ["--allow", "127.0.1.0/24", "--deny", "127.0.1.7/32"];
        let server = Server::start(mode, &guest("echo"), &arguments);
        assert!(serves(&server, "127.0.1.6"));
        assert!(!serves(&server, "127.0.1.7"));
        server.wait_for_log(&["limit=deny", "127.0.1.7"]);
        assert!(!serves(&server, "127.0.0.1"));
    }
}

#[test]
fn a_source_has_so_many_connections_and_others_are_served() {
    for mode in MODES {
        let arguments = ["--max-connections-per-source", "2"];
        let server = Server::start(mode, &guest("echo"), &arguments);
        let mut first = server.connect();
        let mut second = server.connect();
        assert!(is_served(&mut first) && is_served(&mut second));
        assert!(!serves(&server, HERE));
        server.wait_for_log(&["refused a client", "limit=max-connections-per-source"]);
        assert!(serves(&server, "127.0.0.2"));
        // A place that is given back can be had again.
        first.finish();
        assert_eq!(first.read_to_end(), "");
        server.wait_for_log(&["connection ended", &first.peer_field()]);
        let mut third = server.connect();
        assert!(is_served(&mut third));
        assert!(is_served(&mut second));
    }
}

#[test]
fn by_default_one_source_does_not_have_all_places() {
    for mode in MODES {
        let limit = ["--max-connections", "3"];
        let server = Server::start_with_source_limit(mode, &guest("echo"), &limit);
        let mut open: Vec<_> = (0..2).map(|_| server.connect()).collect();
        assert!(open.iter_mut().all(is_served));
        assert!(!serves(&server, HERE));
        assert!(serves(&server, "127.0.0.2"));
    }
}

#[test]
fn a_source_is_a_prefix() {
    for mode in MODES {
        let arguments = [
            "--max-connections-per-source",
            "1",
            "--source-prefix",
            "24,64",
        ];
        let server = Server::start(mode, &guest("echo"), &arguments);
        let mut first = server.connect_from("127.0.0.2").unwrap();
        assert!(is_served(&mut first));
        assert!(!serves(&server, "127.0.0.3"));
        assert!(serves(&server, "127.0.1.2"));
    }
}

#[test]
fn clients_that_come_too_fast_wait_and_are_served() {
    for mode in MODES {
        let server = Server::start(mode, &guest("echo"), &["--accept-rate", "10"]);
        let start = Instant::now();
        // Ten have leave at once, and each thread may have taken one more; the rest of them take a
        // tenth of a second each.
        let mut clients: Vec<_> = (0..20).map(|_| server.connect()).collect();
        assert!(clients.iter_mut().all(is_served));
        let taken = start.elapsed();
        assert!(taken > Duration::from_millis(700), "{taken:?}");
        server.wait_for_log(&["WARN", "limit=accept-rate"]);
        // And it is over when they have been served.
        assert!(serves(&server, HERE));
    }
}

#[test]
fn a_source_that_comes_too_fast_is_reset_and_recovers() {
    for mode in MODES {
        let server = Server::start(mode, &guest("echo"), &["--accept-rate-per-source", "1"]);
        assert!(serves(&server, HERE));
        assert!(!serves(&server, HERE));
        server.wait_for_log(&["refused a client", "limit=accept-rate-per-source"]);
        assert!(serves(&server, "127.0.0.2"));
        let patience = Instant::now() + PATIENCE;
        while !serves(&server, HERE) {
            assert!(Instant::now() < patience, "it is never let in again");
        }
    }
}

#[test]
fn a_full_server_can_say_so() {
    for mode in MODES {
        let arguments = [
            "--max-connections",
            "1",
            "--when-full",
            "close",
            "--full-banner",
            "421 busy",
        ];
        let server = Server::start(mode, &guest("echo"), &arguments);
        let mut first = server.connect();
        assert!(is_served(&mut first));
        assert_eq!(server.connect().read_to_end(), "421 busy");
        server.wait_for_log(&["refused a client", "limit=max-connections "]);
        first.finish();
        assert_eq!(first.read_to_end(), "");
        server.wait_for_log(&["connection ended", &first.peer_field()]);
        assert!(serves(&server, HERE));
    }
}

#[test]
fn what_cannot_be_meant_is_refused() {
    for (flag, value) in [
        ("--allow", "10.0.0.0/33"),
        ("--deny", "example.org"),
        ("--source-prefix", "0,64"),
        ("--source-prefix", "32"),
        ("--max-connections-per-source", "0"),
        ("--accept-rate", "-1"),
        ("--max-memory", "much"),
        ("--stack", "1KiB"),
        ("--idle-timeout", "60"),
        ("--idle-timeout", "0s"),
        ("--cpu-time", "0s"),
        ("--deny", "::ffff:192.0.2.1"),
    ] {
        let output = run(wasinetd().args(["serve", flag, value, "guest.wasm"]));
        assert_eq!(output.status.code(), Some(64), "{flag} {value}");
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(text.contains(flag) && text.contains(value), "{text}");
    }
}
