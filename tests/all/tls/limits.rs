//! Limits on handshakes and on the decrypted stream.

use std::io::{ErrorKind, Read, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use socket2::SockRef;

use crate::harness::{AdminSocket, MODES, PATIENCE, guest, wait_until};

use super::authority::{Authority, read};
use super::observe::{handshakes, metric};

#[test]
fn half_open_handshakes_time_out_and_delay_no_other_client() {
    for mode in MODES {
        let authority = Authority::new();
        let admin = AdminSocket::new();
        let arguments = ["--handshake-timeout", "4s", "--admin", &admin.flag];
        let server = authority.serve(mode, &guest("echo"), &arguments);
        // Half of the clients send nothing, the others a part of their hello.
        let mut half_open: Vec<_> = (0..200).map(|_| server.connect()).collect();
        for client in half_open.iter_mut().step_by(2) {
            client.send([22, 3, 1, 0, 200, 1, 0]);
        }
        let mut tls = authority.connect(&server);
        tls.write_all(b"x").unwrap();
        assert_eq!(read(&mut tls, 1), "x");
        // The half-open handshakes have no sandbox.
        assert_eq!(metric(&admin, "wasinetd_pool_instances "), 1);
        for client in &mut half_open {
            let (bytes, end) = client.read_all();
            assert_eq!(bytes, b"");
            assert_eq!(end.unwrap_err().kind(), ErrorKind::ConnectionReset);
        }
        assert_eq!(handshakes(&admin, "timeout"), 200);
        assert_eq!(
            metric(
                &admin,
                "wasinetd_limits_met_total{limit=\"handshake-timeout\"} "
            ),
            200
        );
        // The limit does not apply after the handshake.
        tls.write_all(b"y").unwrap();
        assert_eq!(read(&mut tls, 1), "y");
    }
}

#[test]
fn handshakes_over_the_limit_wait() {
    for mode in MODES {
        let authority = Authority::new();
        let admin = AdminSocket::new();
        let arguments = ["--max-handshakes", "1", "--admin", &admin.flag];
        let server = authority.serve(mode, &guest("echo"), &arguments);
        let hits = || {
            metric(
                &admin,
                "wasinetd_limits_met_total{limit=\"max-handshakes\"} ",
            )
        };
        // Handshakes in sequence do not reach the limit.
        for _ in 0..3 {
            let mut tls = authority.connect(&server);
            tls.write_all(b"x").unwrap();
            assert_eq!(read(&mut tls, 1), "x");
        }
        assert_eq!(hits(), 0);
        let mut first = server.connect();
        first.send([22, 3, 1, 0, 200, 1, 0]);
        let limit_was_hit = AtomicBool::new(false);
        thread::scope(|scope| {
            let second = scope.spawn(|| {
                // The server may get to this handshake before the first one: repeat until one
                // had to wait.
                loop {
                    let mut tls = authority.connect(&server);
                    tls.write_all(b"x").unwrap();
                    assert_eq!(read(&mut tls, 1), "x");
                    if hits() > 0 {
                        return limit_was_hit.load(Ordering::SeqCst);
                    }
                }
            });
            let patience = Instant::now() + PATIENCE;
            while hits() == 0 {
                assert!(Instant::now() < patience, "no handshake has to wait");
            }
            limit_was_hit.store(true, Ordering::SeqCst);
            drop(first);
            assert!(second.join().unwrap(), "the second handshake did not wait");
        });
    }
}

#[test]
fn one_source_cannot_use_up_all_handshakes() {
    for mode in MODES {
        let authority = Authority::new();
        let arguments = [
            "--max-handshakes",
            "4",
            "--handshake-timeout",
            "10m",
            "--max-connections-per-source",
            "100",
        ];
        let server = authority.serve(mode, &guest("echo"), &arguments);
        let half_open: Vec<_> = (0..20)
            .map(|_| {
                let mut client = server.connect_from("127.0.0.9").unwrap();
                client.send([22]);
                client
            })
            .collect();
        for _ in 0..3 {
            let mut tls = authority.connect(&server);
            tls.write_all(b"x").unwrap();
            assert_eq!(read(&mut tls, 1), "x");
        }
        drop(half_open);
    }
}

#[test]
fn a_full_server_sends_no_banner_to_tls_clients() {
    let authority = Authority::new();
    let arguments = [
        "--max-connections",
        "1",
        "--when-full",
        "close",
        "--full-banner",
        "full",
    ];
    let server = authority.serve("concurrent", &guest("echo"), &arguments);
    let mut tls = authority.connect(&server);
    tls.write_all(b"x").unwrap();
    assert_eq!(read(&mut tls, 1), "x");
    assert_eq!(server.connect().read_to_end(), "");
}

#[test]
fn the_first_byte_timeout_waits_for_a_decrypted_byte() {
    for mode in MODES {
        let authority = Authority::new();
        let arguments = ["--first-byte-timeout", "1s"];
        let server = authority.serve(mode, &guest("echo"), &arguments);
        let mut silent = authority.connect(&server);
        // A record that arrives byte by byte does not count before it is complete.
        let mut dripping = authority.connect(&server);
        let mut active = authority.connect(&server);
        active.write_all(b"x").unwrap();
        assert_eq!(read(&mut active, 1), "x");
        let start = Instant::now();
        let record = [&[23, 3, 3, 0x40, 0][..], &[0; 0x4000]].concat();
        let mut ended = false;
        for byte in record.chunks(1).take(400) {
            if dripping.sock.write_all(byte).is_err() {
                ended = true;
                break;
            }
            thread::sleep(Duration::from_millis(10));
        }
        assert!(
            ended,
            "the connection is still open after {:?}",
            start.elapsed()
        );
        let error = silent.read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        let outcome = "outcome=limit: first-byte-timeout";
        wait_until("two clients do not end", || {
            server.log_lines(outcome).len() >= 2
        });
        active.write_all(b"y").unwrap();
        assert_eq!(read(&mut active, 1), "y");
    }
}

#[test]
fn idle_and_write_timeouts_apply_to_tls() {
    for mode in MODES {
        let authority = Authority::new();
        let arguments = ["--idle-timeout", "1s", "--write-timeout", "500ms"];
        let server = authority.serve(mode, &guest("echo"), &arguments);
        let mut idle = authority.connect(&server);
        idle.write_all(b"x").unwrap();
        assert_eq!(read(&mut idle, 1), "x");
        let error = idle.read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        server.wait_for_log(&["outcome=limit: idle-timeout"]);
        let mut not_reading = authority.connect(&server);
        let sock = SockRef::from(&not_reading.sock).set_recv_buffer_size(4096);
        sock.unwrap();
        not_reading.sock.set_write_timeout(Some(PATIENCE)).unwrap();
        while not_reading.write_all(&[b'x'; 1 << 16]).is_ok() {}
        server.wait_for_log(&["outcome=limit: write-timeout"]);
    }
}

#[test]
fn byte_limits_count_decrypted_bytes() {
    for mode in MODES {
        let authority = Authority::new();
        let arguments = ["--max-bytes-in", "1000B", "--max-bytes-out", "1000B"];
        let server = authority.serve(mode, &guest("echo"), &arguments);
        let mut tls = authority.connect(&server);
        // Each byte has a record of its own, which takes many more bytes on the wire.
        for _ in 0..1000 {
            tls.write_all(b"x").unwrap();
            assert_eq!(read(&mut tls, 1), "x");
        }
        tls.write_all(b"x").unwrap();
        assert!(tls.read(&mut [0]).is_err());
        server.wait_for_log(&[
            "bytes_in=1000 bytes_out=1000",
            "outcome=limit: max-bytes-in",
        ]);
    }
}
