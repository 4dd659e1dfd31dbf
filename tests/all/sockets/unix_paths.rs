//! The path of a Unix socket: mode, owner, replacement and removal.

use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::process::{Signal, getuid};
use socket2::{Domain, SockAddr, Socket, Type};

use crate::harness::{Client, MODES, Server, fixture, guest, output};

use super::helpers::{SocketDirectory, assert_refused, serve_echo};

#[test]
fn a_guest_sees_unix_socket_paths_as_addresses() {
    for mode in MODES {
        let directory = SocketDirectory::new();
        let server = directory.serve(mode, &fixture("addresses"), &[]);
        let answer = server.connect_unix().read_to_end();
        let (_, addresses) = answer.split_once(' ').unwrap();
        assert_eq!(addresses, format!("unix {}", directory.flag()));
        // A client can bind a path too.
        let client_path = directory.0.path().join("client");
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
        socket.bind(&SockAddr::unix(&client_path).unwrap()).unwrap();
        socket
            .connect(&SockAddr::unix(directory.path()).unwrap())
            .unwrap();
        let answer = Client(UnixStream::from(OwnedFd::from(socket))).read_to_end();
        let (_, addresses) = answer.split_once(' ').unwrap();
        let expected = format!("unix:{} {}", client_path.display(), directory.flag());
        assert_eq!(addresses, expected, "{server:?}");
    }
}

#[test]
fn a_unix_socket_gets_the_configured_mode_and_owner() {
    let mode_of = |directory: &SocketDirectory| {
        directory.path().metadata().unwrap().permissions().mode() & 0o7777
    };
    let directory = SocketDirectory::new();
    // The umask neither removes bits nor adds any.
    for (umask, arguments, expected) in [
        ("0077", &[][..], 0o660),
        ("0000", &[][..], 0o660),
        ("0777", &["--unix-mode", "0666"][..], 0o666),
        ("0000", &["--unix-mode", "600"][..], 0o600),
    ] {
        let mut command = Command::new("sh");
        let script = format!("umask {umask}; exec target/quick/wasinetd \"$@\"");
        command.args(["-c", &script, "sh"]);
        let flag = directory.flag();
        let arguments = [&["--listen", &flag], arguments].concat();
        let server =
            Server::start_with_command(command, 1, "concurrent", &guest("echo"), &arguments);
        assert_eq!(mode_of(&directory), expected, "{server:?}");
    }
    if !getuid().is_root() {
        println!("skipped: only root can give files to other users");
        let owner = ["--listen", &directory.flag(), "--unix-owner", "root"];
        assert_refused(
            &mut serve_echo(&owner),
            69,
            &["--listen", "may give files to"],
        );
        return;
    }
    // Another user can connect only with the group of the socket.
    let curl_as_nobody = |gid| {
        let mut command = Command::new("curl");
        command.args(["--silent", "--max-time", "60", "--unix-socket"]);
        command.arg(directory.path()).arg("http://localhost/");
        command.uid(65534).gid(gid).current_dir("/");
        output(&mut command).status.code()
    };
    std::fs::set_permissions(directory.0.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let owner = ["--dir", "static::/static", "--unix-owner", "54321:12345"];
    let server = directory.serve("concurrent", &guest("hello"), &owner);
    let metadata = directory.path().metadata().unwrap();
    assert_eq!((metadata.uid(), metadata.gid()), (54321, 12345));
    assert_eq!(mode_of(&directory), 0o660);
    assert_eq!(curl_as_nobody(12345), Some(0), "{server:?}");
    assert_eq!(curl_as_nobody(65534), Some(7), "{server:?}");
}

#[test]
fn only_a_stale_unix_socket_is_replaced() {
    let directory = SocketDirectory::new();
    let flag = directory.flag();
    // The socket of a server that has ended is replaced.
    drop(UnixListener::bind(directory.path()).unwrap());
    let server = directory.serve("concurrent", &guest("echo"), &[]);
    let mut client = server.connect_unix();
    client.send("a");
    assert_eq!(client.read(1), "a");
    // The socket of a running server is not. `output` because this test has a server already.
    let refused = output(&mut serve_echo(&["--listen", &flag]));
    let message = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(69), "{message}");
    for part in [&*flag, "--listen", "in use", "stop the server"] {
        assert!(message.contains(part), "no {part:?} in {message}");
    }
    client.send("b");
    assert_eq!(client.read(1), "b", "{server:?}");
    drop(server);
    std::fs::remove_file(directory.path()).unwrap();
    // A socket with a full backlog is not replaced.
    let full = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
    full.bind(&SockAddr::unix(directory.path()).unwrap())
        .unwrap();
    full.listen(0).unwrap();
    let _waiting = UnixStream::connect(directory.path()).unwrap();
    assert_refused(
        &mut serve_echo(&["--listen", &flag]),
        69,
        &[&flag, "in use"],
    );
    std::fs::remove_file(directory.path()).unwrap();
    // A regular file is not replaced.
    std::fs::write(directory.path(), "precious").unwrap();
    let parts = [&*flag, "it is not a socket", "name a path where nothing is"];
    assert_refused(&mut serve_echo(&["--listen", &flag]), 69, &parts);
    assert_eq!(
        std::fs::read_to_string(directory.path()).unwrap(),
        "precious"
    );
    let nowhere = "unix:/no/such/directory/a.sock";
    let parts = [nowhere, "No such file", "directory of your own"];
    assert_refused(&mut serve_echo(&["--listen", nowhere]), 69, &parts);
    for (flag, value, part) in [
        ("--listen", "unix:", "there is no path"),
        ("--listen", "unix:@abstract", "has no permissions"),
        ("--listen", "fd:", "the name of a passed socket"),
        ("--unix-mode", "0888", "octal mode"),
        ("--unix-owner", "nobody-is-called-so", "there is no user"),
        ("--unix-owner", "root:nor-a-group", "there is no group"),
        ("--backlog", "0", "from 1 to"),
    ] {
        assert_refused(&mut serve_echo(&[flag, value]), 64, &[flag, part]);
    }
}

#[test]
fn the_socket_path_is_removed_at_exit_if_it_is_still_ours() {
    for mode in MODES {
        let directory = SocketDirectory::new();
        let mut server = directory.serve(mode, &guest("echo"), &[]);
        server.signal(Signal::TERM);
        assert_eq!(server.wait().code(), Some(0), "{server:?}");
        assert!(!directory.path().exists());
        drop(server);
        let mut server = directory.serve(mode, &guest("echo"), &[]);
        std::fs::remove_file(directory.path()).unwrap();
        let _other_server = UnixListener::bind(directory.path()).unwrap();
        server.signal(Signal::TERM);
        assert_eq!(server.wait().code(), Some(0), "{server:?}");
        assert!(directory.path().exists());
    }
}
