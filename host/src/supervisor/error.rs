//! Why a server does not start, and why a reload changes nothing.

use std::fmt;
use std::io;
use std::path::PathBuf;

use super::cache_location::UnusableCache;
use super::file_watch::WatchError;
use crate::capacity::CapacityError;
use crate::config::{ConfigError, LoadCause, LoadError, Mistake};
use crate::listener::BindError;
use crate::sandbox::EngineError;
use crate::server::{ServeError, StartError};
use crate::service::SwapError;

/// A server cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartupError {
    /// A file or directory of a service cannot be used.
    #[error(transparent)]
    Load(#[from] LoadCause),

    /// Files and directories of a config file cannot be used.
    #[error("{} mistakes in the config file", .0.len())]
    Mistakes(Vec<Mistake>),

    /// More connections are configured than fit on this machine.
    #[error(transparent)]
    Capacity(#[from] CapacityError),

    /// The pool of sandboxes cannot be set up.
    #[error(transparent)]
    Engine(#[from] EngineError),

    /// The directory of compiled guests cannot be used.
    #[error(transparent)]
    Cache(#[from] UnusableCache),

    /// An address cannot be listened on.
    #[error(transparent)]
    Bind(#[from] BindError),

    /// A file cannot be watched.
    #[error(transparent)]
    Watch(#[from] WatchError),

    /// The threads for connections cannot be started.
    #[error(transparent)]
    Threads(#[from] StartError),

    /// The threads for connections ended.
    #[error(transparent)]
    Serving(#[from] ServeError),

    /// The server drains already.
    #[error("the server is draining, and nothing has changed; change its successor")]
    Draining,

    /// A step failed that should always work.
    #[error("{stage} failed: {source}")]
    Internal {
        /// The step.
        stage: &'static str,
        /// Why.
        source: io::Error,
    },
}

impl StartupError {
    /// The first of `errors` on a command line, or all of them as mistakes in a config file.
    pub(super) fn from_load(errors: Vec<LoadError>, has_config_file: bool) -> Self {
        let mut errors = errors.into_iter();
        if has_config_file {
            return Self::Mistakes(errors.map(Mistake::from).collect());
        }
        match errors.next() {
            Some(first) => Self::Load(first.cause),
            None => Self::Mistakes(Vec::new()),
        }
    }

    pub(super) fn internal(stage: &'static str) -> impl Fn(io::Error) -> Self {
        move |source| Self::Internal { stage, source }
    }
}

/// A reload has changed nothing.
#[derive(Debug, thiserror::Error)]
pub enum ReloadError {
    /// The config file cannot be used.
    #[error(transparent)]
    Config(#[from] ConfigError),

    /// A file or directory of a service cannot be used.
    #[error(transparent)]
    Load(#[from] LoadCause),

    /// The guest is refused.
    #[error("the guest {path:?} is refused: {reason}")]
    GuestRefused {
        /// The file.
        path: PathBuf,
        /// The reason and the fix.
        reason: String,
    },

    /// An address cannot be listened on.
    #[error(transparent)]
    Bind(#[from] BindError),

    /// A file cannot be watched.
    #[error(transparent)]
    Watch(#[from] WatchError),

    /// The server drains already.
    #[error("the server is draining, and nothing has changed; change its successor")]
    Draining,

    /// A step failed that should always work.
    #[error("{stage} failed: {reason}")]
    Internal {
        /// The step.
        stage: &'static str,
        /// Why.
        reason: String,
    },
}

impl ReloadError {
    pub(super) fn internal(stage: &'static str, reason: impl fmt::Display) -> Self {
        Self::Internal {
            stage,
            reason: reason.to_string(),
        }
    }

    /// The guest at `path` could not be swapped in.
    pub(super) fn from_swap(path: PathBuf) -> impl Fn(SwapError) -> Self {
        move |error| match error {
            SwapError::Refused(reason) => Self::GuestRefused {
                path: path.clone(),
                reason,
            },
            SwapError::Draining => Self::Draining,
            SwapError::NoPrevious | SwapError::Internal(_) => {
                Self::internal("preparing the guest", error)
            }
        }
    }
}
