//! Restarts with another config file.

use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::{fs, thread};

use crate::config::{Config, connect, echoes, service};
use crate::harness::{
    Server, Successor, free_address, guest, output, wait_until, wasinetd, wat_fixture,
    write_version,
};
use crate::swap::answer;

use super::helpers::{
    connect_served, echo_at, permissions, serve_version_0, service_at, wait_until_closed,
};

#[test]
fn a_successor_listens_only_where_its_config_says() {
    let [stays, goes] = [free_address(), free_address()];
    let stay = echo_at("stays", &[stays.to_string(), "127.0.0.1:0".into()], "");
    let go = echo_at("goes", &[goes.to_string(), "unix:goes.sock".into()], "");
    let config = Config::new(&format!("{stay}{go}"));
    let mut server = Server::start_config(&config.path, 4);
    let any = server.addresses()[1];
    let path = config.admin.beside("goes.sock");
    let mut open = connect_served(goes);
    // The order changes, and the free port moves to the front.
    let listen = ["127.0.0.1:0".into(), stays.to_string()];
    let other = service("other", guest("hello"), "");
    config.write(&format!("{other}{}", echo_at("stays", &listen, "")));
    config.admin.ctl_text(&["restart"]);
    let _successor = Successor::of(&config.admin);
    echoes(stays);
    echoes(any);
    // The old process has accepted the clients that waited there, and removed the path.
    wait_until_closed(goes);
    wait_until("the old process leaves its path", || !path.exists());
    open.send("b");
    assert_eq!(open.read(1), "b");
    drop(open);
    assert_eq!(server.wait_for_exit().code(), Some(0), "{server:?}");
}

#[test]
fn a_successor_serves_the_guest_from_its_config() {
    let config = Config::new("");
    let files = ["one", "two"].map(|name| config.guest(&format!("{name}.wasm"), name));
    let at = free_address();
    let write = |file: &Path| config.write(&service_at("names", file, &[at.to_string()], ""));
    write(&files[0]);
    let _server = Server::start_config(&config.path, 1);
    assert_eq!(answer(&mut connect(at)).0, "one");
    write(&files[1]);
    config.admin.ctl_text(&["restart"]);
    let _successor = Successor::of(&config.admin);
    assert_eq!(answer(&mut connect(at)).0, "two");
}

#[test]
fn a_swap_during_a_restart_is_not_lost() {
    let (config, at, file, _server) = serve_version_0("max-connections-per-source = 'off'");
    let mut successors = Vec::new();
    let mut served = "version-0".to_string();
    for n in 1..8 {
        let name = format!("version-{n}");
        write_version(&file, &name);
        let swapped = thread::scope(|scope| {
            let restarted = scope.spawn(|| config.admin.ctl_text(&["restart"]));
            let swapped = config.admin.ctl(&["swap", "names", file.to_str().unwrap()]);
            restarted.join().unwrap();
            swapped
        });
        successors.push(Successor::of(&config.admin));
        match swapped.status.success() {
            true => served = name,
            false => {
                let message = String::from_utf8(swapped.stderr).unwrap();
                assert!(
                    message.contains("draining") || message.contains("cannot"),
                    "{message}"
                );
            }
        }
        assert_eq!(answer(&mut connect(at)).0, served);
    }
}

#[test]
fn a_guest_written_before_a_restart_is_served_after_it() {
    let (config, at, file, _server) = serve_version_0("watch = true");
    let mut successors = Vec::new();
    for n in 1..4 {
        let name = format!("version-{n}");
        write_version(&file, &name);
        config.admin.ctl_text(&["restart"]);
        successors.push(Successor::of(&config.admin));
        assert_eq!(answer(&mut connect(at)).0, name);
    }
}

#[test]
fn a_failed_restart_leaves_unix_sockets_unchanged() {
    let config = Config::new("");
    let path = config.admin.beside("echo.sock");
    let at = |name: &str, more: &str| echo_at("one", &[format!("unix:{name}")], more);
    config.write(&at("echo.sock", "unix-mode = '0660'"));
    let _server = Server::start_config(&config.path, 1);
    let holder = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = holder.local_addr().unwrap().to_string();
    let bad = service("bad", wat_fixture("start_traps"), "");
    for wrong in [echo_at("two", &[taken], ""), bad] {
        config.write(&(at("echo.sock", "unix-mode = '0666'") + &wrong));
        let output = config.admin.ctl(&["restart"]);
        assert!(!output.status.success(), "{output:?}");
        assert_eq!(permissions(&path), 0o660);
    }
    // Another server now owns the path: we change and remove nothing, neither now nor at exit.
    fs::remove_file(&path).unwrap();
    let _other_server = std::os::unix::net::UnixListener::bind(&path).unwrap();
    fs::set_permissions(&path, PermissionsExt::from_mode(0o700)).unwrap();
    config.write(&at("echo.sock", "unix-mode = '0666'"));
    config.admin.ctl_text(&["restart"]);
    let successor = Successor::of(&config.admin);
    assert_eq!(permissions(&path), 0o700);
    config.admin.ctl_text(&["drain"]);
    wait_until("the server does not drain", || {
        !config.admin.path().exists()
    });
    assert!(path.exists());
    drop(successor);
}

#[test]
fn a_successor_opens_the_admin_address_from_its_config() {
    let config = Config::new("");
    let token = config.admin.beside("token");
    fs::write(&token, "0123456789abcdef0123456789abcdef").unwrap();
    fs::set_permissions(&token, PermissionsExt::from_mode(0o600)).unwrap();
    let token = token.to_str().unwrap();
    let loopback = free_address().to_string();
    let other = format!("unix:{}", config.admin.beside("other.sock").display());
    let text = |admin: &str| {
        let one = service("one", guest("echo"), "");
        format!("admin = {admin:?}\nadmin-token-file = {token:?}\nthreads = 2\n{one}")
    };
    fs::write(&config.path, text(&config.admin.flag)).unwrap();
    let _server = Server::start_config(&config.path, 1);
    let ctl = |admin: &str, command: &str| {
        let arguments = [
            "ctl",
            "--admin",
            admin,
            "--admin-token-file",
            token,
            "--json",
            command,
        ];
        let output = output(wasinetd().args(arguments));
        assert!(output.status.success(), "{admin} {command}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let mut successors = Vec::new();
    let mut at = config.admin.flag.clone();
    for next in [other, loopback, config.admin.flag.clone()] {
        fs::write(&config.path, text(&next)).unwrap();
        let pid = ctl(&at, "restart").trim().parse().unwrap();
        successors.push(Successor(rustix::process::Pid::from_raw(pid).unwrap()));
        let status: serde_json::Value = serde_json::from_str(&ctl(&next, "status")).unwrap();
        assert_eq!(status["pid"], pid);
        at = next;
    }
    // Each old process has removed its own admin socket, and no other.
    let other = config.admin.beside("other.sock");
    wait_until("the admin socket stays", || !other.exists());
    ctl(&at, "status");
}
