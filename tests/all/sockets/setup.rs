//! Options of listening sockets: the backlog and shared ports.

use std::io::{self, ErrorKind};
use std::net::{SocketAddr, TcpListener};
use std::thread;

use socket2::{Domain, SockAddr, Socket, Type};

use crate::harness::{Server, guest};

use super::helpers::{SocketDirectory, assert_refused, run_with_input, serve_echo};

#[test]
fn the_backlog_bounds_the_number_of_waiting_clients() {
    let directory = SocketDirectory::new();
    let waiting_clients = |arguments: &[&str]| {
        let arguments = [&["--max-connections", "1"], arguments].concat();
        let server = directory.serve("concurrent", &guest("echo"), &arguments);
        let mut open = server.connect_unix();
        open.send("a");
        assert_eq!(open.read(1), "a");
        let mut waiting = Vec::new();
        let full = loop {
            let socket = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
            socket.set_nonblocking(true).unwrap();
            match socket.connect(&SockAddr::unix(directory.path()).unwrap()) {
                Ok(()) if waiting.len() > 20 => break None,
                Ok(()) => waiting.push(socket),
                Err(error) => break Some(error.kind()),
            }
        };
        (waiting.len(), full)
    };
    // Linux accepts one more than the backlog.
    let full = Some(ErrorKind::WouldBlock);
    assert_eq!(waiting_clients(&["--backlog", "3"]), (4, full));
    assert_eq!(waiting_clients(&[]), (21, None));
    // `ss` shows the backlog of TCP sockets. The kernel may lower it.
    for (arguments, expected) in [(&["--backlog", "77"][..], "77"), (&[][..], "4096")] {
        let server = Server::start("concurrent", &guest("echo"), arguments);
        let port = format!("sport = :{}", server.address().port());
        let Some(listed) = run_with_input("ss", &["-H", "-l", "-t", "-n", &port], "") else {
            return;
        };
        let somaxconn = std::fs::read_to_string("/proc/sys/net/core/somaxconn").unwrap();
        let lowered = somaxconn.trim().parse::<u32>().unwrap() < expected.parse().unwrap();
        let expected = if lowered { somaxconn.trim() } else { expected };
        let backlogs: Vec<_> = listed
            .lines()
            .map(|line| line.split_whitespace().nth(2).unwrap())
            .collect();
        assert_eq!(backlogs, [expected; 2], "{listed}");
    }
    let server = Server::start("concurrent", &guest("echo"), &["--backlog", "2000000000"]);
    server.wait_for_log(&["the kernel lowers the backlog", "net.core.somaxconn"]);
}

#[test]
fn a_port_is_shared_only_with_reuse_port() {
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
        // Another process listens on the port already.
        let other = bind("127.0.0.1:0".parse().unwrap()).unwrap();
        other.set_nonblocking(true).unwrap();
        let address = other.local_addr().unwrap().to_string();
        let listen = ["--threads", threads, "--listen", &address];
        assert_refused(&mut serve_echo(&listen), 69, &[&address, "in use"]);
        let shared = [&["--reuse-port"], &listen[..]].concat();
        let server = Server::start("concurrent", &guest("echo"), &shared);
        // The kernel distributes connections between both.
        let (mut theirs, mut ours) = (0, 0);
        while theirs == 0 || ours == 0 {
            let mut client = server.connect();
            client.send("a");
            // Our server echoes; the other listener accepts and closes.
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
                    unexpected => panic!("{unexpected:?}"),
                }
            }
        }
    }
}
