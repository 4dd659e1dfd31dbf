//! Many connections at once, and many bytes on one connection.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::harness::{Client, MODES, PATIENCE, Server, fixture, guest};

/// The same pseudo-random bytes for sender and receiver.
///
/// The sequence has no short period, so a lost, duplicated or moved byte shows.
fn test_bytes() -> fastrand::Rng {
    fastrand::Rng::with_seed(0x9e37_79b9_7f4a_7c15)
}

#[test]
fn a_waiting_guest_uses_no_cpu_time() {
    for mode in MODES {
        // Two clients for three threads, so one thread has no client.
        let arguments = ["--dir", "static::/static", "--threads", "3"];
        let server = Server::start(mode, &guest("hello"), &arguments);
        let mut kept = server.connect();
        assert_eq!(kept.get("/").status(), "200 OK");
        let before = server.cpu_time();
        assert_eq!(server.connect().get("/sleep").status(), "200 OK");
        let used = server.cpu_time() - before;
        // `/sleep` takes 5 s: this allows a tenth of that for the epoch ticks.
        assert!(used < Duration::from_millis(500), "{used:?}\n{server:?}");
    }
}

const GIB: usize = 1 << 30;
const CHUNK: usize = 256 * 1024;

#[test]
fn one_gib_is_echoed_byte_for_byte_in_bounded_memory() {
    for mode in MODES {
        let server = Server::start_alone(mode, &guest("echo"), &[]);
        let client = server.connect();
        let before = server.memory("VmRSS");
        let mut writing = client.0.try_clone().unwrap();
        writing
            .set_write_timeout(Some(Duration::from_secs(1)))
            .unwrap();
        let (mut random, mut chunk, mut sent) = (test_bytes(), vec![0; CHUNK], 0);
        // The client does not read, so once the socket buffers are full the server stops reading.
        let rest = loop {
            random.fill(&mut chunk);
            match write_some(&mut writing, &chunk) {
                n if n == CHUNK => sent += n,
                n => break chunk[n..].to_vec(),
            }
            assert!(
                sent < GIB / 4,
                "the server buffered {sent} bytes for a client that does not read"
            );
        };
        let grown = server.memory("VmRSS").saturating_sub(before);
        assert!(
            grown < 8 * 1024,
            "memory grew by {grown} KiB for a client that does not read"
        );
        writing.set_write_timeout(Some(PATIENCE)).unwrap();
        let writer = std::thread::spawn(move || {
            writing.write_all(&rest).unwrap();
            sent += CHUNK;
            while sent < GIB {
                random.fill(&mut chunk);
                writing.write_all(&chunk).unwrap();
                sent += CHUNK;
            }
            writing.shutdown(std::net::Shutdown::Write).unwrap();
        });
        assert_echoed(client, server.memory("VmRSS"), &server);
        writer.join().unwrap();
        server.wait_for_log(&["bytes_in=1073741824 bytes_out=1073741824", "outcome=ok"]);
    }
}

/// Writes until the write timeout passes, and returns how many bytes were written.
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

/// Reads the echoed bytes, compares each one, and checks the growth of `memory_before` (KiB).
fn assert_echoed(mut client: Client, memory_before: u64, server: &Server) {
    let (mut random, mut expected, mut received) = (test_bytes(), vec![0; CHUNK], vec![0; CHUNK]);
    for offset in (0..GIB).step_by(CHUNK) {
        client.0.read_exact(&mut received).unwrap();
        random.fill(&mut expected);
        assert!(
            received == expected,
            "the {CHUNK} bytes from offset {offset} differ"
        );
    }
    assert_eq!(client.read_to_end(), "");
    let grown = server.memory("VmRSS").saturating_sub(memory_before);
    assert!(grown < 8 * 1024, "memory grew by {grown} KiB after 1 GiB");
}

/// Connections open at once.
const CONNECTIONS: usize = 10_000;

#[test]
fn ten_thousand_open_connections_each_have_their_own_sandbox() {
    allow_open_files(CONNECTIONS as u64 + 256);
    for mode in MODES {
        let limit = CONNECTIONS.to_string();
        let server = Server::start_alone(
            mode,
            &fixture("counter"),
            &["--max-connections", &limit, "--log-level", "warn"],
        );
        let mut clients: Vec<_> = (0..CONNECTIONS).map(|_| server.connect()).collect();
        // A guest answers how often it was asked: another number would mean shared state.
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

/// Raises the open file limit of the test process, or fails with the command that helps.
fn allow_open_files(needed: u64) {
    let limit = getrlimit(Resource::Nofile);
    let maximum = limit.maximum.unwrap_or(u64::MAX);
    assert!(
        maximum >= needed,
        "this test opens {needed} files and may open {maximum}: run it after `ulimit -Hn {needed}`"
    );
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    setrlimit(Resource::Nofile, raised).unwrap();
}
