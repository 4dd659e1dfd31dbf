//! What an operator sees of a running server.

use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::process::Signal;

use crate::harness::{MODES, Server, fixture, guest, output, page, wasinetd};

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

/// A figure of the metrics: the sum of the series with this name, without `wasinetd_`, and this label.
fn figure(socket: &Path, name: &str, label: &str) -> f64 {
    let metrics = ask(socket, "/metrics", &[]);
    let series: Vec<f64> = metrics
        .lines()
        .filter_map(|line| {
            let (series, figure) = line.rsplit_once(' ')?;
            let (this, labels) = series.split_once('{').unwrap_or((series, ""));
            let wanted = this.strip_prefix("wasinetd_")? == name && labels.contains(label);
            wanted.then(|| figure.parse().unwrap())
        })
        .collect();
    assert!(!series.is_empty(), "no {name} with {label} in\n{metrics}");
    series.iter().sum()
}

#[test]
fn connections_and_what_they_move_are_counted() {
    for mode in MODES {
        let (_directory, socket, flag) = socket();
        let server = Server::start(mode, &guest("echo"), &["--admin", &flag]);
        assert_eq!(figure(&socket, "connections_open", ""), 0.0);
        let mut client = server.connect();
        client.send("hello");
        assert_eq!(client.read(5), "hello");
        assert_eq!(figure(&socket, "connections_open", ""), 1.0);
        client.finish();
        assert_eq!(client.read_to_end(), "");
        drop(client);
        server.wait_for_log(&["connection ended"]);
        // The line comes first.
        while figure(&socket, "connections_open", "") > 0.0 {}
        for (name, label, value) in [
            ("connections_total", "outcome=\"ok\"", 1.0),
            ("connections_total", "outcome=\"trap\"", 0.0),
            ("received_bytes_total", "service=\"default\"", 5.0),
            ("sent_bytes_total", "service=\"default\"", 5.0),
            ("connection_duration_seconds_count", "", 1.0),
            ("instantiation_duration_seconds_count", "", 1.0),
            ("connection_cpu_seconds_count", "", 1.0),
            ("connection_memory_bytes_count", "", 1.0),
            ("accept_errors_total", "", 0.0),
            ("guests_memory_bytes", "", 0.0),
            ("pool_instances", "", 0.0),
        ] {
            assert_eq!(figure(&socket, name, label), value, "{name} {label}");
        }
        // Rust's guests begin with some hundred KiB.
        assert!(figure(&socket, "connection_memory_bytes_sum", "") > 1e5);
        assert_eq!(
            figure(&socket, "connection_memory_bytes_bucket", "+Inf"),
            1.0
        );
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
        let server = Server::start(mode, &fixture("uses_resources"), &limits);
        let met = |limit| figure(&socket, "limits_met_total", &format!("limit=\"{limit}\""));
        let all = ask(&socket, "/metrics", &[]);
        let counted: Vec<_> = all
            .lines()
            .filter_map(|line| line.strip_prefix("wasinetd_limits_met_total{limit=\""))
            .filter_map(|line| line.split('"').next())
            .collect();
        // Those of `--help`, but for what is no limit by itself.
        assert_eq!(counted.len(), 25, "{all}");
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
        assert!(ask(&socket, "/nothing", &[]).contains("/v1/status"));
        assert!(ask(&socket, "/healthz", &["--request", "DELETE"]).contains("405 "));
        let mut sleeper = server.connect();
        sleeper.send("GET /sleep HTTP/1.1\r\nHost: test\r\n\r\n");
        while figure(&socket, "connections_open", "") < 1.0 {}
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
        assert_eq!(figure(&socket, "connections_open", ""), 0.0, "{server:?}");
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
    for address in ["127.0.0.1:1", "0.0.0.0:1", "nowhere"] {
        let mut usage = wasinetd();
        usage.args(["serve", "--admin", address]).arg(guest("echo"));
        let output = output(&mut usage);
        assert_eq!(output.status.code(), Some(64), "{output:?}");
    }
}
