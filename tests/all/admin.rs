//! The admin socket: metrics, health and access.

use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::Path;
use std::process::Command;

use rustix::process::Signal;

use crate::harness::{
    AdminSocket, MODES, Server, fixture, guest, output, page, wait_until, wasinetd,
};

/// The body that curl receives, then the status and the media type.
fn fetch(socket: &Path, path: &str, arguments: &[&str]) -> String {
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

/// The sum of the metric `wasinetd_NAME` over all series with this label.
fn metric(socket: &Path, name: &str, label: &str) -> f64 {
    let metrics = fetch(socket, "/metrics", &[]);
    let series: Vec<f64> = metrics
        .lines()
        .filter_map(|line| {
            let (series, value) = line.rsplit_once(' ')?;
            let (full_name, labels) = series.split_once('{').unwrap_or((series, ""));
            let matches = full_name.strip_prefix("wasinetd_")? == name && labels.contains(label);
            matches.then(|| value.parse().unwrap())
        })
        .collect();
    assert!(!series.is_empty(), "no {name} with {label} in\n{metrics}");
    series.iter().sum()
}

#[test]
fn metrics_count_connections_and_bytes() {
    for mode in MODES {
        let admin = AdminSocket::new();
        let socket = admin.path();
        let server = Server::start(mode, &guest("echo"), &["--admin", &admin.flag]);
        assert_eq!(metric(&socket, "connections_open", ""), 0.0);
        let mut client = server.connect();
        client.send("hello");
        assert_eq!(client.read(5), "hello");
        assert_eq!(metric(&socket, "connections_open", ""), 1.0);
        client.finish();
        assert_eq!(client.read_to_end(), "");
        drop(client);
        server.wait_for_log(&["connection ended"]);
        // The log line is written before the metric changes.
        wait_until("the connection stays open", || {
            metric(&socket, "connections_open", "") == 0.0
        });
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
            assert_eq!(metric(&socket, name, label), value, "{name} {label}");
        }
        // A guest in Rust starts with several hundred KiB of memory.
        assert!(metric(&socket, "connection_memory_bytes_sum", "") > 1e5);
        assert_eq!(
            metric(&socket, "connection_memory_bytes_bucket", "+Inf"),
            1.0
        );
    }
}

#[test]
fn metrics_count_each_limit_that_fires() {
    for mode in MODES {
        let admin = AdminSocket::new();
        let socket = admin.path();
        let limits = [
            "--admin",
            &admin.flag,
            "--cpu-time",
            "100ms",
            "--max-memory",
            "4MiB",
        ];
        let server = Server::start(mode, &fixture("uses_resources"), &limits);
        let count = |limit| metric(&socket, "limits_met_total", &format!("limit=\"{limit}\""));
        let all = fetch(&socket, "/metrics", &[]);
        let names: Vec<_> = all
            .lines()
            .filter_map(|line| line.strip_prefix("wasinetd_limits_met_total{limit=\""))
            .filter_map(|line| line.split('"').next())
            .collect();
        // The limits in `--help`, without flags that only configure another limit.
        assert_eq!(names.len(), 25, "{all}");
        for flag in names {
            assert_eq!(count(flag), 0.0, "{flag}");
        }
        for (request, limit) in [
            ("memory 100000000", "max-memory"),
            ("compute 5000", "cpu-time"),
            ("recurse 10000000", "stack"),
            ("streams 100000", "max-handles"),
        ] {
            let mut client = server.connect();
            client.send(format!("{request}\n"));
            // The connection may be reset already.
            let _ = client.0.shutdown(Shutdown::Write);
            let _ = client.read_all();
            server.wait_for_log(&["connection ended", &format!("limit=\"{limit}\"")]);
            assert_eq!(count(limit), 1.0, "{limit}");
        }
    }
}

#[test]
fn health_readiness_and_unknown_paths_are_answered() {
    for mode in MODES {
        let admin = AdminSocket::new();
        let socket = admin.path();
        let pages = ["--dir", "static::/static", "--admin", &admin.flag];
        let mut server = Server::start(mode, &guest("hello"), &pages);
        let plain = "text/plain; charset=utf-8";
        assert_eq!(fetch(&socket, "/healthz", &[]), format!("ok\n200 {plain}"));
        assert_eq!(
            fetch(&socket, "/readyz", &[]),
            format!("ready\n200 {plain}")
        );
        assert!(
            fetch(&socket, "/metrics", &[])
                .ends_with("# EOF\n200 application/openmetrics-text; version=1.0.0; charset=utf-8")
        );
        assert!(fetch(&socket, "/nothing", &[]).contains("/v1/status"));
        assert!(fetch(&socket, "/healthz", &["--request", "DELETE"]).contains("405 "));
        let mut sleeper = server.connect();
        sleeper.send("GET /sleep HTTP/1.1\r\nHost: test\r\n\r\n");
        wait_until("the connection is not counted", || {
            metric(&socket, "connections_open", "") == 1.0
        });
        server.signal(Signal::TERM);
        server.wait_for_log(&["draining"]);
        assert_eq!(
            fetch(&socket, "/readyz", &[]),
            format!("draining\n503 {plain}")
        );
        assert_eq!(fetch(&socket, "/healthz", &[]), format!("ok\n200 {plain}"));
        assert_eq!(sleeper.response().body, page("hello.html"));
        assert_eq!(server.wait().code(), Some(0));
        assert!(!socket.exists());
    }
}

#[test]
fn admin_socket_is_private_and_overwrites_nothing() {
    let admin = AdminSocket::new();
    let socket = admin.path();
    let assert_refused = |flag: &str, part: &str| {
        let mut command = wasinetd();
        command.args(["serve", "--listen", "127.0.0.1:0", "--admin", flag]);
        let output = output(command.arg(guest("echo")));
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(69), "{text}");
        assert!(text.contains("--admin") && text.contains(part), "{text}");
    };
    {
        // A stale socket of a server that has exited is replaced.
        drop(UnixListener::bind(&socket).unwrap());
        let server = Server::start("concurrent", &guest("echo"), &["--admin", &admin.flag]);
        let mode = std::fs::metadata(&socket).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_refused(&admin.flag, "stop the server");
        assert_eq!(metric(&socket, "connections_open", ""), 0.0, "{server:?}");
    }
    // A datagram socket belongs to another program.
    let datagrams = admin.beside("datagrams");
    let other_program = UnixDatagram::bind(&datagrams).unwrap();
    assert_refused(&format!("unix:{}", datagrams.display()), "stop the server");
    other_program.send_to(b"still there", &datagrams).unwrap();
    let file = admin.beside("file");
    std::fs::write(&file, "kept").unwrap();
    assert_refused(&format!("unix:{}", file.display()), "not a socket");
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "kept");
    assert_refused("unix:/no/such/directory/admin.sock", "No such file");
    for address in ["127.0.0.1:1", "0.0.0.0:1", "nowhere"] {
        let mut usage = wasinetd();
        usage.args(["serve", "--admin", address]).arg(guest("echo"));
        let output = output(&mut usage);
        assert_eq!(output.status.code(), Some(64), "{output:?}");
    }
}
