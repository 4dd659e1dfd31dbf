//! The end of a TLS stream: close_notify, truncation and shutdown.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::thread;
use std::time::Instant;

use rustix::process::Signal;
use socket2::SockRef;

use crate::harness::{MODES, PATIENCE, fixture, guest};

use super::authority::{Authority, Tls, read};

#[test]
fn a_slow_client_receives_the_whole_answer_before_the_end() {
    for mode in MODES {
        let authority = Authority::new();
        let server = authority.serve(mode, &fixture("burst"), &[]);
        let mut tls = authority.connect(&server);
        SockRef::from(&tls.sock)
            .set_recv_buffer_size(64 << 10)
            .unwrap();
        tls.write_all(b"x").unwrap();
        let mut all = Vec::new();
        // `read_to_end` fails without a close_notify.
        tls.read_to_end(&mut all).unwrap();
        assert_eq!(all.len(), 8 << 20);
        let line = server.wait_for_log(&["connection ended", "outcome=ok"]);
        assert!(
            line.contains(&format!("bytes_out={} ", all.len())),
            "{line}"
        );
    }
}

#[test]
fn a_client_that_closes_without_close_notify_truncates_its_stream() {
    for mode in MODES {
        let authority = Authority::new();
        let server = authority.serve(mode, &fixture("tls"), &[]);
        let mut orderly = authority.connect(&server);
        orderly.write_all(b"all").unwrap();
        orderly.conn.send_close_notify();
        orderly.flush().unwrap();
        let mut text = String::new();
        orderly.read_to_string(&mut text).unwrap();
        server.wait_for_log(&["ended in order after 3 bytes"]);
        let mut truncated = authority.connect(&server);
        truncated.write_all(b"some").unwrap();
        truncated.sock.shutdown(Shutdown::Write).unwrap();
        server.wait_for_log(&["cut short after 4 bytes", "close_notify"]);
    }
}

#[test]
fn a_client_that_closes_without_close_notify_still_gets_the_whole_answer() {
    for mode in MODES {
        let authority = Authority::new();
        let server = authority.serve(mode, &fixture("answers_late"), &[]);
        let mut tls = authority.connect(&server);
        tls.write_all(b"x").unwrap();
        tls.sock.shutdown(Shutdown::Write).unwrap();
        let mut answer = Vec::new();
        // The server ends with a close_notify.
        tls.read_to_end(&mut answer).unwrap();
        assert_eq!(answer.len(), 4 << 20);
    }
}

#[test]
fn a_truncated_answer_has_no_orderly_end() {
    for mode in MODES {
        let authority = Authority::new();
        let server = authority.serve(mode, &fixture("error"), &[]);
        let mut tls = authority.connect(&server);
        // The client writes nothing: a write to a reset connection would fail differently.
        let error = tls.read_to_end(&mut Vec::new()).unwrap_err();
        let kinds = [ErrorKind::ConnectionReset, ErrorKind::UnexpectedEof];
        assert!(kinds.contains(&error.kind()), "{error}");
        server.wait_for_log(&["outcome=guest error"]);
    }
}

#[test]
fn a_forged_record_is_an_error_for_the_guest() {
    let authority = Authority::new();
    let server = authority.serve("concurrent", &fixture("tls"), &[]);
    let mut tls = authority.connect(&server);
    // The guest is running.
    assert_eq!(read(&mut tls, 3), "TLS");
    tls.write_all(b"good").unwrap();
    // A well-formed record that was not encrypted with the session's keys.
    let forged = [&[23, 3, 3, 0, 32][..], &[7; 32]].concat();
    tls.sock.write_all(&forged).unwrap();
    server.wait_for_log(&["cut short after 4 bytes", "TLS: "]);
}

#[test]
fn all_bytes_arrive_in_order_in_both_directions_with_small_buffers() {
    for mode in MODES {
        let authority = Authority::new();
        let server = authority.serve(mode, &guest("echo"), &[]);
        let tls = authority.connect(&server);
        let sock = SockRef::from(&tls.sock);
        sock.set_send_buffer_size(64 << 10).unwrap();
        sock.set_recv_buffer_size(64 << 10).unwrap();
        let sent: Vec<u8> = (0..8 << 20).map(|n: u32| (n ^ (n >> 7)) as u8).collect();
        let received = pump(tls, &sent);
        assert!(received == sent, "{} of {}", received.len(), sent.len());
        let (n, line) = (sent.len(), server.wait_for_log(&["connection ended"]));
        let counted = format!("bytes_in={n} bytes_out={n} outcome=ok");
        assert!(line.contains(&counted), "{line}");
    }
}

/// Sends all bytes and a close_notify, and receives at the same time.
///
/// Two threads cannot share a session, so the socket does not block.
fn pump(mut tls: Tls, sent: &[u8]) -> Vec<u8> {
    tls.sock.set_nonblocking(true).unwrap();
    tls.conn.set_buffer_limit(Some(32 << 10));
    let (mut unsent, mut closed, mut received) = (sent, false, Vec::new());
    let patience = Instant::now() + 4 * PATIENCE;
    loop {
        assert!(
            Instant::now() < patience,
            "{} bytes are unsent",
            unsent.len()
        );
        let n = tls.conn.writer().write(unsent).unwrap();
        unsent = &unsent[n..];
        if unsent.is_empty() && !closed {
            tls.conn.send_close_notify();
            closed = true;
        }
        let mut progress = n > 0;
        while tls.conn.wants_write() {
            match tls.conn.write_tls(&mut tls.sock) {
                Ok(_) => progress = true,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => panic!("{error} after {}", received.len()),
            }
        }
        match tls.conn.read_tls(&mut tls.sock) {
            Ok(_) => progress = true,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => panic!("{error} after {}", received.len()),
        }
        tls.conn.process_new_packets().unwrap();
        match tls.conn.reader().read_to_end(&mut received) {
            Ok(_) => return received,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => panic!("{error} after {}", received.len()),
        }
        if !progress {
            thread::yield_now();
        }
    }
}

#[test]
fn a_draining_server_finishes_open_tls_connections() {
    for mode in MODES {
        let authority = Authority::new();
        let mut server = authority.serve(mode, &guest("echo"), &[]);
        let mut tls = authority.connect(&server);
        tls.write_all(b"x").unwrap();
        assert_eq!(read(&mut tls, 1), "x");
        server.signal(Signal::TERM);
        server.wait_for_log(&["draining"]);
        tls.write_all(b"y").unwrap();
        assert_eq!(read(&mut tls, 1), "y");
        tls.conn.send_close_notify();
        tls.flush().unwrap();
        assert_eq!(tls.read_to_end(&mut Vec::new()).unwrap(), 0);
        assert_eq!(server.wait().code(), Some(0));
    }
}
