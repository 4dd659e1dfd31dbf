//! `cert`: creates a self-signed certificate, for trying out TLS.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use rcgen::{CertificateParams, DnType, ExtendedKeyUsagePurpose, KeyPair, KeyUsagePurpose};

use crate::cli::CertArgs;
use crate::exit::{Failure, code};

/// Validity from now on. A test certificate should not be left in use for good.
const VALIDITY: Duration = Duration::from_secs(90 * 24 * 60 * 60);

/// Validity before now, because the clocks of clients differ.
const CLOCK_SKEW: Duration = Duration::from_secs(60 * 60);

/// Writes a certificate and its key into a directory, and prints the command that serves with them.
pub(crate) fn cert(args: &CertArgs) -> Result<ExitCode, Failure> {
    let [certificate, key] = ["cert.pem", "key.pem"].map(|name| args.directory.join(name));
    if certificate.exists() {
        return Err(cannot_write(
            &certificate,
            io::ErrorKind::AlreadyExists.into(),
        ));
    }
    let failed = |error: rcgen::Error| {
        Failure::new(
            code::SOFTWARE,
            format!("creating a certificate failed: {error}"),
        )
    };
    let pair = KeyPair::generate().map_err(failed)?;
    let params = params(&args.name).map_err(failed)?;
    let signed = params.self_signed(&pair).map_err(failed)?;
    // The key first: a certificate without its key is useless.
    write_new(&key, 0o600, &pair.serialize_pem())?;
    write_new(&certificate, 0o644, &signed.pem()).inspect_err(|_| {
        // The key would be in the way of the next attempt.
        let _ = std::fs::remove_file(&key);
    })?;
    let mut stdout = io::stdout().lock();
    // The files exist even if nobody reads this line.
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
    subject.push(DnType::CommonName, "wasinetd cert (for testing)");
    let now = SystemTime::now();
    params.not_before = (now - CLOCK_SKEW).into();
    params.not_after = (now + VALIDITY).into();
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    Ok(params)
}

/// Writes a file that must not exist yet.
fn write_new(path: &Path, mode: u32, text: &str) -> Result<(), Failure> {
    let mut options = OpenOptions::new();
    let file = options.write(true).create_new(true).mode(mode).open(path);
    file.and_then(|mut file| file.write_all(text.as_bytes()))
        .map_err(|error| cannot_write(path, error))
}

fn cannot_write(path: &Path, error: io::Error) -> Failure {
    let fix = match error.kind() {
        io::ErrorKind::AlreadyExists => "remove it, or name another directory",
        _ => "name an existing directory that you can write to",
    };
    Failure::new(
        code::CONFIG,
        format!("cannot make {path:?}: {error}; {fix}"),
    )
}
