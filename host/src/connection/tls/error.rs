//! Errors of setting up TLS.

use std::fmt;
use std::path::{Path, PathBuf};

/// Why TLS cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be used.
    #[error("cannot use the {kind} {path:?}: {reason}")]
    File {
        /// Purpose of the file.
        kind: TlsFile,
        /// The file.
        path: PathBuf,
        /// The fault of the file, and the fix.
        reason: String,
    },
    /// The library refused a setting.
    #[error("{stage} failed: {reason}")]
    Setup {
        /// The step that failed.
        stage: &'static str,
        /// Why.
        reason: String,
    },
}

impl TlsError {
    pub(super) fn file(kind: TlsFile, path: &Path, reason: impl Into<String>) -> Self {
        Self::File {
            kind,
            path: path.into(),
            reason: reason.into(),
        }
    }

    pub(super) fn setup(stage: &'static str, reason: impl fmt::Display) -> Self {
        Self::Setup {
            stage,
            reason: reason.to_string(),
        }
    }
}

/// Purpose of a file.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum TlsFile {
    /// Certificate of the server.
    Certificate,
    /// Private key of the server.
    Key,
    /// OCSP response.
    Ocsp,
    /// Certificates of the authorities that issue client certificates.
    ClientAuthorities,
}

impl fmt::Display for TlsFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Certificate => "certificate",
            Self::Key => "private key",
            Self::Ocsp => "OCSP response",
            Self::ClientAuthorities => "client authorities",
        })
    }
}
