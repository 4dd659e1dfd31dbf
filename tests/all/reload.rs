//! What a reload, or a restart with another config file, keeps and what it does not: limits, clients who
//! wait, addresses, and who watches what.

use std::io::{BufRead, BufReader};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Instant;
use std::{fs, thread};

use rustix::process::{Resource, Rlimit, getrlimit, prlimit};

use crate::config::{Config, connect, echoes, listens, service};
use crate::harness::{
    Client, PATIENCE, Server, Successor, guest, output, run, wasinetd, wat_fixture, write_version,
};
use crate::swap::answer;

/// An address that nobody has.
fn free() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap()
}

/// A service of the guest at `path`, at these addresses.
fn service_at(name: &str, path: &Path, listen: &[String], more: &str) -> String {
    format!("[[service]]\nname = {name:?}\nlisten = {listen:?}\nguest = {path:?}\n{more}\n")
}

/// One that echoes.
pub(crate) fn echo_at(name: &str, listen: &[String], more: &str) -> String {
    service_at(name, &guest("echo"), listen, more)
}

/// A server of the guest `names`, of its version `version-0`, with its config file, its address, and the
/// guest's file.
fn version_0(more: &str) -> (Config, SocketAddr, PathBuf, Server) {
    let config = Config::new("");
    let file = config.guest("names.wasm", "version-0");
    let at = free();
    config.write(&service_at("names", &file, &[at.to_string()], more));
    let server = Server::start_config(&config.path, 1);
    (config, at, file, server)
}

/// Who may do what with the file at `path`.
fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().permissions().mode() & 0o777
}

/// A client that has been served.
fn served(address: SocketAddr) -> Client {
    let mut client = connect(address);
    client.send("a");
    assert_eq!(client.read(1), "a");
    client
}

/// Waits until nobody listens there.
fn is_closed(address: SocketAddr) {
    let deadline = Instant::now() + PATIENCE;
    while Client::connect(address).is_ok() {
        assert!(Instant::now() < deadline, "{address} is listened at");
    }
}

#[test]
fn an_address_that_is_given_up_is_closed() {
    let [one, two, three] = [free(), free(), free()];
    let with = |listen: &[SocketAddr], more: &str| {
        let listen: Vec<_> = listen.iter().map(ToString::to_string).collect();
        echo_at("one", &listen, more)
    };
    // Whatever else changes, and though the server is full.
    for (more, other) in [
        ("", "idle-timeout = '50s'"),
        ("", "dispatch = 'spawn'"),
        ("max-connections = 1", "max-connections = 1"),
    ] {
        let config = Config::new(&with(&[one, two, three], more));
        let _server = Server::start_config(&config.path, 3);
        let mut open = served(one);
        config.write(&with(&[one], other));
        assert_eq!(config.reload(), "changed: one");
        is_closed(two);
        is_closed(three);
        open.send("b");
        assert_eq!(open.read(1), "b");
        config.write(&with(&[one, two], other));
        assert_eq!(config.reload(), "changed: one");
    }
}

#[test]
fn who_is_connected_counts_after_a_reload() {
    let (one, two) = (free(), free());
    let banner = "when-full = 'close'\nfull-banner = 'full'\nmax-connections-per-source = 'off'";
    let with = |listen: &[SocketAddr], more: &str| {
        let listen: Vec<_> = listen.iter().map(ToString::to_string).collect();
        echo_at("one", &listen, &format!("{banner}\n{more}"))
    };
    let config = Config::new(&with(&[one], "max-connections = 1"));
    let _server = Server::start_config(&config.path, 1);
    let mut open = vec![served(one)];
    let full = |address| assert_eq!(connect(address).read_to_end(), "full");
    full(one);
    config.write(&with(&[one, two], "max-connections = 1"));
    assert_eq!(config.reload(), "changed: one");
    full(one);
    full(two);
    config.write(&with(
        &[one, two],
        "max-connections = 1\nidle-timeout = '50s'",
    ));
    assert_eq!(config.reload(), "changed: one");
    full(one);
    config.write(&with(&[one, two], "max-connections = 3"));
    config.reload();
    open.extend([served(two), served(one)]);
    full(two);
    // Fewer than there are: nobody is let in until enough have gone.
    config.write(&with(&[one, two], "max-connections = 1"));
    config.reload();
    full(one);
    assert_eq!(config.admin.ctl_json(&["status"])["open"], 3);
    open.clear();
    config.admin.wait_for_no_connections();
    drop(served(two));
}

#[test]
fn sources_count_after_a_reload() {
    let at = free();
    let with = |more: &str| {
        let more = format!("max-connections-per-source = 1\n{more}");
        echo_at("one", &[at.to_string()], &more)
    };
    let config = Config::new(&with(""));
    let server = Server::start_config(&config.path, 1);
    let mut first = served(at);
    for n in 1..3 {
        config.write(&with(&format!("idle-timeout = '{n}h'")));
        assert_eq!(config.reload(), "changed: one");
        assert!(connect(at).read_all().1.is_err());
    }
    first.finish();
    first.read_to_end();
    server.wait_for_log(&["connection ended", "outcome=ok"]);
    drop(served(at));
}

#[test]
fn who_has_come_before_a_service_goes_is_served() {
    let [stays, goes] = [free(), free()];
    let text = |services: &[&str]| services.concat();
    let stay = echo_at("stays", &[stays.to_string()], "");
    let proxied = "proxy-from = '127.0.0.1'\nhandshake-timeout = '20s'";
    let go = echo_at("goes", &[goes.to_string()], proxied);
    let config = Config::new(&text(&[&stay, &go]));
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
    server.wait_for_log(&["a service that was removed has ended", "goes"]);
}

#[test]
fn an_address_that_was_given_up_can_be_had_again() {
    let at = free();
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
    // Any port, once more.
    let twice = ["127.0.0.1:0", "127.0.0.1:0"].map(Into::into);
    let off = "max-connections-per-source = 'off'";
    config.write(&echo_at("stays", &twice, off));
    let said = config.reload();
    assert!(said.starts_with("changed: stays"), "{said}");
}

#[test]
fn nothing_changes_when_there_are_no_more_files() {
    let one = service("one", guest("echo"), "");
    let config = Config::new(&one);
    let server = Server::start_config(&config.path, 1);
    let at = server.address();
    let pid = Some(server.pid());
    let before = getrlimit(Resource::Nofile);
    let files = format!("/proc/{}/fd", server.pid().as_raw_nonzero());
    let other = service("one", guest("echo"), "idle-timeout = '50s'");
    config.write(
        &(other + &service("two", guest("echo"), "") + &service("three", guest("echo"), "")),
    );
    let mut failed = 0;
    // What it fails for is another thing each time.
    for more in 4.. {
        let open = fs::read_dir(&files).unwrap().count() as u64;
        let few = Rlimit {
            current: Some(open + more),
            ..before
        };
        prlimit(pid, Resource::Nofile, few).unwrap();
        let done = config.admin.ctl(&["reload"]).status.success();
        prlimit(pid, Resource::Nofile, before).unwrap();
        echoes(at);
        if done {
            break;
        }
        failed += 1;
        let status = config.admin.ctl_json(&["status"]);
        assert_eq!(status["services"].as_array().unwrap().len(), 1, "{status}");
    }
    assert!(failed > 3, "it failed {failed} times");
    echoes(listens(&server, "two"));
    echoes(listens(&server, "three"));
}

#[test]
fn a_unix_socket_is_given_the_mode_that_the_file_says_by_now() {
    let config = Config::new("");
    let path = config.admin.beside("echo.sock");
    let write = |mode: &str| {
        // Beside the config file.
        let listen = ["unix:echo.sock".to_string()];
        config.write(&echo_at("one", &listen, &format!("unix-mode = '{mode}'")));
    };
    write("0666");
    let _server = Server::start_config(&config.path, 1);
    assert_eq!(mode(&path), 0o666);
    write("0600");
    assert_eq!(config.reload(), "changed: one");
    assert_eq!(mode(&path), 0o600);
    write("0640");
    config.admin.ctl_text(&["restart"]);
    let _successor = Successor::of(&config.admin);
    assert_eq!(mode(&path), 0o640);
}

#[test]
fn a_successor_listens_where_its_file_says_and_nowhere_else() {
    let [stays, goes] = [free(), free()];
    let stay = echo_at("stays", &[stays.to_string(), "127.0.0.1:0".into()], "");
    let go = echo_at("goes", &[goes.to_string(), "unix:goes.sock".into()], "");
    let config = Config::new(&format!("{stay}{go}"));
    let mut server = Server::start_config(&config.path, 4);
    let any = server.addresses()[1];
    let path = config.admin.beside("goes.sock");
    let mut open = served(goes);
    // Another order, and a port that any service may have.
    let listen = ["127.0.0.1:0".into(), stays.to_string()];
    let other = service("other", guest("hello"), "");
    config.write(&format!("{other}{}", echo_at("stays", &listen, "")));
    config.admin.ctl_text(&["restart"]);
    let _successor = Successor::of(&config.admin);
    echoes(stays);
    echoes(any);
    // Whoever waited there was accepted by the one before, which has removed the path as well.
    is_closed(goes);
    while path.exists() {}
    open.send("b");
    assert_eq!(open.read(1), "b");
    drop(open);
    assert_eq!(server.wait_for_exit().code(), Some(0), "{server:?}");
}

#[test]
fn a_successor_serves_the_guest_that_its_file_names() {
    let config = Config::new("");
    let files = ["one", "two"].map(|name| config.guest(&format!("{name}.wasm"), name));
    let at = free();
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
fn what_is_swapped_while_a_successor_starts_is_not_lost() {
    let (config, at, file, _server) = version_0("max-connections-per-source = 'off'");
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
                let said = String::from_utf8(swapped.stderr).unwrap();
                assert!(
                    said.contains("draining") || said.contains("cannot"),
                    "{said}"
                );
            }
        }
        assert_eq!(answer(&mut connect(at)).0, served);
    }
}

#[test]
fn what_was_written_before_a_restart_is_served() {
    let (config, at, file, _server) = version_0("watch = true");
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
fn a_restart_that_fails_leaves_sockets_as_they_are() {
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
        assert_eq!(mode(&path), 0o660);
    }
    // Another server is there by now: its file is not ours, neither now nor in the end.
    fs::remove_file(&path).unwrap();
    let _other = std::os::unix::net::UnixListener::bind(&path).unwrap();
    fs::set_permissions(&path, PermissionsExt::from_mode(0o700)).unwrap();
    config.write(&at("echo.sock", "unix-mode = '0666'"));
    config.admin.ctl_text(&["restart"]);
    let successor = Successor::of(&config.admin);
    assert_eq!(mode(&path), 0o700);
    config.admin.ctl_text(&["drain"]);
    while config.admin.path().exists() {}
    assert!(path.exists());
    drop(successor);
}

#[test]
fn operators_find_a_successor_where_its_file_says() {
    let config = Config::new("");
    let token = config.admin.beside("token");
    fs::write(&token, "0123456789abcdef0123456789abcdef").unwrap();
    fs::set_permissions(&token, PermissionsExt::from_mode(0o600)).unwrap();
    let token = token.to_str().unwrap();
    let loopback = free().to_string();
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
    // Those before have removed theirs, and nobody else's.
    let other = config.admin.beside("other.sock");
    while other.exists() {}
    ctl(&at, "status");
}

#[test]
fn one_of_two_servers_has_a_unix_socket() {
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
        let said = servers.iter_mut().map(|server| {
            let mut line = String::new();
            let stdout = server.stdout.take().unwrap();
            BufReader::new(stdout).read_line(&mut line).unwrap();
            line
        });
        let said: Vec<_> = said.collect();
        let listening = said.iter().filter(|line| line.contains("listening"));
        assert_eq!(listening.count(), 1, "{said:?}");
        // A socket that was left is no reason not to begin.
        for server in &mut servers {
            server.kill().unwrap();
            server.wait().unwrap();
        }
    }
}

#[test]
fn a_directory_that_took_the_place_of_another_is_granted() {
    let config = Config::new("");
    let pages = config.admin.beside("pages");
    let fill = |text: &str| {
        fs::create_dir(&pages).unwrap();
        fs::write(pages.join("hello.html"), text).unwrap();
    };
    fill("before");
    let dir = format!("dir = '{}::/static'", pages.display());
    config.write(&service("hello", guest("hello"), &dir));
    let server = Server::start_config(&config.path, 1);
    assert_eq!(server.connect().get("/").body, "before");
    fs::rename(&pages, config.admin.beside("old")).unwrap();
    fill("after");
    assert_eq!(config.reload(), "changed: hello");
    assert_eq!(server.connect().get("/").body, "after");
    assert_eq!(config.reload(), "nothing has changed");
}

#[test]
fn files_are_watched_whatever_a_reload_comes_to() {
    let config = Config::new("");
    let files = ["one.wasm", "two.wasm"].map(|file| config.guest(file, "first"));
    let of = |n: usize| {
        let file = files[n].clone();
        service(["one", "two"][n], file, "watch = true")
    };
    config.write(&of(0));
    let server = Server::start_config(&config.path, 1);
    config.write(&format!("{}{}", of(0), of(1)));
    assert_eq!(config.reload(), "added: two");
    config.write("not = 'a setting'");
    assert!(!config.admin.ctl(&["reload"]).status.success());
    for (n, file) in files.iter().enumerate() {
        write_version(file, "second");
        let service = format!("service=\"{}\"", ["one", "two"][n]);
        server.wait_for_log(&["a new version was given", &service, "outcome=\"swapped\""]);
    }
    assert_eq!(answer(&mut server.connect()).0, "second");
    assert_eq!(answer(&mut connect(listens(&server, "two"))).0, "second");
}

#[test]
fn services_that_are_in_each_others_way_are_told() {
    let config = Config::new("");
    let said = |text: &str| {
        config.write(text);
        let output = run(wasinetd().args(["check", "--config"]).arg(&config.path));
        assert_eq!(output.status.code(), Some(78), "{text}");
        String::from_utf8(output.stderr).unwrap()
    };
    let at = |name: &str, listen: &str, more: &str| echo_at(name, &[listen.into()], more);
    let every = at("a", "0.0.0.0:7", "") + &at("b", "127.0.0.1:7", "");
    assert!(said(&every).contains(":10: listen: 127.0.0.1:7 is not free beside 0.0.0.0:7"));
    let admin = format!("unix:{}", config.admin.path().display());
    assert!(said(&at("a", &admin, "")).contains("is where operators connect to (admin)"));
    let many = said(&format!(
        "max-connections = 5\n{}",
        at("a", "127.0.0.1:7", "max-connections = 6")
    ));
    assert!(
        many.contains(":8: max-connections: 6 is more than the 5 of all services"),
        "{many}"
    );
    let missing = said(&at("a", "127.0.0.1:7", "allow = []\ntls-cert = 'c'"));
    assert!(missing.contains(":8: missing: tls-key"), "{missing}");
    // What is wrong with one is no reason to deny that it is there.
    let guest = guest("echo");
    let behind = |name: &str| {
        format!(
            "[[service]]\nname = {name:?}\nguest = {guest:?}\nbehind = 'front'\nserver-name = 'A.example'\n"
        )
    };
    let front = at("front", "127.0.0.1:7", "idle-timeout = 5");
    let one = said(&format!("{front}{}", behind("b")));
    assert!(
        one.contains("idle-timeout") && !one.contains("no service"),
        "{one}"
    );
    let both = said(&format!("{front}{}{}", behind("b"), behind("c")));
    assert!(
        both.contains("server-name: \"A.example\" leads to the service \"b\" already"),
        "{both}"
    );
}
