//! Clients that come through a proxy, which says whom it speaks for: by the PROXY protocol, from
//! haproxy where it is installed, and by hand.

use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::harness::{AdminSocket, Client, MODES, PATIENCE, Server, fixture, guest, run, wasinetd};

/// As far as the servers of these tests are concerned, who connects from 127.0.0.1 is a proxy.
const FROM_HERE: [&str; 2] = ["--proxy-from", "127.0.0.1/32"];

const V1: &[u8] = b"PROXY TCP4 192.0.2.1 198.51.100.2 56324 443\r\n";

/// Of a connection that the proxy makes for itself.
const LOCAL: &[u8] = b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0";

/// The same as [`V1`], with so many bytes that say more.
fn v2(more: usize) -> Vec<u8> {
    let addresses = [192, 0, 2, 1, 198, 51, 100, 2, 0xdc, 0x04, 1, 0xbb];
    let length = u16::try_from(addresses.len() + more).unwrap().to_be_bytes();
    let begin: &[u8] = b"\r\n\r\n\0\r\nQUIT\n\x21\x11";
    // As one field of a type that is for anyone's use.
    let mut field = vec![0; more];
    if let Some(length) = more.checked_sub(3) {
        field[0] = 0xe0;
        field[1..3].copy_from_slice(&u16::try_from(length).unwrap().to_be_bytes());
    }
    [begin, &length, &addresses, &field].concat()
}

fn start(mode: &str, name: &str, arguments: &[&str]) -> Server {
    let guest = match name {
        "echo" => guest(name),
        _ => fixture(name),
    };
    Server::start(mode, &guest, &[&FROM_HERE, arguments].concat())
}

fn is_reset(client: &mut Client) {
    let (bytes, end) = client.read_all();
    assert_eq!(bytes, b"");
    assert_eq!(end.unwrap_err().kind(), ErrorKind::ConnectionReset);
}

/// A figure of what came of headers.
fn headers(admin: &AdminSocket, outcome: &str) -> u64 {
    let name = format!("wasinetd_proxy_headers_total{{outcome=\"{outcome}\"}} ");
    let metrics = admin.metrics();
    let line = metrics.lines().find_map(|line| line.strip_prefix(&name));
    line.unwrap_or_else(|| panic!("no {name} in {metrics}"))
        .parse()
        .unwrap()
}

#[test]
fn the_guest_and_the_log_have_the_client_of_a_proxy() {
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
            server.wait_for_log(&["connection ended", "peer=192.0.2.1:56324 ", &via]);
        }
    }
}

#[test]
fn clients_of_ipv6_are_told_by_a_proxy_of_ipv4() {
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
fn a_header_may_come_in_any_pieces_and_what_follows_is_the_guests() {
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
fn what_looks_like_a_header_is_the_clients_who_is_no_proxy() {
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
fn a_proxy_without_a_header_is_reset_and_counted() {
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
            is_reset(&mut client);
        }
        assert_eq!(headers(&admin, "bad"), 6);
        assert_eq!(server.log_lines("connection ended").len(), 0);
        server.wait_for_log(&["WARN", "a proxy sent no valid header", "outcome=\"bad\""]);
        // A line a second, however many there are.
        assert!(server.log_lines("no valid header").len() <= 3);
        // In the middle of one.
        let mut client = server.connect();
        client.send(&V1[..20]);
        client.finish();
        is_reset(&mut client);
        assert_eq!(headers(&admin, "gone"), 1);
    }
}

#[test]
fn a_proxy_that_says_nothing_is_reset_in_time_and_others_are_served() {
    for mode in MODES {
        let admin = AdminSocket::new();
        let arguments = ["--handshake-timeout", "500ms", "--admin", &admin.flag];
        let server = start(mode, "echo", &arguments);
        let mut silent: Vec<_> = (0..20).map(|_| server.connect()).collect();
        silent[0].send(&V1[..20]);
        // Who begins in time is served after that time as well.
        let mut client = server.connect();
        client.send(V1);
        for client in &mut silent {
            is_reset(client);
        }
        client.send("x");
        assert_eq!(client.read(1), "x");
        assert_eq!(headers(&admin, "timeout"), 20);
        let limits = admin.ctl_json(&["limits"]);
        let limit = serde_json::json!({"limit": "handshake-timeout", "value": "500ms", "met": 20});
        let mut all = limits.as_array().expect("they are listed").iter();
        assert!(all.any(|one| *one == limit), "{limits}");
    }
}

#[test]
fn a_proxy_that_asks_whether_we_are_there_is_no_connection() {
    for mode in MODES {
        let admin = AdminSocket::new();
        let server = start(
            mode,
            "addresses",
            &["--admin", &admin.flag, "--log-level", "debug"],
        );
        // Of a family that says nothing here, with what is none of its addresses.
        let odd = b"\r\n\r\n\0\r\nQUIT\n\x20\x41\0\x03abc";
        for header in [&b""[..], LOCAL, odd, b"PROXY UNKNOWN\r\n", b"itself"] {
            let mut client = server.connect();
            // As haproxy does it with version 1.
            let itself = client.0.local_addr().unwrap().port();
            let itself = format!("PROXY TCP4 127.0.0.1 127.0.0.1 {itself} 1\r\n");
            client.send(match header {
                b"itself" => itself.as_bytes(),
                _ => header,
            });
            client.finish();
            is_reset(&mut client);
        }
        assert_eq!(headers(&admin, "health_check"), 5);
        server.wait_for_log(&[
            "DEBUG",
            "connection ended before a guest got it",
            "health_check",
        ]);
        assert_eq!(server.log_lines("connection ended").len(), 0);
        // One that goes on is served, as what it is.
        let mut client = server.connect();
        client.send(LOCAL);
        let here = client.0.local_addr().unwrap();
        let text = client.read_to_end();
        assert!(text.contains(&format!(" {here} ")), "{text}");
        assert_eq!(headers(&admin, "no_client"), 1);
    }
}

#[test]
fn who_may_connect_is_asked_of_the_clients_of_a_proxy() {
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
        let come = |source: &str| {
            let mut client = server.connect();
            client.send(format!("PROXY TCP4 {source} 192.0.2.2 1 2\r\nx"));
            client
        };
        let served = |mut client: Client| {
            assert_eq!(client.read(1), "x");
            client
        };
        let _two = [served(come("192.0.2.1")), served(come("192.0.2.1"))];
        let _others = [served(come("192.0.2.3")), served(come("192.0.2.4"))];
        is_reset(&mut come("192.0.2.1"));
        let here = "via=127.0.0.1:";
        server.wait_for_log(&["refused a client of a proxy", "peer=192.0.2.1:1 ", here]);
        is_reset(&mut come("198.51.100.7"));
        drop(_two);
        // Their places are had again.
        let patience = Instant::now() + PATIENCE;
        loop {
            let mut client = come("192.0.2.1");
            match client.read_all_of(1) {
                Ok(()) => break,
                Err(_) => assert!(Instant::now() < patience, "it is never let in again"),
            }
        }
    }
}

impl Client {
    /// Waits for so many bytes, or for the error that comes instead.
    fn read_all_of(&mut self, n: usize) -> std::io::Result<()> {
        use std::io::Read;
        self.0.read_exact(&mut vec![0; n])
    }
}

#[test]
fn a_server_that_is_to_end_waits_for_no_header() {
    for mode in MODES {
        let mut server = start(mode, "echo", &["--handshake-timeout", "1h"]);
        let mut silent = server.connect();
        // It is accepted when this one, which comes later, is.
        let mut client = server.connect();
        client.send([V1, b"x"].concat());
        assert_eq!(client.read(1), "x");
        server.signal(Signal::TERM);
        server.wait_for_log(&["draining"]);
        server.signal(Signal::TERM);
        is_reset(&mut silent);
        assert_eq!(server.wait().code(), Some(75));
    }
}

#[test]
fn what_is_no_network_is_refused() {
    for value in ["127.0.0.1/33", "proxy.example", ""] {
        let output = run(wasinetd().args(["serve", "--proxy-from", value, "guest.wasm"]));
        assert_eq!(output.status.code(), Some(64), "{value}");
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(text.contains("--proxy-from"), "{text}");
    }
}

/// haproxy in front of a server. It is killed when this is dropped.
struct Haproxy {
    child: Child,
    address: SocketAddr,
    _directory: tempfile::TempDir,
}

impl Haproxy {
    /// With these options of `server`. None where it is not installed.
    fn start(server: &Server, options: &str) -> Option<Self> {
        if Command::new("haproxy").arg("-v").output().is_err() {
            eprintln!("left out: there is no haproxy here");
            return None;
        }
        // Nobody else listens at this address of the machine, so that the port stays free.
        let free = TcpListener::bind("127.91.0.1:0").unwrap();
        let address = free.local_addr().unwrap();
        drop(free);
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
        let quiet = command.stdout(Stdio::null()).stderr(Stdio::null());
        let child = quiet.spawn().unwrap();
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
fn haproxy_says_whom_it_speaks_for() {
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
        server.wait_for_log(&["connection ended", &format!("peer={here} via=127.0.0.1:")]);
    }
}

#[test]
fn haproxys_health_checks_are_no_connections_of_clients() {
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
        while headers(&admin, "health_check") < 10 {
            assert!(Instant::now() < patience, "{}", admin.metrics());
        }
        assert_eq!(server.log_lines("WARN").len(), 0);
        // Nor did it find the server down.
        client.send("y");
        assert_eq!(client.read(1), "y");
    }
}
