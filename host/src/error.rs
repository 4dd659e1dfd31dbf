//! What can keep the server from starting.

use std::io;
use std::path::PathBuf;

/// Why the server cannot start, with the value at fault and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file of the guest cannot be read.
    #[error(
        "cannot read the guest {path:?}: {source}; give the path of a component built for wasm32-wasip2"
    )]
    GuestUnreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },

    /// The guest is not one that can be run.
    #[error("the guest {path:?} is refused: {reason}")]
    GuestRefused {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, and the fix.
        reason: String,
    },

    /// The config file cannot be read.
    #[error("cannot read {path:?} given to --config: {source}; name a file that wasinetd can read")]
    ConfigUnreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },

    /// The config file cannot be followed.
    #[error("{0}")]
    Config(crate::config::Mistakes),

    /// A directory that is to be granted cannot be opened.
    #[error(
        "cannot grant the directory {path:?} given to {flag}: {reason}; create it or name another"
    )]
    Directory {
        /// The flag that names it.
        flag: &'static str,
        /// The directory.
        path: PathBuf,
        /// Why.
        reason: String,
    },

    /// More connections are asked for than this machine can hold.
    #[error(
        "--max-connections {asked} does not fit: the bound {bound} allows {fits}; ask for no more, or lift it with: {fix}"
    )]
    Capacity {
        /// The connections asked for.
        asked: usize,
        /// How many fit.
        fits: usize,
        /// The bound that is met first.
        bound: &'static str,
        /// How to lift it.
        fix: String,
    },

    /// The pool of sandboxes cannot be set up.
    #[error(
        "cannot reserve address space for {connections} sandboxes: {reason}; lower --max-connections, or lift the limit with: ulimit -v unlimited"
    )]
    Pool {
        /// The sandboxes.
        connections: usize,
        /// Why.
        reason: String,
    },

    /// An address cannot be listened on.
    #[error("cannot listen on {address} (--listen): {source}; {fix}")]
    Listen {
        /// The address.
        address: crate::net::ListenAddress,
        /// Why.
        source: io::Error,
        /// What to do about it.
        fix: &'static str,
    },

    /// A socket that should have been passed to this process was not, or is of no use.
    #[error("cannot listen at {address} (--listen): {reason}")]
    Passed {
        /// As it was asked for.
        address: crate::net::ListenAddress,
        /// What is wrong, and the fix.
        reason: String,
    },

    /// The socket for operators cannot be had.
    #[error("cannot listen at {address} given to --admin: {source}; {fix}")]
    Admin {
        /// Where it was to be.
        address: crate::admin::AdminAddress,
        /// Why.
        source: io::Error,
        /// What to do about it.
        fix: &'static str,
    },

    /// The directory of compiled guests is not one to be trusted.
    #[error("cannot keep compiled guests in {path:?} (see --cache): {reason}, or use --cache off")]
    Cache {
        /// The directory.
        path: PathBuf,
        /// What is wrong with it, and the fix.
        reason: String,
    },

    /// The token of operators is not one.
    #[error("cannot use {path:?} given to --admin-token-file: {reason}")]
    Token {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, and the fix.
        reason: String,
    },

    /// A file of TLS is not what it has to be.
    #[error("cannot use {path:?} given to {flag}: {reason}")]
    Tls {
        /// The flag that names it.
        flag: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wrong with it, and the fix.
        reason: String,
    },

    /// There are not as many keys as certificates.
    #[error(
        "--tls-cert is there {certificates} times, --tls-key {keys} times and --tls-ocsp {ocsp} times; give each certificate its key, in the same order, and no more answers than certificates"
    )]
    TlsPairs {
        /// The certificates.
        certificates: usize,
        /// The keys.
        keys: usize,
        /// The answers of OCSP.
        ocsp: usize,
    },

    /// A certificate cannot be made.
    #[error("cannot make {path:?}: {reason}")]
    Certificate {
        /// The file.
        path: PathBuf,
        /// Why, and the fix.
        reason: String,
    },

    /// The guest's file cannot be watched.
    #[error(
        "cannot watch {path:?}, as --watch asks for: {reason}; name a file in a directory that can be read, or send SIGHUP instead when it has changed"
    )]
    Watch {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },

    /// A manual page cannot be written.
    #[error("cannot write {path:?}: {source}; name a directory that is there")]
    Man {
        /// The page.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },

    /// There is something where a new crate is to be.
    #[error(
        "{path:?} is there already, and not an empty directory; choose another name, or remove it"
    )]
    Taken {
        /// Where it was to be.
        path: PathBuf,
    },

    /// A new crate cannot be written.
    #[error(
        "cannot create {path:?}: {source}; choose a directory that is there and can be written to"
    )]
    Create {
        /// Where it was to be.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },

    /// There is no SDK to depend on.
    #[error("cannot use {path:?} given to --sdk: {reason}; name a checkout of wasinetd")]
    Sdk {
        /// Where it was to be.
        path: PathBuf,
        /// Why.
        reason: String,
    },

    /// Operators on a loopback address have nothing to show.
    #[error(
        "--admin is a loopback address, which any user of this machine can connect to; name a file with a token that operators show: --admin-token-file FILE, or use --admin unix:PATH"
    )]
    NoToken,

    /// It is too late to change what is served.
    #[error("the server is draining, and nothing has changed; change its successor")]
    Draining,

    /// Something that should always work did not.
    #[error("{stage} failed: {reason}")]
    Internal {
        /// What was being done.
        stage: &'static str,
        /// Why it failed.
        reason: String,
    },
}

impl From<crate::admin::AdminError> for Error {
    fn from(error: crate::admin::AdminError) -> Self {
        match error {
            crate::admin::AdminError::Bind {
                address,
                source,
                fix,
            } => Self::Admin {
                address,
                source,
                fix,
            },
        }
    }
}

impl Error {
    /// The exit code that tells a supervisor what kind of failure this is, from BSD's
    /// `sysexits.h`: 65 for the guest, 78 for the configuration, 69 for what the system does not
    /// let us have, 70 for our own fault, 73 for files that cannot be made.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::GuestUnreadable { .. } | Self::GuestRefused { .. } => 65,
            Self::Directory { .. }
            | Self::Config(_)
            | Self::ConfigUnreadable { .. }
            | Self::Capacity { .. }
            | Self::Pool { .. }
            | Self::Cache { .. }
            | Self::Man { .. }
            | Self::Passed { .. }
            | Self::Tls { .. }
            | Self::Certificate { .. }
            | Self::Token { .. } => 78,
            Self::NoToken | Self::TlsPairs { .. } | Self::Taken { .. } | Self::Sdk { .. } => 64,
            Self::Create { .. } => 73,
            Self::Watch { .. } | Self::Listen { .. } | Self::Admin { .. } | Self::Draining => 69,
            Self::Internal { .. } => 70,
        }
    }

    pub(crate) fn passed(address: &crate::net::ListenAddress, reason: impl Into<String>) -> Self {
        Self::Passed {
            address: address.clone(),
            reason: reason.into(),
        }
    }

    pub(crate) fn pool(connections: usize, reason: impl std::fmt::Display) -> Self {
        Self::Pool {
            connections,
            reason: format!("{reason:#}"),
        }
    }

    /// An internal error of `stage`, whatever its type.
    pub(crate) fn internal(stage: &'static str, reason: impl std::fmt::Display) -> Self {
        Self::Internal {
            stage,
            reason: format!("{reason:#}"),
        }
    }
}
