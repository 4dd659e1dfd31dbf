//! Server certificates: selection, mistakes, and certificates for tests.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::harness::{MODES, Server, guest, output, page, run, wasinetd};

use super::authority::Authority;
use super::observe::{PAGES, openssl};

#[test]
fn the_certificate_is_selected_by_server_name() {
    for mode in MODES {
        let authority = Authority::new();
        authority.certify("first", &["first.test"]);
        authority.certify("wild", &["*.wild.test", "wild.test"]);
        authority.certify("exact", &["exact.wild.test"]);
        let files = ["first", "wild", "exact"];
        let server = authority.serve_with(mode, &guest("hello"), &files, &PAGES);
        for name in ["first.test", "wild.test", "a.wild.test", "exact.wild.test"] {
            authority.curl_text(&server, name, &[]);
        }
        // Other names get the first certificate, which curl rejects.
        for name in ["other.test", "a.b.wild.test"] {
            let output = authority.curl(&server, name, &[]);
            assert_eq!(output.status.code(), Some(60), "{output:?}");
        }
        for (name, subject) in [
            ("exact.wild.test", "CN = exact"),
            ("EXACT.wild.test", "CN = exact"),
            ("b.wild.test", "CN = wild"),
            ("other.test", "CN = first"),
        ] {
            let (text, _) = openssl(&server, &["-servername", name]);
            let line = text.lines().find(|line| line.starts_with("subject="));
            let line = line.unwrap_or_else(|| panic!("{text}"));
            assert!(line.contains(subject), "{name}: {line}");
        }
    }
}

#[test]
fn clients_get_an_ecdsa_or_an_rsa_certificate_as_they_support() {
    let authority = Authority::new();
    authority.certify("ecdsa", &["localhost"]);
    let status = Command::new("openssl")
        .args([
            "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1",
        ])
        .args([
            "-subj",
            "/CN=rsa",
            "-addext",
            "subjectAltName=DNS:localhost",
        ])
        .args(["-keyout", &authority.text("rsa.key")])
        .args(["-out", &authority.text("rsa.pem")])
        .stderr(Stdio::null())
        .status()
        .unwrap();
    assert!(status.success());
    let files = ["ecdsa", "rsa"];
    let server = authority.serve_with("concurrent", &guest("hello"), &files, &PAGES);
    for (arguments, subject) in [
        (&["-servername", "localhost"][..], "CN = ecdsa"),
        (
            &["-servername", "localhost", "-sigalgs", "RSA-PSS+SHA256"],
            "CN = rsa",
        ),
    ] {
        let (text, error) = openssl(&server, arguments);
        assert!(text.contains(subject), "{text}{error}");
    }
}

#[test]
fn a_private_key_readable_by_others_causes_a_warning() {
    let authority = Authority::new();
    authority.certify("open", &["localhost"]);
    let key = authority.path("open.key");
    std::fs::set_permissions(&key, Permissions::from_mode(0o644)).unwrap();
    let server = authority.serve_with("concurrent", &guest("echo"), &["open"], &[]);
    server.wait_for_log(&["WARN", "others may read the key", "chmod 600", "open.key"]);
    drop(server);
    let server = authority.serve("concurrent", &guest("echo"), &[]);
    assert_eq!(server.log_lines("others may read").len(), 0);
}

#[test]
fn cert_creates_a_usable_test_certificate_and_overwrites_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let cert =
        |arguments: &[&str]| run(wasinetd().arg("cert").arg(directory.path()).args(arguments));
    let output = cert(&["--name", "localhost", "--name", "dev.test"]);
    assert!(output.status.success(), "{output:?}");
    let command = String::from_utf8(output.stdout).unwrap();
    let [certificate, key] = ["cert.pem", "key.pem"].map(|name| directory.path().join(name));
    let [certificate_text, key_text] =
        [&certificate, &key].map(|path| path.to_str().unwrap().to_string());
    let flags = format!("--tls-cert {certificate_text} --tls-key {key_text} ");
    assert!(
        command.starts_with("wasinetd serve ") && command.contains(&flags),
        "{command}"
    );
    let permissions = std::fs::metadata(&key).unwrap().permissions().mode();
    assert_eq!(permissions & 0o777, 0o600);
    let before = std::fs::read(&key).unwrap();
    let output = cert(&[]);
    assert_eq!(output.status.code(), Some(78));
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(
        text.contains("cert.pem") && text.contains("remove it"),
        "{text}"
    );
    std::fs::remove_file(&certificate).unwrap();
    assert_eq!(cert(&[]).status.code(), Some(78));
    assert_eq!(std::fs::read(&key).unwrap(), before);
    std::fs::remove_file(&key).unwrap();
    assert!(cert(&["--name", "dev.test"]).status.success());
    // A server accepts the certificate, and so does curl.
    let arguments = [
        &["--tls-cert", &certificate_text, "--tls-key", &key_text],
        &PAGES[..],
    ]
    .concat();
    let server = Server::start("concurrent", &guest("hello"), &arguments);
    let port = server.address().port();
    let output = curl_trusting(&certificate, port);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(
        String::from_utf8(output.stdout).unwrap(),
        page("hello.html")
    );
}

/// Requests a page with curl, which trusts only this certificate.
fn curl_trusting(certificate: &Path, port: u16) -> std::process::Output {
    let mut command = Command::new("curl");
    command
        .args(["--silent", "--show-error", "--cacert"])
        .arg(certificate)
        .args(["--resolve", &format!("dev.test:{port}:127.0.0.1")]);
    output(command.arg(format!("https://dev.test:{port}/")))
}

#[test]
fn invalid_tls_settings_are_refused_with_the_flag_name() {
    let authority = Authority::new();
    authority.certify("one", &["localhost"]);
    authority.certify("two", &["localhost"]);
    let [one, two] = ["one", "two"].map(|name| authority.text(&format!("{name}.pem")));
    let [one_key, two_key] = ["one", "two"].map(|name| authority.text(&format!("{name}.key")));
    let missing = authority.text("missing");
    // Settings that need a certificate, without one.
    for (arguments, message) in [
        (["--tls-cert", &one], "--tls-key"),
        (["--tls-alpn", "h2"], "--tls-cert"),
        (["--tls-client-ca", &one], "--tls-cert"),
        (["--tls-min-version", "1.3"], "--tls-cert"),
        (["--max-handshakes", "5"], "--tls-cert"),
    ] {
        assert_refused(&arguments, 64, message);
    }
    // Further settings beside a valid certificate.
    let valid = ["--tls-cert", &one, "--tls-key", &one_key];
    let twice = ["--tls-ocsp", &two, "--tls-ocsp", &two];
    for (arguments, code, message) in [
        (
            &["--tls-cert", &*two][..],
            64,
            "--tls-cert is given 2 times",
        ),
        (&twice, 64, "--tls-ocsp 2 times"),
        (&["--tls-client-auth", "required"], 64, "--tls-client-ca"),
        (&["--tls-ocsp", &one], 78, "given to --tls-ocsp"),
        (&["--tls-min-version", "1.1"], 64, "--tls-min-version"),
        (&["--tls-alpn", ""], 64, "--tls-alpn"),
        (&["--max-handshakes", "0"], 64, "--max-handshakes"),
        (&["--handshake-timeout", "0s"], 64, "--handshake-timeout"),
        (
            &["--tls-client-ca", &one_key],
            78,
            "given to --tls-client-ca",
        ),
    ] {
        assert_refused(&[&valid, arguments].concat(), code, message);
    }
    // Missing files, and a key that does not belong to the certificate.
    for (certificate, key, message) in [
        (&missing, &one_key, "given to --tls-cert"),
        (&one, &missing, "given to --tls-key"),
        (&one, &two_key, "not the key of"),
    ] {
        let arguments = ["--tls-cert", certificate, "--tls-key", key];
        assert_refused(&arguments, 78, message);
    }
}

/// Runs `serve`, which must fail with this code and message.
fn assert_refused(arguments: &[&str], code: i32, message: &str) {
    let mut command = wasinetd();
    command
        .args(["serve", "--listen", "127.0.0.1:0"])
        .args(arguments);
    let output = run(command.arg(guest("echo")));
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {text}");
    assert!(text.contains(message), "{arguments:?}: {text}");
}
