//! What the operator lets guests see beside their connection.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use wasmtime_wasi::filesystem::WasiFilesystemCtx;
use wasmtime_wasi::{FsPerms, WasiCtx};

use super::host_network::{Destination, Destinations};

/// What a guest may do in a directory.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Access {
    /// Read files and list directories.
    ReadOnly,
    /// Also create, change and remove them.
    ReadWrite,
}

/// A directory of the host that guests see.
#[derive(Clone, Debug, PartialEq)]
pub struct DirGrant {
    /// Where it is on the host.
    pub host: PathBuf,
    /// Where a guest finds it.
    pub guest: String,
    /// What a guest may do in it.
    pub access: Access,
}

/// Everything that is granted. Nothing is unless it is added.
///
/// Directories are opened once, here, and shared by all sandboxes: what a path refers to later
/// does not matter.
#[derive(Clone, Default)]
pub struct Grants(Arc<Granted>);

#[derive(Default)]
struct Granted {
    filesystem: WasiFilesystemCtx,
    /// Which directories those are: device and inode of each.
    directories: Vec<(u64, u64)>,
    environment: Vec<(String, String)>,
    destinations: Arc<Destinations>,
}

impl Grants {
    /// Grants the environment variables and directories.
    ///
    /// # Errors
    ///
    /// Fails with the first directory that cannot be opened, and the reason.
    pub fn new(
        directories: &[DirGrant],
        environment: Vec<(String, String)>,
    ) -> Result<Self, (DirGrant, String)> {
        let mut context = WasiCtx::builder();
        // File operations run on the thread of the connection, as they do in a native server that
        // uses `std::fs`: handing each to another thread costs more than most take.
        context.allow_blocking_current_thread(true);
        let mut opened = Vec::new();
        for (n, grant) in directories.iter().enumerate() {
            let name = |grant: &DirGrant| grant.guest.trim_end_matches('/').to_string();
            if directories[..n]
                .iter()
                .any(|other| name(other) == name(grant))
            {
                let reason = format!("another directory is granted as {:?} already", grant.guest);
                return Err((grant.clone(), reason));
            }
            let permissions = match grant.access {
                Access::ReadOnly => FsPerms::ReadOnly,
                Access::ReadWrite => FsPerms::ReadWrite,
            };
            let identity = open_directory(&grant.host).and_then(|identity| {
                context
                    .preopened_dir(&grant.host, &grant.guest, permissions)
                    .map(|_| identity)
                    .map_err(|error| format!("{error:#}"))
            });
            opened.push(identity.map_err(|reason| (grant.clone(), reason))?);
        }
        Ok(Self(Arc::new(Granted {
            filesystem: context.build().filesystem().clone(),
            directories: opened,
            environment: last_of_each(environment),
            destinations: Arc::default(),
        })))
    }

    /// Grants TCP connections to `destinations` as well.
    pub fn with_destinations(self, destinations: Vec<Destination>) -> Self {
        Self(Arc::new(Granted {
            filesystem: self.filesystem(),
            directories: self.0.directories.clone(),
            environment: self.environment().to_vec(),
            destinations: Arc::new(Destinations::new(destinations)),
        }))
    }

    /// Whether the very same directories are granted, and not others that have taken their names.
    pub fn has_directories_of(&self, other: &Self) -> bool {
        self.0.directories == other.0.directories
    }

    /// The directories.
    pub(super) fn filesystem(&self) -> WasiFilesystemCtx {
        self.0.filesystem.clone()
    }

    /// The environment variables.
    pub(super) fn environment(&self) -> &[(String, String)] {
        &self.0.environment
    }

    /// Where to connect to.
    pub(super) fn destinations(&self) -> Arc<Destinations> {
        self.0.destinations.clone()
    }
}

/// A variable that is granted twice has its last value, as on a shell's command line.
fn last_of_each(variables: Vec<(String, String)>) -> Vec<(String, String)> {
    let mut last: Vec<(String, String)> = Vec::new();
    for (name, value) in variables {
        last.retain(|(other, _)| *other != name);
        last.push((name, value));
    }
    last
}

/// Tells a missing directory from a file in its place, which opening it alone does not everywhere. And
/// which one it is.
fn open_directory(path: &Path) -> Result<(u64, u64), String> {
    match std::fs::metadata(path) {
        Ok(metadata) if metadata.is_dir() => Ok((metadata.dev(), metadata.ino())),
        Ok(_) => Err("it is not a directory".into()),
        Err(error) => Err(error.to_string()),
    }
}
