//! Files of Unix sockets: how they are bound, replaced, given permissions and removed.

use std::fmt;
use std::fs::{File, Metadata};
use std::io;
use std::num::ParseIntError;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use rustix::fs::{FlockOperation, Mode as FileMode, OFlags, fchmod, flock};
use rustix::io::Errno;
use socket2::{Domain, SockAddr, Socket, Type};

use super::socket_permissions::SocketPermissions;
use super::unix_path::directory_of;

/// The file of a listening Unix socket. Dropping this removes the file if it is still ours.
///
/// The file is not ours if another server has put its own in its place, or has taken it over.
pub(crate) struct UnixSocketFile {
    path: PathBuf,
    identity: FileIdentity,
    /// Whether this process removes the file.
    owned: AtomicBool,
}

impl UnixSocketFile {
    /// Adopts the file of a socket that another process hands over. None if it was replaced.
    ///
    /// The other process may still keep the socket: it owns the file until [`Self::take_over`].
    pub(crate) fn adopt(path: &Path, identity: FileIdentity) -> Option<Self> {
        let found = FileIdentity::of(&std::fs::symlink_metadata(path).ok()?);
        (found == identity).then(|| Self {
            path: path.into(),
            identity,
            owned: AtomicBool::new(false),
        })
    }

    /// The identity of the file, for a process that adopts it.
    pub(crate) fn identity(&self) -> FileIdentity {
        self.identity
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Sets the mode and the owner of the file where they differ.
    ///
    /// Does nothing if the file is gone or another file has its name by now.
    pub(crate) fn set_permissions(
        &self,
        permissions: &SocketPermissions,
    ) -> Result<(), SocketFileError> {
        match self.try_set_permissions(permissions) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result.map_err(|source| SocketFileError {
                source,
                fix: "name an owner that this user may give files to",
            }),
        }
    }

    fn try_set_permissions(&self, permissions: &SocketPermissions) -> io::Result<()> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = File::from(rustix::fs::open(&self.path, flags, FileMode::empty())?);
        let found = file.metadata()?;
        if FileIdentity::of(&found) != self.identity {
            return Ok(());
        }
        // The path may lead to another file by now, the descriptor cannot. fchmod(2) and fchown(2)
        // refuse a descriptor opened with O_PATH, so this goes through its name in /proc.
        let descriptor = format!("/proc/self/fd/{}", file.as_raw_fd());
        let mode = permissions.mode.bits();
        if found.mode() & 0o777 != mode {
            std::fs::set_permissions(&descriptor, PermissionsExt::from_mode(mode))?;
        }
        let (user, group) = permissions.owner.resolve(&self.path);
        if (user, group) != (found.uid(), found.gid()) {
            chown(&descriptor, Some(user), Some(group))?;
        }
        Ok(())
    }

    /// Makes this process the owner of a file that it has adopted.
    pub(crate) fn take_over(&self) {
        self.owned.store(true, Ordering::Relaxed);
    }

    /// Leaves the file to the process that has adopted it.
    pub(crate) fn hand_over(&self) {
        self.owned.store(false, Ordering::Relaxed);
    }
}

impl Drop for UnixSocketFile {
    fn drop(&mut self) {
        let found = std::fs::symlink_metadata(&self.path);
        if self.owned.load(Ordering::Relaxed)
            && found.is_ok_and(|found| FileIdentity::of(&found) == self.identity)
        {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Why the file of a Unix socket cannot be created or changed.
#[derive(Debug)]
pub(crate) struct SocketFileError {
    pub(crate) source: io::Error,
    /// Advice for the operator.
    pub(crate) fix: &'static str,
}

/// Listens at `path`. Replaces the file of a socket that no server listens at any more.
///
/// Only privileged clients can connect before [`UnixSocketFile::set_permissions`]. The socket
/// listens at once, so that other servers see that the path is taken.
pub(crate) fn bind(path: &Path, backlog: i32) -> Result<(Socket, UnixSocketFile), SocketFileError> {
    let _lock = DirectoryLock::around(path);
    match std::fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => {
            return Err(SocketFileError {
                source: io::Error::new(io::ErrorKind::AlreadyExists, "it is not a socket"),
                fix: "name a path where nothing is",
            });
        }
        Ok(_) => remove_stale(path).map_err(|source| SocketFileError {
            source,
            fix: "stop the server that listens there, or name another path",
        })?,
        Err(_) => {}
    }
    bind_new(path, backlog).map_err(|source| SocketFileError {
        source,
        fix: "name a path in a directory of your own",
    })
}

/// An advisory lock on a directory, if the system grants it.
///
/// Two servers that start at the same time must not take each other's socket for a stale one.
struct DirectoryLock {
    _directory: Option<File>,
}

impl DirectoryLock {
    /// Locks the directory that contains `path`.
    fn around(path: &Path) -> Self {
        /// Bounded, because any user that can read the directory can hold the lock.
        const TRIES: u32 = 100;
        const PAUSE: Duration = Duration::from_millis(10);
        let directory = File::open(directory_of(path)).ok();
        if let Some(directory) = &directory {
            for _ in 0..TRIES {
                match flock(directory, FlockOperation::NonBlockingLockExclusive) {
                    Err(Errno::WOULDBLOCK) => std::thread::sleep(PAUSE),
                    _ => break,
                }
            }
        }
        Self {
            _directory: directory,
        }
    }
}

/// Removes the file at `path` if it is a socket that refuses connections.
fn remove_stale(path: &Path) -> io::Result<()> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    // A server with a full backlog would block the connect. It is alive all the same.
    socket.set_nonblocking(true)?;
    match socket.connect(&SockAddr::unix(path)?) {
        Ok(()) => Err(io::ErrorKind::AddrInUse.into()),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path)
        }
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            Err(io::ErrorKind::AddrInUse.into())
        }
        Err(error) => Err(error),
    }
}

/// Listens at a path without a file. The new file has no permissions yet.
fn bind_new(path: &Path, backlog: i32) -> io::Result<(Socket, UnixSocketFile)> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    // Linux creates the file with the mode of the socket.
    fchmod(&socket, FileMode::empty())?;
    socket.bind(&SockAddr::unix(path)?)?;
    let file = UnixSocketFile {
        identity: FileIdentity::of(&std::fs::symlink_metadata(path)?),
        path: path.into(),
        owned: AtomicBool::new(true),
    };
    socket.listen(backlog)?;
    Ok((socket, file))
}

/// Tells a file from a later one at the same path.
///
/// The creation time is part of it: some file systems reuse the inode number of a removed file.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FileIdentity {
    device: u64,
    inode: u64,
    /// Nanoseconds since 1970. Zero if the file system does not record it.
    created: u128,
}

impl FileIdentity {
    fn of(metadata: &Metadata) -> Self {
        let created = metadata.created().ok();
        let created = created.and_then(|time| time.duration_since(SystemTime::UNIX_EPOCH).ok());
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            created: created.map_or(0, |time| time.as_nanos()),
        }
    }
}

/// Writes the form that one process hands to the next.
impl fmt::Display for FileIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{},{},{}", self.device, self.inode, self.created)
    }
}

impl FromStr for FileIdentity {
    type Err = ParseIntError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut parts = text.split(',');
        let mut part = || parts.next().unwrap_or_default();
        Ok(Self {
            device: part().parse()?,
            inode: part().parse()?,
            created: part().parse()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::socket_permissions::SocketMode;

    #[test]
    fn permissions_are_set_on_the_socket_and_not_on_its_replacement() {
        let directory = tempfile::tempdir().unwrap();
        let [path, other, elsewhere] =
            ["socket", "other", "elsewhere"].map(|name| directory.path().join(name));
        let mode = |path: &Path| std::fs::metadata(path).unwrap().mode() & 0o777;
        let (_socket, file) = bind(&path, 1).unwrap();
        assert_eq!(mode(&path), 0);
        file.set_permissions(&SocketPermissions::default()).unwrap();
        assert_eq!(mode(&path), 0o660);
        std::fs::rename(&path, elsewhere).unwrap();
        std::fs::write(&other, "theirs").unwrap();
        let before = mode(&other);
        std::os::unix::fs::symlink(&other, &path).unwrap();
        let all = SocketPermissions {
            mode: "0666".parse::<SocketMode>().unwrap(),
            ..SocketPermissions::default()
        };
        file.set_permissions(&all).unwrap();
        assert_eq!(mode(&other), before);
        std::fs::remove_file(&path).unwrap();
        file.set_permissions(&all).unwrap();
    }

    #[test]
    fn a_socket_file_is_recognized_by_its_identity() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let (_socket, file) = bind(&path, 1).unwrap();
        let identity: FileIdentity = file.identity().to_string().parse().unwrap();
        assert_eq!(identity, file.identity());
        assert!(UnixSocketFile::adopt(&path, identity).is_some());
        std::fs::rename(&path, directory.path().join("elsewhere")).unwrap();
        std::fs::write(&path, "theirs").unwrap();
        assert!(UnixSocketFile::adopt(&path, identity).is_none());
        assert!("1,2".parse::<FileIdentity>().is_err());
    }

    #[test]
    fn only_our_own_file_is_removed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let (_socket, file) = bind(&path, 1).unwrap();
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "theirs").unwrap();
        drop(file);
        assert!(path.exists());
        std::fs::remove_file(&path).unwrap();
        let (_socket, file) = bind(&path, 1).unwrap();
        drop(file);
        assert!(!path.exists());
        let (_socket, file) = bind(&path, 1).unwrap();
        file.hand_over();
        drop(file);
        assert!(path.exists());
    }
}
