//! The programs that are measured, and the cargo profile that they were built with.

use std::env;
use std::path::{Path, PathBuf};

/// The environment variable with the path of another `wasinetd` to measure.
pub(crate) const SERVER_VARIABLE: &str = "WASINETD";

/// The directory of the programs that `make bench` builds.
const DIST: &str = "target/dist";

/// The `wasinetd` to measure: by default the one beside this program.
///
/// The native server is part of this program. Cargo writes programs of one profile to one
/// directory, so both servers are built with the same profile.
pub(crate) fn wasinetd() -> PathBuf {
    env::var_os(SERVER_VARIABLE).map_or_else(|| program("wasinetd"), PathBuf::from)
}

/// A program in the directory of this one.
pub(crate) fn program(name: &str) -> PathBuf {
    directory().join(name)
}

/// Describes in one line how both servers were built.
pub(crate) fn describe() -> String {
    let native = format!("cargo profile `{}`", profile(&directory()));
    match env::var_os(SERVER_VARIABLE) {
        None => format!("Built with {native}: wasinetd and the native server."),
        Some(path) => format!(
            "Built with {native}: the native server. wasinetd is `{}`.",
            Path::new(&path).display()
        ),
    }
}

fn directory() -> PathBuf {
    env::current_exe()
        .ok()
        .and_then(|own| Some(own.parent()?.to_path_buf()))
        .unwrap_or_else(|| DIST.into())
}

/// The profile of the programs in a directory. Cargo names the directory after the profile, but
/// that of the profile `dev` is `debug`.
fn profile(directory: &Path) -> String {
    match directory.file_name().and_then(|name| name.to_str()) {
        Some("debug") => "dev".into(),
        Some(name) => name.into(),
        None => "unknown".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_directory_names_the_profile() {
        assert_eq!(profile(Path::new("/src/target/dist")), "dist");
        assert_eq!(profile(Path::new("/src/target/debug")), "dev");
    }
}
