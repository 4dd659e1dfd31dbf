//! Where a server listens: Unix sockets, sockets that are passed to it, and how they are set up.

use std::io::{self, ErrorKind, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use rustix::process::{Signal, getuid};
use socket2::{Domain, SockAddr, Socket, Type};

use crate::config::Config;
use crate::harness::{
    AdminSocket, Client, MODES, Server, Successor, fixture, guest, output, page, request, root,
    run, wasinetd,
};
use crate::reload::echo_at;

/// A directory for sockets, which is gone with it.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("a.sock")
    }

    /// As `--listen` wants it.
    fn flag(&self) -> String {
        format!("unix:{}", self.path().display())
    }

    fn serve(&self, mode: &str, guest: &Path, arguments: &[&str]) -> Server {
        let flag = self.flag();
        let listen = ["--listen", &flag];
        Server::start(mode, guest, &[&listen, arguments].concat())
    }
}

/// What a program prints that is given this, or None where it is not installed.
fn talk(program: &str, arguments: &[&str], question: &str) -> Option<String> {
    let spawned = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn();
    let mut child = match spawned {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            println!("left out: {program} is not installed");
            return None;
        }
        child => child.unwrap(),
    };
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(question.as_bytes()).unwrap();
    drop(stdin);
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{program}: {output:?}");
    Some(String::from_utf8(output.stdout).unwrap())
}

fn refuses(command: &mut Command, code: i32, parts: &[&str]) {
    let output = run(command);
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{command:?}\n{message}");
    for part in parts {
        assert!(message.contains(part), "no {part:?} in {message}");
    }
}

fn serve(arguments: &[&str]) -> Command {
    let mut command = wasinetd();
    command.arg("serve").args(arguments).arg(guest("echo"));
    command
}

#[test]
fn clients_of_all_kinds_come_to_a_unix_socket() {
    for mode in MODES {
        let place = Place::new();
        let path = place.path();
        let path = path.to_str().unwrap();
        let server = place.serve(mode, &guest("hello"), &["--dir", "static::/static"]);
        let curl = ["--silent", "--max-time", "60", "--unix-socket", path];
        let page_by_curl = output(Command::new("curl").args(curl).arg("http://localhost/"));
        assert_eq!(
            String::from_utf8_lossy(&page_by_curl.stdout),
            page("hello.html"),
            "{server:?}"
        );
        let line = server.wait_for_log(&["connection ended", "outcome=ok"]);
        let uid = getuid().as_raw();
        let peer = format!("peer=unix:uid={uid},pid=");
        assert!(line.contains(&peer), "{line}");
        drop(server);
        let server = place.serve(mode, &guest("echo"), &[]);
        if let Some(answer) = talk("nc", &["-N", "-U", path], "by nc") {
            assert_eq!(answer, "by nc", "{server:?}");
        }
        let connect = format!("UNIX-CONNECT:{path}");
        if let Some(answer) = talk("socat", &["-", &connect], "by socat") {
            assert_eq!(answer, "by socat", "{server:?}");
        }
        // As much as goes through in many pieces, both ways at once.
        let mut client = server.connect_unix();
        let many: Vec<u8> = (0..4_000_000u32).map(|n| (n % 251) as u8).collect();
        let mut writer = client.0.try_clone().unwrap();
        let sent = many.clone();
        let writing = thread::spawn(move || {
            for piece in sent.chunks(7001) {
                writer.write_all(piece).unwrap();
            }
            writer.shutdown(std::net::Shutdown::Write).unwrap();
        });
        let (back, end) = client.read_all();
        writing.join().unwrap();
        end.unwrap_or_else(|error| panic!("{error}\n{server:?}"));
        assert!(back == many, "{} of {}", back.len(), many.len());
    }
}

#[test]
fn a_guest_sees_the_paths_of_a_unix_socket() {
    for mode in MODES {
        let place = Place::new();
        let server = place.serve(mode, &fixture("addresses"), &[]);
        let told = server.connect_unix().read_to_end();
        let (_, addresses) = told.split_once(' ').unwrap();
        assert_eq!(addresses, format!("unix {}", place.flag()));
        // Clients may have a path too.
        let own = place.0.path().join("client");
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
        socket.bind(&SockAddr::unix(&own).unwrap()).unwrap();
        socket
            .connect(&SockAddr::unix(place.path()).unwrap())
            .unwrap();
        let told = Client(UnixStream::from(OwnedFd::from(socket))).read_to_end();
        let (_, addresses) = told.split_once(' ').unwrap();
        let expected = format!("unix:{} {}", own.display(), place.flag());
        assert_eq!(addresses, expected, "{server:?}");
    }
}

#[test]
fn a_unix_socket_has_the_mode_and_the_owner_it_is_to_have() {
    let mode_of = |place: &Place| place.path().metadata().unwrap().permissions().mode() & 0o7777;
    let place = Place::new();
    // Whatever the umask is, which would take from these and add to those.
    for (umask, arguments, expected) in [
        ("0077", &[][..], 0o660),
        ("0000", &[][..], 0o660),
        ("0777", &["--unix-mode", "0666"][..], 0o666),
        ("0000", &["--unix-mode", "600"][..], 0o600),
    ] {
        let mut command = Command::new("sh");
        let script = format!("umask {umask}; exec target/release/wasinetd \"$@\"");
        command.args(["-c", &script, "sh"]);
        let flag = place.flag();
        let arguments = [&["--listen", &flag], arguments].concat();
        let server = Server::start_by(command, 1, "concurrent", &guest("echo"), &arguments);
        assert_eq!(mode_of(&place), expected, "{server:?}");
    }
    if !getuid().is_root() {
        println!("left out: only root can give files to others");
        let owner = ["--listen", &place.flag(), "--unix-owner", "root"];
        refuses(&mut serve(&owner), 69, &["--listen", "may give files to"]);
        return;
    }
    // Who may connect: another user with the group of the socket, and no other.
    let nobody = |gid| {
        let mut command = Command::new("curl");
        command.args(["--silent", "--max-time", "60", "--unix-socket"]);
        command.arg(place.path()).arg("http://localhost/");
        command.uid(65534).gid(gid).current_dir("/");
        output(&mut command).status.code()
    };
    std::fs::set_permissions(place.0.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let owner = ["--dir", "static::/static", "--unix-owner", "54321:12345"];
    let server = place.serve("concurrent", &guest("hello"), &owner);
    let metadata = place.path().metadata().unwrap();
    assert_eq!((metadata.uid(), metadata.gid()), (54321, 12345));
    assert_eq!(mode_of(&place), 0o660);
    assert_eq!(nobody(12345), Some(0), "{server:?}");
    assert_eq!(nobody(65534), Some(7), "{server:?}");
}

#[test]
fn what_is_at_a_path_is_replaced_only_if_nobody_is_there() {
    let place = Place::new();
    let flag = place.flag();
    // A server that is no more.
    drop(UnixListener::bind(place.path()).unwrap());
    let server = place.serve("concurrent", &guest("echo"), &[]);
    let mut client = server.connect_unix();
    client.send("a");
    assert_eq!(client.read(1), "a");
    // One that is there. By `output`, which waits for no turn: this test has a server.
    let refused = output(&mut serve(&["--listen", &flag]));
    let message = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(69), "{message}");
    for part in [&*flag, "--listen", "in use", "stop the server"] {
        assert!(message.contains(part), "no {part:?} in {message}");
    }
    client.send("b");
    assert_eq!(client.read(1), "b", "{server:?}");
    drop(server);
    std::fs::remove_file(place.path()).unwrap();
    // One with a full backlog.
    let full = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
    full.bind(&SockAddr::unix(place.path()).unwrap()).unwrap();
    full.listen(0).unwrap();
    let _waits = UnixStream::connect(place.path()).unwrap();
    refuses(&mut serve(&["--listen", &flag]), 69, &[&flag, "in use"]);
    std::fs::remove_file(place.path()).unwrap();
    // No socket.
    std::fs::write(place.path(), "precious").unwrap();
    let parts = [&*flag, "it is not a socket", "name a path where nothing is"];
    refuses(&mut serve(&["--listen", &flag]), 69, &parts);
    assert_eq!(std::fs::read_to_string(place.path()).unwrap(), "precious");
    let nowhere = "unix:/no/such/directory/a.sock";
    let parts = [nowhere, "No such file", "directory of your own"];
    refuses(&mut serve(&["--listen", nowhere]), 69, &parts);
    for (flag, value, part) in [
        ("--listen", "unix:", "there is no path"),
        ("--listen", "unix:@abstract", "has no permissions"),
        ("--listen", "fd:", "the name of a passed socket"),
        ("--unix-mode", "0888", "octal mode"),
        ("--unix-owner", "nobody-is-called-so", "there is no user"),
        ("--unix-owner", "root:nor-a-group", "there is no group"),
        ("--backlog", "0", "from 1 to"),
    ] {
        refuses(&mut serve(&[flag, value]), 64, &[flag, part]);
    }
}

#[test]
fn a_path_is_removed_in_the_end_if_it_is_still_ours() {
    for mode in MODES {
        let place = Place::new();
        let mut server = place.serve(mode, &guest("echo"), &[]);
        server.signal(Signal::TERM);
        assert_eq!(server.wait().code(), Some(0), "{server:?}");
        assert!(!place.path().exists());
        drop(server);
        let mut server = place.serve(mode, &guest("echo"), &[]);
        std::fs::remove_file(place.path()).unwrap();
        let _others = UnixListener::bind(place.path()).unwrap();
        server.signal(Signal::TERM);
        assert_eq!(server.wait().code(), Some(0), "{server:?}");
        assert!(place.path().exists());
    }
}

#[test]
fn the_end_is_told_apart_at_a_unix_socket() {
    for mode in MODES {
        let place = Place::new();
        // After all that was sent comes an error, though the guest has read all that came.
        let server = place.serve(mode, &fixture("uses_resources"), &["--cpu-time", "100ms"]);
        let mut client = server.connect_unix();
        client.send("print 1\n");
        assert_eq!(client.read_line(), "done");
        client.send("recurse 100000000\n");
        let (bytes, end) = client.read_all();
        let end = end.map_err(|error| error.kind());
        assert_eq!((bytes, end), (vec![], Err(ErrorKind::ConnectionReset)));
        server.wait_for_log(&["connection ended", "outcome=trap", "limit=\"stack\""]);
        drop(server);
        // One byte is enough, or thousands that came in pieces.
        for question in [1, 2, 70_000] {
            let server = place.serve(mode, &guest("echo"), &["--idle-timeout", "300ms"]);
            let mut client = server.connect_unix();
            let half = question / 2;
            client.send(vec![b'x'; half]);
            client.read(half);
            client.send(vec![b'x'; question - half]);
            client.read(question - half);
            let (bytes, end) = client.read_all();
            let end = end.map_err(|error| error.kind());
            assert_eq!((bytes, end), (vec![], Err(ErrorKind::ConnectionReset)));
            server.wait_for_log(&["outcome=limit: idle-timeout"]);
        }
        // Who has sent nothing sees the end, for there is no reset. The log tells.
        let server = place.serve(mode, &fixture("error"), &[]);
        let mut client = server.connect_unix();
        assert_eq!(client.read_to_end(), "half");
        server.wait_for_log(&["outcome=guest error"]);
        drop(server);
        // An answer of a guest that has not read all is whole.
        let server = place.serve(mode, &fixture("gives_up_writing"), &[]);
        let mut client = server.connect_unix();
        client.send("unread");
        let (bytes, end) = client.read_all();
        assert!(!bytes.is_empty() && end.is_ok(), "{end:?} {server:?}");
        server.wait_for_log(&["outcome=ok"]);
    }
}

#[test]
fn limits_hold_at_a_unix_socket() {
    for mode in MODES {
        let place = Place::new();
        let first = ["--first-byte-timeout", "300ms"];
        let server = place.serve(mode, &guest("echo"), &first);
        assert_eq!(server.connect_unix().read_to_end(), "");
        server.wait_for_log(&["outcome=limit: first-byte-timeout"]);
        drop(server);
        // One that takes nothing.
        let write = ["--write-timeout", "300ms"];
        let server = place.serve(mode, &fixture("flood"), &write);
        let silent = server.connect_unix();
        server.wait_for_log(&["outcome=limit: write-timeout"]);
        drop((silent, server));
        let server = place.serve(mode, &guest("echo"), &["--max-bytes-in", "10"]);
        let mut client = server.connect_unix();
        client.send("0123456789");
        assert_eq!(client.read(10), "0123456789");
        client.send("x");
        let (_, end) = client.read_all();
        assert_eq!(end.unwrap_err().kind(), ErrorKind::ConnectionReset);
        server.wait_for_log(&["outcome=limit: max-bytes-in"]);
        drop(server);
        // A user is a source, and of no network.
        let one = [
            "--max-connections-per-source",
            "1",
            "--deny",
            "0.0.0.0/0",
            "--allow",
            "192.0.2.0/24",
        ];
        let server = place.serve(mode, &guest("echo"), &one);
        let mut first = server.connect_unix();
        first.send("a");
        assert_eq!(first.read(1), "a");
        let mut second = server.connect_unix();
        let (bytes, _) = second.read_all();
        assert!(bytes.is_empty());
        let line = server.wait_for_log(&["max-connections-per-source", "peer=unix:uid="]);
        assert!(line.contains("refused"), "{line}");
        first.send("b");
        assert_eq!(first.read(1), "b", "{server:?}");
    }
}

#[test]
fn who_is_killed_or_drained_at_a_unix_socket_is_told() {
    for mode in MODES {
        let place = Place::new();
        let admin = AdminSocket::new();
        let arguments = ["--admin", &admin.flag, "--drain-timeout", "300ms"];
        let mut server = place.serve(mode, &guest("echo"), &arguments);
        let mut client = server.connect_unix();
        client.send("a");
        assert_eq!(client.read(1), "a");
        let connections = admin.ctl_json(&["connections"]);
        let peer = connections[0]["peer"].as_str().unwrap().to_string();
        assert!(peer.starts_with("unix:uid="), "{connections}");
        let id = connections[0]["id"].to_string();
        admin.ctl_text(&["kill", &id]);
        let (_, end) = client.read_all();
        assert_eq!(end.unwrap_err().kind(), ErrorKind::ConnectionReset);
        let mut client = server.connect_unix();
        client.send("a");
        assert_eq!(client.read(1), "a");
        server.signal(Signal::TERM);
        let (_, end) = client.read_all();
        assert_eq!(end.unwrap_err().kind(), ErrorKind::ConnectionReset);
        assert_eq!(server.wait().code(), Some(75), "{server:?}");
        server.wait_for_log(&["outcome=drain timeout"]);
    }
}

#[test]
fn descriptors_that_are_sent_along_change_nothing() {
    for mode in MODES {
        let place = Place::new();
        let server = place.serve(mode, &guest("echo"), &[]);
        let mut client = server.connect_unix();
        let path = place.0.path().join("sent");
        let file = std::fs::File::create(&path).unwrap();
        let mut sent = Vec::new();
        // They end what the kernel gives in one read, wherever they are.
        for n in 0..200u8 {
            let piece = vec![n; usize::from(n % 5) * 3 + 1];
            let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut along = rustix::net::SendAncillaryBuffer::new(&mut space);
            let files = [file.as_fd()];
            if n % 3 != 0 {
                along.push(rustix::net::SendAncillaryMessage::ScmRights(&files));
            }
            let bytes = [io::IoSlice::new(&piece)];
            let flags = rustix::net::SendFlags::empty();
            let n = rustix::net::sendmsg(&client.0, &bytes, &mut along, flags).unwrap();
            assert_eq!(n, piece.len());
            sent.extend(piece);
        }
        client.finish();
        let (back, end) = client.read_all();
        assert!(end.is_ok(), "{end:?} {server:?}");
        assert_eq!(back, sent);
        server.wait_for_log(&["connection ended", "outcome=ok"]);
        drop(client);
        // None is kept by the server.
        let files = format!("/proc/{}/fd", server.pid().as_raw_nonzero());
        let kept = std::fs::read_dir(files)
            .unwrap()
            .filter_map(|file| std::fs::read_link(file.ok()?.path()).ok())
            .filter(|target| *target == path)
            .count();
        assert_eq!(kept, 0, "{server:?}");
    }
}

/// Asks for a page. None when nobody listens any more.
fn one_page(path: &Path) -> Option<()> {
    let mut client = match Client::connect_unix(path) {
        Ok(client) => client,
        Err(error) => {
            let gone = [ErrorKind::ConnectionRefused, ErrorKind::NotFound];
            assert!(gone.contains(&error.kind()), "{error}");
            return None;
        }
    };
    client.send(request("/"));
    assert_eq!(client.response().body, page("hello.html"));
    Some(())
}

#[test]
fn nobody_is_lost_when_a_unix_socket_closes() {
    for mode in MODES {
        let place = Place::new();
        let page = ["--dir", "static::/static"];
        let mut server = place.serve(mode, &guest("hello"), &page);
        let answered = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    while let Some(()) = one_page(&place.path()) {
                        answered.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
            while answered.load(Ordering::Relaxed) < 200 {
                thread::yield_now();
            }
            server.signal(Signal::TERM);
        });
        assert_eq!(server.wait().code(), Some(0), "{server:?}");
        let ended = server.log_lines("outcome=ok").len();
        assert_eq!(ended, answered.load(Ordering::Relaxed), "{server:?}");
    }
}

/// What runs a server with these sockets, as systemd does. `program` is what is run.
fn pass(program: &Path, sockets: &[(&str, OwnedFd)]) -> Command {
    let names: Vec<&str> = sockets.iter().map(|(name, _)| *name).collect();
    let mut command = pass_unnamed(program, sockets.iter().map(|(_, socket)| socket));
    command.env("LISTEN_FDNAMES", names.join(":"));
    command
}

fn pass_unnamed<'a>(program: &Path, sockets: impl Iterator<Item = &'a OwnedFd>) -> Command {
    // Out of the way of the numbers that they get.
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
            // SAFETY: between fork and exec nothing else in the child knows of the number.
            let mut place = unsafe { rustix_fd(number) };
            rustix::io::dup2(socket.as_fd(), &mut place)?;
            std::mem::forget(place);
        }
        Ok(())
    };
    // SAFETY: it makes system calls only, and allocates nothing.
    unsafe { command.pre_exec(duplicate) };
    command
}

/// # Safety
///
/// The number is nobody else's.
unsafe fn rustix_fd(number: i32) -> OwnedFd {
    // SAFETY: as the caller says.
    unsafe { std::os::fd::FromRawFd::from_raw_fd(number) }
}

fn program() -> PathBuf {
    root().join("target/release/wasinetd")
}

fn tcp() -> (SocketAddr, OwnedFd) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    (listener.local_addr().unwrap(), listener.into())
}

fn echoes<S: crate::harness::Socketlike>(mut client: Client<S>) {
    client.send("hello");
    assert_eq!(client.read(5), "hello");
    client.finish();
    assert_eq!(client.read_to_end(), "");
}

#[test]
fn sockets_that_are_passed_are_served_by_name() {
    for mode in MODES {
        let place = Place::new();
        let (web, web_fd) = tcp();
        let (other, other_fd) = tcp();
        let (unasked, unasked_fd) = tcp();
        let local = UnixListener::bind(place.path()).unwrap();
        let sockets = [
            ("web", web_fd),
            ("local, too", local.into()),
            ("web", other_fd),
            ("unasked", unasked_fd),
        ];
        let command = pass(&program(), &sockets);
        let listen = ["--listen", "fd:local, too", "--listen", "fd:web"];
        let mut server = Server::start_by(command, 3, mode, &guest("echo"), &listen);
        // They are told by where they are.
        assert_eq!(server.addresses(), [web, other]);
        assert_eq!(server.path(), place.path());
        server.wait_for_log(&["nobody listens at", "unasked (6)"]);
        for _ in 0..10 {
            echoes(Client::connect(web).unwrap());
            echoes(Client::connect(other).unwrap());
            echoes(server.connect_unix());
        }
        server.signal(Signal::TERM);
        assert_eq!(server.wait().code(), Some(0), "{server:?}");
        drop(server);
        // They go on when it is gone: who connects waits for the next one.
        let waits = Client::connect(web).unwrap();
        let waits_too = Client::connect_unix(&place.path()).unwrap();
        let command = pass(&program(), &sockets);
        // Without --listen all are meant; by number, one.
        let server = Server::start_by(command, 4, mode, &guest("echo"), &[]);
        echoes(waits);
        echoes(waits_too);
        echoes(Client::connect(unasked).unwrap());
        assert_eq!(server.log_lines("nobody listens at").len(), 0);
        drop(server);
        let command = pass(&program(), &sockets);
        let server = Server::start_by(command, 1, mode, &guest("echo"), &["--listen", "fd:6"]);
        assert_eq!(server.addresses(), [unasked]);
        echoes(server.connect());
        drop(server);
        // Without names as well.
        let only = &sockets[3].1;
        let command = pass_unnamed(&program(), std::iter::once(only));
        let server = Server::start_by(command, 1, mode, &guest("echo"), &[]);
        assert_eq!(server.addresses(), [unasked]);
        echoes(server.connect());
    }
}

#[test]
fn sockets_that_are_passed_and_do_not_fit_are_refused() {
    let passing = |sockets: &[(&str, OwnedFd)], listen: &[&str], code, parts: &[&str]| {
        let mut command = pass(&program(), sockets);
        command.current_dir(root()).arg("serve");
        refuses(command.args(listen).arg(guest("echo")), code, parts);
    };
    let (_, one) = tcp();
    let (_, two) = tcp();
    let both = [("one", one), ("two", two)];
    let parts = ["fd:three", "--listen", "one, two", "FileDescriptorName="];
    passing(&both, &["--listen", "fd:three"], 78, &parts);
    passing(
        &both,
        &["--listen", "fd:5"],
        78,
        &["fd:5", "one (3), two (4)"],
    );
    let twice = ["--listen", "fd:one", "--listen", "fd:one"];
    passing(&both, &twice, 78, &["fd:one", "left of them: two (4)"]);
    let file = std::fs::File::open("/dev/null").unwrap();
    let file = [("file", file.into())];
    let parts = ["fd:file", "descriptor 3 is not a socket"];
    passing(&file, &["--listen", "fd:file"], 78, &parts);
    let (connected, _) = UnixStream::pair().unwrap();
    let connected = [("talks", connected.into())];
    let parts = ["fd:talks", "does not listen", "Accept=no"];
    passing(&connected, &[], 78, &parts);
    let datagrams = UnixDatagram::unbound().unwrap();
    let datagrams = [("datagrams", datagrams.into())];
    let parts = ["not a stream socket", "ListenStream="];
    passing(&datagrams, &[], 78, &parts);
    // More names than sockets.
    let (_, one) = tcp();
    passing(&[("a:b", one)], &[], 70, &["LISTEN_FDS", "LISTEN_FDNAMES"]);
    // None at all, or those of another process.
    let parts = ["fd:web", "no sockets were passed", "socket unit"];
    refuses(&mut serve(&["--listen", "fd:web"]), 78, &parts);
    let mut command = serve(&["--listen", "fd:web"]);
    command.env("LISTEN_PID", "1").env("LISTEN_FDS", "1");
    refuses(&mut command, 78, &parts);
}

#[test]
fn systemd_starts_it_when_a_client_comes() {
    let place = Place::new();
    let path = place.path();
    let mut command = Command::new("systemd-socket-activate");
    if command.arg("--version").output().is_err() {
        println!("left out: systemd-socket-activate is not installed");
        return;
    }
    let mut command = Command::new("systemd-socket-activate");
    command.arg("--listen").arg(&path).arg("--fdname=local");
    command.arg(program());
    let first = thread::spawn(move || {
        loop {
            if let Ok(client) = Client::connect_unix(&path) {
                return echoes(client);
            }
            thread::yield_now();
        }
    });
    let server = Server::start_by(
        command,
        1,
        "concurrent",
        &guest("echo"),
        &["--listen", "fd:local"],
    );
    first.join().unwrap();
    assert_eq!(server.path(), place.path());
    echoes(server.connect_unix());
}

#[test]
fn all_sockets_are_handed_over_under_load() {
    for mode in MODES {
        let place = Place::new();
        let admin = AdminSocket::new();
        let program = admin.beside("wasinetd");
        std::fs::copy(root().join("target/release/wasinetd"), &program).unwrap();
        let (passed, passed_fd) = tcp();
        let command = pass(&program, &[("a=b,c", passed_fd)]);
        let flag = place.flag();
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
        let mut server = Server::start_by(command, 2, mode, &guest("hello"), &arguments);
        let (stop, answers) = (AtomicBool::new(false), [const { AtomicUsize::new(0) }; 2]);
        let least = || {
            let both = answers.each_ref().map(|n| n.load(Ordering::Relaxed));
            both.into_iter().min().unwrap()
        };
        let successors: Vec<Successor> = thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while !stop.load(Ordering::Relaxed) {
                        one_page(&place.path()).expect("nobody is refused");
                        answers[0].fetch_add(1, Ordering::Relaxed);
                    }
                });
                scope.spawn(|| {
                    while !stop.load(Ordering::Relaxed) {
                        let mut client = Client::connect(passed).expect("nobody is refused");
                        assert_eq!(client.get("/").body, page("hello.html"));
                        answers[1].fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
            // Twice: a successor has one too.
            let successors = [(); 2].map(|()| {
                let before = least();
                while least() < before + 50 {
                    thread::yield_now();
                }
                let said = admin.ctl_text(&["restart"]);
                assert!(said.contains("has taken over"), "{said}");
                let successor = Successor::of(&admin);
                // It is told of all sockets by us, and by nobody else.
                let environment = format!("/proc/{}/environ", successor.0.as_raw_nonzero());
                let environment = std::fs::read(environment).unwrap();
                let environment = String::from_utf8_lossy(&environment).into_owned();
                assert!(!environment.contains("LISTEN_"), "{environment}");
                successor
            });
            let before = least();
            while least() < before + 50 {
                thread::yield_now();
            }
            stop.store(true, Ordering::Relaxed);
            successors.into()
        });
        assert_eq!(server.wait_for_exit().code(), Some(0), "{server:?}");
        // Those before have left the path to the last one, which removes it.
        one_page(&place.path()).expect("it is there");
        admin.ctl_text(&["drain"]);
        let gone = std::time::Instant::now();
        while place.path().exists() && gone.elapsed() < crate::harness::PATIENCE {
            thread::yield_now();
        }
        assert!(!place.path().exists(), "{server:?}");
        drop(successors);
    }
}

#[test]
fn a_socket_that_was_passed_is_not_taken_for_a_port_of_ours() {
    let (address, socket) = tcp();
    let kept = socket.try_clone().unwrap();
    let config = Config::new("");
    let write = |listen: String| config.write(&echo_at("echo", &[listen], ""));
    write("fd:web".into());
    let command = pass(&program(), &[("web", socket)]);
    let mut server = Server::start_config_by(command, &config.path, 1);
    echoes(Client::connect(address).unwrap());
    write(address.to_string());
    let output = config.admin.ctl(&["restart"]);
    assert!(!output.status.success(), "{output:?}");
    echoes(Client::connect(address).unwrap());
    server.signal(Signal::TERM);
    server.wait();
    // Whoever passed it goes on with it.
    let _waits = Client::connect(address).unwrap();
    drop(kept);
}

#[test]
fn as_many_wait_as_the_backlog_says() {
    let place = Place::new();
    let waiting = |arguments: &[&str]| {
        let one = [&["--max-connections", "1"], arguments].concat();
        let server = place.serve("concurrent", &guest("echo"), &one);
        let mut open = server.connect_unix();
        open.send("a");
        assert_eq!(open.read(1), "a");
        let mut waiting = Vec::new();
        let full = loop {
            let socket = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
            socket.set_nonblocking(true).unwrap();
            match socket.connect(&SockAddr::unix(place.path()).unwrap()) {
                Ok(()) if waiting.len() > 20 => break None,
                Ok(()) => waiting.push(socket),
                Err(error) => break Some(error.kind()),
            }
        };
        (waiting.len(), full)
    };
    // Linux lets one more wait than it is told.
    let full = Some(ErrorKind::WouldBlock);
    assert_eq!(waiting(&["--backlog", "3"]), (4, full));
    assert_eq!(waiting(&[]), (21, None));
    // TCP has the same, which `ss` tells, and which the kernel may lower.
    for (arguments, expected) in [(&["--backlog", "77"][..], "77"), (&[][..], "4096")] {
        let server = Server::start("concurrent", &guest("echo"), arguments);
        let port = format!("sport = :{}", server.address().port());
        let Some(listed) = talk("ss", &["-H", "-l", "-t", "-n", &port], "") else {
            return;
        };
        let most = std::fs::read_to_string("/proc/sys/net/core/somaxconn").unwrap();
        let lowered = most.trim().parse::<u32>().unwrap() < expected.parse().unwrap();
        let expected = if lowered { most.trim() } else { expected };
        let backlogs: Vec<_> = listed
            .lines()
            .map(|line| line.split_whitespace().nth(2).unwrap())
            .collect();
        assert_eq!(backlogs, [expected; 2], "{listed}");
    }
    let server = Server::start("concurrent", &guest("echo"), &["--backlog", "2000000000"]);
    server.wait_for_log(&["the kernel lowers --backlog", "net.core.somaxconn"]);
}

#[test]
fn a_port_is_shared_on_purpose_only() {
    for threads in ["1", "2"] {
        let bind = |address: SocketAddr| -> io::Result<TcpListener> {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
            socket.set_reuse_port(true)?;
            socket.bind(&address.into())?;
            socket.listen(128)?;
            Ok(socket.into())
        };
        let arguments = ["--threads", threads];
        let server = Server::start("concurrent", &guest("echo"), &arguments);
        if threads == "1" {
            let error = bind(server.address()).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::AddrInUse);
        }
        drop(server);
        // Another one is there already.
        let other = bind("127.0.0.1:0".parse().unwrap()).unwrap();
        other.set_nonblocking(true).unwrap();
        let address = other.local_addr().unwrap().to_string();
        let listen = ["--threads", threads, "--listen", &address];
        refuses(&mut serve(&listen), 69, &[&address, "in use"]);
        let shared = [&["--reuse-port"], &listen[..]].concat();
        let server = Server::start("concurrent", &guest("echo"), &shared);
        // The kernel gives each some.
        let (mut theirs, mut ours) = (0, 0);
        while theirs == 0 || ours == 0 {
            let mut client = server.connect();
            client.send("a");
            // Whoever gets it answers, we by closing.
            let mut byte = [0];
            client.0.set_nonblocking(true).unwrap();
            loop {
                if other.accept().is_ok() {
                    theirs += 1;
                    break;
                }
                match std::io::Read::read(&mut client.0, &mut byte) {
                    Ok(1) => {
                        ours += 1;
                        break;
                    }
                    Err(error) if error.kind() == ErrorKind::WouldBlock => thread::yield_now(),
                    gone => panic!("{gone:?}"),
                }
            }
        }
    }
}
