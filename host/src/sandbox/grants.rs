//! Grants of the operator: what guests may see beside their connection.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use wasmtime_wasi::filesystem::WasiFilesystemCtx;
use wasmtime_wasi::{FsPerms, WasiCtx};

use super::host_network::destination::Destination;
use super::host_network::outbound::Destinations;

/// All grants of a guest. The default grants nothing.
///
/// Directories are opened once, here, and shared by all sandboxes. A path may name another
/// directory later: the grant stays with the open one.
#[derive(Clone, Default)]
pub struct Grants(Arc<GrantSet>);

#[derive(Default)]
struct GrantSet {
    filesystem: WasiFilesystemCtx,
    directories: Vec<DirectoryId>,
    environment: Vec<(String, String)>,
    destinations: Arc<Destinations>,
}

/// A directory of the host that guests see.
#[derive(Clone, Debug, PartialEq)]
pub struct DirGrant {
    /// The path on the host.
    pub host: PathBuf,
    /// The path that a guest sees.
    pub guest: String,
    /// Access of guests to the directory.
    pub access: Access,
}

/// Access of guests to a directory.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Access {
    /// Read files and list directories.
    ReadOnly,
    /// Also create, change and remove files and directories.
    ReadWrite,
}

/// Identifies an open directory, whatever its path.
#[derive(Clone, Copy, PartialEq)]
struct DirectoryId {
    device: u64,
    inode: u64,
}

impl Grants {
    /// Grants directories and environment variables.
    ///
    /// # Errors
    ///
    /// Returns the first directory that cannot be granted, and the reason.
    pub fn new(
        directories: &[DirGrant],
        environment: Vec<(String, String)>,
    ) -> Result<Self, (DirGrant, String)> {
        let mut context = WasiCtx::builder();
        // File operations run on the thread of the connection, as in a native server that uses
        // `std::fs`. Handing each one to another thread costs more than most of them take.
        context.allow_blocking_current_thread(true);
        let mut ids = Vec::new();
        for (n, grant) in directories.iter().enumerate() {
            let guest_path = |grant: &DirGrant| grant.guest.trim_end_matches('/').to_string();
            if directories[..n]
                .iter()
                .any(|earlier| guest_path(earlier) == guest_path(grant))
            {
                let reason = format!("another directory is granted as {:?} already", grant.guest);
                return Err((grant.clone(), reason));
            }
            let permissions = match grant.access {
                Access::ReadOnly => FsPerms::ReadOnly,
                Access::ReadWrite => FsPerms::ReadWrite,
            };
            let id = directory_id(&grant.host).and_then(|id| {
                context
                    .preopened_dir(&grant.host, &grant.guest, permissions)
                    .map(|_| id)
                    .map_err(|error| format!("{error:#}"))
            });
            ids.push(id.map_err(|reason| (grant.clone(), reason))?);
        }
        Ok(Self(Arc::new(GrantSet {
            filesystem: context.build().filesystem().clone(),
            directories: ids,
            environment: last_values(environment),
            destinations: Arc::default(),
        })))
    }

    /// Adds TCP connections to `destinations`.
    pub fn with_destinations(self, destinations: Vec<Destination>) -> Self {
        Self(Arc::new(GrantSet {
            filesystem: self.filesystem(),
            directories: self.0.directories.clone(),
            environment: self.environment().to_vec(),
            destinations: Arc::new(Destinations::new(destinations)),
        }))
    }

    /// Whether both grant the same directories.
    ///
    /// Compares the open directories, not their paths: a path may name another directory by now.
    pub fn has_directories_of(&self, other: &Self) -> bool {
        self.0.directories == other.0.directories
    }

    pub(super) fn filesystem(&self) -> WasiFilesystemCtx {
        self.0.filesystem.clone()
    }

    pub(super) fn environment(&self) -> &[(String, String)] {
        &self.0.environment
    }

    pub(super) fn destinations(&self) -> &Arc<Destinations> {
        &self.0.destinations
    }
}

/// Keeps the last value of each variable, as a shell does.
fn last_values(variables: Vec<(String, String)>) -> Vec<(String, String)> {
    let mut last: Vec<(String, String)> = Vec::new();
    for (name, value) in variables {
        last.retain(|(earlier, _)| *earlier != name);
        last.push((name, value));
    }
    last
}

/// Identifies the directory at `path`.
///
/// Checks that a directory is there. Opening the path is not enough: on some systems that succeeds
/// for a file too.
fn directory_id(path: &Path) -> Result<DirectoryId, String> {
    match std::fs::metadata(path) {
        Ok(metadata) if metadata.is_dir() => Ok(DirectoryId {
            device: metadata.dev(),
            inode: metadata.ino(),
        }),
        Ok(_) => Err("it is not a directory".into()),
        Err(error) => Err(error.to_string()),
    }
}
