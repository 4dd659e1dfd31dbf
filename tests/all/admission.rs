//! Admission of clients by address, number and rate: obeyed and violated.

use std::io::ErrorKind;
use std::time::{Duration, Instant};

use crate::harness::{Client, MODES, Server, guest, run, wait_until, wasinetd};

/// Whether the server answers this client rather than resets its connection.
fn is_served(client: &mut Client) -> bool {
    use std::io::{Read, Write};
    // The reset may arrive before the write.
    let sent = client.0.write_all(b"x");
    match sent.and_then(|()| client.0.read_exact(&mut [0])) {
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

/// Whether the server answers a new client from `source`.
fn serves(server: &Server, source: &str) -> bool {
    let client = server.connect_from(source);
    // The reset may arrive before `connect` returns.
    client.is_ok_and(|mut client| is_served(&mut client))
}

const LOCALHOST: &str = "127.0.0.1";

#[test]
fn denied_clients_are_reset_others_are_served() {
    for mode in MODES {
        let server = Server::start(mode, &guest("echo"), &["--deny", "127.0.0.2"]);
        assert!(!serves(&server, "127.0.0.2"));
        server.wait_for_log(&["WARN", "refused a client", "limit=deny", "127.0.0.2"]);
        assert!(serves(&server, "127.0.0.3"));
    }
}

#[test]
fn only_allowed_clients_are_served() {
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
fn connections_per_source_are_limited_others_are_served() {
    for mode in MODES {
        let arguments = ["--max-connections-per-source", "2"];
        let server = Server::start(mode, &guest("echo"), &arguments);
        let mut first = server.connect();
        let mut second = server.connect();
        assert!(is_served(&mut first) && is_served(&mut second));
        assert!(!serves(&server, LOCALHOST));
        server.wait_for_log(&["refused a client", "limit=max-connections-per-source"]);
        assert!(serves(&server, "127.0.0.2"));
        // A connection that has ended leaves its permit to the next one.
        first.finish();
        assert_eq!(first.read_to_end(), "");
        server.wait_for_log(&["connection ended", &first.peer_field()]);
        let mut third = server.connect();
        assert!(is_served(&mut third));
        assert!(is_served(&mut second));
    }
}

#[test]
fn one_source_cannot_use_all_connections_by_default() {
    for mode in MODES {
        let limit = ["--max-connections", "3"];
        let server = Server::start_with_source_limit(mode, &guest("echo"), &limit);
        let mut open: Vec<_> = (0..2).map(|_| server.connect()).collect();
        assert!(open.iter_mut().all(is_served));
        assert!(!serves(&server, LOCALHOST));
        assert!(serves(&server, "127.0.0.2"));
    }
}

#[test]
fn addresses_with_the_same_prefix_are_one_source() {
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
fn accept_rate_delays_clients_but_serves_them() {
    for mode in MODES {
        let server = Server::start(mode, &guest("echo"), &["--accept-rate", "10"]);
        let start = Instant::now();
        // Ten connections are accepted at once, and each thread may have accepted one more. Each
        // other connection waits for a tenth of a second.
        let mut clients: Vec<_> = (0..20).map(|_| server.connect()).collect();
        assert!(clients.iter_mut().all(is_served));
        let elapsed = start.elapsed();
        assert!(elapsed > Duration::from_millis(700), "{elapsed:?}");
        server.wait_for_log(&["WARN", "limit=accept-rate"]);
        // The delay ends with the burst.
        assert!(serves(&server, LOCALHOST));
    }
}

#[test]
fn accept_rate_per_source_resets_clients_until_it_recovers() {
    for mode in MODES {
        let server = Server::start(mode, &guest("echo"), &["--accept-rate-per-source", "1"]);
        assert!(serves(&server, LOCALHOST));
        assert!(!serves(&server, LOCALHOST));
        server.wait_for_log(&["refused a client", "limit=accept-rate-per-source"]);
        assert!(serves(&server, "127.0.0.2"));
        wait_until("the source is never served again", || {
            serves(&server, LOCALHOST)
        });
    }
}

#[test]
fn full_server_sends_its_banner() {
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
        assert!(serves(&server, LOCALHOST));
    }
}

#[test]
fn invalid_limits_are_refused() {
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
