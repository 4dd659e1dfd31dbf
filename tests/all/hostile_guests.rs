//! Guests that try to harm other connections of the same server.
//!
//! Each kind of guest runs many times in parallel, while the server answers innocent clients.
//! Further tests show that a guest cannot see the memory of another connection.

use std::thread;
use std::time::Instant;

use crate::harness::{
    Client, MODES, PATIENCE, Server, fixture, run, wait_until, wasinetd, wat_fixture,
};

/// The number of hostile guests at the same time.
const MANY: usize = 100;

/// Limits that guests that compute reach within a test.
const COMPUTING: [&str; 6] = [
    "--max-memory",
    "16MiB",
    "--cpu-time",
    "50ms",
    "--max-output",
    "1KiB",
];

/// Limits that guests that wait reach within a test.
///
/// They leave a guest time to start on a busy machine.
const WAITING: [&str; 6] = [
    "--max-memory",
    "16MiB",
    "--idle-timeout",
    "3s",
    "--write-timeout",
    "500ms",
];

/// The resident memory that a used pool slot may keep, in KiB.
const KEPT_PER_SLOT: u64 = 256;

/// The same of a used stack, with the frames of the host.
const KEPT_PER_STACK: u64 = 512 + 64;

/// The resident memory that the host may keep otherwise, in KiB.
const KEPT_BY_HOST: u64 = 16 * 1024;

/// Asserts that innocent clients are answered while a hundred guests do `harm`.
///
/// Each hostile connection ends with a log line that contains `outcome`.
fn assert_harmless(harm: &str, limits: &[&str], outcome: &str) {
    assert_harmless_with_memory(harm, limits, outcome, KEPT_PER_SLOT);
}

/// Like [`assert_harmless`]. Each hostile guest may leave `kept_each` KiB behind.
fn assert_harmless_with_memory(harm: &str, limits: &[&str], outcome: &str, kept_each: u64) {
    for mode in MODES {
        let server = Server::start_alone(mode, &fixture("hostile"), limits);
        // The memory of a hundred innocent connections does not count.
        let innocent: Vec<_> = (0..MANY).map(|_| server.connect()).collect();
        for mut client in innocent {
            assert_answered(&mut client);
        }
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
                assert_answered(&mut server.connect());
                answered += 1;
            }
            assert!(
                start.elapsed() < 2 * PATIENCE,
                "{harm}: {} connections have ended, {answered} clients were answered\n{server:?}",
                ended()
            );
        }
        assert_answered(&mut server.connect());
        drop(hostile);

        let kept = || server.memory("VmRSS").saturating_sub(before);
        let most = kept_each * MANY as u64 + KEPT_BY_HOST;
        // The allocator returns free memory to the kernel after a delay.
        let start = Instant::now();
        while kept() >= most {
            assert_answered(&mut server.connect());
            let kept = kept();
            assert!(
                start.elapsed() < PATIENCE,
                "{harm}: the server keeps {kept} KiB\n{server:?}"
            );
        }
        assert_eq!(server.log_lines("a bug in wasinetd").len(), 0, "{server:?}");
    }
}

/// Asserts that an innocent client gets its answer.
fn assert_answered(client: &mut Client) {
    client.send("innocent\n");
    assert_eq!(client.read_line(), "innocent");
}

#[test]
fn guests_that_compute_forever_harm_no_other_client() {
    assert_harmless("spin", &COMPUTING, "limit=\"cpu-time\"");
}

#[test]
fn guests_that_allocate_forever_harm_no_other_client() {
    assert_harmless("spin and allocate", &COMPUTING, "limit=\"cpu-time\"");
}

#[test]
fn guests_that_take_all_memory_at_once_harm_no_other_client() {
    assert_harmless(
        "one big grow",
        &WAITING,
        "limit=\"max-memory,idle-timeout\"",
    );
}

#[test]
fn guests_that_take_all_memory_in_pieces_harm_no_other_client() {
    assert_harmless("many small grows", &WAITING, "outcome=limit: idle-timeout");
}

#[test]
fn guests_that_recurse_forever_harm_no_other_client() {
    assert_harmless_with_memory("recurse", &WAITING, "limit=\"stack\"", KEPT_PER_STACK);
}

#[test]
fn guests_that_trap_harm_no_other_client() {
    assert_harmless("trap", &WAITING, "outcome=trap");
    assert_harmless("panic", &WAITING, "outcome=trap");
    assert_harmless("answer and trap", &WAITING, "outcome=trap");
}

#[test]
fn guests_that_return_at_once_harm_no_other_client() {
    assert_harmless("return", &WAITING, "outcome=ok");
}

#[test]
fn guests_that_never_answer_harm_no_other_client() {
    assert_harmless("never write", &WAITING, "limit=\"idle-timeout\"");
    assert_harmless("never read", &WAITING, "limit=\"idle-timeout\"");
}

#[test]
fn guests_that_write_forever_harm_no_other_client() {
    assert_harmless("write forever", &WAITING, "limit=\"write-timeout\"");
}

#[test]
fn guests_that_open_streams_forever_harm_no_other_client() {
    assert_harmless("open streams", &WAITING, "limit=\"max-handles\"");
}

#[test]
fn guests_that_leak_streams_harm_no_other_client() {
    assert_harmless("leak streams", &WAITING, "outcome=ok");
}

#[test]
fn guests_that_call_the_host_forever_harm_no_other_client() {
    assert_harmless("call without end", &WAITING, "limit=\"max-handles\"");
}

#[test]
fn guests_that_print_forever_harm_no_other_client() {
    assert_harmless("print", &COMPUTING, "limit=\"max-output,cpu-time\"");
}

#[test]
fn guests_that_request_random_bytes_forever_harm_no_other_client() {
    assert_harmless("ask for randomness", &COMPUTING, "limit=\"cpu-time\"");
}

/// Asserts that a new connection is reset, perhaps before `connect` returns.
fn assert_reset(server: &Server) {
    if let Ok(mut client) = Client::connect(server.address()) {
        assert!(client.read_all().1.is_err());
    }
}

#[test]
fn guests_that_trap_before_the_first_call_are_reset() {
    for mode in MODES {
        let server = Server::start(mode, &fixture("init_traps"), &[]);
        (0..MANY).for_each(|_| assert_reset(&server));
        server.wait_for_log(&["connection ended", "outcome=trap"]);
    }
}

#[test]
fn a_guest_that_traps_during_instantiation_is_refused() {
    let mut command = wasinetd();
    command.args(["serve", "--listen", "127.0.0.1:0"]);
    let output = run(command.arg(wat_fixture("start_traps")));
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(65), "{text}");
    assert!(text.contains("unreachable"), "{text}");
}

/// A build of wasmtime without garbage collection aborts the process here (GHSA-rc4p-x33f-vpr2).
#[test]
fn a_guest_can_cast_functions() {
    for mode in MODES {
        let server = Server::start(mode, &wat_fixture("casts_functions"), &[]);
        for _ in 0..2 {
            let mut client = server.connect();
            client.finish();
            assert_eq!(client.read_to_end(), "", "{server:?}");
        }
    }
}

/// wasmtime confuses the ends of this guest's stream (GHSA-xrvr-8678-5wp8).
#[test]
fn guests_that_cancel_a_stream_on_its_wrong_end_are_reset() {
    for mode in MODES {
        let server = Server::start(mode, &wat_fixture("cancels_wrong_end"), &[]);
        (0..MANY).for_each(|_| assert_reset(&server));
        server.wait_for_log(&["connection ended", "outcome=trap"]);
    }
}

#[test]
fn guests_that_fill_tables_harm_no_other_client() {
    for mode in MODES {
        // Every second connection is innocent.
        let server = Server::start_alone(mode, &wat_fixture("table_bomb"), &COMPUTING);
        let before = server.memory("VmRSS");
        let mut clients: Vec<_> = (0..2 * MANY).map(|_| server.connect()).collect();
        let ends: Vec<_> = clients
            .iter_mut()
            .map(|client| client.read_all().1)
            .collect();
        let answered = ends.iter().filter(|end| end.is_ok()).count();
        assert_eq!(answered, MANY, "{server:?}");
        wait_until("connections do not end", || {
            server.log_lines("connection ended").len() >= 2 * MANY
        });
        assert_eq!(server.log_lines("limit=\"cpu-time\"").len(), MANY);
        let kept = server.memory("VmRSS").saturating_sub(before);
        let most = KEPT_PER_SLOT * 2 * MANY as u64 + KEPT_BY_HOST;
        assert!(kept < most, "the server keeps {kept} KiB\n{server:?}");
    }
}

#[test]
fn a_guest_can_drop_its_connection_and_keep_its_streams() {
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
fn memory_of_a_connection_is_erased_for_the_next() {
    for mode in MODES {
        // With few slots each is reused many times.
        let few = ["--max-connections", "4", "--max-memory", "16MiB"];
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
fn the_memory_search_finds_data_of_its_own_connection() {
    // The line of the client is in the memory of its own guest.
    let server = Server::start("concurrent", &fixture("scavenges"), &[]);
    let mut client = server.connect();
    client.send("search SECRET--\n");
    assert_ne!(client.read_line(), "0");
}
