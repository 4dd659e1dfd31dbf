//! Certificates and OCSP responses that are replaced while the server runs.

use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Instant;

use rustix::process::Signal;

use crate::harness::{MODES, PATIENCE, Server, guest};

use super::authority::{Authority, read};
use super::observe::openssl;

#[test]
fn a_certificate_is_replaced_under_load_without_losing_a_request() {
    for mode in MODES {
        let authority = Authority::new();
        let server = authority.serve(mode, &guest("echo"), &[]);
        let mut before = authority.connect(&server);
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            let clients: Vec<_> = (0..2)
                .map(|_| scope.spawn(|| send_requests_until(&authority, &server, &done)))
                .collect();
            let mut current = served_certificate(&authority, &server);
            for round in 0..4 {
                authority.certify("localhost", &["localhost"]);
                if round % 2 == 0 {
                    server.signal(Signal::HUP);
                }
                // Reloaded at the signal, or when the server notices the changed file.
                let patience = Instant::now() + PATIENCE;
                let next = loop {
                    let next = served_certificate(&authority, &server);
                    if next != current {
                        break next;
                    }
                    assert!(Instant::now() < patience, "round {round}\n{server:?}");
                };
                current = next;
            }
            done.store(true, Ordering::SeqCst);
            for client in clients {
                assert!(client.join().unwrap() > 0);
            }
        });
        before.write_all(b"x").unwrap();
        assert_eq!(read(&mut before, 1), "x");
    }
}

/// Sends requests in sequence, each on a new connection, until `done`.
fn send_requests_until(authority: &Authority, server: &Server, done: &AtomicBool) -> usize {
    let mut served = 0;
    while !done.load(Ordering::SeqCst) {
        let mut tls = authority.connect(server);
        tls.write_all(b"x").unwrap();
        assert_eq!(read(&mut tls, 1), "x");
        served += 1;
    }
    served
}

/// The certificate that a new client gets.
fn served_certificate(authority: &Authority, server: &Server) -> Vec<u8> {
    let tls = authority.connect(server);
    tls.conn.peer_certificates().unwrap()[0].to_vec()
}

#[test]
fn a_bad_certificate_changes_nothing_and_is_logged() {
    for mode in MODES {
        let authority = Authority::new();
        let server = authority.serve(mode, &guest("echo"), &[]);
        let current = served_certificate(&authority, &server);
        std::fs::write(authority.path("localhost.pem"), "nonsense").unwrap();
        server.signal(Signal::HUP);
        server.wait_for_log(&[
            "WARN",
            "TLS goes on with the certificates from before",
            "localhost.pem",
        ]);
        assert_eq!(served_certificate(&authority, &server), current);
        // The key does not belong to the certificate.
        let before = std::fs::read(authority.path("localhost.key")).unwrap();
        authority.certify("localhost", &["localhost"]);
        std::fs::write(authority.path("localhost.key"), before).unwrap();
        server.signal(Signal::HUP);
        server.wait_for_log(&[
            "TLS goes on with the certificates from before",
            "not the key of",
        ]);
        assert_eq!(served_certificate(&authority, &server), current);
    }
}

#[test]
fn an_ocsp_response_is_stapled() {
    let authority = Authority::new();
    // A response with a status only. The rest concerns the client, not the server.
    let ocsp = authority.text("ocsp.der");
    std::fs::write(&ocsp, [0x30, 0x03, 0x0a, 0x01, 0x00]).unwrap();
    let server = authority.serve("concurrent", &guest("echo"), &["--tls-ocsp", &ocsp]);
    let (text, error) = openssl(&server, &["-status"]);
    assert!(
        text.contains("OCSP Response Status: successful"),
        "{text}{error}"
    );
    // An invalid response is not sent, and the old one stays.
    for bad in [&b""[..], b"<html>502", &[0x30, 0x03, 0x0a, 0x01, 0x06]] {
        std::fs::write(&ocsp, bad).unwrap();
        server.signal(Signal::HUP);
        server.wait_for_log(&[
            "TLS goes on with the certificates from before",
            "--tls-ocsp",
        ]);
        let (text, error) = openssl(&server, &["-status"]);
        assert!(
            text.contains("OCSP Response Status: successful"),
            "{text}{error}"
        );
    }
}
