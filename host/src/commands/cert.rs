//! `cert`: a certificate for trying out TLS.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use rcgen::{CertificateParams, DnType, ExtendedKeyUsagePurpose, KeyPair, KeyUsagePurpose};
use wasinetd::Error;

use super::internal;
use crate::cli::CertArgs;

/// For how long it is valid. What is for trying out is not to be left somewhere for good.
const VALID: Duration = Duration::from_secs(90 * 24 * 60 * 60);

/// Clocks differ.
const BEFORE: Duration = Duration::from_secs(60 * 60);

/// Writes a certificate and its key into a directory, and says how to serve with them.
pub(crate) fn cert(args: &CertArgs) -> Result<ExitCode, Error> {
    let [certificate, key] = ["cert.pem", "key.pem"].map(|name| args.directory.join(name));
    if certificate.exists() {
        return Err(cannot_make(
            &certificate,
            io::ErrorKind::AlreadyExists.into(),
        ));
    }
    let failed = internal("making a certificate");
    let pair = KeyPair::generate().map_err(|error| failed(error.to_string()))?;
    let params = params(&args.name).map_err(|error| failed(error.to_string()))?;
    let made = params
        .self_signed(&pair)
        .map_err(|error| failed(error.to_string()))?;
    // The key first: without it the certificate is of no use to anyone.
    write_new(&key, 0o600, &pair.serialize_pem())?;
    write_new(&certificate, 0o644, &made.pem()).inspect_err(|_| {
        // It would be in the way of the next try.
        let _ = std::fs::remove_file(&key);
    })?;
    let mut stdout = io::stdout().lock();
    // It was made even where nobody reads this.
    let _ = writeln!(
        stdout,
        "wasinetd serve --tls-cert {} --tls-key {} GUEST.wasm",
        certificate.display(),
        key.display()
    );
    let _ = stdout.flush();
    Ok(ExitCode::SUCCESS)
}

fn params(names: &[String]) -> Result<CertificateParams, rcgen::Error> {
    let mut params = CertificateParams::new(names)?;
    let subject = &mut params.distinguished_name;
    subject.push(DnType::CommonName, "made by wasinetd cert, for trying out");
    let now = SystemTime::now();
    params.not_before = (now - BEFORE).into();
    params.not_after = (now + VALID).into();
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    Ok(params)
}

/// Writes a file that is not there yet.
fn write_new(path: &Path, mode: u32, text: &str) -> Result<(), Error> {
    let mut options = OpenOptions::new();
    let file = options.write(true).create_new(true).mode(mode).open(path);
    file.and_then(|mut file| file.write_all(text.as_bytes()))
        .map_err(|error| cannot_make(path, error))
}

fn cannot_make(path: &Path, error: io::Error) -> Error {
    let fix = match error.kind() {
        io::ErrorKind::AlreadyExists => "it is left alone; remove it, or name another directory",
        _ => "name a directory that is there and that you can write to",
    };
    Error::Certificate {
        path: path.into(),
        reason: format!("{error}; {fix}"),
    }
}
