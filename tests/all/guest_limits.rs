//! Each limit of a guest: obeyed and violated.

use std::fs::File;
use std::net::Shutdown;

use crate::harness::{Client, MODES, Server, fixture, run, wasinetd};

/// Sends a request to the guest of a new connection. None if the guest is stopped.
fn ask(server: &Server, request: &str) -> Option<String> {
    let mut client = server.connect();
    client.send(format!("{request}\n"));
    // The connection may be reset already.
    let _ = client.0.shutdown(Shutdown::Write);
    let (bytes, end) = client.read_all();
    end.ok()
        .map(|()| String::from_utf8_lossy(&bytes).trim_end().to_string())
}

/// Asserts that `limit` allows `within` and stops a guest at `beyond`.
///
/// Another connection goes on meanwhile.
fn assert_limit(arguments: &[&str], within: &str, beyond: &str, limit: &str) {
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

/// Sends a small request on an open connection.
fn ask_again(client: &mut Client) -> String {
    client.send("memory 1\n");
    client.read_line()
}

#[test]
fn max_memory_refuses_further_memory() {
    for mode in MODES {
        let server = Server::start(mode, &fixture("uses_resources"), &["--max-memory", "4MiB"]);
        assert_eq!(ask(&server, "memory 2000000").as_deref(), Some("done"));
        server.wait_for_log(&["id=1 ", "outcome=ok"]);
        assert!(
            !server.log_lines("id=1 ")[0].contains("limit="),
            "{server:?}"
        );
        // The guest gets an error and goes on.
        let refused = ask(&server, "memory 4000000").unwrap();
        assert!(refused.contains("memory allocation failed"), "{refused}");
        server.wait_for_log(&["id=2 ", "outcome=ok", "limit=\"max-memory\""]);
    }
}

#[test]
fn max_total_memory_bounds_all_guests_together() {
    for mode in MODES {
        let server = Server::start(
            mode,
            &fixture("uses_resources"),
            &["--max-total-memory", "8MiB"],
        );
        // A guest keeps its memory until its connection ends.
        let mut first = server.connect();
        first.send("memory 6000000\n");
        assert_eq!(first.read_line(), "done");
        let refused = ask(&server, "memory 6000000").unwrap();
        assert!(refused.contains("memory allocation failed"), "{refused}");
        server.wait_for_log(&["id=2 ", "outcome=ok", "limit=\"max-total-memory\""]);
        // The initial memory of a guest does not count.
        assert_eq!(ask(&server, "memory 100000").as_deref(), Some("done"));
        drop(first);
        server.wait_for_log(&["id=1 ", "connection ended"]);
        assert_eq!(ask(&server, "memory 6000000").as_deref(), Some("done"));
    }
}

#[test]
fn a_guest_with_too_much_initial_memory_is_refused() {
    let output = run(wasinetd().args([
        "serve",
        "--listen",
        "127.0.0.1:0",
        "--max-memory",
        "128KiB",
        fixture("uses_resources").to_str().unwrap(),
    ]));
    assert_eq!(output.status.code(), Some(65));
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("max-memory allows 131072"), "{text}");
}

#[test]
fn cpu_time_limits_computing() {
    assert_limit(
        &["--cpu-time", "500ms"],
        "compute 200",
        "compute 60000",
        "cpu-time",
    );
}

#[test]
fn cpu_time_does_not_count_waiting() {
    for mode in MODES {
        let server = Server::start(mode, &fixture("spin_or_sleep"), &["--cpu-time", "200ms"]);
        let mut client = server.connect();
        client.send("sleep\n");
        assert_eq!(client.read_line(), "awake");
    }
}

#[test]
fn stack_limits_recursion() {
    assert_limit(&[], "recurse 1000", "recurse 1000000", "stack");
    // A smaller stack allows less depth.
    assert_limit(
        &["--stack", "32KiB"],
        "recurse 100",
        "recurse 4000",
        "stack",
    );
}

#[test]
fn max_handles_limits_open_handles() {
    assert_limit(
        &["--max-handles", "100"],
        "streams 40",
        "streams 100",
        "max-handles",
    );
}

#[test]
fn max_open_files_limits_open_files() {
    let directory = tempfile::tempdir().unwrap();
    File::create(directory.path().join("file")).unwrap();
    let grant = format!("{}::/granted", directory.path().display());
    assert_limit(
        &["--dir", &grant, "--max-open-files", "20"],
        "files 10 /granted/file",
        "files 20 /granted/file",
        "max-open-files",
    );
}

#[test]
fn max_call_size_limits_the_data_of_a_call() {
    let directory = tempfile::tempdir().unwrap();
    let grant = format!("{}::/granted", directory.path().display());
    assert_limit(
        &["--dir", &grant, "--max-call-size", "4KiB"],
        "call 3000 /granted",
        "call 5000 /granted",
        "max-call-size",
    );
}

#[test]
fn max_output_limits_logged_output() {
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
