//! Loads everything on disk that services name: guests, directories, certificates.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;

use super::file::Mistake;
use super::model::{HandlerConfig, ServiceConfig, UnpairedCertificates, directory_key};
use crate::connection::tls::{Tls, TlsError, TlsFile};
use crate::sandbox::{Access, Grants, GuestLimits, Refusal, Requirements};

/// A service with its guest read, its directories opened and its certificates loaded.
pub struct LoadedService {
    /// Its settings.
    pub config: ServiceConfig,
    /// Bytes of the guest's component.
    pub component: Bytes,
    /// Pool slots for one instance of the guest.
    pub requirements: Requirements,
    /// Directories, variables and destinations of guests.
    pub grants: Grants,
    /// TLS with clients.
    pub tls: Option<Arc<Tls>>,
}

/// Components by service and path of the guest, given instead of the files.
pub type KnownComponents = HashMap<(String, PathBuf), Vec<u8>>;

/// A file or directory of a service cannot be used.
#[derive(Debug)]
pub struct LoadError {
    /// Line of the setting in the config file.
    pub line: usize,
    /// The reason.
    pub cause: LoadCause,
}

/// Why a file or directory of a service cannot be used. The words name no flag.
#[derive(Debug, thiserror::Error)]
pub enum LoadCause {
    /// The guest's file cannot be read.
    #[error(
        "cannot read the guest {path:?}: {source}; give the path of a component built for wasm32-wasip2"
    )]
    GuestUnreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },

    /// The guest cannot be run.
    #[error("the guest {path:?} is refused: {reason}")]
    GuestRefused {
        /// The file.
        path: PathBuf,
        /// The reason and the fix.
        reason: String,
    },

    /// A directory cannot be granted.
    #[error("cannot grant the directory {path:?}: {reason}; create it or name another")]
    Directory {
        /// Whether guests were to read it or also to change it.
        access: Access,
        /// The directory.
        path: PathBuf,
        /// Why.
        reason: String,
    },

    /// Certificates and keys do not match in number.
    #[error(transparent)]
    UnpairedCertificates(#[from] UnpairedCertificates),

    /// A certificate, a key or the like cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

impl LoadCause {
    /// The config key at fault.
    pub fn key(&self) -> &'static str {
        match self {
            Self::GuestUnreadable { .. } | Self::GuestRefused { .. } => "guest",
            Self::Directory { access, .. } => directory_key(*access),
            Self::UnpairedCertificates(_) => "tls-cert",
            Self::Tls(TlsError::File { kind, .. }) => tls_key(*kind),
            Self::Tls(_) => "tls-cert",
        }
    }
}

/// The config key that names a file of TLS.
fn tls_key(file: TlsFile) -> &'static str {
    match file {
        TlsFile::Certificate => "tls-cert",
        TlsFile::Key => "tls-key",
        TlsFile::Ocsp => "tls-ocsp",
        TlsFile::ClientAuthorities => "tls-client-ca",
    }
}

impl From<LoadError> for Mistake {
    fn from(error: LoadError) -> Self {
        let LoadError { line, cause } = error;
        Self {
            line,
            text: format!("{}: {cause}", cause.key()),
        }
    }
}

/// Loads all of `services`, with components from `known` where it has them.
///
/// # Errors
///
/// Returns every failure of every service, not just the first one.
pub fn load_all(
    services: Vec<ServiceConfig>,
    mut known: KnownComponents,
) -> Result<Vec<LoadedService>, Vec<LoadError>> {
    let mut loaded = Vec::new();
    let mut errors = Vec::new();
    for service in services {
        let guest = (service.name.clone(), service.handler.guest.clone());
        match load(service, known.remove(&guest)) {
            Ok(service) => loaded.push(service),
            Err(causes) => errors.extend(causes),
        }
    }
    match errors.is_empty() {
        true => Ok(loaded),
        false => Err(errors),
    }
}

fn load(
    config: ServiceConfig,
    component: Option<Vec<u8>>,
) -> Result<LoadedService, Vec<LoadError>> {
    let component = component.map_or_else(|| read_guest(&config.handler.guest), Ok);
    let guest = component.and_then(|component| {
        let HandlerConfig {
            guest,
            guest_limits,
            ..
        } = &config.handler;
        let requirements = requirements(guest, guest_limits, &component)?;
        Ok((Bytes::from(component), requirements))
    });
    match (guest, open_grants(&config.handler), load_tls(&config)) {
        (Ok((component, requirements)), Ok(grants), Ok(tls)) => Ok(LoadedService {
            config,
            component,
            requirements,
            grants,
            tls,
        }),
        (guest, grants, tls) => {
            let causes = [guest.err(), grants.err(), tls.err()].into_iter().flatten();
            let located = causes.map(|cause| LoadError {
                line: config.origin.line_of(cause.key()),
                cause,
            });
            Err(located.collect())
        }
    }
}

/// Reads the file of a guest.
///
/// # Errors
///
/// [`LoadCause::GuestUnreadable`].
pub fn read_guest(path: &Path) -> Result<Vec<u8>, LoadCause> {
    std::fs::read(path).map_err(|source| LoadCause::GuestUnreadable {
        path: path.into(),
        source,
    })
}

/// Counts the requirements of a component, and checks them against `limits`.
///
/// # Errors
///
/// [`LoadCause::GuestRefused`].
pub fn requirements(
    path: &Path,
    limits: &GuestLimits,
    component: &[u8],
) -> Result<Requirements, LoadCause> {
    let refused = |refusal: Refusal| LoadCause::GuestRefused {
        path: path.into(),
        reason: refusal.to_string(),
    };
    let requirements = Requirements::of(component).map_err(refused)?;
    requirements.fit(limits).map_err(refused)?;
    Ok(requirements)
}

fn open_grants(handler: &HandlerConfig) -> Result<Grants, LoadCause> {
    let grants = Grants::new(&handler.directories, handler.env.clone());
    let grants = grants.map_err(|(grant, reason)| LoadCause::Directory {
        access: grant.access,
        path: grant.host,
        reason,
    })?;
    Ok(grants.with_destinations(handler.allow_connect.clone()))
}

fn load_tls(config: &ServiceConfig) -> Result<Option<Arc<Tls>>, LoadCause> {
    let handshake = &config.listener.handshake;
    let Some(tls) = &handshake.tls else {
        return Ok(None);
    };
    let settings = tls.settings(handshake.max_handshakes)?;
    Ok(Some(Arc::new(Tls::new(settings)?)))
}

#[cfg(test)]
mod tests {
    use super::super::model::OriginKey;
    use super::super::model::tests::{echo, tls};
    use super::*;

    #[test]
    fn every_failure_of_every_service_is_reported_with_its_line() {
        let mut first = echo("first", &["127.0.0.1:1"]);
        first.handler.guest = "/nowhere/first.wasm".into();
        first.listener.handshake.tls = Some(tls());
        let key = |name: &str, line| OriginKey {
            name: name.into(),
            line,
            of_listener: false,
        };
        first.origin.keys = vec![key("guest", 3), key("tls-cert", 4)];
        let mut second = echo("second", &["127.0.0.1:2"]);
        second.origin.line = 9;
        let known = [(
            ("second".into(), second.handler.guest.clone()),
            b"no component".to_vec(),
        )];
        let errors = load_all(vec![first, second], known.into())
            .err()
            .expect("all fail");
        let mistakes: Vec<Mistake> = errors.into_iter().map(Mistake::from).collect();
        let begin: Vec<_> = mistakes
            .iter()
            .map(|mistake| (mistake.line, mistake.text.split(": ").next().unwrap()))
            .collect();
        assert_eq!(begin, [(3, "guest"), (4, "tls-cert"), (9, "guest")]);
    }
}
