//! Guests that do what they can against others on the same host.
//!
//! Each kind runs many times side by side, while an innocent client is served by the same host. A
//! second part shows that nothing of one connection's memory is seen by another.

use std::thread;
use std::time::Instant;

use crate::harness::{Client, MODES, PATIENCE, Server, fixture, run, text_fixture, wasinetd};

/// How many of a kind run side by side.
const MANY: usize = 100;

/// Limits that are met within a test: the first by guests that compute, the second by the others.
const COMPUTING: [&str; 6] = [
    "--max-memory",
    "16MiB",
    "--cpu-time",
    "50ms",
    "--max-output",
    "1KiB",
];
/// With time for a guest to have its first turn on a machine that does much else.
const WAITING: [&str; 6] = [
    "--max-memory",
    "16MiB",
    "--idle-timeout",
    "3s",
    "--write-timeout",
    "500ms",
];

/// What a host may keep of each memory that was used, in KiB.
const KEPT_OF_MEMORY: u64 = 256;

/// The same of each stack: all of it, and what the host's own functions took.
const KEPT_OF_STACK: u64 = 512 + 64;

/// What it may keep of everything else, in KiB.
const KEPT: u64 = 16 * 1024;

/// Has innocent clients be answered as long as a hundred guests do what `harm` says, each on a
/// connection of its own that ends as `outcome` says.
fn nobody_is_hurt(harm: &str, limits: &[&str], outcome: &str) {
    nobody_is_hurt_and_no_more_is_kept(harm, limits, outcome, KEPT_OF_MEMORY);
}

fn nobody_is_hurt_and_no_more_is_kept(harm: &str, limits: &[&str], outcome: &str, kept_each: u64) {
    for mode in MODES {
        let server = Server::start_alone(mode, &fixture("hostile"), limits);
        // What a hundred connections take at all is not what is asked here.
        let benign: Vec<_> = (0..MANY).map(|_| server.connect()).collect();
        benign
            .into_iter()
            .for_each(|mut client| is_answered(&mut client));
        let before = server.memory("VmRSS");

        let hostile: Vec<Client> = (0..MANY)
            .map(|_| {
                let mut client = server.connect();
                client.send(format!("{harm}\n"));
                client
            })
            .collect();
        let ended = || server.log_lines(outcome).len();
        let (start, mut answered) = (Instant::now(), 0);
        while ended() < MANY {
            for _ in 0..20 {
                is_answered(&mut server.connect());
                answered += 1;
            }
            assert!(
                start.elapsed() < 2 * PATIENCE,
                "{harm}: {} have ended, {answered} were answered\n{server:?}",
                ended()
            );
        }
        is_answered(&mut server.connect());
        drop(hostile);

        let kept = || server.memory("VmRSS").saturating_sub(before);
        let most = kept_each * MANY as u64 + KEPT;
        // What the host's heap has free goes back to the kernel after a while.
        let start = Instant::now();
        while kept() >= most {
            is_answered(&mut server.connect());
            let kept = kept();
            assert!(
                start.elapsed() < PATIENCE,
                "{harm}: {kept} KiB are kept\n{server:?}"
            );
        }
        assert_eq!(server.log_lines("a bug in wasinetd").len(), 0, "{server:?}");
    }
}

fn is_answered(client: &mut Client) {
    client.send("innocent\n");
    assert_eq!(client.read_line(), "innocent");
}

#[test]
fn who_computes_without_end() {
    nobody_is_hurt("spin", &COMPUTING, "limit=\"cpu-time\"");
}

#[test]
fn who_allocates_without_end() {
    nobody_is_hurt("spin and allocate", &COMPUTING, "limit=\"cpu-time\"");
}

#[test]
fn who_takes_all_memory_at_once() {
    nobody_is_hurt(
        "one big grow",
        &WAITING,
        "limit=\"max-memory,idle-timeout\"",
    );
}

#[test]
fn who_takes_all_memory_in_pieces() {
    nobody_is_hurt("many small grows", &WAITING, "outcome=limit: idle-timeout");
}

#[test]
fn who_recurses_without_end() {
    nobody_is_hurt_and_no_more_is_kept("recurse", &WAITING, "limit=\"stack\"", KEPT_OF_STACK);
}

#[test]
fn who_traps() {
    nobody_is_hurt("trap", &WAITING, "outcome=trap");
    nobody_is_hurt("panic", &WAITING, "outcome=trap");
    nobody_is_hurt("answer and trap", &WAITING, "outcome=trap");
}

#[test]
fn who_returns_at_once() {
    nobody_is_hurt("return", &WAITING, "outcome=ok");
}

#[test]
fn who_never_answers() {
    nobody_is_hurt("never write", &WAITING, "limit=\"idle-timeout\"");
    nobody_is_hurt("never read", &WAITING, "limit=\"idle-timeout\"");
}

#[test]
fn who_writes_without_end() {
    nobody_is_hurt("write forever", &WAITING, "limit=\"write-timeout\"");
}

#[test]
fn who_opens_streams_without_end() {
    nobody_is_hurt("open streams", &WAITING, "limit=\"max-handles\"");
}

#[test]
fn who_leaks_streams() {
    nobody_is_hurt("leak streams", &WAITING, "outcome=ok");
}

#[test]
fn who_calls_the_host_without_end() {
    nobody_is_hurt("call without end", &WAITING, "limit=\"max-handles\"");
}

#[test]
fn who_prints_without_end() {
    nobody_is_hurt("print", &COMPUTING, "limit=\"max-output,cpu-time\"");
}

#[test]
fn who_asks_for_randomness_without_end() {
    nobody_is_hurt("ask for randomness", &COMPUTING, "limit=\"cpu-time\"");
}

/// Connects, and is reset, perhaps before it knows that it was connected.
fn is_reset(server: &Server) {
    if let Ok(mut client) = Client::connect(server.address()) {
        assert!(client.read_all().1.is_err());
    }
}

#[test]
fn who_traps_before_the_first_call() {
    for mode in MODES {
        let server = Server::start(mode, &fixture("init_traps"), &[]);
        (0..MANY).for_each(|_| is_reset(&server));
        server.wait_for_log(&["connection ended", "outcome=trap"]);
    }
}

#[test]
fn who_traps_while_it_is_instantiated_is_not_served() {
    let mut command = wasinetd();
    command.args(["serve", "--listen", "127.0.0.1:0"]);
    let output = run(command.arg(text_fixture("start_traps")));
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(65), "{text}");
    assert!(text.contains("unreachable"), "{text}");
}

#[test]
fn who_takes_all_it_can_by_tables() {
    for mode in MODES {
        // Every other connection is an innocent one.
        let server = Server::start_alone(mode, &text_fixture("table_bomb"), &COMPUTING);
        let before = server.memory("VmRSS");
        let mut clients: Vec<_> = (0..2 * MANY).map(|_| server.connect()).collect();
        let ends: Vec<_> = clients
            .iter_mut()
            .map(|client| client.read_all().1)
            .collect();
        let answered = ends.iter().filter(|end| end.is_ok()).count();
        assert_eq!(answered, MANY, "{server:?}");
        while server.log_lines("connection ended").len() < 2 * MANY {}
        assert_eq!(server.log_lines("limit=\"cpu-time\"").len(), MANY);
        let kept = server.memory("VmRSS").saturating_sub(before);
        let most = KEPT_OF_MEMORY * 2 * MANY as u64 + KEPT;
        assert!(kept < most, "{kept} KiB are kept\n{server:?}");
    }
}

#[test]
fn who_drops_its_connection_first_can_go_on() {
    for mode in MODES {
        let server = Server::start(mode, &fixture("drops_connection_first"), &[]);
        for _ in 0..MANY {
            let mut client = server.connect();
            for text in ["one", "more"] {
                client.send(text);
                assert_eq!(client.read(text.len()), text);
            }
            client.finish();
            assert_eq!(client.read_to_end(), "");
        }
        assert_eq!(server.log_lines("outcome=trap").len(), 0, "{server:?}");
    }
}

#[test]
fn nothing_of_a_connection_is_left_for_the_next() {
    for mode in MODES {
        // Few slots, so that each is used again and again.
        let few = [
            "--max-connections",
            "4",
            "--max-connections-per-source",
            "off",
            "--max-memory",
            "16MiB",
        ];
        let server = Server::start(mode, &fixture("scavenges"), &few);
        let ask = |question: &str| {
            let mut client = server.connect();
            client.send(format!("{question}\n"));
            client.read_line()
        };
        thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    for n in 0..500 {
                        assert_eq!(ask(&format!("keep SECRET--{n:040}")), "kept");
                        assert_eq!(ask("search"), "0");
                    }
                });
            }
        });
    }
}

#[test]
fn the_search_would_find_it() {
    // In the memory of the connection itself: the line that the client sent.
    let server = Server::start("concurrent", &fixture("scavenges"), &[]);
    let mut client = server.connect();
    client.send("search SECRET--\n");
    assert_ne!(client.read_line(), "0");
}
