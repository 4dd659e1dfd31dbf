//! Certificates and keys: from files, by the name that a client asks for, and as clients show them.

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

use super::CertificateFiles;
use crate::Error;
use crate::sandbox::ClientCertificate;

fn failed(flag: &'static str, path: &Path, reason: impl Into<String>) -> Error {
    Error::Tls {
        flag,
        path: path.into(),
        reason: reason.into(),
    }
}

fn read(flag: &'static str, path: &Path) -> Result<Vec<u8>, Error> {
    std::fs::read(path).map_err(|error| {
        let text = format!("{error}; name a file that wasinetd can read");
        failed(flag, path, text)
    })
}

/// The certificates in a file, of which there is one at least.
fn read_certificates(
    flag: &'static str,
    path: &Path,
) -> Result<Vec<CertificateDer<'static>>, Error> {
    let text = read(flag, path)?;
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text).collect();
    match certificates {
        Ok(certificates) if !certificates.is_empty() => Ok(certificates),
        Ok(_) => Err(failed(
            flag,
            path,
            "there is no certificate in it; it has to be PEM, with -----BEGIN CERTIFICATE-----",
        )),
        Err(error) => Err(failed(flag, path, not_pem(&error))),
    }
}

fn not_pem(error: &pem::Error) -> String {
    format!("{error}; it has to be PEM (openssl x509 and openssl pkey convert to it)")
}

/// The certificates that clients may show lead to these.
pub(super) fn authorities(path: &Path) -> Result<RootCertStore, Error> {
    const FLAG: &str = "--tls-client-ca";
    let mut roots = RootCertStore::empty();
    for certificate in read_certificates(FLAG, path)? {
        roots.add(certificate).map_err(|error| {
            let text = format!("a certificate in it is none: {error}; make it anew");
            failed(FLAG, path, text)
        })?;
    }
    Ok(roots)
}

/// What the server shows, by name.
#[derive(Debug)]
pub(super) struct Certificates {
    /// In the order in which they were given, of which the first one is the usual one.
    all: Vec<Arc<CertifiedKey>>,
    /// Their places in that, by the names that they are for, in lower case.
    by_name: HashMap<String, Vec<usize>>,
}

impl Certificates {
    /// Reads them.
    pub(super) fn read(
        pairs: &[CertificateFiles],
        provider: &CryptoProvider,
    ) -> Result<Self, Error> {
        let mut certificates = Self {
            all: Vec::new(),
            by_name: HashMap::new(),
        };
        for pair in pairs {
            let (key, names) = read_pair(pair, provider)?;
            let place = certificates.all.len();
            certificates.all.push(Arc::new(key));
            for name in names {
                let name = name.to_ascii_lowercase();
                certificates.by_name.entry(name).or_default().push(place);
            }
        }
        Ok(certificates)
    }

    /// The names that there are certificates for.
    pub(super) fn names(&self) -> Vec<&str> {
        let mut names: Vec<_> = self.by_name.keys().map(String::as_str).collect();
        names.sort_unstable();
        names
    }

    /// Those that are for `name`: by itself, then by a wildcard for its first part (RFC 9525, section 6.3).
    fn named(&self, name: &str) -> impl Iterator<Item = &Arc<CertifiedKey>> {
        let name = name.to_ascii_lowercase();
        let wildcard = name
            .split_once('.')
            .map(|(_, parent)| format!("*.{parent}"));
        let places = [Some(name), wildcard].map(|name| self.by_name.get(&name?));
        let places = places.into_iter().flatten().flatten();
        places.map(|place| &self.all[*place])
    }
}

impl ResolvesServerCert for Certificates {
    /// One for the name, or the first one, or else any that the client can check the signature of.
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

/// A certificate with its key, and the names that it is for.
fn read_pair(
    pair: &CertificateFiles,
    provider: &CryptoProvider,
) -> Result<(CertifiedKey, Vec<String>), Error> {
    const FLAG: &str = "--tls-cert";
    const KEY_FLAG: &str = "--tls-key";
    let chain = read_certificates(FLAG, &pair.certificate)?;
    let parsed = Certificate::from_der(&chain[0]).map_err(|error| {
        let text = format!("its first certificate is none: {error}; make it anew");
        failed(FLAG, &pair.certificate, text)
    })?;
    let key_failed = |reason: String| failed(KEY_FLAG, &pair.key, reason);
    let text = read(KEY_FLAG, &pair.key)?;
    let key = PrivateKeyDer::from_pem_slice(&text).map_err(|error| {
        key_failed(match error {
            pem::Error::NoItemsFound => {
                "there is no private key in it that is not encrypted; make one with: openssl pkey"
                    .into()
            }
            error => not_pem(&error),
        })
    })?;
    let key = provider.key_provider.load_private_key(key).map_err(|error| {
        key_failed(format!(
            "{error}; use an RSA key of 2048 bits or more, or an ECDSA (P-256, P-384) or Ed25519 one"
        ))
    })?;
    let mut certified = CertifiedKey::new(chain, key);
    certified.keys_match().map_err(|_| {
        key_failed(format!(
            "it is not the key of the certificate in {:?}; give those that belong together, in the same order",
            pair.certificate
        ))
    })?;
    if let Some(path) = &pair.ocsp {
        certified.ocsp = Some(read_ocsp(path)?);
    }
    warn_of(pair, &parsed);
    Ok((certified, names_of(&parsed)))
}

/// What an OCSP responder has answered. Clients break off a handshake for what is none.
fn read_ocsp(path: &Path) -> Result<Vec<u8>, Error> {
    const FLAG: &str = "--tls-ocsp";
    /// The beginning of an answer that is one: the status `successful` (RFC 6960, section 4.2.1).
    const SUCCESSFUL: [u8; 3] = [0x0a, 1, 0];
    let answer = read(FLAG, path)?;
    let sequence = AnyRef::from_der(&answer);
    match sequence {
        Ok(sequence)
            if sequence.tag() == Tag::Sequence && sequence.value().starts_with(&SUCCESSFUL) =>
        {
            Ok(answer)
        }
        _ => Err(failed(
            FLAG,
            path,
            "it is not what a responder answers that knows the certificate; ask for it anew (openssl ocsp -respout FILE), and leave the flag out until there is one",
        )),
    }
}

/// What is no reason not to serve.
fn warn_of(pair: &CertificateFiles, certificate: &Certificate) {
    let (path, key) = (&pair.certificate, &pair.key);
    if let Ok(metadata) = std::fs::metadata(key)
        && metadata.mode() & 0o007 != 0
    {
        warn!(
            path = %key.display(),
            mode = format!("{:03o}", metadata.mode() & 0o777),
            fix = format!("chmod 600 {}", key.display()),
            "others may read the key given to --tls-key"
        );
    }
    let validity = certificate.tbs_certificate().validity();
    let now = SystemTime::now();
    if validity.not_after.to_system_time() < now {
        warn!(path = %path.display(), not_after = %validity.not_after, "the certificate given to --tls-cert has expired: clients will refuse it");
    }
    if validity.not_before.to_system_time() > now {
        warn!(path = %path.display(), not_before = %validity.not_before, "the certificate given to --tls-cert is not valid yet: clients will refuse it");
    }
}

/// The DNS names of a certificate. Those in its subject count for no client of today.
fn names_of(certificate: &Certificate) -> Vec<String> {
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

/// The longest subject that a guest is told of, in bytes. Arbitrary: those of people are far shorter.
const MOST_OF_SUBJECT: usize = 4096;

/// What a guest learns of a certificate that was checked.
pub(super) fn describe_client(certificate: &CertificateDer<'_>) -> ClientCertificate {
    let parsed = Certificate::from_der(certificate);
    let mut subject = parsed.map_or_else(
        |_| String::new(),
        |parsed| parsed.tbs_certificate().subject().to_string(),
    );
    if subject.len() > MOST_OF_SUBJECT {
        // A part of a name can be another's.
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
        let made = rcgen::generate_simple_self_signed(names).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let pair = CertificateFiles {
            certificate: directory.path().join("cert.pem"),
            key: directory.path().join("key.pem"),
            ocsp: None,
        };
        std::fs::write(&pair.certificate, made.cert.pem()).unwrap();
        std::fs::write(&pair.key, made.signing_key.serialize_pem()).unwrap();
        (directory, pair)
    }

    fn provider() -> CryptoProvider {
        rustls::crypto::ring::default_provider()
    }

    #[test]
    fn a_name_leads_to_its_certificates_and_a_wildcard_is_one_part() {
        let given = [
            certified(&["example.org", "www.Example.org"]),
            certified(&["*.example.org", "other.test"]),
            certified(&["www.example.org"]),
        ];
        let pairs: Vec<_> = given.iter().map(|(_, pair)| pair.clone()).collect();
        let certificates = Certificates::read(&pairs, &provider()).unwrap();
        for (name, places) in [
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
            let place = |one| {
                certificates
                    .all
                    .iter()
                    .position(|two| Arc::ptr_eq(one, two))
            };
            let found: Vec<usize> = named.filter_map(place).collect();
            assert_eq!(found, places, "{name}");
        }
    }

    #[test]
    fn what_is_wrong_with_a_file_is_said_with_its_flag() {
        let (directory, good) = certified(&["localhost"]);
        let (_other, other) = certified(&["localhost"]);
        let nothing = directory.path().join("nothing.pem");
        std::fs::write(&nothing, "nothing\n").unwrap();
        let broken = directory.path().join("broken.pem");
        let text = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n";
        std::fs::write(&broken, text).unwrap();
        let missing = directory.path().join("missing.pem");
        let bad = |change: &dyn Fn(&mut CertificateFiles)| {
            let mut pair = good.clone();
            change(&mut pair);
            Certificates::read(&[pair], &provider())
                .unwrap_err()
                .to_string()
        };
        for (error, parts) in [
            (
                bad(&|pair| pair.certificate = missing.clone()),
                ["--tls-cert", "missing.pem", "No such file"],
            ),
            (
                bad(&|pair| pair.certificate = nothing.clone()),
                ["--tls-cert", "nothing.pem", "BEGIN CERTIFICATE"],
            ),
            (
                bad(&|pair| pair.certificate = broken.clone()),
                ["--tls-cert", "broken.pem", "make it anew"],
            ),
            (
                bad(&|pair| pair.certificate = good.key.clone()),
                ["--tls-cert", "key.pem", "no certificate"],
            ),
            (
                bad(&|pair| pair.key = missing.clone()),
                ["--tls-key", "missing.pem", "No such file"],
            ),
            (
                bad(&|pair| pair.key = nothing.clone()),
                ["--tls-key", "nothing.pem", "no private key"],
            ),
            (
                bad(&|pair| pair.key = other.key.clone()),
                ["--tls-key", "key.pem", "not the key of"],
            ),
            (
                bad(&|pair| pair.ocsp = Some(missing.clone())),
                ["--tls-ocsp", "missing.pem", "No such file"],
            ),
        ] {
            assert!(parts.iter().all(|part| error.contains(part)), "{error}");
        }
        assert!(authorities(&nothing).is_err());
        assert!(authorities(&good.certificate).is_ok());
    }

    #[test]
    fn a_subject_is_written_so_that_nobody_can_forge_another() {
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
