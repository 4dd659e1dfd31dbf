//! Guest output in the log, and the format of the log.

use crate::harness::{MODES, Server, fixture, guest};

#[test]
fn guest_output_is_logged_with_the_connection_id() {
    for mode in MODES {
        let server = Server::start(mode, &fixture("prints"), &[]);
        server.connect().read_to_end();
        server.wait_for_log(&["guest", "id=1 ", "stdout", "to standard output"]);
        let line = server.wait_for_log(&["guest", "id=1 ", "stderr", "to standard error"]);
        assert!(
            !line.contains('\x1b'),
            "a guest can send escapes to the terminal: {line:?}"
        );
    }
}

#[test]
fn guest_output_is_limited() {
    for mode in MODES {
        let server = Server::start(mode, &fixture("prints"), &[]);
        server.connect().read_to_end();
        server.wait_for_log(&["id=1 ", "connection ended", "limit=\"max-output\""]);
        server.wait_for_log(&["WARN", "id=1 ", "bytes=65536 limit=max-output"]);
        // The fixture prints 10,000 lines of 100 bytes. A line counts as 200 bytes, so 64 KiB allow
        // about 327 lines.
        let lines = server.log_lines("xxxxxxxxxx").len();
        assert!((325..=330).contains(&lines), "{lines} lines");
    }
}

#[test]
fn the_log_format_can_be_json() {
    let server = Server::start(
        "spawn",
        &guest("hello"),
        &["--dir", "static::/static", "--log-format", "json"],
    );
    server.connect().get("/");
    let line = server.wait_for_log(&["connection ended"]);
    assert!(line.starts_with('{') && line.ends_with('}'), "{line}");
    for part in [
        r#""id":1"#,
        r#""outcome":"ok""#,
        r#""bytes_in":"#,
        r#""peer":"127.0.0.1:"#,
    ] {
        assert!(line.contains(part), "no {part} in {line}");
    }
}

#[test]
fn log_level_error_keeps_the_log_empty() {
    let mut server = Server::start(
        "spawn",
        &guest("hello"),
        &["--dir", "static::/static", "--log-level", "error"],
    );
    server.connect().get("/");
    server.signal(rustix::process::Signal::TERM);
    server.wait();
    assert_eq!(server.log_lines("").len(), 0, "{server:?}");
}
