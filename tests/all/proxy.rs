//! Clients behind a proxy that announces them by the PROXY protocol.
//!
//! The tests write headers by hand, and use haproxy where it is installed.

use std::io::ErrorKind;
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::harness::{
    AdminSocket, Client, MODES, PATIENCE, Server, fixture, free_address, guest, run, wasinetd,
};

/// The servers of these tests trust headers from 127.0.0.1.
const TRUST_LOOPBACK: [&str; 2] = ["--proxy-from", "127.0.0.1/32"];

/// A header of version 1.
const V1: &[u8] = b"PROXY TCP4 192.0.2.1 198.51.100.2 56324 443\r\n";

/// The header of a connection that the proxy opens for itself, such as a health check.
const LOCAL: &[u8] = b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0";

/// The same client in version 2, with `extra` bytes of further fields.
fn v2(extra: usize) -> Vec<u8> {
    let addresses = [192, 0, 2, 1, 198, 51, 100, 2, 0xdc, 0x04, 1, 0xbb];
    let length = u16::try_from(addresses.len() + extra)
        .unwrap()
        .to_be_bytes();
    let signature: &[u8] = b"\r\n\r\n\0\r\nQUIT\n\x21\x11";
    // One field of type 0xe0, which the specification reserves for applications.
    let mut field = vec![0; extra];
    if let Some(length) = extra.checked_sub(3) {
        field[0] = 0xe0;
        field[1..3].copy_from_slice(&u16::try_from(length).unwrap().to_be_bytes());
    }
    [signature, &length, &addresses, &field].concat()
}

/// Starts a server of the guest `name` that trusts headers from 127.0.0.1.
fn start(mode: &str, name: &str, arguments: &[&str]) -> Server {
    let guest = match name {
        "echo" => guest(name),
        _ => fixture(name),
    };
    Server::start(mode, &guest, &[&TRUST_LOOPBACK, arguments].concat())
}

fn assert_reset(client: &mut Client) {
    let (bytes, end) = client.read_all();
    assert_eq!(bytes, b"");
    assert_eq!(end.unwrap_err().kind(), ErrorKind::ConnectionReset);
}

/// The number of headers with this outcome, from the metrics.
fn header_count(admin: &AdminSocket, outcome: &str) -> u64 {
    let name = format!("wasinetd_proxy_headers_total{{outcome=\"{outcome}\"}} ");
    let metrics = admin.metrics();
    let line = metrics.lines().find_map(|line| line.strip_prefix(&name));
    line.unwrap_or_else(|| panic!("no {name} in {metrics}"))
        .parse()
        .unwrap()
}

#[test]
fn guest_and_log_see_the_client_address_from_the_header() {
    for mode in MODES {
        let server = start(mode, "addresses", &[]);
        for header in [V1, &v2(0), &v2(3), &v2(4096 - 28)] {
            let mut client = server.connect();
            client.send(header);
            let text = client.read_to_end();
            assert!(
                text.ends_with(" 192.0.2.1:56324 198.51.100.2:443"),
                "{text}"
            );
            let via = format!("via={} ", client.0.local_addr().unwrap());
            // The server logs the end when the client has closed too, or two seconds later.
            drop(client);
            server.wait_for_log(&["connection ended", "peer=192.0.2.1:56324 ", &via]);
        }
    }
}

#[test]
fn an_ipv4_proxy_can_announce_an_ipv6_client() {
    let server = start("concurrent", "addresses", &[]);
    let mut client = server.connect();
    client.send("PROXY TCP6 2001:db8::1 2001:db8::2 1 65535\r\n");
    let text = client.read_to_end();
    assert!(
        text.ends_with(" [2001:db8::1]:1 [2001:db8::2]:65535"),
        "{text}"
    );
}

#[test]
fn a_header_can_be_split_anywhere_and_later_bytes_reach_the_guest() {
    for mode in MODES {
        let server = start(mode, "echo", &[]);
        for header in [V1, &v2(0)] {
            for n in 0..=header.len() {
                let mut client = server.connect();
                let (begin, rest) = header.split_at(n);
                client.send(begin);
                client.send([rest, b"\r\n\r\n\0 and more"].concat());
                client.finish();
                assert_eq!(client.read_to_end(), "\r\n\r\n\0 and more");
            }
            let mut client = server.connect();
            for byte in header {
                client.send([*byte]);
            }
            client.send("x");
            assert_eq!(client.read(1), "x");
        }
    }
}

#[test]
fn a_header_from_an_untrusted_client_is_ordinary_data() {
    for mode in MODES {
        let server = start(mode, "echo", &[]);
        for header in [V1, &v2(0), LOCAL] {
            let mut client = server.connect_from("127.0.0.2").unwrap();
            client.send(header);
            client.finish();
            assert_eq!(client.read_all().0, header);
        }
        let line = server.wait_for_log(&["connection ended", "peer=127.0.0.2:"]);
        assert!(!line.contains("via="), "{line}");
    }
}

#[test]
fn a_proxy_without_a_valid_header_is_reset_and_counted() {
    for mode in MODES {
        let admin = AdminSocket::new();
        let server = start(mode, "echo", &["--admin", &admin.flag]);
        let bad: [&[u8]; 6] = [
            b"GET / HTTP/1.1\r\n\r\n",
            b"\r\n\r\n\0\r\nQUIET",
            b"PROXY TCP4 192.0.2.1 198.51.100.2 1 65536\r\n",
            &[&b"PROXY TCP4 "[..], &[b'1'; 100]].concat(),
            &v2(4096 - 27)[..16],
            b"\r\n\r\n\0\r\nQUIT\n\x21\x12\0\x0c000000000000",
        ];
        for header in bad {
            let mut client = server.connect();
            client.send(header);
            assert_reset(&mut client);
        }
        assert_eq!(header_count(&admin, "bad"), 6);
        assert_eq!(server.log_lines("connection ended").len(), 0);
        server.wait_for_log(&["WARN", "a proxy sent no valid header", "outcome=\"bad\""]);
        // The log has at most one line per second.
        assert!(server.log_lines("no valid header").len() <= 3);
        // The proxy closes in the middle of a header.
        let mut client = server.connect();
        client.send(&V1[..20]);
        client.finish();
        assert_reset(&mut client);
        assert_eq!(header_count(&admin, "gone"), 1);
    }
}

#[test]
fn a_silent_proxy_is_reset_after_the_timeout_and_others_are_served() {
    for mode in MODES {
        let admin = AdminSocket::new();
        let arguments = ["--handshake-timeout", "500ms", "--admin", &admin.flag];
        let server = start(mode, "echo", &arguments);
        let mut silent: Vec<_> = (0..20).map(|_| server.connect()).collect();
        silent[0].send(&V1[..20]);
        // A client whose header came in time is not subject to the timeout any more.
        let mut client = server.connect();
        client.send(V1);
        for client in &mut silent {
            assert_reset(client);
        }
        client.send("x");
        assert_eq!(client.read(1), "x");
        assert_eq!(header_count(&admin, "timeout"), 20);
        let limits = admin.ctl_json(&["limits"]);
        let limit = serde_json::json!({"limit": "handshake-timeout", "value": "500ms", "met": 20});
        let mut all = limits.as_array().expect("limits are a list").iter();
        assert!(all.any(|entry| *entry == limit), "{limits}");
    }
}

#[test]
fn a_proxy_health_check_is_not_a_connection() {
    for mode in MODES {
        let admin = AdminSocket::new();
        let server = start(
            mode,
            "addresses",
            &["--admin", &admin.flag, "--log-level", "debug"],
        );
        // An address family that means nothing here, with three bytes that are no address.
        let unknown_family = b"\r\n\r\n\0\r\nQUIT\n\x20\x41\0\x03abc";
        for header in [
            &b""[..],
            LOCAL,
            unknown_family,
            b"PROXY UNKNOWN\r\n",
            b"itself",
        ] {
            let mut client = server.connect();
            // For version 1, haproxy announces its own address.
            let port = client.0.local_addr().unwrap().port();
            let itself = format!("PROXY TCP4 127.0.0.1 127.0.0.1 {port} 1\r\n");
            client.send(match header {
                b"itself" => itself.as_bytes(),
                _ => header,
            });
            client.finish();
            assert_reset(&mut client);
        }
        assert_eq!(header_count(&admin, "health_check"), 5);
        server.wait_for_log(&["DEBUG", "no guest got the connection", "health_check"]);
        assert_eq!(server.log_lines("connection ended").len(), 0);
        // A proxy that keeps such a connection open is served under its own address.
        let mut client = server.connect();
        client.send(LOCAL);
        let here = client.0.local_addr().unwrap();
        let text = client.read_to_end();
        assert!(text.contains(&format!(" {here} ")), "{text}");
        assert_eq!(header_count(&admin, "no_client"), 1);
    }
}

#[test]
fn admission_rules_apply_to_the_clients_of_a_proxy() {
    for mode in MODES {
        let arguments = [
            "--deny",
            "198.51.100.0/24",
            "--deny",
            "127.0.0.1",
            "--max-connections-per-source",
            "2",
        ];
        let server = start(mode, "echo", &arguments);
        let connect = |source: &str| {
            let mut client = server.connect();
            client.send(format!("PROXY TCP4 {source} 192.0.2.2 1 2\r\nx"));
            client
        };
        let assert_served = |mut client: Client| {
            assert_eq!(client.read(1), "x");
            client
        };
        let same_source = [
            assert_served(connect("192.0.2.1")),
            assert_served(connect("192.0.2.1")),
        ];
        let _others = [
            assert_served(connect("192.0.2.3")),
            assert_served(connect("192.0.2.4")),
        ];
        assert_reset(&mut connect("192.0.2.1"));
        let via = "via=127.0.0.1:";
        server.wait_for_log(&["refused a client of a proxy", "peer=192.0.2.1:1 ", via]);
        assert_reset(&mut connect("198.51.100.7"));
        drop(same_source);
        // Closed connections no longer count towards the limit of their source.
        let patience = Instant::now() + PATIENCE;
        loop {
            let mut client = connect("192.0.2.1");
            match client.try_read(1) {
                Ok(()) => break,
                Err(_) => assert!(Instant::now() < patience, "the source is still refused"),
            }
        }
    }
}

impl Client {
    /// Reads `n` bytes, or returns the error.
    fn try_read(&mut self, n: usize) -> std::io::Result<()> {
        use std::io::Read;
        self.0.read_exact(&mut vec![0; n])
    }
}

#[test]
fn a_second_stop_signal_does_not_wait_for_a_header() {
    for mode in MODES {
        let mut server = start(mode, "echo", &["--handshake-timeout", "1h"]);
        let mut silent = server.connect();
        // The server accepts in order: when this client is served, the silent one is accepted.
        let mut client = server.connect();
        client.send([V1, b"x"].concat());
        assert_eq!(client.read(1), "x");
        server.signal(Signal::TERM);
        server.wait_for_log(&["draining"]);
        server.signal(Signal::TERM);
        assert_reset(&mut silent);
        assert_eq!(server.wait().code(), Some(75));
    }
}

#[test]
fn an_invalid_proxy_network_is_refused() {
    for value in ["127.0.0.1/33", "proxy.example", ""] {
        let output = run(wasinetd().args(["serve", "--proxy-from", value, "guest.wasm"]));
        assert_eq!(output.status.code(), Some(64), "{value}");
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(text.contains("--proxy-from"), "{text}");
    }
}

/// haproxy in front of a server. Dropping this kills the process.
struct Haproxy {
    child: Child,
    address: SocketAddr,
    _directory: tempfile::TempDir,
}

impl Haproxy {
    /// Starts haproxy with these `server` options, or returns None if it is not installed.
    fn start(server: &Server, options: &str) -> Option<Self> {
        if Command::new("haproxy").arg("-v").output().is_err() {
            eprintln!("skipped: haproxy is not installed");
            return None;
        }
        let address = free_address();
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("haproxy.cfg");
        let config = format!(
            "defaults\n mode tcp\n timeout connect 10s\n timeout client 60s\n timeout server 60s\n\
             listen it\n bind {address}\n server it {} {options}\n",
            server.address()
        );
        std::fs::write(&path, config).unwrap();
        let mut command = Command::new("haproxy");
        command.arg("-db").arg("-f").arg(&path);
        let command = command.stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn().unwrap();
        Some(Self {
            child,
            address,
            _directory: directory,
        })
    }

    fn connect(&mut self) -> Client {
        let patience = Instant::now() + PATIENCE;
        loop {
            match TcpStream::connect(self.address) {
                Ok(_) => return Client::connect(self.address).unwrap(),
                Err(error) => assert!(Instant::now() < patience, "{error}"),
            }
            if let Some(status) = self.child.try_wait().unwrap() {
                panic!("haproxy ended with {status}");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Haproxy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn haproxy_announces_its_clients() {
    for (mode, options) in MODES.into_iter().zip(["send-proxy", "send-proxy-v2"]) {
        let server = start(mode, "addresses", &[]);
        let Some(mut haproxy) = Haproxy::start(&server, options) else {
            return;
        };
        let mut client = haproxy.connect();
        let here = client.0.local_addr().unwrap();
        let text = client.read_to_end();
        assert!(
            text.ends_with(&format!(" {here} {}", haproxy.address)),
            "{text}"
        );
        // The server logs the end when the client has closed too, or two seconds later.
        drop(client);
        server.wait_for_log(&["connection ended", &format!("peer={here} via=127.0.0.1:")]);
    }
}

#[test]
fn haproxy_health_checks_are_not_client_connections() {
    for (mode, options) in MODES.into_iter().zip(["send-proxy", "send-proxy-v2"]) {
        let admin = AdminSocket::new();
        let server = start(mode, "echo", &["--admin", &admin.flag]);
        let options = format!("{options} check inter 20ms");
        let Some(mut haproxy) = Haproxy::start(&server, &options) else {
            return;
        };
        let mut client = haproxy.connect();
        client.send("x");
        assert_eq!(client.read(1), "x");
        let patience = Instant::now() + PATIENCE;
        while header_count(&admin, "health_check") < 10 {
            assert!(Instant::now() < patience, "{}", admin.metrics());
        }
        assert_eq!(server.log_lines("WARN").len(), 0);
        // haproxy still considers the server up.
        client.send("y");
        assert_eq!(client.read(1), "y");
    }
}
