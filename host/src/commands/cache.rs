//! The directory of compiled guests.

use std::env;
use std::path::PathBuf;

use wasinetd::config::model::CacheConfig;
use wasinetd::sandbox::Cache;
use wasinetd::supervisor::CacheLocation;

use crate::exit::{Failure, code};

/// Location of the configured cache.
pub(super) fn location(config: &CacheConfig) -> CacheLocation {
    match (config, usual_directory()) {
        (CacheConfig::Directory(path), _) => CacheLocation::Required(path.clone()),
        (CacheConfig::Usual, Some(path)) => CacheLocation::Preferred(path),
        (CacheConfig::Usual, None) | (CacheConfig::Off, _) => CacheLocation::Off,
    }
}

/// Opens the configured cache, or the usual one, for a command that cannot do without.
pub(super) fn required(config: &CacheConfig) -> Result<Cache, Failure> {
    let directory = match config {
        CacheConfig::Directory(path) => Some(path.clone()),
        CacheConfig::Usual | CacheConfig::Off => usual_directory(),
    };
    let opened = match directory {
        Some(path) => CacheLocation::Required(path).open()?,
        None => None,
    };
    opened.ok_or_else(|| {
        let message = "there is no directory for compiled guests; name one with --cache DIR";
        Failure::new(code::CONFIG, message)
    })
}

/// The directory that systemd.exec(5) or the XDG base directory specification names.
fn usual_directory() -> Option<PathBuf> {
    let variable = |name| env::var_os(name).filter(|value| !value.is_empty());
    // systemd may set several directories, separated by colons.
    let of_unit = variable("CACHE_DIRECTORY").and_then(|all| env::split_paths(&all).next());
    let of_user = || variable("XDG_CACHE_HOME").map(|path| PathBuf::from(path).join("wasinetd"));
    let of_home = || variable("HOME").map(|path| PathBuf::from(path).join(".cache/wasinetd"));
    let usual = of_unit.or_else(of_user).or_else(of_home);
    usual.filter(|path| path.is_absolute())
}
