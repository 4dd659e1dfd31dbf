//! Where compiled guests are kept.

use std::path::PathBuf;

use tracing::warn;

use crate::sandbox::{Cache, CacheError};

/// Where compiled guests are kept.
#[derive(Clone, Debug, PartialEq)]
pub enum CacheLocation {
    /// Nowhere: guests are compiled at each start.
    Off,
    /// In this directory if possible. The operator has not asked for it.
    Preferred(PathBuf),
    /// In this directory.
    Required(PathBuf),
}

/// A directory cannot be the cache.
#[derive(Debug, thiserror::Error)]
#[error("cannot keep compiled guests in {path:?}: {source}")]
pub struct UnusableCache {
    /// The directory.
    pub path: PathBuf,
    /// Why.
    pub source: CacheError,
}

impl CacheLocation {
    /// Opens the cache. A preferred directory that cannot be used is a warning.
    ///
    /// # Errors
    ///
    /// Fails if a required directory cannot be used.
    pub fn open(self) -> Result<Option<Cache>, UnusableCache> {
        match self {
            Self::Off => Ok(None),
            Self::Required(path) => match Cache::open(&path) {
                Ok(cache) => Ok(Some(cache)),
                Err(source) => Err(UnusableCache { path, source }),
            },
            Self::Preferred(path) => Ok(Cache::open(&path)
                .inspect_err(|error| warn!(?path, %error, "compiled guests are not kept"))
                .ok()),
        }
    }
}
