//! How the process ends: all exit codes, and the words of errors that name a flag.
//!
//! The library's errors name no flag and no exit code. [`Failure`] adds both.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

use wasinetd::admin::{AdminError, ReloadFailure, ReloadFailureKind};
use wasinetd::capacity::CapacityError;
use wasinetd::config::{ConfigError, LoadCause, Mistakes};
use wasinetd::connection::tls::{TlsError, TlsFile};
use wasinetd::listener::BindError;
use wasinetd::sandbox::{Access, EngineError};
use wasinetd::supervisor::{ReloadError, StartupError, UnusableCache};

/// Exit codes, from BSD's `sysexits.h`.
pub(crate) mod code {
    /// EX_USAGE: a mistake on the command line.
    pub(crate) const USAGE: u8 = 64;
    /// EX_DATAERR: a guest that cannot run.
    pub(crate) const GUEST: u8 = 65;
    /// EX_UNAVAILABLE: something that the system or a server does not give us now.
    pub(crate) const UNAVAILABLE: u8 = 69;
    /// EX_SOFTWARE: a fault of wasinetd.
    pub(crate) const SOFTWARE: u8 = 70;
    /// EX_CANTCREAT: a file that cannot be created.
    pub(crate) const CANNOT_CREATE: u8 = 73;
    /// EX_TEMPFAIL: connections were cut off at the end. The stop itself has succeeded.
    pub(crate) const CUT_OFF: u8 = 75;
    /// EX_CONFIG: a mistake in the configuration.
    pub(crate) const CONFIG: u8 = 78;
}

/// Why a command failed, in words for the person who ran it.
#[derive(Debug)]
pub(crate) struct Failure {
    message: String,
    code: u8,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl Failure {
    pub(crate) fn new(code: u8, message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            code,
        }
    }

    /// A fault of wasinetd itself.
    pub(crate) fn internal(stage: &'static str) -> impl Fn(io::Error) -> Self {
        move |error| Self::new(code::SOFTWARE, format!("{stage} failed: {error}"))
    }

    pub(crate) fn exit_code(&self) -> u8 {
        self.code
    }
}

impl From<Failure> for ExitCode {
    fn from(failure: Failure) -> Self {
        Self::from(failure.code)
    }
}

impl From<StartupError> for Failure {
    fn from(error: StartupError) -> Self {
        match error {
            StartupError::Load(cause) => cause.into(),
            StartupError::Capacity(error) => error.into(),
            StartupError::Engine(error) => error.into(),
            StartupError::Bind(error) => error.into(),
            StartupError::Cache(error) => error.into(),
            StartupError::Watch(error) => Self::new(
                code::UNAVAILABLE,
                format!(
                    "cannot watch {:?}, as --watch asks for: {}; name a file in a directory that can be read, or send SIGHUP after each change instead",
                    error.path, error.reason
                ),
            ),
            StartupError::Draining => Self::new(code::UNAVAILABLE, error.to_string()),
            StartupError::Mistakes(_) => Self::new(code::CONFIG, error.to_string()),
            StartupError::Threads(_) | StartupError::Serving(_) | StartupError::Internal { .. } => {
                Self::new(code::SOFTWARE, error.to_string())
            }
        }
    }
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        match error {
            ConfigError::Unreadable { path, source } => Self::new(
                code::CONFIG,
                format!(
                    "cannot read {path:?} given to --config: {source}; name a file that wasinetd can read"
                ),
            ),
            ConfigError::Mistakes(mistakes) => mistakes.into(),
        }
    }
}

impl From<Mistakes> for Failure {
    fn from(mistakes: Mistakes) -> Self {
        Self::new(code::CONFIG, mistakes.to_string())
    }
}

impl From<LoadCause> for Failure {
    fn from(cause: LoadCause) -> Self {
        match cause {
            LoadCause::GuestUnreadable { .. } | LoadCause::GuestRefused { .. } => {
                Self::new(code::GUEST, cause.to_string())
            }
            LoadCause::Directory {
                access,
                path,
                reason,
            } => {
                let flag = match access {
                    Access::ReadOnly => "--dir",
                    Access::ReadWrite => "--dir-rw",
                };
                Self::new(
                    code::CONFIG,
                    format!(
                        "cannot grant the directory {path:?} given to {flag}: {reason}; create it or name another"
                    ),
                )
            }
            LoadCause::UnpairedCertificates(counts) => Self::new(
                code::USAGE,
                format!(
                    "--tls-cert is given {} times, --tls-key {} times and --tls-ocsp {} times; give each certificate a key, in the same order, and no more OCSP responses than certificates",
                    counts.certificates, counts.keys, counts.ocsp
                ),
            ),
            LoadCause::Tls(error) => error.into(),
        }
    }
}

impl From<TlsError> for Failure {
    fn from(error: TlsError) -> Self {
        match error {
            TlsError::File { kind, path, reason } => {
                let flag = match kind {
                    TlsFile::Certificate => "--tls-cert",
                    TlsFile::Key => "--tls-key",
                    TlsFile::Ocsp => "--tls-ocsp",
                    TlsFile::ClientAuthorities => "--tls-client-ca",
                };
                Self::new(
                    code::CONFIG,
                    format!("cannot use {path:?} given to {flag}: {reason}"),
                )
            }
            TlsError::Setup { .. } => Self::new(code::SOFTWARE, error.to_string()),
        }
    }
}

impl From<CapacityError> for Failure {
    fn from(error: CapacityError) -> Self {
        match error {
            CapacityError::DoesNotFit {
                asked,
                fits,
                bound,
                fix,
            } => Self::new(
                code::CONFIG,
                format!(
                    "--max-connections {asked} does not fit: the bound {bound} allows {fits}; ask for no more, or lift it with: {fix}"
                ),
            ),
            other => Self::new(code::SOFTWARE, other.to_string()),
        }
    }
}

impl From<EngineError> for Failure {
    fn from(error: EngineError) -> Self {
        match error {
            EngineError::Pool {
                connections,
                reason,
            } => Self::new(
                code::CONFIG,
                format!(
                    "cannot reserve address space for {connections} sandboxes: {reason}; lower --max-connections, or lift the limit with: ulimit -v unlimited"
                ),
            ),
            other => Self::new(code::SOFTWARE, other.to_string()),
        }
    }
}

impl From<BindError> for Failure {
    fn from(error: BindError) -> Self {
        match error {
            BindError::Address {
                address,
                source,
                fix,
            } => Self::new(
                code::UNAVAILABLE,
                format!("cannot listen on {address} (--listen): {source}; {fix}"),
            ),
            BindError::Passed { address, reason } => Self::new(
                code::CONFIG,
                format!("cannot listen on {address} (--listen): {reason}"),
            ),
            other => Self::new(code::SOFTWARE, other.to_string()),
        }
    }
}

impl From<AdminError> for Failure {
    fn from(error: AdminError) -> Self {
        match error {
            AdminError::Bind {
                address,
                source,
                fix,
            } => Self::new(
                code::UNAVAILABLE,
                format!("cannot listen on {address} given to --admin: {source}; {fix}"),
            ),
        }
    }
}

impl From<UnusableCache> for Failure {
    fn from(error: UnusableCache) -> Self {
        let UnusableCache { path, source } = error;
        Self::new(
            code::CONFIG,
            format!(
                "cannot keep compiled guests in {path:?} (see --cache): {source}, or use --cache off"
            ),
        )
    }
}

/// The answer of the admin API to a reload that failed.
pub(crate) fn explain_reload(error: ReloadError) -> ReloadFailure {
    let kind = match error {
        ReloadError::Draining => ReloadFailureKind::Draining,
        ReloadError::Internal { .. } => ReloadFailureKind::Internal,
        _ => ReloadFailureKind::Refused,
    };
    let failure = match error {
        ReloadError::Config(error) => error.into(),
        ReloadError::Load(cause) => cause.into(),
        ReloadError::Bind(error) => error.into(),
        ReloadError::Watch(error) => StartupError::Watch(error).into(),
        ReloadError::GuestRefused { .. } => Failure::new(code::GUEST, error.to_string()),
        ReloadError::Draining => Failure::new(code::UNAVAILABLE, error.to_string()),
        ReloadError::Internal { .. } => Failure::new(code::SOFTWARE, error.to_string()),
    };
    ReloadFailure {
        kind,
        text: failure.message,
        exit_code: failure.code,
    }
}

/// The token for the admin API cannot be used.
pub(crate) fn token_failure(path: PathBuf, reason: String) -> Failure {
    Failure::new(
        code::CONFIG,
        format!("cannot use {path:?} given to --admin-token-file: {reason}"),
    )
}
