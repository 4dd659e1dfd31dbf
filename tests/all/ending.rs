//! How connections end: in order, by reset, or half-closed.

use std::io::{ErrorKind, Write};

use crate::harness::{Client, MODES, Server, fixture, guest};

#[test]
fn ok_delivers_all_written_bytes_and_closes() {
    for mode in MODES {
        let server = Server::start(mode, &fixture("burst"), &[]);
        let mut client = server.connect();
        let (bytes, end) = client.read_all();
        end.unwrap();
        assert_eq!(bytes.len(), 8 << 20);
        assert!(bytes.iter().all(|byte| *byte == b'x'));
        server.wait_for_log(&["connection ended", "bytes_out=8388608", "outcome=ok"]);
    }
}

#[test]
fn a_started_write_is_delivered_after_the_guest_returns() {
    for mode in MODES {
        let server = Server::start(mode, &fixture("unfinished_write"), &[]);
        let (bytes, end) = server.connect().read_all();
        end.unwrap();
        assert_eq!(bytes.len(), 16 << 20);
        let server = Server::start(mode, &fixture("write_before_send"), &[]);
        assert_eq!(server.connect().read_to_end(), "hello");
    }
}

#[test]
fn a_guest_can_give_up_on_a_client_that_does_not_read() {
    for mode in MODES {
        let server = Server::start(mode, &fixture("gives_up_writing"), &[]);
        let client = server.connect();
        server.wait_for_log(&["connection ended", "outcome=ok"]);
        drop(client);
    }
}

#[test]
fn a_guest_can_splice_its_streams() {
    for mode in MODES {
        let server = Server::start(mode, &fixture("splice"), &[]);
        let mut client = server.connect();
        for _ in 0..3 {
            client.send(vec![b'x'; 30_000]);
            assert_eq!(client.read(30_000).len(), 30_000);
        }
        client.finish();
        assert_eq!(client.read_to_end(), "");
        server.wait_for_log(&["bytes_in=90000 bytes_out=90000", "outcome=ok"]);
    }
}

#[test]
fn an_echo_arrives_complete_before_the_client_finishes() {
    for mode in MODES {
        let server = Server::start(mode, &guest("echo"), &[]);
        let mut client = server.connect();
        // The small receive buffer makes the guest write in parts.
        socket2::SockRef::from(&client.0)
            .set_recv_buffer_size(4096)
            .unwrap();
        let mut writing = client.0.try_clone().unwrap();
        let writer = std::thread::spawn(move || writing.write_all(&vec![b'x'; 300_000]).unwrap());
        assert_eq!(client.read(300_000).len(), 300_000);
        writer.join().unwrap();
    }
}

#[test]
fn a_guest_error_resets_and_is_logged_in_one_line() {
    for mode in MODES {
        let server = Server::start(mode, &fixture("error"), &[]);
        assert_reset_after_half(&mut server.connect());
        server.wait_for_log(&[
            "connection ended",
            "bytes_out=4",
            r"outcome=guest error: out of\nideas",
        ]);
    }
}

#[test]
fn a_trap_resets_and_is_logged_with_its_backtrace() {
    for mode in MODES {
        let server = Server::start(mode, &fixture("panic"), &[]);
        assert_reset_after_half(&mut server.connect());
        let line = server.wait_for_log(&["connection ended", "outcome=trap: wasm `unreachable`"]);
        assert!(line.contains("panic::this_function_panics"), "{line}");
        server.wait_for_log(&["id=1", "stderr", "as requested"]);
        // The server keeps serving.
        assert_reset_after_half(&mut server.connect());
    }
}

/// Asserts that a truncated answer ends with a reset.
fn assert_reset_after_half(client: &mut Client) {
    let (bytes, end) = client.read_all();
    // A reset may overtake bytes that were sent before.
    assert!(b"half".starts_with(&bytes), "{bytes:?}");
    assert_eq!(end.unwrap_err().kind(), ErrorKind::ConnectionReset);
}

#[test]
fn a_guest_can_read_to_the_end_and_then_answer() {
    for mode in MODES {
        let server = Server::start(mode, &fixture("count"), &[]);
        let mut client = server.connect();
        client.send(vec![0; 100_000]);
        client.finish();
        assert_eq!(client.read_to_end(), "100000");
        server.wait_for_log(&[
            "connection ended",
            "bytes_in=100000",
            "bytes_out=6",
            "outcome=ok",
        ]);
    }
}

#[test]
fn a_guest_can_close_first_and_then_read_to_the_end() {
    for mode in MODES {
        let server = Server::start(mode, &fixture("close_first"), &[]);
        let mut client = server.connect();
        assert_eq!(client.read_to_end(), "bye");
        client.send("still here");
        client.finish();
        server.wait_for_log(&["id=1", "stdout", "received 10 bytes after closing"]);
        server.wait_for_log(&["connection ended", "bytes_in=10", "outcome=ok"]);
    }
}

#[test]
fn a_client_that_closes_ends_the_write_of_the_guest() {
    for mode in MODES {
        let server = Server::start(mode, &fixture("flood"), &[]);
        let mut client = server.connect();
        client.read(100_000);
        drop(client);
        server.wait_for_log(&["connection ended", "outcome=client gone"]);
    }
}

#[test]
fn a_client_that_resets_ends_the_read_of_the_guest() {
    for mode in MODES {
        let server = Server::start(mode, &guest("echo"), &[]);
        let mut client = server.connect();
        client.send("x");
        assert_eq!(client.read(1), "x");
        client.reset();
        server.wait_for_log(&["connection ended", "bytes_in=1", "outcome=client gone"]);
    }
}

#[test]
fn a_reset_before_the_first_byte_is_logged_as_client_gone() {
    for mode in MODES {
        // With one thread there is one backlog, whose order is known.
        let one = ["--max-connections", "1", "--threads", "1"];
        let server = Server::start_with_source_limit(mode, &fixture("count"), &one);
        // The second client waits in the backlog, where it resets its connection.
        let first = server.connect();
        let second = server.connect();
        second.reset();
        drop(first);
        server.wait_for_log(&["connection ended", "id=1 ", "outcome=ok"]);
        server.wait_for_log(&["connection ended", "id=2 ", "outcome=client gone"]);
    }
}

#[test]
fn a_client_that_closes_without_sending_ends_in_order() {
    for mode in MODES {
        let server = Server::start(mode, &guest("echo"), &[]);
        drop(server.connect());
        server.wait_for_log(&[
            "connection ended",
            "bytes_in=0",
            "bytes_out=0",
            "outcome=ok",
        ]);
    }
}

#[test]
fn a_client_that_does_not_close_does_not_hold_the_connection() {
    for mode in MODES {
        let server = Server::start(mode, &guest("hello"), &["--dir", "static::/static"]);
        let mut client = server.connect();
        client.send("GET / HTTP/1.0\r\n\r\n");
        client.read_to_end();
        // The client keeps its side open.
        server.wait_for_log(&["connection ended", "outcome=ok"]);
        drop(client);
    }
}

#[test]
fn a_guest_knows_its_connection_id_and_both_addresses() {
    for mode in MODES {
        let server = Server::start(
            mode,
            &fixture("addresses"),
            &["--listen", "127.0.0.1:0", "--listen", "[::1]:0"],
        );
        for (n, address) in (1..).zip(server.addresses()) {
            let mut client = Client::connect(*address).unwrap();
            let peer = client.0.local_addr().unwrap();
            assert_eq!(client.read_to_end(), format!("{n} {peer} {address}"));
            server.wait_for_log(&[
                "connection ended",
                &format!("id={n} "),
                &format!("peer={peer} "),
            ]);
        }
    }
}
