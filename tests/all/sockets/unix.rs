//! Connections on Unix sockets.

use std::io::{self, ErrorKind, Write};
use std::os::fd::AsFd;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use rustix::process::{Signal, getuid};

use crate::harness::{AdminSocket, MODES, fixture, guest, output, page};

use super::helpers::{SocketDirectory, get_page, run_with_input};

#[test]
fn a_unix_socket_serves_curl_nc_socat_and_raw_clients() {
    for mode in MODES {
        let directory = SocketDirectory::new();
        let path = directory.path();
        let path = path.to_str().unwrap();
        let server = directory.serve(mode, &guest("hello"), &["--dir", "static::/static"]);
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
        let server = directory.serve(mode, &guest("echo"), &[]);
        if let Some(answer) = run_with_input("nc", &["-N", "-U", path], "by nc") {
            assert_eq!(answer, "by nc", "{server:?}");
        }
        let connect = format!("UNIX-CONNECT:{path}");
        if let Some(answer) = run_with_input("socat", &["-", &connect], "by socat") {
            assert_eq!(answer, "by socat", "{server:?}");
        }
        // Many pieces in both directions at once.
        let mut client = server.connect_unix();
        let bytes: Vec<u8> = (0..4_000_000u32).map(|n| (n % 251) as u8).collect();
        let mut writer = client.0.try_clone().unwrap();
        let sent = bytes.clone();
        let writing = thread::spawn(move || {
            for piece in sent.chunks(7001) {
                writer.write_all(piece).unwrap();
            }
            writer.shutdown(std::net::Shutdown::Write).unwrap();
        });
        let (echoed, end) = client.read_all();
        writing.join().unwrap();
        end.unwrap_or_else(|error| panic!("{error}\n{server:?}"));
        assert!(echoed == bytes, "{} of {}", echoed.len(), bytes.len());
    }
}

#[test]
fn a_unix_client_can_tell_a_complete_answer_from_a_truncated_one() {
    for mode in MODES {
        let directory = SocketDirectory::new();
        // A trap resets the client, although the guest has read everything the client sent.
        let server = directory.serve(mode, &fixture("uses_resources"), &["--cpu-time", "100ms"]);
        let mut client = server.connect_unix();
        client.send("print 1\n");
        assert_eq!(client.read_line(), "done");
        client.send("recurse 100000000\n");
        let (bytes, end) = client.read_all();
        let end = end.map_err(|error| error.kind());
        assert_eq!((bytes, end), (vec![], Err(ErrorKind::ConnectionReset)));
        server.wait_for_log(&["connection ended", "outcome=trap", "limit=\"stack\""]);
        drop(server);
        // The same for a timeout, after one byte or after thousands in pieces.
        for length in [1, 2, 70_000] {
            let server = directory.serve(mode, &guest("echo"), &["--idle-timeout", "300ms"]);
            let mut client = server.connect_unix();
            let half = length / 2;
            client.send(vec![b'x'; half]);
            client.read(half);
            client.send(vec![b'x'; length - half]);
            client.read(length - half);
            let (bytes, end) = client.read_all();
            let end = end.map_err(|error| error.kind());
            assert_eq!((bytes, end), (vec![], Err(ErrorKind::ConnectionReset)));
            server.wait_for_log(&["outcome=limit: idle-timeout"]);
        }
        // A client that has sent nothing cannot be reset. Only the log shows the error.
        let server = directory.serve(mode, &fixture("error"), &[]);
        let mut client = server.connect_unix();
        assert_eq!(client.read_to_end(), "half");
        server.wait_for_log(&["outcome=guest error"]);
        drop(server);
        // A complete answer ends without a reset, even if the guest has not read all input.
        let server = directory.serve(mode, &fixture("gives_up_writing"), &[]);
        let mut client = server.connect_unix();
        client.send("unread");
        let (bytes, end) = client.read_all();
        assert!(!bytes.is_empty() && end.is_ok(), "{end:?} {server:?}");
        server.wait_for_log(&["outcome=ok"]);
    }
}

#[test]
fn limits_apply_to_unix_sockets() {
    for mode in MODES {
        let directory = SocketDirectory::new();
        let first = ["--first-byte-timeout", "300ms"];
        let server = directory.serve(mode, &guest("echo"), &first);
        assert_eq!(server.connect_unix().read_to_end(), "");
        server.wait_for_log(&["outcome=limit: first-byte-timeout"]);
        drop(server);
        // A client that does not read.
        let write = ["--write-timeout", "300ms"];
        let server = directory.serve(mode, &fixture("flood"), &write);
        let idle = server.connect_unix();
        server.wait_for_log(&["outcome=limit: write-timeout"]);
        drop((idle, server));
        let server = directory.serve(mode, &guest("echo"), &["--max-bytes-in", "10"]);
        let mut client = server.connect_unix();
        client.send("0123456789");
        assert_eq!(client.read(10), "0123456789");
        client.send("x");
        let (_, end) = client.read_all();
        assert_eq!(end.unwrap_err().kind(), ErrorKind::ConnectionReset);
        server.wait_for_log(&["outcome=limit: max-bytes-in"]);
        drop(server);
        // A user is a source. Rules for networks do not apply.
        let one = [
            "--max-connections-per-source",
            "1",
            "--deny",
            "0.0.0.0/0",
            "--allow",
            "192.0.2.0/24",
        ];
        let server = directory.serve(mode, &guest("echo"), &one);
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
fn killed_and_drained_unix_clients_are_reset() {
    for mode in MODES {
        let directory = SocketDirectory::new();
        let admin = AdminSocket::new();
        let arguments = ["--admin", &admin.flag, "--drain-timeout", "300ms"];
        let mut server = directory.serve(mode, &guest("echo"), &arguments);
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
fn descriptors_sent_over_a_unix_socket_are_ignored() {
    for mode in MODES {
        let directory = SocketDirectory::new();
        let server = directory.serve(mode, &guest("echo"), &[]);
        let mut client = server.connect_unix();
        let path = directory.0.path().join("sent");
        let file = std::fs::File::create(&path).unwrap();
        let mut sent = Vec::new();
        // A read of the kernel ends at each message with descriptors, wherever these are.
        for n in 0..200u8 {
            let piece = vec![n; usize::from(n % 5) * 3 + 1];
            let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = rustix::net::SendAncillaryBuffer::new(&mut space);
            let files = [file.as_fd()];
            if n % 3 != 0 {
                control.push(rustix::net::SendAncillaryMessage::ScmRights(&files));
            }
            let bytes = [io::IoSlice::new(&piece)];
            let flags = rustix::net::SendFlags::empty();
            let n = rustix::net::sendmsg(&client.0, &bytes, &mut control, flags).unwrap();
            assert_eq!(n, piece.len());
            sent.extend(piece);
        }
        client.finish();
        let (echoed, end) = client.read_all();
        assert!(end.is_ok(), "{end:?} {server:?}");
        assert_eq!(echoed, sent);
        server.wait_for_log(&["connection ended", "outcome=ok"]);
        drop(client);
        // The server has closed every received descriptor.
        let files = format!("/proc/{}/fd", server.pid().as_raw_nonzero());
        let still_open = std::fs::read_dir(files)
            .unwrap()
            .filter_map(|file| std::fs::read_link(file.ok()?.path()).ok())
            .filter(|target| *target == path)
            .count();
        assert_eq!(still_open, 0, "{server:?}");
    }
}

#[test]
fn no_client_is_lost_when_a_unix_socket_closes() {
    for mode in MODES {
        let directory = SocketDirectory::new();
        let page = ["--dir", "static::/static"];
        let mut server = directory.serve(mode, &guest("hello"), &page);
        let answered = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    while let Some(()) = get_page(&directory.path()) {
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
