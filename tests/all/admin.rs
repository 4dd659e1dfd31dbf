//! What an operator sees of a running server.

use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::process::Signal;

use crate::harness::{MODES, Server, fixture, guest, output, page, run, wasinetd};

/// A path for a socket, in a directory that is gone with it.
fn socket() -> (tempfile::TempDir, PathBuf, String) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("admin.sock");
    let flag = format!("unix:{}", path.display());
    (directory, path, flag)
}

/// What curl gets, with the status and the media type on a last line.
fn ask(socket: &Path, path: &str, arguments: &[&str]) -> String {
    let mut command = Command::new("curl");
    command
        .args(["--silent", "--show-error", "--max-time", "60"])
        .args(["--write-out", "%{http_code} %{content_type}"])
        .args(arguments)
        .arg("--unix-socket")
        .arg(socket)
        .arg(format!("http://localhost{path}"));
    let output = output(&mut command);
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// A figure of the metrics.
fn figure(socket: &Path, name: &str) -> f64 {
    let metrics = ask(socket, "/metrics", &[]);
    metrics
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))
        .unwrap_or_else(|| panic!("no {name} in\n{metrics}"))
        .parse()
        .unwrap()
}

#[test]
fn connections_and_what_they_move_are_counted() {
    for mode in MODES {
        let (_directory, socket, flag) = socket();
        let server = Server::start(mode, &guest("echo"), &["--admin", &flag]);
        assert_eq!(figure(&socket, "wasinetd_connections_open"), 0.0);
        let mut client = server.connect();
        client.send("hello");
        assert_eq!(client.read(5), "hello");
        assert_eq!(figure(&socket, "wasinetd_connections_open"), 1.0);
        client.finish();
        assert_eq!(client.read_to_end(), "");
        drop(client);
        server.wait_for_log(&["connection ended"]);
        // The line comes first.
        while figure(&socket, "wasinetd_connections_open") > 0.0 {}
        for (name, value) in [
            ("wasinetd_connections_total{outcome=\"ok\"}", 1.0),
            ("wasinetd_connections_total{outcome=\"trap\"}", 0.0),
            ("wasinetd_received_bytes_total", 5.0),
            ("wasinetd_sent_bytes_total", 5.0),
            ("wasinetd_connection_duration_seconds_count", 1.0),
            ("wasinetd_accept_errors_total", 0.0),
            ("wasinetd_guests_memory_bytes", 0.0),
        ] {
            assert_eq!(figure(&socket, name), value, "{name}");
        }
    }
}

#[test]
fn each_limit_is_counted_when_it_is_met() {
    for mode in MODES {
        let (_directory, socket, flag) = socket();
        let limits = [
            "--admin",
            &flag,
            "--cpu-time",
            "100ms",
            "--max-memory",
            "4MiB",
        ];
        let server = Server::start(mode, &fixture("uses"), &limits);
        let met = |limit| {
            figure(
                &socket,
                &format!("wasinetd_limits_met_total{{limit=\"{limit}\"}}"),
            )
        };
        let all = ask(&socket, "/metrics", &[]);
        let counted: Vec<_> = all
            .lines()
            .filter_map(|line| line.strip_prefix("wasinetd_limits_met_total{limit=\""))
            .filter_map(|line| line.split('"').next())
            .collect();
        // Those of `--help`, but for what is no limit by itself.
        assert_eq!(counted.len(), 22, "{all}");
        for flag in counted {
            assert_eq!(met(flag), 0.0, "{flag}");
        }
        for (request, limit) in [
            ("memory 100000000", "max-memory"),
            ("compute 5000", "cpu-time"),
            ("recurse 10000000", "stack"),
            ("streams 100000", "max-handles"),
        ] {
            let mut client = server.connect();
            client.send(format!("{request}\n"));
            // It may be reset before, or have an answer.
            let _ = client.0.shutdown(Shutdown::Write);
            let _ = client.read_all();
            server.wait_for_log(&["connection ended", &format!("limit=\"{limit}\"")]);
            assert_eq!(met(limit), 1.0, "{limit}");
        }
    }
}

#[test]
fn who_asks_learns_whether_it_serves_and_what_there_is() {
    for mode in MODES {
        let (_directory, socket, flag) = socket();
        let pages = ["--dir", "static::/static", "--admin", &flag];
        let mut server = Server::start(mode, &guest("hello"), &pages);
        let plain = "text/plain; charset=utf-8";
        assert_eq!(ask(&socket, "/healthz", &[]), format!("ok\n200 {plain}"));
        assert_eq!(ask(&socket, "/readyz", &[]), format!("ready\n200 {plain}"));
        assert!(
            ask(&socket, "/metrics", &[])
                .ends_with("# EOF\n200 application/openmetrics-text; version=1.0.0; charset=utf-8")
        );
        assert!(ask(&socket, "/nothing", &[]).contains("/metrics\n404 "));
        assert!(ask(&socket, "/healthz", &["--request", "DELETE"]).contains("405 "));
        let mut sleeper = server.connect();
        sleeper.send("GET /sleep HTTP/1.1\r\nHost: test\r\n\r\n");
        while figure(&socket, "wasinetd_connections_open") < 1.0 {}
        server.signal(Signal::TERM);
        server.wait_for_log(&["draining"]);
        assert_eq!(
            ask(&socket, "/readyz", &[]),
            format!("draining\n503 {plain}")
        );
        assert_eq!(ask(&socket, "/healthz", &[]), format!("ok\n200 {plain}"));
        assert_eq!(sleeper.response().body, page("hello.html"));
        assert_eq!(server.wait().code(), Some(0));
        assert!(!socket.exists());
    }
}

#[test]
fn only_the_same_user_may_connect_and_nothing_is_written_over() {
    let (directory, socket, flag) = socket();
    let refused = |flag: &str, part: &str| {
        let mut command = wasinetd();
        command.args(["serve", "--listen", "127.0.0.1:0", "--admin", flag]);
        let output = output(command.arg(guest("echo")));
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(69), "{text}");
        assert!(text.contains("--admin") && text.contains(part), "{text}");
    };
    {
        // A server that is gone has left it.
        drop(UnixListener::bind(&socket).unwrap());
        let server = Server::start("concurrent", &guest("echo"), &["--admin", &flag]);
        let mode = std::fs::metadata(&socket).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        refused(&flag, "stop the server");
        assert_eq!(
            figure(&socket, "wasinetd_connections_open"),
            0.0,
            "{server:?}"
        );
    }
    // One that listens in its own way is somebody's.
    let datagrams = directory.path().join("datagrams");
    let somebody = UnixDatagram::bind(&datagrams).unwrap();
    refused(&format!("unix:{}", datagrams.display()), "stop the server");
    somebody.send_to(b"still there", &datagrams).unwrap();
    let file = directory.path().join("file");
    std::fs::write(&file, "kept").unwrap();
    refused(&format!("unix:{}", file.display()), "not a socket");
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "kept");
    refused("unix:/no/such/directory/admin.sock", "No such file");
    let mut usage = wasinetd();
    usage
        .args(["serve", "--admin", "127.0.0.1:1"])
        .arg(guest("echo"));
    assert_eq!(run(&mut usage).status.code(), Some(64));
}
