//! What an operator sees and does with `wasinetd ctl`.

use std::fs::{self, Permissions};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};

use crate::harness::{AdminSocket, MODES, Server, fixture, guest, output, wasinetd};

#[test]
fn connections_are_listed_and_killed() {
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
        let of = |client: &crate::harness::Client| {
            let address = client.0.local_addr().unwrap().to_string();
            let mut all = list.as_array().unwrap().iter();
            all.find(|one| one["peer"] == address).unwrap().clone()
        };
        let one = of(&killed);
        assert_eq!(
            (&one["service"], &one["received"]),
            (&"default".into(), &11.into())
        );
        assert!(one["memory"].as_u64().unwrap() > 100_000, "{one}");
        assert!(one["cpu"].as_f64().unwrap() > 0.01, "{one}");
        assert!(one["age"].as_f64().unwrap() > 0.0, "{one}");
        let table = admin.ctl_text(&["connections"]);
        assert!(table.contains(one["peer"].as_str().unwrap()), "{table}");
        let id = one["id"].to_string();
        admin.ctl_text(&["kill", &id]);
        assert!(killed.read_all().1.is_err());
        server.wait_for_log(&["connection ended", &format!("id={id} "), "outcome=killed"]);
        kept.send("compute 1\n");
        assert_eq!(kept.read_line(), "done");
        assert_eq!(admin.ctl(&["kill", &id]).status.code(), Some(64));
        // Of the log, what is of one connection and nothing else.
        let lines = admin.ctl_text(&["logs", &id]);
        assert_eq!(lines.lines().count(), 2, "{lines}");
        assert!(
            lines.contains("an operator ends") && lines.contains("killed"),
            "{lines}"
        );
    }
}

#[test]
fn who_computes_without_end_can_be_killed() {
    for mode in MODES {
        let admin = AdminSocket::new();
        let server = Server::start(mode, &fixture("spin"), &["--admin", &admin.flag]);
        let mut client = server.connect();
        let id = loop {
            let list = admin.ctl_json(&["connections"]);
            if let Some(one) = list.get(0) {
                break one["id"].to_string();
            }
        };
        admin.ctl_text(&["kill", &id]);
        assert!(client.read_all().1.is_err());
    }
}

#[test]
fn the_log_is_followed() {
    for mode in MODES {
        let admin = AdminSocket::new();
        let server = Server::start(mode, &guest("echo"), &["--admin", &admin.flag]);
        let mut command = wasinetd();
        command.args(["ctl", "--admin", &admin.flag, "logs", "--follow"]);
        let mut follower = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(follower.stdout.take().unwrap()).lines();
        // A line that was there before says that it follows.
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
fn limits_and_rates_are_shown() {
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
fn a_server_is_drained() {
    for mode in MODES {
        let admin = AdminSocket::new();
        let mut server = Server::start(mode, &guest("echo"), &["--admin", &admin.flag]);
        let mut client = server.connect();
        client.send("a");
        assert_eq!(client.read(1), "a");
        admin.ctl_text(&["drain"]);
        server.wait_for_log(&["draining"]);
        // Asked again, it goes on to drain, and does not end what is open.
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
fn what_cannot_be_asked_says_why() {
    let admin = AdminSocket::new();
    let refused = |command: &mut Command, code, part: &str| {
        let output = output(command);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{text}");
        assert!(text.contains(part), "{text}");
    };
    refused(wasinetd().args(["ctl", "status"]), 64, "--admin");
    let status = ["ctl", "--admin", &admin.flag, "status"];
    refused(wasinetd().args(status), 69, "is it running");
    let _server = Server::start("concurrent", &guest("echo"), &["--admin", &admin.flag]);
    let swap = ["ctl", "--admin", &admin.flag, "swap"];
    refused(
        wasinetd().args(swap).args(["nope", "README.md"]),
        64,
        "there is: default",
    );
    refused(
        wasinetd().args(swap).args(["default", "no.wasm"]),
        65,
        "no.wasm",
    );
}

#[test]
fn on_a_loopback_address_a_token_is_shown() {
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
    let output = output(serve(0o644).arg(guest("echo")));
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(78), "{text}");
    assert!(text.contains("chmod 600"), "{text}");
    serve(0o600);
    let file = token.to_str().unwrap();
    let arguments = ["--admin", "127.0.0.1:0", "--admin-token-file", file];
    let mut server = Server::start("concurrent", &guest("echo"), &arguments);
    let address = server.operators();
    let status = |token: &[&str]| {
        let mut command = wasinetd();
        command.args(["ctl", "--admin", &address]).args(token);
        crate::harness::output(command.arg("status")).status.code()
    };
    assert_eq!(status(&["--admin-token-file", file]), Some(0));
    assert_eq!(status(&[]), Some(78));
    assert_eq!(
        status(&["--admin-token-file", wrong.to_str().unwrap()]),
        Some(78)
    );
    let code = |path: &str, arguments: &[&str]| {
        let mut curl = Command::new("curl");
        curl.args([
            "--silent",
            "--output",
            "/dev/null",
            "--write-out",
            "%{http_code}",
        ]);
        curl.args(arguments).arg(format!("http://{address}{path}"));
        String::from_utf8(crate::harness::output(&mut curl).stdout).unwrap()
    };
    let shown = ["--header", "Authorization: Bearer 0123456789abcdef"];
    for path in ["/metrics", "/v1/status", "/v1/connections", "/v1/logs"] {
        assert_eq!(
            (code(path, &[]), code(path, &shown)),
            ("401".into(), "200".into()),
            "{path}"
        );
    }
    // Whoever looks after the process needs none, nor does a page that asks for it.
    for path in ["/healthz", "/readyz", "/"] {
        assert_eq!(code(path, &[]), "200", "{path}");
    }
    let drain = ["--request", "POST"];
    assert_eq!(code("/v1/drain", &drain), "401");
    assert_eq!(server.connect().0.peer_addr().unwrap(), server.address());
}
