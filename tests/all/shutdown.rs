//! SIGTERM and SIGINT: nothing that was asked for is lost, and nothing is waited for without end.

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
fn a_request_under_way_is_answered_and_the_port_is_free() {
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
fn an_idle_client_that_keeps_its_connection_does_not_hold_up_the_drain() {
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
fn requests_that_were_pipelined_are_all_answered() {
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
fn what_is_left_after_the_drain_timeout_is_reset() {
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
fn a_second_signal_ends_at_once() {
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
fn a_handshake_under_way_is_completed_and_its_request_answered() {
    for mode in MODES {
        let mut server = hello(mode, &["--drain-timeout", "1h"]);
        let client = half_open(server.address());
        server.signal(Signal::TERM);
        server.wait_for_log(&["draining"]);
        // The server's kernel answers again after a second, and the client waits for it.
        client.detach_filter().unwrap();
        client.set_nonblocking(false).unwrap();
        let mut client = Client::<TcpStream>(client.into());
        assert_eq!(client.get("/").body, page("hello.html"));
        drop(client);
        assert_eq!(server.wait().code(), Some(0), "{server:?}");
    }
}

#[test]
fn a_handshake_that_is_never_completed_does_not_hold_up_the_drain() {
    for mode in MODES {
        let mut server = hello(mode, &["--drain-timeout", "1h"]);
        let _client = half_open(server.address());
        server.signal(Signal::TERM);
        assert_eq!(server.wait().code(), Some(0), "{server:?}");
    }
}

/// A client that does not see what the server answers to its first packet.
fn half_open(address: SocketAddr) -> Socket {
    let client = Socket::new(Domain::for_address(address), Type::STREAM, None).unwrap();
    // One instruction: keep nothing of any packet.
    client
        .attach_filter(&[SockFilter::new(0x06, 0, 0, 0)])
        .unwrap();
    client.set_nonblocking(true).unwrap();
    let begun = client.connect(&address.into()).unwrap_err();
    assert_eq!(begun.raw_os_error(), Some(Errno::INPROGRESS.raw_os_error()));
    let half_open = format!("0100007F:{:04X} 0100007F:", address.port());
    let patience = Instant::now() + PATIENCE;
    while !fs::read_to_string("/proc/net/tcp")
        .unwrap()
        .lines()
        .any(|line| line.contains(&half_open) && line.contains(" 03 "))
    {
        assert!(
            Instant::now() < patience,
            "the server's kernel has not answered"
        );
        thread::yield_now();
    }
    client
}

/// Clients that send requests as fast as they are answered, until the server is gone.
const CLIENTS: usize = 16;

/// The answers after which the server is told to stop.
const ENOUGH: usize = 2_000;

#[test]
fn no_client_that_sent_a_request_on_a_new_connection_loses_its_answer() {
    for mode in MODES {
        stop_under_load(mode, &[], one_request);
    }
}

#[test]
fn no_client_of_a_full_server_loses_its_answer() {
    for mode in MODES {
        stop_under_load(mode, &["--max-connections", "2"], one_request);
    }
}

#[test]
fn no_client_that_sent_a_request_on_a_kept_connection_loses_its_answer() {
    for mode in MODES {
        stop_under_load(mode, &[], many_requests);
    }
}

fn one_request(client: &mut Client, answered: &AtomicUsize) -> Result<(), String> {
    client.send("GET / HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n");
    checked(client.try_response())?;
    answered.fetch_add(1, Ordering::Relaxed);
    Ok(())
}

fn many_requests(client: &mut Client, answered: &AtomicUsize) -> Result<(), String> {
    loop {
        client.send(request("/"));
        let response = checked(client.try_response())?;
        answered.fetch_add(1, Ordering::Relaxed);
        if response.head.contains("Connection: close\r\n") {
            return Ok(());
        }
    }
}

fn checked(response: io::Result<Response>) -> Result<Response, String> {
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
        while answered.load(Ordering::Relaxed) < ENOUGH
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
