//! Valid and invalid handshakes, as the guest, the log and the metrics see them.

use std::io::{ErrorKind, Read, Write};
use std::process::Command;
use std::sync::Arc;

use rustls::pki_types::ServerName;
use rustls::{ClientConnection, StreamOwned};

use crate::harness::{AdminSocket, MODES, Server, fixture, guest, output, page};

use super::authority::{Authority, client_config, read};
use super::observe::{PAGES, handshakes, openssl};

#[test]
fn a_page_is_served_over_https_and_the_log_names_the_tls_version() {
    for mode in MODES {
        let authority = Authority::new();
        let server = authority.serve(mode, &guest("hello"), &PAGES);
        let text = authority.curl_text(&server, "localhost", &["--tls-max", "1.2"]);
        assert_eq!(text, page("hello.html"));
        server.wait_for_log(&["outcome=ok", "tls=TLSv1.2 localhost"]);
        let text = authority.curl_text(&server, "localhost", &["--tlsv1.3"]);
        assert_eq!(text, page("hello.html"));
        server.wait_for_log(&["outcome=ok", "tls=TLSv1.3 localhost"]);
    }
}

#[test]
fn a_guest_sees_the_tls_version_server_name_and_protocol() {
    for mode in MODES {
        let authority = Authority::new();
        let arguments = ["--tls-alpn", "echo/1", "--tls-alpn", "http/1.1"];
        let server = authority.serve(mode, &fixture("tls"), &arguments);
        let text = authority.curl_text(&server, "localhost", &["--http0.9", "--http1.1"]);
        let rest = "name=localhost alpn=http/1.1 subject=- fingerprint=-\n";
        assert_eq!(text, format!("TLSv1.3 {rest}"));
        let older = ["--http0.9", "--http1.1", "--tls-max", "1.2"];
        let text = authority.curl_text(&server, "localhost", &older);
        assert_eq!(text, format!("TLSv1.2 {rest}"));
        // A client that sends neither a server name nor a protocol.
        let (text, _) = openssl(&server, &["-noservername", "-quiet"]);
        assert_eq!(text, "TLSv1.3 name=- alpn=- subject=- fingerprint=-\n");
        // A client that offers only other protocols is refused (RFC 7301, section 3.2).
        let (_, error) = openssl(&server, &["-alpn", "other"]);
        assert!(error.contains("no application protocol"), "{error}");
    }
}

#[test]
fn a_guest_sees_that_a_connection_has_no_tls() {
    let server = Server::start("concurrent", &fixture("tls"), &[]);
    let mut client = server.connect();
    assert_eq!(client.read_line(), "no TLS");
    client.finish();
    server.wait_for_log(&["ended in order after 0 bytes"]);
}

#[test]
fn clients_below_the_minimum_version_are_refused() {
    for mode in MODES {
        let authority = Authority::new();
        let admin = AdminSocket::new();
        let arguments = ["--tls-min-version", "1.3", "--admin", &admin.flag];
        let server = authority.serve(mode, &fixture("tls"), &arguments);
        let (text, _) = openssl(&server, &["-tls1_3", "-quiet"]);
        assert!(text.starts_with("TLSv1.3 "), "{text}");
        let (text, error) = openssl(&server, &["-tls1_2", "-quiet"]);
        assert_eq!(text, "");
        assert!(error.contains("protocol version"), "{error}");
        assert_eq!(handshakes(&admin, "incompatible"), 1);
        assert_eq!(handshakes(&admin, "ok"), 1);
    }
}

#[test]
fn invalid_handshakes_are_counted_and_reach_no_guest() {
    for mode in MODES {
        let authority = Authority::new();
        let admin = AdminSocket::new();
        let server = authority.serve(mode, &guest("echo"), &["--admin", &admin.flag]);
        let mut client = server.connect();
        client.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n");
        let (bytes, end) = client.read_all();
        assert_eq!(bytes, b"");
        assert_eq!(end.unwrap_err().kind(), ErrorKind::ConnectionReset);
        assert_eq!(handshakes(&admin, "plain_text"), 1);
        let garbage: [&[u8]; 4] = [
            &[0; 100],
            &[0x80, 0x2e, 1, 3, 1, 0, 0x15, 0, 0],
            // A valid record header with invalid content.
            &[22, 3, 1, 0xff, 0xff, 1, 2, 3],
            &[22, 3, 1, 0, 4, 1, 0xff, 0xff, 0xff],
        ];
        for (n, bytes) in garbage.into_iter().enumerate() {
            let mut client = server.connect();
            client.send([bytes, &[0xff; 100]].concat());
            // The answer is an alert (record type 21) or nothing.
            let (answer, _) = client.read_all();
            assert!(answer.is_empty() || answer[0] == 21, "{n}: {answer:?}");
        }
        assert_eq!(handshakes(&admin, "bad"), garbage.len() as u64);
        // The client closes in the middle of its hello.
        let mut client = server.connect();
        client.send([22, 3, 1, 0, 200, 1, 0, 0, 196]);
        client.finish();
        let _ = client.read_all();
        let mut client = server.connect();
        client.finish();
        let _ = client.read_all();
        assert_eq!(handshakes(&admin, "client_gone"), 2);
        assert_eq!(server.log_lines("connection ended").len(), 0);
        assert!(server.log_lines("TLS handshake failed").len() <= 4);
        let mut tls = authority.connect(&server);
        tls.write_all(b"x").unwrap();
        assert_eq!(read(&mut tls, 1), "x");
    }
}

#[test]
fn a_port_probe_is_counted_but_not_logged() {
    let authority = Authority::new();
    let admin = AdminSocket::new();
    let server = authority.serve("concurrent", &guest("echo"), &["--admin", &admin.flag]);
    for _ in 0..3 {
        let mut client = server.connect();
        client.finish();
        let _ = client.read_all();
    }
    assert_eq!(handshakes(&admin, "client_gone"), 3);
    // A client that has sent a byte is logged, and its log line is the first.
    let mut client = server.connect();
    client.send([22, 3, 1]);
    client.finish();
    let _ = client.read_all();
    let line = server.wait_for_log(&["TLS handshake failed"]);
    assert!(line.contains("since=1"), "{line}");
}

#[test]
fn a_tls_handshake_can_follow_a_proxy_header() {
    for mode in MODES {
        let authority = Authority::new();
        let arguments = ["--proxy-from", "127.0.0.1"];
        let server = authority.serve(mode, &fixture("addresses"), &arguments);
        let name = ServerName::try_from("localhost").unwrap();
        let config = Arc::new(client_config(authority.roots()));
        let session = ClientConnection::new(config, name).unwrap();
        let mut tcp = server.connect();
        tcp.send("PROXY TCP4 192.0.2.1 198.51.100.2 56324 443\r\n");
        let mut tls = StreamOwned::new(session, tcp.0);
        let mut text = String::new();
        tls.read_to_string(&mut text).unwrap();
        assert!(
            text.ends_with(" 192.0.2.1:56324 198.51.100.2:443"),
            "{text}"
        );
        // The server logs the end when the client has closed too, or two seconds later.
        drop(tls);
        server.wait_for_log(&[
            "peer=192.0.2.1:56324 via=127.0.0.1:",
            "tls=TLSv1.3 localhost",
        ]);
    }
}

#[test]
fn sslscan_finds_no_old_or_weak_protocol() {
    if Command::new("sslscan").arg("--version").output().is_err() {
        eprintln!("skipped: sslscan is not installed; apt-get install sslscan");
        return;
    }
    let authority = Authority::new();
    let server = authority.serve("concurrent", &guest("echo"), &[]);
    let mut command = Command::new("sslscan");
    command.args(["--no-colour", "--sni-name=localhost"]);
    let output = output(command.arg(server.address().to_string()));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let has = |words: &[&str]| {
        text.lines().any(|line| {
            let mut found = line.split_whitespace();
            words.iter().all(|word| found.any(|next| next == *word))
        })
    };
    for old in ["SSLv2", "SSLv3", "TLSv1.0", "TLSv1.1"] {
        assert!(
            has(&[old, "disabled"]) && !has(&[old, "enabled"]),
            "{old}\n{text}"
        );
    }
    for new in ["TLSv1.2", "TLSv1.3"] {
        assert!(has(&[new, "enabled"]), "{new}\n{text}");
    }
    let ciphers: Vec<_> = text
        .lines()
        .filter(|line| line.starts_with("Preferred ") || line.starts_with("Accepted "))
        .collect();
    assert!(ciphers.len() > 3, "{text}");
    for line in ciphers {
        // Every cipher has forward secrecy and authenticated encryption.
        let forward_secret = line.contains("TLS_") || line.contains("ECDHE-");
        let aead = line.contains("GCM") || line.contains("POLY1305");
        assert!(forward_secret && aead, "{line}\n{text}");
    }
    assert!(text.contains("not vulnerable to heartbleed"), "{text}");
    assert!(
        text.contains("Compression disabled")
            || text.contains("OpenSSL version does not support compression"),
        "{text}"
    );
    assert!(
        !text.contains("Insecure session renegotiation supported"),
        "{text}"
    );
}
