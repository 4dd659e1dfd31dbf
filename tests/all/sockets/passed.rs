//! Sockets that systemd or an old server passes to a new server.

use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Instant;

use rustix::process::Signal;

use crate::config::Config;
use crate::harness::{
    AdminSocket, Client, MODES, PATIENCE, Server, StreamSocket, Successor, guest, page, program,
    root,
};
use crate::reload::echo_at;

use super::helpers::{SocketDirectory, assert_refused, get_page, serve_echo};

#[test]
fn passed_sockets_are_served_by_name_and_by_number() {
    for mode in MODES {
        let directory = SocketDirectory::new();
        let (web, web_fd) = listening_socket();
        let (other, other_fd) = listening_socket();
        let (unused, unused_fd) = listening_socket();
        let local = UnixListener::bind(directory.path()).unwrap();
        let sockets = [
            ("web", web_fd),
            ("local, too", local.into()),
            ("web", other_fd),
            ("unasked", unused_fd),
        ];
        let command = pass(&program(), &sockets);
        let listen = ["--listen", "fd:local, too", "--listen", "fd:web"];
        let mut server = Server::start_with_command(command, 3, mode, &guest("echo"), &listen);
        // The server prints their addresses, not their names.
        assert_eq!(server.addresses(), [web, other]);
        assert_eq!(server.path(), directory.path());
        server.wait_for_log(&["no service listens on", "unasked (6)"]);
        for _ in 0..10 {
            assert_echoes(Client::connect(web).unwrap());
            assert_echoes(Client::connect(other).unwrap());
            assert_echoes(server.connect_unix());
        }
        server.signal(Signal::TERM);
        assert_eq!(server.wait().code(), Some(0), "{server:?}");
        drop(server);
        // The sockets outlive the server: new clients wait for the next server.
        let waiting = Client::connect(web).unwrap();
        let waiting_unix = Client::connect_unix(&directory.path()).unwrap();
        let command = pass(&program(), &sockets);
        // Without --listen the server uses all sockets; by number, only one.
        let server = Server::start_with_command(command, 4, mode, &guest("echo"), &[]);
        assert_echoes(waiting);
        assert_echoes(waiting_unix);
        assert_echoes(Client::connect(unused).unwrap());
        assert_eq!(server.log_lines("no service listens on").len(), 0);
        drop(server);
        let command = pass(&program(), &sockets);
        let server =
            Server::start_with_command(command, 1, mode, &guest("echo"), &["--listen", "fd:6"]);
        assert_eq!(server.addresses(), [unused]);
        assert_echoes(server.connect());
        drop(server);
        // The sockets need not have names.
        let unnamed = &sockets[3].1;
        let command = pass_unnamed(&program(), std::iter::once(unnamed));
        let server = Server::start_with_command(command, 1, mode, &guest("echo"), &[]);
        assert_eq!(server.addresses(), [unused]);
        assert_echoes(server.connect());
    }
}

#[test]
fn unsuitable_passed_sockets_are_refused() {
    let assert_pass_refused =
        |sockets: &[(&str, OwnedFd)], listen: &[&str], code, parts: &[&str]| {
            let mut command = pass(&program(), sockets);
            command.current_dir(root()).arg("serve");
            assert_refused(command.args(listen).arg(guest("echo")), code, parts);
        };
    let (_, one) = listening_socket();
    let (_, two) = listening_socket();
    let both = [("one", one), ("two", two)];
    let parts = ["fd:three", "--listen", "one, two", "FileDescriptorName="];
    assert_pass_refused(&both, &["--listen", "fd:three"], 78, &parts);
    assert_pass_refused(
        &both,
        &["--listen", "fd:5"],
        78,
        &["fd:5", "one (3), two (4)"],
    );
    let twice = ["--listen", "fd:one", "--listen", "fd:one"];
    assert_pass_refused(&both, &twice, 78, &["fd:one", "unused: two (4)"]);
    let file = std::fs::File::open("/dev/null").unwrap();
    let file = [("file", file.into())];
    let parts = ["fd:file", "descriptor 3 is not a socket"];
    assert_pass_refused(&file, &["--listen", "fd:file"], 78, &parts);
    let (connected, _) = UnixStream::pair().unwrap();
    let connected = [("talks", connected.into())];
    let parts = ["fd:talks", "does not listen", "Accept=no"];
    assert_pass_refused(&connected, &[], 78, &parts);
    let datagrams = UnixDatagram::unbound().unwrap();
    let datagrams = [("datagrams", datagrams.into())];
    let parts = ["not a stream socket", "ListenStream="];
    assert_pass_refused(&datagrams, &[], 78, &parts);
    // The number of names differs from the number of sockets.
    let (_, one) = listening_socket();
    assert_pass_refused(&[("a:b", one)], &[], 70, &["LISTEN_FDS", "LISTEN_FDNAMES"]);
    // No sockets, or sockets for another process.
    let parts = ["fd:web", "no sockets were passed", "socket unit"];
    assert_refused(&mut serve_echo(&["--listen", "fd:web"]), 78, &parts);
    let mut command = serve_echo(&["--listen", "fd:web"]);
    command.env("LISTEN_PID", "1").env("LISTEN_FDS", "1");
    assert_refused(&mut command, 78, &parts);
}

#[test]
fn systemd_starts_the_server_when_a_client_connects() {
    let directory = SocketDirectory::new();
    let path = directory.path();
    let mut command = Command::new("systemd-socket-activate");
    if command.arg("--version").output().is_err() {
        println!("skipped: systemd-socket-activate is not installed");
        return;
    }
    let mut command = Command::new("systemd-socket-activate");
    command.arg("--listen").arg(&path).arg("--fdname=local");
    command.arg(program());
    let first_client = thread::spawn(move || {
        loop {
            if let Ok(client) = Client::connect_unix(&path) {
                return assert_echoes(client);
            }
            thread::yield_now();
        }
    });
    let server = Server::start_with_command(
        command,
        1,
        "concurrent",
        &guest("echo"),
        &["--listen", "fd:local"],
    );
    first_client.join().unwrap();
    assert_eq!(server.path(), directory.path());
    assert_echoes(server.connect_unix());
}

#[test]
fn a_passed_socket_cannot_be_rebound_as_our_own_port() {
    let (address, socket) = listening_socket();
    let passer_fd = socket.try_clone().unwrap();
    let config = Config::new("");
    let write = |listen: String| config.write(&echo_at("echo", &[listen], ""));
    write("fd:web".into());
    let command = pass(&program(), &[("web", socket)]);
    let mut server = Server::start_config_with_command(command, &config.path, 1);
    assert_echoes(Client::connect(address).unwrap());
    write(address.to_string());
    let output = config.admin.ctl(&["restart"]);
    assert!(!output.status.success(), "{output:?}");
    assert_echoes(Client::connect(address).unwrap());
    server.signal(Signal::TERM);
    server.wait();
    // The socket stays open for the process that passed it.
    let _waiting = Client::connect(address).unwrap();
    drop(passer_fd);
}

#[test]
fn all_sockets_are_handed_to_a_successor_under_load() {
    for mode in MODES {
        let directory = SocketDirectory::new();
        let admin = AdminSocket::new();
        let installed = admin.beside("wasinetd");
        std::fs::copy(program(), &installed).unwrap();
        let (passed, passed_fd) = listening_socket();
        let command = pass(&installed, &[("a=b,c", passed_fd)]);
        let flag = directory.flag();
        let arguments = [
            "--listen",
            &flag,
            "--listen",
            "fd:a=b,c",
            "--admin",
            &admin.flag,
            "--dir",
            "static::/static",
        ];
        let mut server = Server::start_with_command(command, 2, mode, &guest("hello"), &arguments);
        let successors = under_load(&directory.path(), passed, |answers| {
            // Twice, because a successor can be succeeded too.
            let successors = [(); 2].map(|()| {
                answers.wait_for_more();
                restart(&admin)
            });
            answers.wait_for_more();
            successors
        });
        assert_eq!(server.wait_for_exit().code(), Some(0), "{server:?}");
        // The earlier servers left the path to the last one, which removes it.
        get_page(&directory.path()).expect("the last successor listens");
        admin.ctl_text(&["drain"]);
        let drained = Instant::now();
        while directory.path().exists() && drained.elapsed() < PATIENCE {
            thread::yield_now();
        }
        assert!(!directory.path().exists(), "{server:?}");
        drop(successors);
    }
}

/// A command that runs `program` with these named sockets, in the way of systemd.
fn pass(program: &Path, sockets: &[(&str, OwnedFd)]) -> Command {
    let names: Vec<&str> = sockets.iter().map(|(name, _)| *name).collect();
    let mut command = pass_unnamed(program, sockets.iter().map(|(_, socket)| socket));
    command.env("LISTEN_FDNAMES", names.join(":"));
    command
}

/// The same, without names.
fn pass_unnamed<'a>(program: &Path, sockets: impl Iterator<Item = &'a OwnedFd>) -> Command {
    // Copies with high numbers, so that no copy occupies the final number of another.
    let sockets: Vec<OwnedFd> = sockets
        .map(|socket| rustix::io::fcntl_dupfd_cloexec(socket, 200).unwrap())
        .collect();
    let mut command = Command::new("sh");
    command
        .args(["-c", "export LISTEN_PID=$$; exec \"$@\"", "sh"])
        .arg(program)
        .env("LISTEN_FDS", sockets.len().to_string());
    let duplicate = move || {
        for (n, socket) in sockets.iter().enumerate() {
            let number = 3 + n as i32;
            // SAFETY: between fork and exec nothing else in the child uses the number.
            let mut target = unsafe { owned_fd(number) };
            rustix::io::dup2(socket.as_fd(), &mut target)?;
            std::mem::forget(target);
        }
        Ok(())
    };
    // SAFETY: the closure only makes system calls, and does not allocate.
    unsafe { command.pre_exec(duplicate) };
    command
}

/// # Safety
///
/// No other owner of the number exists.
unsafe fn owned_fd(number: i32) -> OwnedFd {
    // SAFETY: the caller guarantees that there is no other owner.
    unsafe { std::os::fd::FromRawFd::from_raw_fd(number) }
}

/// A listening TCP socket on a free port, to be passed.
fn listening_socket() -> (SocketAddr, OwnedFd) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    (listener.local_addr().unwrap(), listener.into())
}

/// Checks that the server echoes and then ends the stream without a reset.
fn assert_echoes<S: StreamSocket>(mut client: Client<S>) {
    client.send("hello");
    assert_eq!(client.read(5), "hello");
    client.finish();
    assert_eq!(client.read_to_end(), "");
}

/// The answers that clients of a Unix socket and of a TCP socket have received.
struct Answers([AtomicUsize; 2]);

impl Answers {
    fn lowest(&self) -> usize {
        let both = self.0.each_ref().map(|n| n.load(Ordering::Relaxed));
        both.into_iter().min().unwrap()
    }

    /// Waits until both kinds of clients have received 50 more answers.
    fn wait_for_more(&self) {
        let before = self.lowest();
        while self.lowest() < before + 50 {
            thread::yield_now();
        }
    }
}

/// Runs `operation` while two clients of each socket request pages.
fn under_load<T>(unix: &Path, tcp: SocketAddr, operation: impl FnOnce(&Answers) -> T) -> T {
    let stop = AtomicBool::new(false);
    let answers = Answers([const { AtomicUsize::new(0) }; 2]);
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    get_page(unix).expect("no client is refused");
                    answers.0[0].fetch_add(1, Ordering::Relaxed);
                }
            });
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let mut client = Client::connect(tcp).expect("no client is refused");
                    assert_eq!(client.get("/").body, page("hello.html"));
                    answers.0[1].fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let result = operation(&answers);
        stop.store(true, Ordering::Relaxed);
        result
    })
}

/// Restarts the server and returns its successor.
fn restart(admin: &AdminSocket) -> Successor {
    let message = admin.ctl_text(&["restart"]);
    assert!(message.contains("has taken over"), "{message}");
    let successor = Successor::of(admin);
    // The old server passes the sockets itself, and not by the variables of systemd.
    let environment = format!("/proc/{}/environ", successor.0.as_raw_nonzero());
    let environment = std::fs::read(environment).unwrap();
    let environment = String::from_utf8_lossy(&environment).into_owned();
    assert!(!environment.contains("LISTEN_"), "{environment}");
    successor
}
