//! Clients that try to harm other clients of the same server.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::buffer::spare_capacity;
use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::process::{Resource, Rlimit, getrlimit, prlimit, setrlimit};
use socket2::{Domain, Socket, Type};

use crate::harness::{AdminSocket, MODES, PATIENCE, Server, guest, page, request};

/// The number of hostile clients at the same time.
const MANY: usize = 100;

/// The argument that grants the pages.
const PAGES: [&str; 2] = ["--dir", "static::/static"];

fn serve(mode: &str, limits: &[&str]) -> Server {
    let arguments: Vec<_> = PAGES.iter().chain(limits).copied().collect();
    Server::start(mode, &guest("hello"), &arguments)
}

/// Asserts that the server answers another client.
fn assert_others_are_served(server: &Server) {
    assert_eq!(server.connect().get("/").body, page("hello.html"));
}

/// Waits for `count` log lines with `outcome`. Other clients are served meanwhile.
fn wait_for_ends(server: &Server, outcome: &str, count: usize) {
    while server.log_lines(outcome).len() < count {
        assert_others_are_served(server);
    }
}

#[test]
fn max_lifetime_ends_clients_that_send_byte_by_byte() {
    for mode in MODES {
        let server = serve(mode, &["--max-lifetime", "2s"]);
        let mut slow: Vec<_> = (0..MANY).map(|_| server.connect()).collect();
        let ended = "limit=\"max-lifetime\"";
        for byte in b"GET / HTTP/1.1\r\nHost: a\r\nX: "
            .iter()
            .chain(&[b'x'; 1 << 20])
        {
            for client in &mut slow {
                // The connection may be reset already.
                let _ = client.0.write(&[*byte]);
            }
            assert_others_are_served(&server);
            if server.log_lines(ended).len() >= MANY {
                break;
            }
        }
        wait_for_ends(&server, ended, MANY);
    }
}

#[test]
fn first_byte_timeout_ends_silent_clients() {
    for mode in MODES {
        let server = serve(mode, &["--first-byte-timeout", "1s"]);
        let silent: Vec<_> = (0..MANY).map(|_| server.connect()).collect();
        wait_for_ends(&server, "limit=\"first-byte-timeout\"", MANY);
        drop(silent);
    }
}

#[test]
fn write_timeout_ends_clients_that_never_read() {
    for mode in MODES {
        let server = serve(mode, &["--write-timeout", "1s", "--idle-timeout", "2s"]);
        let before = server.memory("VmRSS");
        let mut deaf: Vec<_> = (0..MANY).map(|_| server.connect()).collect();
        let requests = request("/").repeat(100);
        for client in &mut deaf {
            client.0.set_nonblocking(true).unwrap();
            // Send until both socket buffers are full.
            while client.0.write(requests.as_bytes()).is_ok() {}
        }
        wait_for_ends(&server, "outcome=limit: ", MANY);
        let grown = server.memory("VmRSS").saturating_sub(before);
        assert!(grown < 64 * 1024, "{grown} KiB\n{server:?}");
    }
}

#[test]
fn resets_at_any_point_harm_no_other_client() {
    for mode in MODES {
        let server = serve(mode, &[]);
        let whole = request("/");
        for sent in 0..=whole.len() {
            let mut client = server.connect();
            client.send(&whole[..sent]);
            client.reset();
        }
        let answer = {
            let mut client = server.connect();
            client.send(request("/"));
            client.finish();
            client.read_to_end().len()
        };
        for received in (0..answer).step_by(7) {
            let mut client = server.connect();
            client.send(request("/"));
            client.read(received);
            client.reset();
        }
        assert_others_are_served(&server);
        assert_eq!(server.log_lines("a bug in wasinetd").len(), 0, "{server:?}");
    }
}

#[test]
fn half_closed_connections_harm_no_other_client() {
    for mode in MODES {
        let server = serve(mode, &["--idle-timeout", "1s"]);
        let half: Vec<_> = (0..MANY)
            .map(|n| {
                let client = server.connect();
                let side = [Shutdown::Read, Shutdown::Write][n % 2];
                client.0.shutdown(side).unwrap();
                client
            })
            .collect();
        wait_for_ends(&server, "connection ended", MANY);
        drop(half);
        assert_others_are_served(&server);
    }
}

#[test]
fn random_bytes_harm_no_other_client() {
    for mode in MODES {
        let server = serve(mode, &[]);
        let mut random = fastrand::Rng::with_seed(0x9e37_79b9_7f4a_7c15);
        for n in 0..MANY {
            let mut bytes = vec![0; n * 97];
            random.fill(&mut bytes);
            let mut client = server.connect();
            // The server may refuse the request before all bytes are sent.
            let _ = client.0.write_all(&bytes);
            let _ = client.0.shutdown(Shutdown::Write);
            let _ = client.0.read(&mut [0; 4096]);
        }
        assert_others_are_served(&server);
        assert_eq!(server.log_lines("outcome=trap").len(), 0, "{server:?}");
    }
}

/// The number of clients in a burst, if there are enough file descriptors.
const BURST: usize = 20_000;

#[test]
fn a_burst_beyond_max_connections_is_served_eventually() {
    let files = getrlimit(Resource::Nofile);
    let all = Rlimit {
        current: files.maximum,
        maximum: files.maximum,
    };
    setrlimit(Resource::Nofile, all).unwrap();
    let spare = files.maximum.unwrap_or(u64::MAX).saturating_sub(500);
    let clients = BURST.min(usize::try_from(spare).unwrap_or(BURST));
    for mode in MODES {
        let admin = AdminSocket::new();
        let limits = ["--max-connections", "1000", "--log-level", "warn"];
        let arguments = [&PAGES[..], &limits, &["--admin", &admin.flag]].concat();
        let server = Server::start_alone(mode, &guest("hello"), &arguments);
        let mut crowd = Crowd::new(server.address());
        for n in 0..clients {
            crowd.add_client();
            if n % 100 == 0 {
                crowd.poll(Duration::ZERO);
            }
        }
        // The kernel drops packets while its queues are full. Clients retransmit after a time that
        // doubles with each attempt. Where the machine is slow, the kernel gives up some clients
        // before the server can accept them, and they connect again.
        while crowd.sockets.iter().any(Option::is_some) {
            assert!(crowd.poll(3 * PATIENCE), "no client is served\n{server:?}");
        }
        let page = page("hello.html");
        let is_page = |answer: &&Vec<u8>| answer.ends_with(page.as_bytes());
        assert_eq!(crowd.answers.iter().filter(is_page).count(), clients);
        // The server has lost none of those that it has accepted.
        admin.wait_for_no_connections();
        let metrics = admin.metrics();
        let ended: Vec<_> = metrics
            .lines()
            .filter(|line| line.starts_with("wasinetd_connections_total{"))
            .filter(|line| !line.ends_with(" 0"))
            .collect();
        let ok = format!("outcome=\"ok\"}} {clients}");
        assert!(ended.len() == 1 && ended[0].ends_with(&ok), "{ended:?}");
    }
}

/// Clients that request a page at the same time.
struct Crowd {
    address: SocketAddr,
    epoll: OwnedFd,
    /// The clients whose answers are not complete.
    sockets: Vec<Option<Socket>>,
    answers: Vec<Vec<u8>>,
}

impl Crowd {
    fn new(address: SocketAddr) -> Self {
        Self {
            address,
            epoll: epoll::create(CreateFlags::CLOEXEC).unwrap(),
            sockets: Vec::new(),
            answers: Vec::new(),
        }
    }

    fn add_client(&mut self) {
        let n = self.sockets.len();
        let socket = self.connect(n);
        self.sockets.push(Some(socket));
        self.answers.push(Vec::new());
    }

    /// Begins to connect client `n`.
    fn connect(&self, n: usize) -> Socket {
        let socket = Socket::new(Domain::for_address(self.address), Type::STREAM, None).unwrap();
        socket.set_nonblocking(true).unwrap();
        // The connection is established later.
        let _ = socket.connect(&self.address.into());
        let n = EventData::new_u64(n as u64);
        epoll::add(&self.epoll, &socket, n, EventFlags::OUT).unwrap();
        socket
    }

    /// Waits for events and handles them. False if there were none within `timeout`.
    fn poll(&mut self, timeout: Duration) -> bool {
        let mut events = Vec::with_capacity(1024);
        let timeout = Timespec::try_from(timeout).unwrap();
        epoll::wait(&self.epoll, spare_capacity(&mut events), Some(&timeout)).unwrap();
        for event in &events {
            let (data, flags) = (event.data, event.flags);
            self.handle_event(data.u64() as usize, flags);
        }
        !events.is_empty()
    }

    fn handle_event(&mut self, n: usize, flags: EventFlags) {
        let Some(socket) = &self.sockets[n] else {
            return;
        };
        match exchange(socket, flags, &mut self.answers[n]) {
            Ok(Next::Read) => {
                let n = EventData::new_u64(n as u64);
                epoll::modify(&self.epoll, socket, n, EventFlags::IN).unwrap();
            }
            Ok(Next::End) => self.sockets[n] = None,
            Err(error) => {
                let given_up = [ErrorKind::ConnectionReset, ErrorKind::TimedOut];
                assert!(given_up.contains(&error.kind()), "client {n}: {error}");
                assert!(self.answers[n].is_empty(), "client {n} lost its answer");
                self.sockets[n] = Some(self.connect(n));
            }
        }
    }
}

/// What a client waits for.
enum Next {
    Read,
    End,
}

/// Sends the request or reads a part of the answer.
fn exchange(mut socket: &Socket, ready: EventFlags, answer: &mut Vec<u8>) -> io::Result<Next> {
    if let Some(error) = socket.take_error()? {
        return Err(error);
    }
    if ready.contains(EventFlags::OUT) {
        let request = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
        assert_eq!(socket.write(request)?, request.len());
        return Ok(Next::Read);
    }
    let mut bytes = [0; 4096];
    let received = socket.read(&mut bytes)?;
    answer.extend(&bytes[..received]);
    Ok(if received == 0 { Next::End } else { Next::Read })
}

#[test]
fn a_flood_from_one_source_leaves_connections_for_others() {
    for mode in MODES {
        let limits = ["--max-connections", "20", "--first-byte-timeout", "30s"];
        let arguments = [PAGES.as_slice(), &limits].concat();
        let server = Server::start_with_source_limit(mode, &guest("hello"), &arguments);
        let mut flood: Vec<_> = (0..MANY)
            .filter_map(|_| server.connect_from("127.0.0.9").ok())
            .collect();
        server.wait_for_log(&["refused a client", "limit=max-connections-per-source"]);
        for _ in 0..MANY {
            let mut other = server.connect_from("127.0.0.1").unwrap();
            assert_eq!(other.get("/").body, page("hello.html"));
            flood.extend(server.connect_from("127.0.0.9"));
        }
    }
}

#[test]
fn a_server_without_free_files_keeps_its_connections() {
    for mode in MODES {
        let server = Server::start(mode, &guest("echo"), &["--first-byte-timeout", "off"]);
        let mut kept = server.connect();
        kept.send("x");
        assert_eq!(kept.read(1), "x");
        let few = Rlimit {
            current: Some(64),
            maximum: Some(10_000),
        };
        prlimit(Some(server.pid()), Resource::Nofile, few).unwrap();
        let mut burst: Vec<_> = (0..MANY).map(|_| server.connect()).collect();
        server.wait_for_log(&["WARN", "cannot accept connections", "Too many open files"]);
        kept.send("y");
        assert_eq!(kept.read(1), "y");
        // Each client that leaves frees a file for a waiting client, in any order.
        for client in &mut burst {
            client.send("z");
            client.finish();
        }
        for client in &mut burst {
            assert_eq!(client.read_to_end(), "z");
        }
    }
}
