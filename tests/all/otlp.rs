//! Spans sent to an OTLP collector. The tests accept the request on a plain socket.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::thread;

use rustix::process::Signal;

use crate::harness::{
    AdminSocket, MODES, PATIENCE, Server, fixture, free_address, guest, run, wasinetd,
};

/// Returns the first request that reaches the collector, body included, as lossy text.
fn receive_request(listener: TcpListener) -> String {
    let (mut stream, _) = listener.accept().unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut request = Vec::new();
    let head = loop {
        let mut bytes = [0; 4096];
        let n = stream.read(&mut bytes).unwrap();
        assert!(n > 0, "the request ended early");
        request.extend(&bytes[..n]);
        if let Some(end) = request.windows(4).position(|bytes| bytes == b"\r\n\r\n") {
            break end + 4;
        }
    };
    let text = String::from_utf8_lossy(&request[..head]).to_lowercase();
    let length = text
        .lines()
        .find_map(|line| line.strip_prefix("content-length: "));
    let length: usize = length.unwrap().trim().parse().unwrap();
    let mut remaining = vec![0; (head + length).saturating_sub(request.len())];
    stream.read_exact(&mut remaining).unwrap();
    request.extend(remaining);
    stream
        .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        .unwrap();
    String::from_utf8_lossy(&request).into_owned()
}

#[test]
fn each_connection_is_exported_as_a_span() {
    for mode in MODES {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let collector = thread::spawn(|| receive_request(listener));
        // Only the path is used, as one more address to listen on.
        let socket = AdminSocket::new();
        let listen = ["--listen", "127.0.0.1:0", "--listen", &socket.flag];
        let arguments = [&listen[..], &["--otlp", &endpoint]].concat();
        let mut server = Server::start(mode, &fixture("uses_resources"), &arguments);
        let unix_client = server.connect_unix();
        unix_client.finish();
        server.wait_for_log(&["peer=unix:"]);
        let mut good = server.connect();
        good.send("compute 0\n");
        assert_eq!(good.read_line(), "done");
        let peer = good.0.local_addr().unwrap();
        good.finish();
        assert_eq!(good.read_to_end(), "");
        let mut bad = server.connect();
        bad.send("recurse 100000000\n");
        assert!(bad.read_all().1.is_err());
        server.wait_for_log(&["limit=\"stack\""]);
        // The server sends the remaining spans when it exits.
        server.signal(Signal::TERM);
        assert_eq!(server.wait().code(), Some(0), "{server:?}");
        let request = collector.join().unwrap();
        assert!(
            request.starts_with("POST /v1/traces HTTP/1.1\r\n"),
            "{request}"
        );
        assert!(
            request
                .to_lowercase()
                .contains("content-type: application/x-protobuf")
        );
        for part in [
            "service.name",
            "wasinetd",
            "instantiate",
            "client.address",
            "network.transport",
            "unix",
            "wasinetd.client.uid",
            "wasinetd.outcome",
            "ok",
            "trap",
            "wasinetd.limits",
            "stack",
        ] {
            assert!(request.contains(part), "{part} in {request}");
        }
        assert!(request.contains(&peer.ip().to_string()), "{request}");
        assert_eq!(request.matches("instantiate").count(), 3, "{request}");
    }
}

#[test]
fn an_unreachable_collector_delays_neither_clients_nor_shutdown() {
    for mode in MODES {
        let unreachable = format!("http://{}", free_address());
        let mut server = Server::start(mode, &guest("echo"), &["--otlp", &unreachable]);
        let mut client = server.connect();
        client.send("hello");
        client.finish();
        assert_eq!(client.read_to_end(), "hello");
        server.signal(Signal::TERM);
        assert_eq!(server.wait().code(), Some(0), "{server:?}");
    }
    for bad in [
        "https://127.0.0.1:4318",
        "127.0.0.1:4318",
        "http://:1",
        "http://host",
    ] {
        let mut command = wasinetd();
        command.args(["serve", "--otlp", bad]);
        let output = run(command.arg(guest("echo")));
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(64), "{text}");
        assert!(text.contains("--otlp"), "{text}");
    }
}
