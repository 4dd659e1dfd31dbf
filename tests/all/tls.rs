//! TLS as clients see it: curl, openssl, a scanner, and a client by hand.

use std::fs::Permissions;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rcgen::{CertificateParams, CertifiedIssuer, DnType, KeyPair};
use rustix::process::Signal;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use socket2::SockRef;

use crate::harness::{
    AdminSocket, MODES, PATIENCE, Server, fixture, guest, output, page, run, wasinetd,
};

/// Who vouches for the certificates of a test, and the files with them.
struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    directory: tempfile::TempDir,
}

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let name = &mut params.distinguished_name;
        name.push(DnType::CommonName, "the authority of a test");
        let key = KeyPair::generate().unwrap();
        let issuer = CertifiedIssuer::self_signed(params, key).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let authority = Self { issuer, directory };
        std::fs::write(authority.path("ca.pem"), authority.issuer.pem()).unwrap();
        authority
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().into()
    }

    /// A certificate for these names, in `FILE.pem` and `FILE.key`.
    fn certify(&self, file: &str, names: &[&str]) {
        let names: Vec<String> = names.iter().map(|name| (*name).into()).collect();
        let mut params = CertificateParams::new(names).unwrap();
        params.distinguished_name.push(DnType::CommonName, file);
        params
            .distinguished_name
            .push(DnType::OrganizationName, "Example, Inc.");
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        std::fs::write(self.path(&format!("{file}.pem")), certificate.pem()).unwrap();
        write_key(&self.path(&format!("{file}.key")), &key.serialize_pem());
    }

    /// The flags to serve with these.
    fn flags(&self, files: &[&str]) -> Vec<String> {
        let each = files.iter().flat_map(|file| {
            [
                "--tls-cert".into(),
                self.text(&format!("{file}.pem")),
                "--tls-key".into(),
                self.text(&format!("{file}.key")),
            ]
        });
        each.collect()
    }

    /// A server that shows `localhost`.
    fn serve(&self, mode: &str, guest: &Path, arguments: &[&str]) -> Server {
        self.certify("localhost", &["localhost"]);
        self.serve_with(mode, guest, &["localhost"], arguments)
    }

    fn serve_with(&self, mode: &str, guest: &Path, files: &[&str], arguments: &[&str]) -> Server {
        let flags = self.flags(files);
        let mut all: Vec<&str> = flags.iter().map(String::as_str).collect();
        all.extend(arguments);
        Server::start(mode, guest, &all)
    }

    /// What a client trusts.
    fn roots(&self) -> RootCertStore {
        let mut roots = RootCertStore::empty();
        roots.add(self.issuer.der().clone()).unwrap();
        roots
    }

    /// A client by hand, which has shaken hands.
    fn connect(&self, server: &Server) -> Tls {
        self.try_connect(server, client_config(self.roots()))
            .unwrap()
    }

    fn try_connect(&self, server: &Server, config: ClientConfig) -> std::io::Result<Tls> {
        let name = ServerName::try_from("localhost").unwrap();
        let session = ClientConnection::new(Arc::new(config), name).unwrap();
        let mut tls = StreamOwned::new(session, server.connect().0);
        while tls.conn.is_handshaking() {
            tls.conn.complete_io(&mut tls.sock)?;
        }
        Ok(tls)
    }

    /// What curl says of the server by this name.
    fn curl(&self, server: &Server, name: &str, arguments: &[&str]) -> std::process::Output {
        let port = server.address().port();
        let mut command = Command::new("curl");
        command
            .args(["--silent", "--show-error", "--max-time", "60", "--cacert"])
            .arg(self.path("ca.pem"))
            .args(["--resolve", &format!("{name}:{port}:127.0.0.1")])
            .args(arguments)
            .arg(format!("https://{name}:{port}/"));
        output(&mut command)
    }

    /// The same, of one that succeeds.
    fn curl_text(&self, server: &Server, name: &str, arguments: &[&str]) -> String {
        let output = self.curl(server, name, arguments);
        assert!(output.status.success(), "{output:?}\n{server:?}");
        String::from_utf8(output.stdout).unwrap()
    }
}

type Tls = StreamOwned<ClientConnection, TcpStream>;

fn write_key(path: &Path, text: &str) {
    std::fs::write(path, text).unwrap();
    std::fs::set_permissions(path, Permissions::from_mode(0o600)).unwrap();
}

fn client_config(roots: RootCertStore) -> ClientConfig {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth()
}

fn read(tls: &mut Tls, n: usize) -> String {
    let mut bytes = vec![0; n];
    tls.read_exact(&mut bytes).unwrap();
    String::from_utf8(bytes).unwrap()
}

fn openssl(server: &Server, arguments: &[&str]) -> (String, String) {
    let mut command = Command::new("openssl");
    command
        .args(["s_client", "-connect", &server.address().to_string()])
        .args(arguments);
    let output = output(&mut command);
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    (text(&output.stdout), text(&output.stderr))
}

/// A figure of what came of handshakes.
fn handshakes(admin: &AdminSocket, outcome: &str) -> u64 {
    figure(
        admin,
        &format!("wasinetd_handshakes_total{{outcome=\"{outcome}\"}} "),
    )
}

fn figure(admin: &AdminSocket, name: &str) -> u64 {
    let metrics = admin.metrics();
    let line = metrics.lines().find_map(|line| line.strip_prefix(name));
    line.unwrap_or_else(|| panic!("no {name} in {metrics}"))
        .parse()
        .unwrap()
}

const PAGES: [&str; 2] = ["--dir", "static::/static"];

#[test]
fn a_page_comes_by_https_and_the_log_says_how() {
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
fn the_guest_learns_what_is_known_of_tls() {
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
        // Without a name, or a protocol.
        let (text, _) = openssl(&server, &["-noservername", "-quiet"]);
        assert_eq!(text, "TLSv1.3 name=- alpn=- subject=- fingerprint=-\n");
        // Who offers others only is refused, as RFC 7301 has it.
        let (_, error) = openssl(&server, &["-alpn", "other"]);
        assert!(error.contains("no application protocol"), "{error}");
    }
}

#[test]
fn a_guest_without_tls_learns_that_too() {
    let server = Server::start("concurrent", &fixture("tls"), &[]);
    let mut client = server.connect();
    assert_eq!(client.read_line(), "no TLS");
    client.finish();
    server.wait_for_log(&["ended in order after 0 bytes"]);
}

#[test]
fn the_certificate_is_the_one_for_the_name() {
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
        // The first is shown to others, who do not like it.
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
fn an_rsa_key_serves_as_well_and_each_client_gets_what_it_can_check() {
    let authority = Authority::new();
    authority.certify("ecdsa", &["localhost"]);
    let made = Command::new("openssl")
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
    assert!(made.success());
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
fn a_client_shows_a_certificate_where_one_is_required() {
    for mode in MODES {
        let authority = Authority::new();
        authority.certify("alice", &["alice.test"]);
        let others = Authority::new();
        others.certify("mallory", &["alice.test"]);
        let admin = AdminSocket::new();
        let ca = authority.text("ca.pem");
        let arguments = ["--tls-client-ca", &ca, "--admin", &admin.flag];
        let server = authority.serve(mode, &fixture("tls"), &arguments);
        let shown = |of: &Authority, name: &str| {
            let (certificate, key) = (
                of.text(&format!("{name}.pem")),
                of.text(&format!("{name}.key")),
            );
            authority.curl(
                &server,
                "localhost",
                &["--http0.9", "--cert", &certificate, "--key", &key],
            )
        };
        let output = shown(&authority, "alice");
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
        // Nobody else gets as far as a guest.
        assert!(!shown(&others, "mallory").status.success());
        assert_eq!(handshakes(&admin, "bad_client_certificate"), 1);
        let output = authority.curl(&server, "localhost", &["--http0.9"]);
        assert!(
            !output.status.success() && output.stdout.is_empty(),
            "{output:?}"
        );
        let (_, error) = openssl(&server, &["-quiet"]);
        assert!(error.contains("certificate required"), "{error}");
        assert_eq!(handshakes(&admin, "no_client_certificate"), 2);
        server.wait_for_log(&["a TLS handshake came to nothing", "bad_client_certificate"]);
        assert_eq!(server.log_lines("connection ended").len(), 1);
    }
}

#[test]
fn a_client_may_show_a_certificate_where_it_is_optional() {
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
        // One that nobody here knows is worse than none.
        let others = Authority::new();
        others.certify("mallory", &["alice.test"]);
        let (certificate, key) = (others.text("mallory.pem"), others.text("mallory.key"));
        let arguments = ["--http0.9", "--cert", &certificate, "--key", &key];
        let output = authority.curl(&server, "localhost", &arguments);
        assert!(!output.status.success(), "{output:?}");
    }
}

#[test]
fn a_session_is_resumed_unless_a_client_is_to_show_a_certificate() {
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
fn older_versions_are_spoken_as_far_as_is_allowed() {
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

/// What is written to a TLS port and is none is reset or told so, and no guest hears of it.
#[test]
fn what_is_no_handshake_is_counted_and_no_connection() {
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
            // Of the right kind, and then not.
            &[22, 3, 1, 0xff, 0xff, 1, 2, 3],
            &[22, 3, 1, 0, 4, 1, 0xff, 0xff, 0xff],
        ];
        for (n, bytes) in garbage.into_iter().enumerate() {
            let mut client = server.connect();
            client.send([bytes, &[0xff; 100]].concat());
            // An alert, where there is one to be sent, or nothing.
            let (said, _) = client.read_all();
            assert!(said.is_empty() || said[0] == 21, "{n}: {said:?}");
        }
        assert_eq!(handshakes(&admin, "bad"), garbage.len() as u64);
        // Half of a hello, and gone.
        let mut client = server.connect();
        client.send([22, 3, 1, 0, 200, 1, 0, 0, 196]);
        client.finish();
        let _ = client.read_all();
        let mut client = server.connect();
        client.finish();
        let _ = client.read_all();
        assert_eq!(handshakes(&admin, "client_gone"), 2);
        assert_eq!(server.log_lines("connection ended").len(), 0);
        assert!(server.log_lines("a TLS handshake came to nothing").len() <= 4);
        let mut tls = authority.connect(&server);
        tls.write_all(b"x").unwrap();
        assert_eq!(read(&mut tls, 1), "x");
    }
}

#[test]
fn half_open_handshakes_end_in_time_and_hold_nobody_up() {
    for mode in MODES {
        let authority = Authority::new();
        let admin = AdminSocket::new();
        let arguments = ["--handshake-timeout", "4s", "--admin", &admin.flag];
        let server = authority.serve(mode, &guest("echo"), &arguments);
        // Silent ones, and such as have begun.
        let mut half: Vec<_> = (0..200).map(|_| server.connect()).collect();
        for client in half.iter_mut().step_by(2) {
            client.send([22, 3, 1, 0, 200, 1, 0]);
        }
        let mut tls = authority.connect(&server);
        tls.write_all(b"x").unwrap();
        assert_eq!(read(&mut tls, 1), "x");
        // None of them has a sandbox.
        assert_eq!(figure(&admin, "wasinetd_pool_instances "), 1);
        for client in &mut half {
            let (bytes, end) = client.read_all();
            assert_eq!(bytes, b"");
            assert_eq!(end.unwrap_err().kind(), ErrorKind::ConnectionReset);
        }
        assert_eq!(handshakes(&admin, "timeout"), 200);
        assert_eq!(
            figure(
                &admin,
                "wasinetd_limits_met_total{limit=\"handshake-timeout\"} "
            ),
            200
        );
        // Whose handshake was in time has no more to do with that limit.
        tls.write_all(b"y").unwrap();
        assert_eq!(read(&mut tls, 1), "y");
    }
}

#[test]
fn handshakes_beyond_the_limit_wait() {
    for mode in MODES {
        let authority = Authority::new();
        let admin = AdminSocket::new();
        let arguments = ["--max-handshakes", "1", "--admin", &admin.flag];
        let server = authority.serve(mode, &guest("echo"), &arguments);
        let met = || {
            figure(
                &admin,
                "wasinetd_limits_met_total{limit=\"max-handshakes\"} ",
            )
        };
        // One after the other is no more than one at once.
        for _ in 0..3 {
            let mut tls = authority.connect(&server);
            tls.write_all(b"x").unwrap();
            assert_eq!(read(&mut tls, 1), "x");
        }
        assert_eq!(met(), 0);
        let mut first = server.connect();
        first.send([22, 3, 1, 0, 200, 1, 0]);
        let begun = AtomicBool::new(false);
        thread::scope(|scope| {
            let second = scope.spawn(|| {
                // Whether the first has the one place when this comes is up to the threads: it has it
                // when somebody has had to wait.
                loop {
                    let mut tls = authority.connect(&server);
                    tls.write_all(b"x").unwrap();
                    assert_eq!(read(&mut tls, 1), "x");
                    if met() > 0 {
                        return begun.load(Ordering::SeqCst);
                    }
                }
            });
            let patience = Instant::now() + PATIENCE;
            while met() == 0 {
                assert!(Instant::now() < patience, "nobody has to wait");
            }
            begun.store(true, Ordering::SeqCst);
            drop(first);
            assert!(second.join().unwrap(), "it did not wait");
        });
    }
}

#[test]
fn all_bytes_arrive_in_order_both_ways_with_small_buffers() {
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

/// Sends all and closes in order, while it receives, as fast as either goes. A session cannot be shared
/// by two threads, so that the socket does not block.
fn pump(mut tls: Tls, sent: &[u8]) -> Vec<u8> {
    tls.sock.set_nonblocking(true).unwrap();
    tls.conn.set_buffer_limit(Some(32 << 10));
    let (mut left, mut closed, mut received) = (sent, false, Vec::new());
    let patience = Instant::now() + 4 * PATIENCE;
    loop {
        assert!(Instant::now() < patience, "{} are left", left.len());
        let n = tls.conn.writer().write(left).unwrap();
        left = &left[n..];
        if left.is_empty() && !closed {
            tls.conn.send_close_notify();
            closed = true;
        }
        let mut moved = n > 0;
        while tls.conn.wants_write() {
            match tls.conn.write_tls(&mut tls.sock) {
                Ok(_) => moved = true,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => panic!("{error} after {}", received.len()),
            }
        }
        match tls.conn.read_tls(&mut tls.sock) {
            Ok(_) => moved = true,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => panic!("{error} after {}", received.len()),
        }
        tls.conn.process_new_packets().unwrap();
        match tls.conn.reader().read_to_end(&mut received) {
            Ok(_) => return received,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => panic!("{error} after {}", received.len()),
        }
        if !moved {
            thread::yield_now();
        }
    }
}

#[test]
fn a_whole_answer_is_delivered_before_the_end_to_a_client_that_takes_its_time() {
    for mode in MODES {
        let authority = Authority::new();
        let server = authority.serve(mode, &fixture("burst"), &[]);
        let mut tls = authority.connect(&server);
        SockRef::from(&tls.sock)
            .set_recv_buffer_size(64 << 10)
            .unwrap();
        tls.write_all(b"x").unwrap();
        let mut all = Vec::new();
        // In order, which takes a close_notify.
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
fn a_client_that_closes_without_saying_so_has_cut_its_stream_short() {
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
        let mut cut = authority.connect(&server);
        cut.write_all(b"some").unwrap();
        cut.sock.shutdown(Shutdown::Write).unwrap();
        server.wait_for_log(&["cut short after 4 bytes", "close_notify"]);
    }
}

#[test]
fn a_broken_answer_is_reset_and_has_no_orderly_end() {
    for mode in MODES {
        let authority = Authority::new();
        let server = authority.serve(mode, &fixture("error"), &[]);
        let mut tls = authority.connect(&server);
        // It says nothing: what is written to a connection that was reset fails otherwise.
        let error = tls.read_to_end(&mut Vec::new()).unwrap_err();
        let kinds = [ErrorKind::ConnectionReset, ErrorKind::UnexpectedEof];
        assert!(kinds.contains(&error.kind()), "{error}");
        server.wait_for_log(&["outcome=guest error"]);
    }
}

#[test]
fn a_record_that_was_changed_on_its_way_is_an_error_to_the_guest() {
    let authority = Authority::new();
    let server = authority.serve("concurrent", &fixture("tls"), &[]);
    let mut tls = authority.connect(&server);
    // The guest has begun.
    assert_eq!(read(&mut tls, 3), "TLS");
    tls.write_all(b"good").unwrap();
    // A record of the right form, and nobody's.
    let forged = [&[23, 3, 3, 0, 32][..], &[7; 32]].concat();
    tls.sock.write_all(&forged).unwrap();
    server.wait_for_log(&["cut short after 4 bytes", "TLS: "]);
}

#[test]
fn the_first_byte_is_one_of_the_clients_own() {
    for mode in MODES {
        let authority = Authority::new();
        let arguments = ["--first-byte-timeout", "1s"];
        let server = authority.serve(mode, &guest("echo"), &arguments);
        let mut silent = authority.connect(&server);
        // A part of a record is none, however often some of it comes.
        let mut drips = authority.connect(&server);
        let mut obeys = authority.connect(&server);
        obeys.write_all(b"x").unwrap();
        assert_eq!(read(&mut obeys, 1), "x");
        let begin = Instant::now();
        let drip = [&[23, 3, 3, 0x40, 0][..], &[0; 0x4000]].concat();
        let mut ended = false;
        for byte in drip.chunks(1).take(400) {
            if drips.sock.write_all(byte).is_err() {
                ended = true;
                break;
            }
            thread::sleep(Duration::from_millis(10));
        }
        assert!(ended, "it goes on after {:?}", begin.elapsed());
        let error = silent.read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        let limited = "outcome=limit: first-byte-timeout";
        while server.log_lines(limited).len() < 2 {}
        obeys.write_all(b"y").unwrap();
        assert_eq!(read(&mut obeys, 1), "y");
    }
}

#[test]
fn an_idle_connection_is_ended_and_one_that_takes_nothing_is() {
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
        let mut deaf = authority.connect(&server);
        let sock = SockRef::from(&deaf.sock).set_recv_buffer_size(4096);
        sock.unwrap();
        deaf.sock.set_write_timeout(Some(PATIENCE)).unwrap();
        while deaf.write_all(&[b'x'; 1 << 16]).is_ok() {}
        server.wait_for_log(&["outcome=limit: write-timeout"]);
    }
}

#[test]
fn limits_of_bytes_are_of_what_is_within() {
    for mode in MODES {
        let authority = Authority::new();
        let arguments = ["--max-bytes-in", "1000B", "--max-bytes-out", "1000B"];
        let server = authority.serve(mode, &guest("echo"), &arguments);
        let mut tls = authority.connect(&server);
        // Each in a record of its own, which takes many more bytes on the way.
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

/// Requests, one after the other, each on a connection of its own, until `done`.
fn request_until(authority: &Authority, server: &Server, done: &AtomicBool) -> usize {
    let mut served = 0;
    while !done.load(Ordering::SeqCst) {
        let mut tls = authority.connect(server);
        tls.write_all(b"x").unwrap();
        assert_eq!(read(&mut tls, 1), "x");
        served += 1;
    }
    served
}

/// The number of the certificate that new clients are shown.
fn serial(authority: &Authority, server: &Server) -> Vec<u8> {
    let tls = authority.connect(server);
    tls.conn.peer_certificates().unwrap()[0].to_vec()
}

#[test]
fn a_certificate_is_replaced_under_load_and_no_request_is_lost() {
    for mode in MODES {
        let authority = Authority::new();
        let server = authority.serve(mode, &guest("echo"), &[]);
        let mut before = authority.connect(&server);
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            let clients: Vec<_> = (0..2)
                .map(|_| scope.spawn(|| request_until(&authority, &server, &done)))
                .collect();
            let mut shown = serial(&authority, &server);
            for round in 0..4 {
                authority.certify("localhost", &["localhost"]);
                if round % 2 == 0 {
                    server.signal(Signal::HUP);
                }
                // At the signal, or when it was seen to have changed.
                let patience = Instant::now() + PATIENCE;
                let next = loop {
                    let next = serial(&authority, &server);
                    if next != shown {
                        break next;
                    }
                    assert!(Instant::now() < patience, "round {round}\n{server:?}");
                };
                shown = next;
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

#[test]
fn a_bad_certificate_changes_nothing_and_is_logged() {
    for mode in MODES {
        let authority = Authority::new();
        let server = authority.serve(mode, &guest("echo"), &[]);
        let shown = serial(&authority, &server);
        std::fs::write(authority.path("localhost.pem"), "nonsense").unwrap();
        server.signal(Signal::HUP);
        server.wait_for_log(&["WARN", "TLS is spoken as before", "localhost.pem"]);
        assert_eq!(serial(&authority, &server), shown);
        // A key that belongs to another one.
        let before = std::fs::read(authority.path("localhost.key")).unwrap();
        authority.certify("localhost", &["localhost"]);
        std::fs::write(authority.path("localhost.key"), before).unwrap();
        server.signal(Signal::HUP);
        server.wait_for_log(&["TLS is spoken as before", "not the key of"]);
        assert_eq!(serial(&authority, &server), shown);
    }
}

#[test]
fn who_was_let_in_by_another_authority_is_asked_again() {
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
    let reads = || -> std::io::Result<String> {
        let mut tls = authority.try_connect(&server, config.clone())?;
        let mut text = String::new();
        tls.read_to_string(&mut text)?;
        Ok(text)
    };
    assert!(reads().unwrap().contains("CN=alice"));
    let others = Authority::new();
    std::fs::copy(others.path("ca.pem"), authority.path("clients.pem")).unwrap();
    let patience = Instant::now() + PATIENCE;
    server.signal(Signal::HUP);
    while reads().is_ok() {
        assert!(
            Instant::now() < patience,
            "she is let in by her old session"
        );
    }
}

#[test]
fn an_answer_of_ocsp_is_sent_along() {
    let authority = Authority::new();
    // What else is in it is the business of whoever asks for it.
    let ocsp = authority.text("ocsp.der");
    std::fs::write(&ocsp, [0x30, 0x03, 0x0a, 0x01, 0x00]).unwrap();
    let server = authority.serve("concurrent", &guest("echo"), &["--tls-ocsp", &ocsp]);
    let (text, error) = openssl(&server, &["-status"]);
    assert!(
        text.contains("OCSP Response Status: successful"),
        "{text}{error}"
    );
    // What is none is not sent, and changes nothing.
    for bad in [&b""[..], b"<html>502", &[0x30, 0x03, 0x0a, 0x01, 0x06]] {
        std::fs::write(&ocsp, bad).unwrap();
        server.signal(Signal::HUP);
        server.wait_for_log(&["TLS is spoken as before", "--tls-ocsp"]);
        let (text, error) = openssl(&server, &["-status"]);
        assert!(
            text.contains("OCSP Response Status: successful"),
            "{text}{error}"
        );
    }
}

#[test]
fn no_source_has_all_handshakes() {
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
        let half: Vec<_> = (0..20)
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
        drop(half);
    }
}

#[test]
fn a_client_that_ends_without_saying_so_by_tls_has_the_whole_answer() {
    for mode in MODES {
        let authority = Authority::new();
        let server = authority.serve(mode, &fixture("answers_late"), &[]);
        let mut tls = authority.connect(&server);
        tls.write_all(b"x").unwrap();
        tls.sock.shutdown(Shutdown::Write).unwrap();
        let mut answer = Vec::new();
        // With the end that TLS has.
        tls.read_to_end(&mut answer).unwrap();
        assert_eq!(answer.len(), 4 << 20);
    }
}

#[test]
fn who_looks_whether_the_port_is_there_makes_no_line() {
    let authority = Authority::new();
    let admin = AdminSocket::new();
    let server = authority.serve("concurrent", &guest("echo"), &["--admin", &admin.flag]);
    for _ in 0..3 {
        let mut client = server.connect();
        client.finish();
        let _ = client.read_all();
    }
    assert_eq!(handshakes(&admin, "client_gone"), 3);
    // One that has begun does, and its line is the first.
    let mut client = server.connect();
    client.send([22, 3, 1]);
    client.finish();
    let _ = client.read_all();
    let line = server.wait_for_log(&["a TLS handshake came to nothing"]);
    assert!(line.contains("since=1"), "{line}");
}

#[test]
fn a_full_server_sends_no_text_to_who_speaks_tls() {
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
fn a_proxy_says_whom_it_speaks_for_and_tls_follows() {
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
        server.wait_for_log(&[
            "peer=192.0.2.1:56324 via=127.0.0.1:",
            "tls=TLSv1.3 localhost",
        ]);
    }
}

#[test]
fn a_server_that_drains_finishes_what_is_open() {
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

#[test]
fn a_certificate_to_try_out_is_made_and_never_written_over() {
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
    let mode = std::fs::metadata(&key).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
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
    // And it is of use.
    let arguments = [
        &["--tls-cert", &certificate_text, "--tls-key", &key_text],
        &PAGES[..],
    ]
    .concat();
    let server = Server::start("concurrent", &guest("hello"), &arguments);
    let port = server.address().port();
    let output = output_of_curl(&certificate, port);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(
        String::from_utf8(output.stdout).unwrap(),
        page("hello.html")
    );
}

fn output_of_curl(certificate: &Path, port: u16) -> std::process::Output {
    let mut command = Command::new("curl");
    command
        .args(["--silent", "--show-error", "--cacert"])
        .arg(certificate)
        .args(["--resolve", &format!("dev.test:{port}:127.0.0.1")]);
    output(command.arg(format!("https://dev.test:{port}/")))
}

#[test]
fn what_cannot_be_served_with_is_refused_with_its_flag() {
    let authority = Authority::new();
    authority.certify("one", &["localhost"]);
    authority.certify("two", &["localhost"]);
    let [one, two] = ["one", "two"].map(|name| authority.text(&format!("{name}.pem")));
    let [one_key, two_key] = ["one", "two"].map(|name| authority.text(&format!("{name}.key")));
    let missing = authority.text("missing");
    let both = ["--tls-cert", &one, "--tls-key", &one_key];
    let with = |more: &[&str]| {
        [&both[..], more]
            .concat()
            .iter()
            .map(|text| text.to_string())
            .collect::<Vec<_>>()
    };
    let plain = |all: &[&str]| all.iter().map(|text| text.to_string()).collect::<Vec<_>>();
    for (arguments, code, said) in [
        (plain(&["--tls-cert", &one]), 64, "--tls-key"),
        (plain(&["--tls-alpn", "h2"]), 64, "--tls-cert"),
        (plain(&["--tls-client-ca", &one]), 64, "--tls-cert"),
        (
            with(&["--tls-cert", &two]),
            64,
            "--tls-cert is there 2 times",
        ),
        (
            with(&["--tls-ocsp", &two, "--tls-ocsp", &two]),
            64,
            "--tls-ocsp 2 times",
        ),
        (plain(&["--tls-min-version", "1.3"]), 64, "--tls-cert"),
        (plain(&["--max-handshakes", "5"]), 64, "--tls-cert"),
        (
            with(&["--tls-client-auth", "required"]),
            64,
            "--tls-client-ca",
        ),
        (with(&["--tls-ocsp", &one]), 78, "given to --tls-ocsp"),
        (with(&["--tls-min-version", "1.1"]), 64, "--tls-min-version"),
        (with(&["--tls-alpn", ""]), 64, "--tls-alpn"),
        (with(&["--max-handshakes", "0"]), 64, "--max-handshakes"),
        (
            with(&["--handshake-timeout", "0s"]),
            64,
            "--handshake-timeout",
        ),
        (
            plain(&["--tls-cert", &missing, "--tls-key", &one_key]),
            78,
            "given to --tls-cert",
        ),
        (
            plain(&["--tls-cert", &one, "--tls-key", &missing]),
            78,
            "given to --tls-key",
        ),
        (
            plain(&["--tls-cert", &one, "--tls-key", &two_key]),
            78,
            "not the key of",
        ),
        (
            with(&["--tls-client-ca", &one_key]),
            78,
            "given to --tls-client-ca",
        ),
    ] {
        let mut command = wasinetd();
        command
            .args(["serve", "--listen", "127.0.0.1:0"])
            .args(&arguments);
        let output = run(command.arg(guest("echo")));
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {text}");
        assert!(text.contains(said), "{arguments:?}: {text}");
    }
}

#[test]
fn a_key_that_others_may_read_is_warned_of() {
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

/// Not everybody has one: `apt-get install sslscan`.
#[test]
fn a_scanner_finds_nothing_old_or_weak() {
    if Command::new("sslscan").arg("--version").output().is_err() {
        eprintln!("left out: there is no sslscan here");
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
            words.iter().all(|word| found.any(|one| one == *word))
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
        // Forward secrecy and authenticated encryption, all of them.
        let good = line.contains("TLS_") || line.contains("ECDHE-");
        let aead = line.contains("GCM") || line.contains("POLY1305");
        assert!(good && aead, "{line}\n{text}");
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
