//! Client certificates, and session resumption, which bypasses their check.

use std::io::Read;
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

use rustix::process::Signal;
use rustls::ClientConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use crate::harness::{AdminSocket, MODES, PATIENCE, fixture};

use super::authority::Authority;
use super::observe::{handshakes, openssl};

#[test]
fn a_required_client_certificate_is_enforced() {
    for mode in MODES {
        let authority = Authority::new();
        authority.certify("alice", &["alice.test"]);
        let others = Authority::new();
        others.certify("mallory", &["alice.test"]);
        let admin = AdminSocket::new();
        let ca = authority.text("ca.pem");
        let arguments = ["--tls-client-ca", &ca, "--admin", &admin.flag];
        let server = authority.serve(mode, &fixture("tls"), &arguments);
        let curl_with = |issuer: &Authority, name: &str| {
            let (certificate, key) = (
                issuer.text(&format!("{name}.pem")),
                issuer.text(&format!("{name}.key")),
            );
            authority.curl(
                &server,
                "localhost",
                &["--http0.9", "--cert", &certificate, "--key", &key],
            )
        };
        let output = curl_with(&authority, "alice");
        let text = String::from_utf8(output.stdout).unwrap();
        let fingerprint = Command::new("openssl")
            .args(["x509", "-noout", "-fingerprint", "-sha256", "-in"])
            .arg(authority.path("alice.pem"))
            .output()
            .unwrap();
        let fingerprint = String::from_utf8(fingerprint.stdout).unwrap();
        let (_, fingerprint) = fingerprint.trim().split_once('=').unwrap();
        let fingerprint = fingerprint.replace(':', "").to_lowercase();
        assert!(
            text.contains(&format!(
                " subject=O=Example\\, Inc.,CN=alice fingerprint={fingerprint}\n"
            )),
            "{text}"
        );
        // No other client reaches a guest.
        assert!(!curl_with(&others, "mallory").status.success());
        assert_eq!(handshakes(&admin, "bad_client_certificate"), 1);
        let output = authority.curl(&server, "localhost", &["--http0.9"]);
        assert!(
            !output.status.success() && output.stdout.is_empty(),
            "{output:?}"
        );
        let (_, error) = openssl(&server, &["-quiet"]);
        assert!(error.contains("certificate required"), "{error}");
        assert_eq!(handshakes(&admin, "no_client_certificate"), 2);
        server.wait_for_log(&["TLS handshake failed", "bad_client_certificate"]);
        assert_eq!(server.log_lines("connection ended").len(), 1);
    }
}

#[test]
fn an_optional_client_certificate_is_verified_if_sent() {
    for mode in MODES {
        let authority = Authority::new();
        authority.certify("alice", &["alice.test"]);
        let ca = authority.text("ca.pem");
        let arguments = ["--tls-client-ca", &ca, "--tls-client-auth", "optional"];
        let server = authority.serve(mode, &fixture("tls"), &arguments);
        let text = authority.curl_text(&server, "localhost", &["--http0.9"]);
        assert!(text.contains(" subject=- "), "{text}");
        let (certificate, key) = (authority.text("alice.pem"), authority.text("alice.key"));
        let arguments = ["--http0.9", "--cert", &certificate, "--key", &key];
        let text = authority.curl_text(&server, "localhost", &arguments);
        assert!(text.contains("CN=alice"), "{text}");
        // A certificate of an unknown authority is refused, although no certificate is fine.
        let others = Authority::new();
        others.certify("mallory", &["alice.test"]);
        let (certificate, key) = (others.text("mallory.pem"), others.text("mallory.key"));
        let arguments = ["--http0.9", "--cert", &certificate, "--key", &key];
        let output = authority.curl(&server, "localhost", &arguments);
        assert!(!output.status.success(), "{output:?}");
    }
}

#[test]
fn sessions_are_resumed_unless_client_certificates_are_requested() {
    let authority = Authority::new();
    authority.certify("alice", &["alice.test"]);
    let ca = authority.text("ca.pem");
    let chain = vec![CertificateDer::from_pem_file(authority.path("alice.pem")).unwrap()];
    for (arguments, resumes) in [(&[][..], true), (&["--tls-client-ca", &*ca], false)] {
        for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
            let server = authority.serve("concurrent", &fixture("tls"), arguments);
            let key = PrivateKeyDer::from_pem_file(authority.path("alice.key")).unwrap();
            let provider = Arc::new(rustls::crypto::ring::default_provider());
            let config = ClientConfig::builder_with_provider(provider)
                .with_protocol_versions(&[version])
                .unwrap()
                .with_root_certificates(authority.roots())
                .with_client_auth_cert(chain.clone(), key)
                .unwrap();
            let mut resumed = Vec::new();
            for _ in 0..2 {
                let mut tls = authority.try_connect(&server, config.clone()).unwrap();
                let mut text = String::new();
                tls.read_to_string(&mut text).unwrap();
                assert_eq!(text.contains("CN=alice"), !resumes, "{text}");
                resumed.push(tls.conn.handshake_kind() == Some(rustls::HandshakeKind::Resumed));
            }
            assert_eq!(resumed, [false, resumes], "{version:?}");
        }
    }
}

#[test]
fn a_new_client_authority_invalidates_old_sessions() {
    let authority = Authority::new();
    authority.certify("alice", &["alice.test"]);
    std::fs::copy(authority.path("ca.pem"), authority.path("clients.pem")).unwrap();
    let clients = authority.text("clients.pem");
    let arguments = ["--tls-client-ca", &clients];
    let server = authority.serve("concurrent", &fixture("tls"), &arguments);
    let chain = vec![CertificateDer::from_pem_file(authority.path("alice.pem")).unwrap()];
    let key = PrivateKeyDer::from_pem_file(authority.path("alice.key")).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(authority.roots())
        .with_client_auth_cert(chain, key)
        .unwrap();
    let connect = || -> std::io::Result<String> {
        let mut tls = authority.try_connect(&server, config.clone())?;
        let mut text = String::new();
        tls.read_to_string(&mut text)?;
        Ok(text)
    };
    assert!(connect().unwrap().contains("CN=alice"));
    let others = Authority::new();
    std::fs::copy(others.path("ca.pem"), authority.path("clients.pem")).unwrap();
    let patience = Instant::now() + PATIENCE;
    server.signal(Signal::HUP);
    while connect().is_ok() {
        assert!(
            Instant::now() < patience,
            "the old session still admits the client"
        );
    }
}
