//! Certificates and keys: read from files, chosen by server name, and described to guests.

use std::collections::HashMap;
use std::fmt::Write;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use rustls::RootCertStore;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use sha2::{Digest, Sha256};
use tracing::warn;
use x509_cert::Certificate;
use x509_cert::der::asn1::AnyRef;
use x509_cert::der::{Decode, Tag, Tagged};
use x509_cert::ext::pkix::SubjectAltName;
use x509_cert::ext::pkix::name::GeneralName;

use super::error::{TlsError, TlsFile};
use super::settings::CertificateFiles;
use crate::sandbox::ClientCertificate;

/// The certificates of the server.
#[derive(Debug)]
pub(super) struct Certificates {
    /// In the order of the settings. The first is the default.
    all: Vec<Arc<CertifiedKey>>,
    /// Indexes into `all` by DNS name, in lower case.
    by_name: HashMap<String, Vec<usize>>,
}

impl Certificates {
    /// Reads certificates and keys from their files.
    ///
    /// # Errors
    ///
    /// [`TlsError::File`] with the first file that cannot be used.
    pub(super) fn read(
        pairs: &[CertificateFiles],
        provider: &CryptoProvider,
    ) -> Result<Self, TlsError> {
        let mut certificates = Self {
            all: Vec::new(),
            by_name: HashMap::new(),
        };
        for pair in pairs {
            let (key, names) = read_pair(pair, provider)?;
            let index = certificates.all.len();
            certificates.all.push(Arc::new(key));
            for name in names {
                let name = name.to_ascii_lowercase();
                certificates.by_name.entry(name).or_default().push(index);
            }
        }
        Ok(certificates)
    }

    /// The DNS names of all certificates, sorted.
    pub(super) fn names(&self) -> Vec<&str> {
        let mut names: Vec<_> = self.by_name.keys().map(String::as_str).collect();
        names.sort_unstable();
        names
    }

    /// The certificates for `name`: exact ones first, then those with a wildcard for its first
    /// label (RFC 9525, section 6.3).
    fn named(&self, name: &str) -> impl Iterator<Item = &Arc<CertifiedKey>> {
        let name = name.to_ascii_lowercase();
        let wildcard = name
            .split_once('.')
            .map(|(_, parent)| format!("*.{parent}"));
        let indexes = [Some(name), wildcard].map(|name| self.by_name.get(&name?));
        let indexes = indexes.into_iter().flatten().flatten();
        indexes.map(|index| &self.all[*index])
    }
}

impl ResolvesServerCert for Certificates {
    /// Prefers a certificate for the name, then the default, then any other.
    ///
    /// The client must be able to verify its signature.
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let named = hello.server_name().into_iter();
        let named = named.flat_map(|name| self.named(name));
        let schemes = hello.signature_schemes();
        named
            .chain(&self.all)
            .find(|key| key.key.choose_scheme(schemes).is_some())
            .cloned()
    }
}

/// Certificates of the authorities that issue client certificates.
///
/// # Errors
///
/// [`TlsError::File`] if the file cannot be used.
pub(super) fn authorities(path: &Path) -> Result<RootCertStore, TlsError> {
    const KIND: TlsFile = TlsFile::ClientAuthorities;
    let mut roots = RootCertStore::empty();
    for certificate in read_certificates(KIND, path)? {
        roots.add(certificate).map_err(|error| {
            let reason = format!("it contains an invalid certificate: {error}; generate it again");
            TlsError::file(KIND, path, reason)
        })?;
    }
    Ok(roots)
}

/// Reads a certificate with its key, and returns its DNS names too.
fn read_pair(
    pair: &CertificateFiles,
    provider: &CryptoProvider,
) -> Result<(CertifiedKey, Vec<String>), TlsError> {
    let chain = read_certificates(TlsFile::Certificate, &pair.certificate)?;
    let parsed = Certificate::from_der(&chain[0]).map_err(|error| {
        let reason = format!("the first certificate is invalid: {error}; generate it again");
        TlsError::file(TlsFile::Certificate, &pair.certificate, reason)
    })?;
    let key_error = |reason: String| TlsError::file(TlsFile::Key, &pair.key, reason);
    let text = read(TlsFile::Key, &pair.key)?;
    let key = PrivateKeyDer::from_pem_slice(&text).map_err(|error| {
        key_error(match error {
            pem::Error::NoItemsFound => {
                "there is no private key in it that is not encrypted; make one with: openssl pkey"
                    .into()
            }
            error => not_pem(&error),
        })
    })?;
    let key = provider.key_provider.load_private_key(key).map_err(|error| {
        key_error(format!(
            "{error}; use an RSA key of 2048 bits or more, or an ECDSA (P-256, P-384) or Ed25519 key"
        ))
    })?;
    let mut certified = CertifiedKey::new(chain, key);
    certified.keys_match().map_err(|_| {
        key_error(format!(
            "it is not the key of the certificate in {:?}; give certificates and keys in the same order",
            pair.certificate
        ))
    })?;
    if let Some(path) = &pair.ocsp {
        certified.ocsp = Some(read_ocsp(path)?);
    }
    warn_about(pair, &parsed);
    Ok((certified, dns_names(&parsed)))
}

fn read(kind: TlsFile, path: &Path) -> Result<Vec<u8>, TlsError> {
    std::fs::read(path).map_err(|error| {
        let reason = format!("{error}; name a file that wasinetd can read");
        TlsError::file(kind, path, reason)
    })
}

/// Reads the certificates in a file, at least one.
fn read_certificates(kind: TlsFile, path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let text = read(kind, path)?;
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text).collect();
    match certificates {
        Ok(certificates) if !certificates.is_empty() => Ok(certificates),
        Ok(_) => Err(TlsError::file(
            kind,
            path,
            "there is no certificate in it; it has to be PEM, with -----BEGIN CERTIFICATE-----",
        )),
        Err(error) => Err(TlsError::file(kind, path, not_pem(&error))),
    }
}

fn not_pem(error: &pem::Error) -> String {
    format!("{error}; it has to be PEM (openssl x509 and openssl pkey convert to it)")
}

/// Reads a successful OCSP response. Clients abort the handshake for any other.
fn read_ocsp(path: &Path) -> Result<Vec<u8>, TlsError> {
    /// The first bytes of a response: the status `successful` (RFC 6960, section 4.2.1).
    const SUCCESSFUL: [u8; 3] = [0x0a, 1, 0];
    let response = read(TlsFile::Ocsp, path)?;
    let sequence = AnyRef::from_der(&response);
    match sequence {
        Ok(sequence)
            if sequence.tag() == Tag::Sequence && sequence.value().starts_with(&SUCCESSFUL) =>
        {
            Ok(response)
        }
        _ => Err(TlsError::file(
            TlsFile::Ocsp,
            path,
            "it is not a successful OCSP response; fetch a new one (openssl ocsp -respout FILE), and serve without one until then",
        )),
    }
}

/// Logs problems that do not keep the server from serving.
fn warn_about(pair: &CertificateFiles, certificate: &Certificate) {
    let (path, key) = (&pair.certificate, &pair.key);
    if let Ok(metadata) = std::fs::metadata(key)
        && metadata.mode() & 0o007 != 0
    {
        warn!(
            path = %key.display(),
            mode = format!("{:03o}", metadata.mode() & 0o777),
            fix = format!("chmod 600 {}", key.display()),
            "others may read the key of the server"
        );
    }
    let validity = certificate.tbs_certificate().validity();
    let now = SystemTime::now();
    if validity.not_after.to_system_time() < now {
        warn!(path = %path.display(), not_after = %validity.not_after, "the certificate of the server has expired: clients will refuse it");
    }
    if validity.not_before.to_system_time() > now {
        warn!(path = %path.display(), not_before = %validity.not_before, "the certificate of the server is not valid yet: clients will refuse it");
    }
}

/// The DNS names of a certificate. Clients ignore names in its subject (RFC 9525, section 2).
fn dns_names(certificate: &Certificate) -> Vec<String> {
    let Ok(Some((_, names))) = certificate
        .tbs_certificate()
        .get_extension::<SubjectAltName>()
    else {
        return Vec::new();
    };
    let names = names.0.into_iter().filter_map(|name| match name {
        GeneralName::DnsName(name) => Some(name.to_string()),
        _ => None,
    });
    names.collect()
}

/// The longest subject that a guest learns, in bytes. Arbitrary: names of people are far shorter.
const MAX_SUBJECT: usize = 4096;

/// Describes a verified client certificate to a guest.
pub(super) fn describe_client(certificate: &CertificateDer<'_>) -> ClientCertificate {
    let parsed = Certificate::from_der(certificate);
    let mut subject = parsed.map_or_else(
        |_| String::new(),
        |parsed| parsed.tbs_certificate().subject().to_string(),
    );
    if subject.len() > MAX_SUBJECT {
        // Not truncated: a part of a name can be the name of somebody else.
        subject.clear();
    }
    let mut fingerprint = String::with_capacity(64);
    for byte in Sha256::digest(certificate) {
        // Writing to a string does not fail.
        let _ = write!(fingerprint, "{byte:02x}");
    }
    ClientCertificate {
        subject,
        fingerprint,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn certified(names: &[&str]) -> (tempfile::TempDir, CertificateFiles) {
        let names: Vec<String> = names.iter().map(|name| (*name).into()).collect();
        let generated = rcgen::generate_simple_self_signed(names).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let pair = CertificateFiles {
            certificate: directory.path().join("cert.pem"),
            key: directory.path().join("key.pem"),
            ocsp: None,
        };
        std::fs::write(&pair.certificate, generated.cert.pem()).unwrap();
        std::fs::write(&pair.key, generated.signing_key.serialize_pem()).unwrap();
        (directory, pair)
    }

    fn provider() -> CryptoProvider {
        rustls::crypto::ring::default_provider()
    }

    #[test]
    fn a_name_selects_its_certificates_and_a_wildcard_is_one_label() {
        let given = [
            certified(&["example.org", "www.Example.org"]),
            certified(&["*.example.org", "other.test"]),
            certified(&["www.example.org"]),
        ];
        let pairs: Vec<_> = given.iter().map(|(_, pair)| pair.clone()).collect();
        let certificates = Certificates::read(&pairs, &provider()).unwrap();
        for (name, indexes) in [
            ("example.org", &[0][..]),
            ("WWW.example.org", &[0, 2, 1]),
            ("mail.example.org", &[1]),
            ("other.test", &[1]),
            ("a.mail.example.org", &[]),
            ("example.com", &[]),
            ("org", &[]),
            ("", &[]),
            (".example.org", &[1]),
        ] {
            let named = certificates.named(name);
            let index = |key| {
                let mut all = certificates.all.iter();
                all.position(|other| Arc::ptr_eq(key, other))
            };
            let found: Vec<usize> = named.filter_map(index).collect();
            assert_eq!(found, indexes, "{name}");
        }
    }

    #[test]
    fn an_error_names_the_file_its_purpose_and_the_reason() {
        let (directory, good) = certified(&["localhost"]);
        let (_other, other) = certified(&["localhost"]);
        let nothing = directory.path().join("nothing.pem");
        std::fs::write(&nothing, "nothing\n").unwrap();
        let broken = directory.path().join("broken.pem");
        let text = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n";
        std::fs::write(&broken, text).unwrap();
        let missing = directory.path().join("missing.pem");
        let (certificate, key) = ("the certificate", "the private key");
        type Change<'a> = &'a dyn Fn(&mut CertificateFiles);
        let cases: [(Change<'_>, [&str; 3]); 8] = [
            (
                &|pair| pair.certificate = missing.clone(),
                [certificate, "missing.pem", "No such file"],
            ),
            (
                &|pair| pair.certificate = nothing.clone(),
                [certificate, "nothing.pem", "BEGIN CERTIFICATE"],
            ),
            (
                &|pair| pair.certificate = broken.clone(),
                [certificate, "broken.pem", "generate it again"],
            ),
            (
                &|pair| pair.certificate = good.key.clone(),
                [certificate, "key.pem", "no certificate"],
            ),
            (
                &|pair| pair.key = missing.clone(),
                [key, "missing.pem", "No such file"],
            ),
            (
                &|pair| pair.key = nothing.clone(),
                [key, "nothing.pem", "no private key"],
            ),
            (
                &|pair| pair.key = other.key.clone(),
                [key, "key.pem", "not the key of"],
            ),
            (
                &|pair| pair.ocsp = Some(missing.clone()),
                ["the OCSP response", "missing.pem", "No such file"],
            ),
        ];
        for (change, parts) in cases {
            let mut pair = good.clone();
            change(&mut pair);
            let error = Certificates::read(&[pair], &provider()).unwrap_err();
            let error = error.to_string();
            assert!(parts.iter().all(|part| error.contains(part)), "{error}");
        }
        assert!(authorities(&nothing).is_err());
        assert!(authorities(&good.certificate).is_ok());
    }

    #[test]
    fn a_subject_is_escaped_so_that_nobody_can_forge_another() {
        let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
        let name = &mut params.distinguished_name;
        *name = rcgen::DistinguishedName::new();
        name.push(rcgen::DnType::OrganizationName, "Example, Inc.\n");
        name.push(rcgen::DnType::CommonName, "a+CN=admin");
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap();
        let described = describe_client(certificate.der());
        assert_eq!(described.subject, "CN=a\\+CN=admin,O=Example\\, Inc.\\0a");
        assert_eq!(described.fingerprint.len(), 64);
        let none = describe_client(&CertificateDer::from(vec![1, 2, 3]));
        assert_eq!(none.subject, "");
    }
}
