//! `wasinetd ctl`, the command for operators.

use std::fs::{self, Permissions};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};

use crate::harness::{AdminSocket, Client, MODES, Server, fixture, guest, output, wasinetd};

#[test]
fn ctl_lists_and_kills_connections() {
    for mode in MODES {
        let admin = AdminSocket::new();
        let server = Server::start(mode, &fixture("uses_resources"), &["--admin", &admin.flag]);
        assert_eq!(admin.ctl_json(&["connections"]), serde_json::json!([]));
        let mut kept = server.connect();
        let mut killed = server.connect();
        for client in [&mut kept, &mut killed] {
            client.send("compute 50\n");
            assert_eq!(client.read_line(), "done");
        }
        let list = admin.ctl_json(&["connections"]);
        assert_eq!(list.as_array().unwrap().len(), 2, "{list}");
        let entry_of = |client: &Client| {
            let address = client.0.local_addr().unwrap().to_string();
            let mut entries = list.as_array().unwrap().iter();
            entries
                .find(|entry| entry["peer"] == address)
                .unwrap()
                .clone()
        };
        let entry = entry_of(&killed);
        assert_eq!(
            (&entry["service"], &entry["received"]),
            (&"default".into(), &11.into())
        );
        assert!(entry["memory"].as_u64().unwrap() > 100_000, "{entry}");
        assert!(entry["cpu"].as_f64().unwrap() > 0.01, "{entry}");
        assert!(entry["age"].as_f64().unwrap() > 0.0, "{entry}");
        let table = admin.ctl_text(&["connections"]);
        assert!(table.contains(entry["peer"].as_str().unwrap()), "{table}");
        let id = entry["id"].to_string();
        admin.ctl_text(&["kill", &id]);
        assert!(killed.read_all().1.is_err());
        server.wait_for_log(&["connection ended", &format!("id={id} "), "outcome=killed"]);
        kept.send("compute 1\n");
        assert_eq!(kept.read_line(), "done");
        assert_eq!(admin.ctl(&["kill", &id]).status.code(), Some(64));
        // `logs ID` shows only the lines of that connection.
        let lines = admin.ctl_text(&["logs", &id]);
        assert_eq!(lines.lines().count(), 2, "{lines}");
        assert!(
            lines.contains("killed by an operator") && lines.contains("outcome=killed"),
            "{lines}"
        );
    }
}

#[test]
fn ctl_kills_a_connection_that_computes_forever() {
    for mode in MODES {
        let admin = AdminSocket::new();
        let server = Server::start(mode, &fixture("spin"), &["--admin", &admin.flag]);
        let mut client = server.connect();
        let id = loop {
            let list = admin.ctl_json(&["connections"]);
            if let Some(entry) = list.get(0) {
                break entry["id"].to_string();
            }
        };
        admin.ctl_text(&["kill", &id]);
        assert!(client.read_all().1.is_err());
    }
}

#[test]
fn ctl_follows_the_log() {
    for mode in MODES {
        let admin = AdminSocket::new();
        let server = Server::start(mode, &guest("echo"), &["--admin", &admin.flag]);
        let mut command = wasinetd();
        command.args(["ctl", "--admin", &admin.flag, "logs", "--follow"]);
        let mut follower = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(follower.stdout.take().unwrap()).lines();
        // The first line may have been logged before the follower connected.
        server.connect().finish();
        let first = lines
            .by_ref()
            .map(Result::unwrap)
            .find(|line| line.contains("id=1 "));
        assert!(first.unwrap().contains("outcome=ok"));
        server.connect().finish();
        let second = lines
            .by_ref()
            .map(Result::unwrap)
            .find(|line| line.contains("id=2 "));
        assert!(second.unwrap().contains("outcome=ok"));
        follower.kill().unwrap();
        follower.wait().unwrap();
    }
}

#[test]
fn ctl_shows_limits_and_rates() {
    for mode in MODES {
        let admin = AdminSocket::new();
        let arguments = [
            "--admin",
            &admin.flag,
            "--cpu-time",
            "3s",
            "--deny",
            "192.0.2.0/24",
        ];
        let _server = Server::start(mode, &guest("echo"), &arguments);
        let limits = admin.ctl_text(&["limits"]);
        let value = |limit: &str| {
            let mut lines = limits.lines().map(|line| line.split_whitespace());
            let mut line = lines
                .find(|line| line.clone().next() == Some(limit))
                .unwrap();
            line.nth(1).unwrap().to_string()
        };
        assert_eq!(value("cpu-time"), "3s");
        assert_eq!(value("deny"), "192.0.2.0/24");
        assert_eq!(value("max-memory"), "64MiB");
        assert_eq!(value("idle-timeout"), "1m");
        let view = admin.ctl_text(&["top", "--count", "2", "--interval", "10ms"]);
        assert_eq!(view.matches("ENDED/s").count(), 2, "{view}");
    }
}

#[test]
fn ctl_drains_a_server() {
    for mode in MODES {
        let admin = AdminSocket::new();
        let mut server = Server::start(mode, &guest("echo"), &["--admin", &admin.flag]);
        let mut client = server.connect();
        client.send("a");
        assert_eq!(client.read(1), "a");
        admin.ctl_text(&["drain"]);
        server.wait_for_log(&["draining"]);
        // Repeating the command has no effect: open connections go on.
        admin.ctl_text(&["drain"]);
        assert_eq!(admin.ctl_json(&["status"])["phase"], "draining");
        let swap = admin.ctl(&["swap", "default", "target/guests/hello.wasm"]);
        assert_eq!(swap.status.code(), Some(69), "{swap:?}");
        client.send("b");
        assert_eq!(client.read(1), "b");
        client.finish();
        assert_eq!(client.read_to_end(), "");
        assert_eq!(server.wait().code(), Some(0));
    }
}

#[test]
fn ctl_explains_why_a_request_fails() {
    let admin = AdminSocket::new();
    let assert_refused = |command: &mut Command, code, part: &str| {
        let output = output(command);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{text}");
        assert!(text.contains(part), "{text}");
    };
    assert_refused(wasinetd().args(["ctl", "status"]), 64, "--admin");
    let status = ["ctl", "--admin", &admin.flag, "status"];
    assert_refused(wasinetd().args(status), 69, "is it running");
    let _server = Server::start("concurrent", &guest("echo"), &["--admin", &admin.flag]);
    let swap = ["ctl", "--admin", &admin.flag, "swap"];
    assert_refused(
        wasinetd().args(swap).args(["nope", "README.md"]),
        64,
        "the services are: default",
    );
    assert_refused(
        wasinetd().args(swap).args(["default", "no.wasm"]),
        65,
        "no.wasm",
    );
}

#[test]
fn admin_on_loopback_requires_a_token() {
    let admin = AdminSocket::new();
    let (token, wrong) = (admin.beside("token"), admin.beside("wrong"));
    fs::write(&token, "0123456789abcdef\n").unwrap();
    fs::write(&wrong, "fedcba9876543210\n").unwrap();
    let serve = |mode: u32| {
        for file in [&token, &wrong] {
            fs::set_permissions(file, Permissions::from_mode(mode)).unwrap();
        }
        let mut command = wasinetd();
        command.args(["serve", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"]);
        command.arg("--admin-token-file").arg(&token);
        command
    };
    let refused = output(serve(0o644).arg(guest("echo")));
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(78), "{text}");
    assert!(text.contains("chmod 600"), "{text}");
    serve(0o600);
    let file = token.to_str().unwrap();
    let arguments = ["--admin", "127.0.0.1:0", "--admin-token-file", file];
    let mut server = Server::start("concurrent", &guest("echo"), &arguments);
    let address = server.admin_address();
    let exit_code = |token: &[&str]| {
        let mut command = wasinetd();
        command.args(["ctl", "--admin", &address]).args(token);
        output(command.arg("status")).status.code()
    };
    assert_eq!(exit_code(&["--admin-token-file", file]), Some(0));
    assert_eq!(exit_code(&[]), Some(78));
    assert_eq!(
        exit_code(&["--admin-token-file", wrong.to_str().unwrap()]),
        Some(78)
    );
    let status_code = |path: &str, arguments: &[&str]| {
        let mut curl = Command::new("curl");
        curl.args([
            "--silent",
            "--output",
            "/dev/null",
            "--write-out",
            "%{http_code}",
        ]);
        curl.args(arguments).arg(format!("http://{address}{path}"));
        String::from_utf8(output(&mut curl).stdout).unwrap()
    };
    let authorized = ["--header", "Authorization: Bearer 0123456789abcdef"];
    for path in ["/metrics", "/v1/status", "/v1/connections", "/v1/logs"] {
        assert_eq!(
            (status_code(path, &[]), status_code(path, &authorized)),
            ("401".into(), "200".into()),
            "{path}"
        );
    }
    // Health checks need no token, and the dashboard asks for it.
    for path in ["/healthz", "/readyz", "/"] {
        assert_eq!(status_code(path, &[]), "200", "{path}");
    }
    let drain = ["--request", "POST"];
    assert_eq!(status_code("/v1/drain", &drain), "401");
    assert_eq!(server.connect().0.peer_addr().unwrap(), server.address());
}
