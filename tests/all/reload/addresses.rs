//! Addresses and Unix sockets that a reload adds, removes or changes.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::Stdio;

use crate::config::{Config, connect, echoes, service};
use crate::harness::{Server, Successor, free_address, guest, wasinetd};

use super::helpers::{connect_served, echo_at, permissions, wait_until_closed};

#[test]
fn a_reload_closes_removed_addresses() {
    let [one, two, three] = [free_address(), free_address(), free_address()];
    let with = |listen: &[SocketAddr], more: &str| {
        let listen: Vec<_> = listen.iter().map(ToString::to_string).collect();
        echo_at("one", &listen, more)
    };
    // With other changes in the same reload, and while the server is full.
    for (more, other) in [
        ("", "idle-timeout = '50s'"),
        ("", "dispatch = 'spawn'"),
        ("max-connections = 1", "max-connections = 1"),
    ] {
        let config = Config::new(&with(&[one, two, three], more));
        let _server = Server::start_config(&config.path, 3);
        let mut open = connect_served(one);
        config.write(&with(&[one], other));
        assert_eq!(config.reload(), "changed: one");
        wait_until_closed(two);
        wait_until_closed(three);
        open.send("b");
        assert_eq!(open.read(1), "b");
        config.write(&with(&[one, two], other));
        assert_eq!(config.reload(), "changed: one");
    }
}

#[test]
fn clients_accepted_before_their_service_is_removed_are_served() {
    let [stays, goes] = [free_address(), free_address()];
    let stay = echo_at("stays", &[stays.to_string()], "");
    let proxied = "proxy-from = '127.0.0.1'\nhandshake-timeout = '20s'";
    let go = echo_at("goes", &[goes.to_string()], proxied);
    let config = Config::new(&[&*stay, &go].concat());
    let server = Server::start_config(&config.path, 2);
    let mut clients = [connect(goes), connect(goes)];
    clients[0].send("PROXY TCP4 192.0.2.1 198");
    config.write(&stay);
    assert_eq!(config.reload(), "removed: goes");
    assert!(server.log_lines("has ended").is_empty(), "{server:?}");
    clients[0].send(".51.100.2 1 2\r\n");
    clients[1].send("PROXY TCP4 192.0.2.1 198.51.100.2 1 2\r\n");
    for client in &mut clients {
        client.send("hello");
        assert_eq!(client.read(5), "hello");
    }
    let status = config.admin.ctl_json(&["status"]);
    assert_eq!(status["open"], 2, "{status}");
    drop(clients);
    server.wait_for_log(&["a removed service has ended", "goes"]);
}

#[test]
fn a_removed_address_can_be_used_again() {
    let at = free_address();
    let stays = service("stays", guest("echo"), "");
    let with = |name: &str| stays.clone() + &echo_at(name, &[at.to_string()], "");
    let config = Config::new(&with("one"));
    let _server = Server::start_config(&config.path, 2);
    for n in 0..5 {
        config.write(&stays);
        config.reload();
        let name = format!("other-{n}");
        config.write(&with(&name));
        assert_eq!(config.reload(), format!("added: {name}"));
        echoes(at);
    }
    // Two listeners on any free port.
    let twice = ["127.0.0.1:0", "127.0.0.1:0"].map(Into::into);
    let off = "max-connections-per-source = 'off'";
    config.write(&echo_at("stays", &twice, off));
    let message = config.reload();
    assert!(message.starts_with("changed: stays"), "{message}");
}

#[test]
fn reload_and_restart_change_the_mode_of_a_unix_socket() {
    let config = Config::new("");
    let path = config.admin.beside("echo.sock");
    let write = |mode: &str| {
        // A relative path starts at the directory of the config file.
        let listen = ["unix:echo.sock".to_string()];
        config.write(&echo_at("one", &listen, &format!("unix-mode = '{mode}'")));
    };
    write("0666");
    let _server = Server::start_config(&config.path, 1);
    assert_eq!(permissions(&path), 0o666);
    write("0600");
    assert_eq!(config.reload(), "changed: one");
    assert_eq!(permissions(&path), 0o600);
    write("0640");
    config.admin.ctl_text(&["restart"]);
    let _successor = Successor::of(&config.admin);
    assert_eq!(permissions(&path), 0o640);
}

#[test]
fn only_one_of_two_servers_gets_a_unix_socket() {
    let directory = tempfile::tempdir().unwrap();
    let listen = format!("unix:{}", directory.path().join("echo.sock").display());
    for _ in 0..4 {
        let mut servers: Vec<_> = (0..2)
            .map(|_| {
                let mut command = wasinetd();
                command.args(["serve", "--cache", "off", "--listen", &listen]);
                command.arg(guest("echo")).stderr(Stdio::null());
                command.stdout(Stdio::piped()).spawn().unwrap()
            })
            .collect();
        let lines = servers.iter_mut().map(|server| {
            let mut line = String::new();
            let stdout = server.stdout.take().unwrap();
            BufReader::new(stdout).read_line(&mut line).unwrap();
            line
        });
        let lines: Vec<_> = lines.collect();
        let listening = lines.iter().filter(|line| line.contains("listening"));
        assert_eq!(listening.count(), 1, "{lines:?}");
        // Killed servers leave the socket behind, which must not stop the next round.
        for server in &mut servers {
            server.kill().unwrap();
            server.wait().unwrap();
        }
    }
}
