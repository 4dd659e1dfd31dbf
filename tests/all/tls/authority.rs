//! A certificate authority, and clients that trust it.

use std::fs::Permissions;
use std::io::Read;
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use rcgen::{CertificateParams, CertifiedIssuer, DnType, KeyPair};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

use crate::harness::{Server, output};

/// A certificate authority for a test, with a temporary directory for its files.
pub(super) struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    directory: tempfile::TempDir,
}

impl Authority {
    pub(super) fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let name = &mut params.distinguished_name;
        name.push(DnType::CommonName, "test authority");
        let key = KeyPair::generate().unwrap();
        let issuer = CertifiedIssuer::self_signed(params, key).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let authority = Self { issuer, directory };
        std::fs::write(authority.path("ca.pem"), authority.issuer.pem()).unwrap();
        authority
    }

    /// The path of a file.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The path of a file, as text for the command line.
    pub(super) fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().into()
    }

    /// Writes a certificate for these names to `FILE.pem` and its key to `FILE.key`.
    pub(super) fn certify(&self, file: &str, names: &[&str]) {
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

    /// The flags of a server with these certificates.
    fn flags(&self, files: &[&str]) -> Vec<String> {
        let flags = files.iter().flat_map(|file| {
            [
                "--tls-cert".into(),
                self.text(&format!("{file}.pem")),
                "--tls-key".into(),
                self.text(&format!("{file}.key")),
            ]
        });
        flags.collect()
    }

    /// Starts a server with a certificate for `localhost`.
    pub(super) fn serve(&self, mode: &str, guest: &Path, arguments: &[&str]) -> Server {
        self.certify("localhost", &["localhost"]);
        self.serve_with(mode, guest, &["localhost"], arguments)
    }

    /// Starts a server with certificates that exist already.
    pub(super) fn serve_with(
        &self,
        mode: &str,
        guest: &Path,
        files: &[&str],
        arguments: &[&str],
    ) -> Server {
        let flags = self.flags(files);
        let mut all: Vec<&str> = flags.iter().map(String::as_str).collect();
        all.extend(arguments);
        Server::start(mode, guest, &all)
    }

    /// The trust store of a client.
    pub(super) fn roots(&self) -> RootCertStore {
        let mut roots = RootCertStore::empty();
        roots.add(self.issuer.der().clone()).unwrap();
        roots
    }

    /// Connects a client and completes its handshake.
    pub(super) fn connect(&self, server: &Server) -> Tls {
        self.try_connect(server, client_config(self.roots()))
            .unwrap()
    }

    /// The same, with this configuration. The handshake may fail.
    pub(super) fn try_connect(
        &self,
        server: &Server,
        config: ClientConfig,
    ) -> std::io::Result<Tls> {
        let name = ServerName::try_from("localhost").unwrap();
        let session = ClientConnection::new(Arc::new(config), name).unwrap();
        let mut tls = StreamOwned::new(session, server.connect().0);
        while tls.conn.is_handshaking() {
            tls.conn.complete_io(&mut tls.sock)?;
        }
        Ok(tls)
    }

    /// Requests a page with curl under this server name.
    pub(super) fn curl(
        &self,
        server: &Server,
        name: &str,
        arguments: &[&str],
    ) -> std::process::Output {
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

    /// The same. The request must succeed; returns the page.
    pub(super) fn curl_text(&self, server: &Server, name: &str, arguments: &[&str]) -> String {
        let output = self.curl(server, name, arguments);
        assert!(output.status.success(), "{output:?}\n{server:?}");
        String::from_utf8(output.stdout).unwrap()
    }
}

/// The client's end of a TLS connection.
pub(super) type Tls = StreamOwned<ClientConnection, TcpStream>;

fn write_key(path: &Path, text: &str) {
    std::fs::write(path, text).unwrap();
    std::fs::set_permissions(path, Permissions::from_mode(0o600)).unwrap();
}

/// A configuration that trusts `roots` and has no client certificate.
pub(super) fn client_config(roots: RootCertStore) -> ClientConfig {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth()
}

/// Reads the next `n` decrypted bytes.
pub(super) fn read(tls: &mut Tls, n: usize) -> String {
    let mut bytes = vec![0; n];
    tls.read_exact(&mut bytes).unwrap();
    String::from_utf8(bytes).unwrap()
}
