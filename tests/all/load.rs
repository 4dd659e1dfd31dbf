//! Much at once, and much at all.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::harness::{Client, MODES, PATIENCE, Server, fixture, guest};

/// A sequence of bytes without a short period, so that any that is lost, doubled or moved shows.
struct Sequence(u64);

impl Sequence {
    fn new() -> Self {
        Self(0x9e37_79b9_7f4a_7c15)
    }

    /// Xorshift (Marsaglia, 2003).
    fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_exact_mut(8) {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            chunk.copy_from_slice(&self.0.to_le_bytes());
        }
    }
}

#[test]
fn waiting_costs_no_processor_time() {
    for mode in MODES {
        // Two clients for three threads: one has nobody to wait for.
        let arguments = ["--dir", "static::/static", "--threads", "3"];
        let server = Server::start(mode, &guest("hello"), &arguments);
        let mut kept = server.connect();
        assert_eq!(kept.get("/").status(), "200 OK");
        let before = server.cpu_time();
        assert_eq!(server.connect().get("/sleep").status(), "200 OK");
        let used = server.cpu_time() - before;
        // A tenth of the time: it ticks for its guests.
        assert!(used < Duration::from_millis(500), "{used:?}\n{server:?}");
    }
}

const GIB: usize = 1 << 30;
const CHUNK: usize = 256 * 1024;

#[test]
fn one_gib_comes_back_byte_for_byte_in_bounded_memory() {
    for mode in MODES {
        let server = Server::start_alone(mode, &guest("echo"), &[]);
        let client = server.connect();
        let before = server.memory("VmRSS");
        let mut writing = client.0.try_clone().unwrap();
        writing
            .set_write_timeout(Some(Duration::from_secs(1)))
            .unwrap();
        let (mut sequence, mut chunk, mut sent) = (Sequence::new(), vec![0; CHUNK], 0);
        // Nobody reads: after what the sockets hold, the server takes no more.
        let rest = loop {
            sequence.fill(&mut chunk);
            match write_some(&mut writing, &chunk) {
                n if n == CHUNK => sent += n,
                n => break chunk[n..].to_vec(),
            }
            assert!(
                sent < GIB / 4,
                "the server takes {sent} bytes that nobody reads"
            );
        };
        let grown = server.memory("VmRSS").saturating_sub(before);
        assert!(
            grown < 8 * 1024,
            "{grown} KiB more for a client that does not read"
        );
        writing.set_write_timeout(Some(PATIENCE)).unwrap();
        let writer = std::thread::spawn(move || {
            writing.write_all(&rest).unwrap();
            sent += CHUNK;
            while sent < GIB {
                sequence.fill(&mut chunk);
                writing.write_all(&chunk).unwrap();
                sent += CHUNK;
            }
            writing.shutdown(std::net::Shutdown::Write).unwrap();
        });
        compare(client, server.memory("VmRSS"), &server);
        writer.join().unwrap();
        server.wait_for_log(&["bytes_in=1073741824 bytes_out=1073741824", "outcome=ok"]);
    }
}

/// Writes until nothing is taken for the length of the time limit.
fn write_some(stream: &mut TcpStream, bytes: &[u8]) -> usize {
    let mut written = 0;
    while written < bytes.len() {
        match stream.write(&bytes[written..]) {
            Ok(n) => written += n,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                break;
            }
            Err(error) => panic!("{error}"),
        }
    }
    written
}

fn compare(mut client: Client, before: u64, server: &Server) {
    let (mut sequence, mut expected, mut got) = (Sequence::new(), vec![0; CHUNK], vec![0; CHUNK]);
    for offset in (0..GIB).step_by(CHUNK) {
        client.0.read_exact(&mut got).unwrap();
        sequence.fill(&mut expected);
        assert!(got == expected, "bytes differ in the {CHUNK} from {offset}");
    }
    assert_eq!(client.read_to_end(), "");
    let grown = server.memory("VmRSS").saturating_sub(before);
    assert!(grown < 8 * 1024, "{grown} KiB more after a GiB");
}

/// The connections that are held at once.
const MANY: usize = 10_000;

#[test]
fn ten_thousand_connections_are_held_each_in_its_own_sandbox() {
    allow_open_files(MANY as u64 + 256);
    for mode in MODES {
        let many = MANY.to_string();
        let server = Server::start_alone(
            mode,
            &fixture("counter"),
            &["--max-connections", &many, "--log-level", "warn"],
        );
        let mut clients: Vec<_> = (0..MANY).map(|_| server.connect()).collect();
        // Each answers how often it was asked: all the same number, or they share something.
        for round in ["1", "2"] {
            for client in &mut clients {
                client.send("?");
            }
            for client in &mut clients {
                assert_eq!(client.read_line(), round);
            }
        }
    }
}

/// Raises our own limit, or says what is missing.
fn allow_open_files(wanted: u64) {
    let limit = getrlimit(Resource::Nofile);
    let maximum = limit.maximum.unwrap_or(u64::MAX);
    assert!(
        maximum >= wanted,
        "this test opens {wanted} files and may open {maximum}: run it after `ulimit -Hn {wanted}`"
    );
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    setrlimit(Resource::Nofile, raised).unwrap();
}
