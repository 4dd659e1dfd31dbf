//! What the subcommands do.

mod activation;
mod cert;
mod check;
mod completions;
mod configured;
mod fleet;
mod man;
mod new;
mod operator;
mod schema;
mod serve;
mod successor;
mod supervisor;
mod watch;

use std::env;
use std::fmt;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use tracing::warn;
use wasinetd::Error;
use wasinetd::net::ListenAddress;
use wasinetd::sandbox::{Cache, Refusal};
use wasinetd::service::SwapError;

pub(crate) use cert::cert;
pub(crate) use check::{check, compile};
pub(crate) use completions::completions;
pub(crate) use man::man;
pub(crate) use new::new;
pub(crate) use schema::schema;
pub(crate) use serve::serve;

use crate::cli::CacheArgs;

fn read(path: &Path) -> Result<Vec<u8>, Error> {
    std::fs::read(path).map_err(|source| Error::GuestUnreadable {
        path: path.into(),
        source,
    })
}

fn refused(path: &Path) -> impl Fn(Refusal) -> Error {
    move |refusal| Error::GuestRefused {
        path: path.into(),
        reason: refusal.to_string(),
    }
}

/// Whether the address that was `held` by a service is the one that is `asked` for by one now, so that its
/// sockets go from one to the other. Each with the name of the service.
fn is_kept(
    (holder, held): (&str, &ListenAddress),
    (service, asked): (&str, &ListenAddress),
) -> bool {
    // A port that any was asked for is nobody else's.
    let may_have = !asked.takes_any_port() || holder == service;
    may_have && held == asked
}

/// Why the guest of `path` is not what clients get.
fn not_swapped(path: &Path) -> impl Fn(SwapError) -> Error {
    move |error| match error {
        SwapError::Refused(reason) => Error::GuestRefused {
            path: path.into(),
            reason,
        },
        SwapError::Draining => Error::Draining,
        SwapError::NoPrevious | SwapError::Internal(_) => internal("making a guest ready")(error),
    }
}

fn internal<E: fmt::Display>(stage: &'static str) -> impl Fn(E) -> Error {
    move |error| Error::Internal {
        stage,
        reason: error.to_string(),
    }
}

/// The cache that is asked for. The usual one, which nobody has asked for, is done without where it
/// cannot be had.
fn cache(args: &CacheArgs) -> Result<Option<Cache>, Error> {
    match (&args.cache, usual_cache()) {
        (Some(off), _) if off.as_os_str() == "off" => Ok(None),
        (Some(path), _) => open_cache(path).map(Some),
        (None, Some(path)) => Ok(open_cache(&path)
            .inspect_err(|error| warn!(%error, "compiled guests are not kept"))
            .ok()),
        (None, None) => Ok(None),
    }
}

/// The cache that is asked for or the usual one, of which there has to be one.
fn required_cache(args: &CacheArgs) -> Result<Cache, Error> {
    let asked = args.cache.clone().filter(|path| path.as_os_str() != "off");
    match asked.or_else(usual_cache) {
        Some(path) => open_cache(&path),
        None => Err(Error::Cache {
            path: "off".into(),
            reason: "there is nothing to compile into; name a directory".into(),
        }),
    }
}

fn open_cache(path: &Path) -> Result<Cache, Error> {
    Cache::open(path).map_err(|error| Error::Cache {
        path: path.into(),
        reason: error.to_string(),
    })
}

/// As systemd.exec(5) and the XDG base directory specification have it.
fn usual_cache() -> Option<PathBuf> {
    let set = |name| env::var_os(name).filter(|value| !value.is_empty());
    // There may be several, with colons between them.
    let of_service = set("CACHE_DIRECTORY").and_then(|all| env::split_paths(&all).next());
    let of_user = || set("XDG_CACHE_HOME").map(|path| PathBuf::from(path).join("wasinetd"));
    let of_home = || set("HOME").map(|path| PathBuf::from(path).join(".cache/wasinetd"));
    let usual = of_service.or_else(of_user).or_else(of_home);
    usual.filter(|path| path.is_absolute())
}

/// The token in a file that nobody else can read.
pub(crate) fn token(path: &Path) -> Result<String, Error> {
    /// Shorter ones can be guessed.
    const SHORTEST: usize = 16;
    let failed = |reason: String| Error::Token {
        path: path.into(),
        reason,
    };
    let readable = || "; name a file that wasinetd can read";
    let mut file =
        std::fs::File::open(path).map_err(|error| failed(format!("{error}{}", readable())))?;
    let metadata = file.metadata().map_err(|error| failed(error.to_string()))?;
    if metadata.mode() & 0o077 != 0 {
        return Err(failed(format!(
            "others may read it (its mode is {:03o}); make a new token, and: chmod 600",
            metadata.mode() & 0o777
        )));
    }
    let mut token = String::new();
    file.read_to_string(&mut token)
        .map_err(|error| failed(format!("{error}{}", readable())))?;
    let token = token.trim();
    let printable = token.bytes().all(|byte| byte.is_ascii_graphic());
    if token.len() < SHORTEST || !printable {
        return Err(failed(format!(
            "the token has to be {SHORTEST} printable characters or more; make one with: openssl rand -hex 32"
        )));
    }
    Ok(token.into())
}
