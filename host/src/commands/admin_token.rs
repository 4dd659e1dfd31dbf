//! The token for the admin API on a loopback address.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::exit::{Failure, token_failure};

/// Least length of a token. A shorter one can be guessed.
const LEAST_LENGTH: usize = 16;

/// Reads the token from a file that only its owner can read.
pub(crate) fn read_token(path: &Path) -> Result<String, Failure> {
    let failed = |reason: String| token_failure(path.into(), reason);
    let unreadable = |error| failed(format!("{error}; name a file that wasinetd can read"));
    let mut file = File::open(path).map_err(unreadable)?;
    let metadata = file.metadata().map_err(|error| failed(error.to_string()))?;
    if metadata.mode() & 0o077 != 0 {
        return Err(failed(format!(
            "other users may read it (its mode is {:03o}); make a new token, and: chmod 600",
            metadata.mode() & 0o777
        )));
    }
    let mut token = String::new();
    file.read_to_string(&mut token).map_err(unreadable)?;
    let token = token.trim();
    let is_printable = token.bytes().all(|byte| byte.is_ascii_graphic());
    if token.len() < LEAST_LENGTH || !is_printable {
        return Err(failed(format!(
            "the token has to be {LEAST_LENGTH} printable characters or more; make one with: openssl rand -hex 32"
        )));
    }
    Ok(token.into())
}
