//! SIGTERM and SIGINT: the server answers every accepted request, and every wait has an end.

use std::fs;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Instant;

use rustix::io::Errno;
use rustix::process::Signal;
use socket2::{Domain, SockFilter, Socket, Type};

use crate::harness::{Client, MODES, PATIENCE, Response, Server, fixture, guest, page, request};

fn hello(mode: &str, arguments: &[&str]) -> Server {
    let arguments = [&["--dir", "static::/static"], arguments].concat();
    Server::start(mode, &guest("hello"), &arguments)
}

#[test]
fn an_idle_server_stops_at_once_with_success() {
    for mode in MODES {
        for signal in [Signal::TERM, Signal::INT] {
            let mut server = hello(mode, &["--drain-timeout", "1h"]);
            server.signal(signal);
            assert_eq!(server.wait().code(), Some(0), "{server:?}");
            assert_eq!(server.rest_of_stdout(), "");
        }
    }
}

#[test]
fn a_request_in_progress_is_answered_and_the_port_is_freed() {
    for mode in MODES {
        let mut server = hello(mode, &["--drain-timeout", "1h"]);
        let mut client = server.connect();
        assert_eq!(client.get("/").status(), "200 OK");
        client.send(request("/sleep"));
        server.signal(Signal::TERM);
        server.wait_for_log(&["draining"]);
        let response = client.response();
        assert_eq!(response.body, page("hello.html"));
        assert!(
            response.head.contains("Connection: close\r\n"),
            "{}",
            response.head
        );
        assert_eq!(server.wait().code(), Some(0), "{server:?}");
        assert!(Client::connect(server.address()).is_err());
    }
}

#[test]
fn an_idle_kept_alive_connection_does_not_delay_the_drain() {
    for mode in MODES {
        let mut server = hello(mode, &["--drain-timeout", "1h"]);
        let mut client = server.connect();
        assert_eq!(client.get("/").status(), "200 OK");
        server.signal(Signal::TERM);
        assert_eq!(client.read_to_end(), "");
        drop(client);
        assert_eq!(server.wait().code(), Some(0), "{server:?}");
    }
}

#[test]
fn all_pipelined_requests_are_answered_before_exit() {
    for mode in MODES {
        let mut server = hello(mode, &["--drain-timeout", "1h"]);
        let mut client = server.connect();
        client.send([request("/sleep"), request("/nope"), request("/")].concat());
        server.signal(Signal::TERM);
        server.wait_for_log(&["draining"]);
        let responses = [client.response(), client.response(), client.response()];
        assert_eq!(
            responses.each_ref().map(Response::status),
            ["200 OK", "404 Not Found", "200 OK"]
        );
        assert!(
            responses[2].head.contains("Connection: close\r\n"),
            "{responses:?}"
        );
        assert_eq!(server.wait().code(), Some(0), "{server:?}");
    }
}

#[test]
fn connections_open_after_the_drain_timeout_are_reset() {
    for mode in MODES {
        for guest in [fixture("spin"), guest("echo")] {
            let mut server = Server::start(mode, &guest, &["--drain-timeout", "300ms"]);
            let mut client = server.connect();
            client.send("x");
            server.signal(Signal::TERM);
            let (_, end) = client.read_all();
            assert_eq!(end.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
            assert_eq!(server.wait().code(), Some(75), "{server:?}");
            server.wait_for_log(&["connection ended", "outcome=drain timeout"]);
        }
    }
}

#[test]
fn a_second_signal_stops_the_server_at_once() {
    for mode in MODES {
        let mut server = Server::start(mode, &guest("echo"), &["--drain-timeout", "1h"]);
        let mut client = server.connect();
        client.send("x");
        assert_eq!(client.read(1), "x");
        server.signal(Signal::TERM);
        server.wait_for_log(&["draining"]);
        server.signal(Signal::INT);
        assert_eq!(server.wait().code(), Some(75), "{server:?}");
        assert!(client.read_all().1.is_err());
    }
}

#[test]
fn a_tcp_handshake_in_progress_is_completed_and_its_request_answered() {
    for mode in MODES {
        let mut server = hello(mode, &["--drain-timeout", "1h"]);
        let client = half_open(server.address());
        server.signal(Signal::TERM);
        server.wait_for_log(&["draining"]);
        // The server's kernel repeats its SYN-ACK after a second, and the client waits for that.
        client.detach_filter().unwrap();
        client.set_nonblocking(false).unwrap();
        let mut client = Client::<TcpStream>(client.into());
        assert_eq!(client.get("/").body, page("hello.html"));
        drop(client);
        assert_eq!(server.wait().code(), Some(0), "{server:?}");
    }
}

#[test]
fn an_abandoned_tcp_handshake_does_not_delay_the_drain() {
    for mode in MODES {
        let mut server = hello(mode, &["--drain-timeout", "1h"]);
        let _client = half_open(server.address());
        server.signal(Signal::TERM);
        assert_eq!(server.wait().code(), Some(0), "{server:?}");
    }
}

/// A TCP client that drops the SYN-ACK, so that its handshake stays incomplete.
fn half_open(address: SocketAddr) -> Socket {
    let client = Socket::new(Domain::for_address(address), Type::STREAM, None).unwrap();
    // A filter of one BPF instruction, "return 0", drops every packet.
    client
        .attach_filter(&[SockFilter::new(0x06, 0, 0, 0)])
        .unwrap();
    client.set_nonblocking(true).unwrap();
    let connecting = client.connect(&address.into()).unwrap_err();
    assert_eq!(
        connecting.raw_os_error(),
        Some(Errno::INPROGRESS.raw_os_error())
    );
    // The server's end in /proc/net/tcp (proc(5)); 03 is SYN_RECV.
    let entry = format!("0100007F:{:04X} 0100007F:", address.port());
    let patience = Instant::now() + PATIENCE;
    while !fs::read_to_string("/proc/net/tcp")
        .unwrap()
        .lines()
        .any(|line| line.contains(&entry) && line.contains(" 03 "))
    {
        assert!(
            Instant::now() < patience,
            "the server's kernel has not answered"
        );
        thread::yield_now();
    }
    client
}

/// Concurrent clients that send requests until they can no longer connect.
const CLIENTS: usize = 16;

/// Answers after which the test stops the server.
const ANSWERS_BEFORE_STOP: usize = 2_000;

#[test]
fn stopping_loses_no_answer_on_new_connections() {
    for mode in MODES {
        stop_under_load(mode, &[], one_request);
    }
}

#[test]
fn stopping_a_full_server_loses_no_answer() {
    for mode in MODES {
        stop_under_load(mode, &["--max-connections", "2"], one_request);
    }
}

#[test]
fn stopping_loses_no_answer_on_kept_alive_connections() {
    for mode in MODES {
        stop_under_load(mode, &[], many_requests);
    }
}

fn one_request(client: &mut Client, answered: &AtomicUsize) -> Result<(), String> {
    client.send("GET / HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n");
    check_page(client.try_response())?;
    answered.fetch_add(1, Ordering::Relaxed);
    Ok(())
}

fn many_requests(client: &mut Client, answered: &AtomicUsize) -> Result<(), String> {
    loop {
        client.send(request("/"));
        let response = check_page(client.try_response())?;
        answered.fetch_add(1, Ordering::Relaxed);
        if response.head.contains("Connection: close\r\n") {
            return Ok(());
        }
    }
}

fn check_page(response: io::Result<Response>) -> Result<Response, String> {
    let response = response.map_err(|error| error.to_string())?;
    if response.body == page("hello.html") {
        Ok(response)
    } else {
        Err(format!("{response:?}"))
    }
}

fn stop_under_load(
    mode: &str,
    arguments: &[&str],
    exchange: fn(&mut Client, &AtomicUsize) -> Result<(), String>,
) {
    let common = [
        "--dir",
        "static::/static",
        "--drain-timeout",
        "1h",
        "--log-level",
        "warn",
    ];
    let mut server = Server::start_alone(
        mode,
        &guest("hello"),
        &[common.as_slice(), arguments].concat(),
    );
    let (address, answered) = (server.address(), AtomicUsize::new(0));
    let client = || {
        while let Ok(mut client) = Client::connect(address) {
            exchange(&mut client, &answered)?;
        }
        Ok(())
    };
    let lost: Vec<String> = thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS).map(|_| scope.spawn(client)).collect();
        while answered.load(Ordering::Relaxed) < ANSWERS_BEFORE_STOP
            && clients.iter().any(|client| !client.is_finished())
        {
            thread::yield_now();
        }
        server.signal(Signal::TERM);
        clients
            .into_iter()
            .filter_map(|client| client.join().unwrap().err())
            .collect()
    });
    assert_eq!(lost, [""; 0], "answers were lost\n{server:?}");
    assert_eq!(server.wait().code(), Some(0), "{server:?}");
}
