//! Each limit of a guest, obeyed and violated.

use std::fs::File;
use std::net::Shutdown;

use crate::harness::{Client, MODES, Server, fixture};

/// Asks a new connection's guest to use something, and returns its answer, or None if it was stopped.
fn ask(server: &Server, request: &str) -> Option<String> {
    let mut client = server.connect();
    client.send(format!("{request}\n"));
    // It may have been reset already.
    let _ = client.0.shutdown(Shutdown::Write);
    let (bytes, end) = client.read_all();
    end.ok()
        .map(|()| String::from_utf8_lossy(&bytes).trim_end().to_string())
}

/// A guest does `within`, and is stopped for `limit` when it is asked for `beyond`. Others go on.
fn stops(arguments: &[&str], within: &str, beyond: &str, limit: &str) {
    for mode in MODES {
        let server = Server::start(mode, &fixture("uses_resources"), arguments);
        let mut other = server.connect();
        assert_eq!(ask_again(&mut other), "done");
        assert_eq!(ask(&server, within).as_deref(), Some("done"), "{server:?}");
        server.wait_for_log(&["id=2 ", "outcome=ok"]);
        assert!(
            !server.log_lines("id=2 ")[0].contains("limit="),
            "{server:?}"
        );
        assert_eq!(ask(&server, beyond), None, "{server:?}");
        server.wait_for_log(&["id=3 ", "outcome=trap", &format!("limit=\"{limit}\"")]);
        assert_eq!(ask_again(&mut other), "done");
    }
}

fn ask_again(client: &mut Client) -> String {
    client.send("memory 1\n");
    client.read_line()
}

#[test]
fn memory_is_refused_beyond_its_limit() {
    for mode in MODES {
        let server = Server::start(mode, &fixture("uses_resources"), &["--max-memory", "4MiB"]);
        assert_eq!(ask(&server, "memory 2000000").as_deref(), Some("done"));
        server.wait_for_log(&["id=1 ", "outcome=ok"]);
        assert!(
            !server.log_lines("id=1 ")[0].contains("limit="),
            "{server:?}"
        );
        // It is told so, and lives.
        let refused = ask(&server, "memory 4000000").unwrap();
        assert!(refused.contains("memory allocation failed"), "{refused}");
        server.wait_for_log(&["id=2 ", "outcome=ok", "limit=\"max-memory\""]);
    }
}

#[test]
fn memory_of_all_guests_is_bounded() {
    for mode in MODES {
        let server = Server::start(
            mode,
            &fixture("uses_resources"),
            &["--max-total-memory", "8MiB"],
        );
        // What a guest has grown to stays its own until its connection ends.
        let mut first = server.connect();
        first.send("memory 6000000\n");
        assert_eq!(first.read_line(), "done");
        let refused = ask(&server, "memory 6000000").unwrap();
        assert!(refused.contains("memory allocation failed"), "{refused}");
        server.wait_for_log(&["id=2 ", "outcome=ok", "limit=\"max-total-memory\""]);
        // What every guest has is not counted.
        assert_eq!(ask(&server, "memory 100000").as_deref(), Some("done"));
        drop(first);
        server.wait_for_log(&["id=1 ", "connection ended"]);
        assert_eq!(ask(&server, "memory 6000000").as_deref(), Some("done"));
    }
}

#[test]
fn a_guest_that_would_begin_beyond_its_memory_is_refused() {
    let output = crate::harness::run(crate::harness::wasinetd().args([
        "serve",
        "--listen",
        "127.0.0.1:0",
        "--max-memory",
        "128KiB",
        fixture("uses_resources").to_str().unwrap(),
    ]));
    assert_eq!(output.status.code(), Some(65));
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("--max-memory allows 131072"), "{text}");
}

#[test]
fn a_guest_may_compute_for_so_long() {
    stops(
        &["--cpu-time", "500ms"],
        "compute 200",
        "compute 60000",
        "cpu-time",
    );
}

#[test]
fn waiting_is_not_computing() {
    for mode in MODES {
        let server = Server::start(mode, &fixture("spin_or_sleep"), &["--cpu-time", "200ms"]);
        let mut client = server.connect();
        client.send("sleep\n");
        assert_eq!(client.read_line(), "awake");
    }
}

#[test]
fn a_stack_is_so_deep() {
    stops(&[], "recurse 1000", "recurse 1000000", "stack");
    // The same depth needs more than a small stack has.
    stops(
        &["--stack", "32KiB"],
        "recurse 100",
        "recurse 4000",
        "stack",
    );
}

#[test]
fn a_guest_has_so_many_handles() {
    stops(
        &["--max-handles", "100"],
        "streams 40",
        "streams 100",
        "max-handles",
    );
}

#[test]
fn a_guest_has_so_many_files_open() {
    let directory = tempfile::tempdir().unwrap();
    File::create(directory.path().join("file")).unwrap();
    let grant = format!("{}::/granted", directory.path().display());
    stops(
        &["--dir", &grant, "--max-open-files", "20"],
        "files 10 /granted/file",
        "files 20 /granted/file",
        "max-open-files",
    );
}

#[test]
fn a_call_hands_over_so_much() {
    let directory = tempfile::tempdir().unwrap();
    let grant = format!("{}::/granted", directory.path().display());
    stops(
        &["--dir", &grant, "--max-call-size", "4KiB"],
        "call 3000 /granted",
        "call 5000 /granted",
        "max-call-size",
    );
}

#[test]
fn so_much_of_what_a_guest_prints_is_logged() {
    for mode in MODES {
        let server = Server::start(mode, &fixture("uses_resources"), &["--max-output", "1KiB"]);
        assert_eq!(ask(&server, "print 1000").as_deref(), Some("done"));
        server.wait_for_log(&["id=1 ", "outcome=ok"]);
        assert_eq!(ask(&server, "print 2000").as_deref(), Some("done"));
        server.wait_for_log(&["id=2 ", "outcome=ok", "limit=\"max-output\""]);
        assert!(
            server
                .log_lines("id=1 ")
                .iter()
                .all(|line| !line.contains("limit="))
        );
    }
}
