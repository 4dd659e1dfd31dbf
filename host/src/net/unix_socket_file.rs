//! Unix sockets at a path: who may connect, what is replaced there, and what is removed in the end.

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

use nix::unistd::{Group, User, getegid, geteuid};
use rustix::fs::{FlockOperation, Mode as FileMode, OFlags, fchmod, flock};
use rustix::io::Errno;
use socket2::{Domain, SockAddr, Socket, Type};

/// What fits into the address of a Unix socket (unix(7), `sun_path`, less its final zero), in bytes.
pub const LONGEST_PATH: usize = 107;

/// Who may connect to a Unix socket: whoever may write to its file.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SocketPermissions {
    /// The mode of the file, whatever the umask is.
    pub mode: SocketMode,
    /// Whose it is. By default that of whoever runs this.
    pub owner: SocketOwner,
}

impl Default for SocketPermissions {
    fn default() -> Self {
        Self {
            mode: SocketMode(0o660),
            owner: SocketOwner::default(),
        }
    }
}

/// The permission bits of a file.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SocketMode(u32);

impl SocketMode {
    /// Only for the user.
    pub(crate) const PRIVATE: Self = Self(0o600);
}

impl fmt::Display for SocketMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04o}", self.0)
    }
}

impl FromStr for SocketMode {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        // Not all that Rust takes for a number: there is no sign before a mode.
        let octal = text.bytes().all(|byte| (b'0'..=b'7').contains(&byte));
        match u32::from_str_radix(text, 8) {
            Ok(bits @ 0..=0o777) if octal => Ok(Self(bits)),
            _ => Err("not an octal mode from 0000 to 0777, such as 0660"),
        }
    }
}

/// A user and a group of this machine, as far as they are not to stay as they are.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SocketOwner {
    user: Option<u32>,
    group: Option<u32>,
}

impl FromStr for SocketOwner {
    type Err = String;

    /// `USER`, `USER:GROUP` or `:GROUP`, each by name or by number.
    fn from_str(text: &str) -> Result<Self, String> {
        let (user, group) = match text.split_once(':') {
            Some((_, "")) => {
                return Err("the group is empty; write USER, USER:GROUP or :GROUP".into());
            }
            Some((user, group)) => (user, Some(group)),
            None => (text, None),
        };
        let user = match (user, group) {
            ("", None) => return Err("it is empty; write USER, USER:GROUP or :GROUP".into()),
            ("", Some(_)) => None,
            (name, _) => Some(id(name, "user", |name| {
                Ok(User::from_name(name)?.map(|user| user.uid.as_raw()))
            })?),
        };
        let group = group.map(|name| {
            id(name, "group", |name| {
                Ok(Group::from_name(name)?.map(|group| group.gid.as_raw()))
            })
        });
        Ok(Self {
            user,
            group: group.transpose()?,
        })
    }
}

impl SocketOwner {
    /// Whose a file at `path` is to be: by default as the kernel has it for a new one.
    fn at(self, path: &Path) -> (u32, u32) {
        /// Files in a directory that has it are of its group (inode(7)).
        const SET_GROUP: u32 = 0o2000;
        let directory = std::fs::metadata(directory_of(path)).ok();
        let directory = directory.filter(|found| found.mode() & SET_GROUP != 0);
        let group = directory.map_or_else(|| getegid().as_raw(), |found| found.gid());
        let user = self.user.unwrap_or_else(|| geteuid().as_raw());
        (user, self.group.unwrap_or(group))
    }
}

fn id(
    name: &str,
    kind: &str,
    find: impl Fn(&str) -> nix::Result<Option<u32>>,
) -> Result<u32, String> {
    match find(name) {
        Ok(Some(id)) => Ok(id),
        // The last one stands for none at all (chown(2)).
        Ok(None) => match name.parse() {
            Ok(id) if id != u32::MAX => Ok(id),
            _ => Err(format!("there is no {kind} {name:?} on this machine")),
        },
        Err(error) => Err(format!("the {kind} {name:?} cannot be looked up: {error}")),
    }
}

/// What failed, and what to do about it.
pub(crate) type SocketFileError = (io::Error, &'static str);

/// Listens at a path. What a server that is no more has left there is replaced.
///
/// Nobody can connect before [`SocketFile::permit`], but for who needs no permissions. That it listens at
/// once is for other servers to see that it is there.
pub(crate) fn bind(path: &Path, backlog: i32) -> Result<(Socket, UnixSocketFile), SocketFileError> {
    let _lock = DirectoryLock::of_directory(path);
    match std::fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => {
            let error = io::Error::new(io::ErrorKind::AlreadyExists, "it is not a socket");
            return Err((error, "name a path where nothing is"));
        }
        Ok(_) => remove_stale(path).map_err(|error| {
            let fix = "stop the server that listens there, or name another path";
            (error, fix)
        })?,
        Err(_) => {}
    }
    bind_new(path, backlog).map_err(|error| (error, "name a path in a directory of your own"))
}

/// A lock on a directory, as far as it is to be had: two servers that begin at once are not to take each
/// other's socket for one that was left.
struct DirectoryLock {
    _directory: Option<File>,
}

impl DirectoryLock {
    /// Of the directory that `path` is in.
    fn of_directory(path: &Path) -> Self {
        /// Whoever may read the directory can lock it: it is not waited for without end.
        const TRIES: u32 = 100;
        const BETWEEN: Duration = Duration::from_millis(10);
        let directory = File::open(directory_of(path)).ok();
        if let Some(directory) = &directory {
            for _ in 0..TRIES {
                match flock(directory, FlockOperation::NonBlockingLockExclusive) {
                    Err(Errno::WOULDBLOCK) => std::thread::sleep(BETWEEN),
                    _ => break,
                }
            }
        }
        Self {
            _directory: directory,
        }
    }
}

/// The directory that a path has its name in.
pub(crate) fn directory_of(path: &Path) -> &Path {
    let parent = path.parent().filter(|parent| *parent != Path::new(""));
    parent.unwrap_or(Path::new("."))
}

/// Removes a socket that nobody listens at any more: one that refuses, and no other.
fn remove_stale(path: &Path) -> io::Result<()> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    // A server with a full backlog is there all the same, and not to be waited for.
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

/// Listens at a path where nothing is, for nobody yet.
fn bind_new(path: &Path, backlog: i32) -> io::Result<(Socket, UnixSocketFile)> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    // Linux makes the file with the mode that the socket has.
    fchmod(&socket, FileMode::empty())?;
    socket.bind(&SockAddr::unix(path)?)?;
    let file = UnixSocketFile {
        identity: FileIdentity::of(&std::fs::symlink_metadata(path)?),
        path: path.into(),
        ours: AtomicBool::new(true),
    };
    socket.listen(backlog)?;
    Ok((socket, file))
}

/// The file of a Unix socket that listens. It is removed when this is dropped, as long as it is ours:
/// another server may have put its own there, or have taken over this one.
pub(crate) struct UnixSocketFile {
    path: PathBuf,
    identity: FileIdentity,
    ours: AtomicBool,
}

impl UnixSocketFile {
    /// Of a socket that another process has handed over, and may go on with: it is not ours before
    /// [`Self::take_over`]. None if another file is there by now.
    pub(crate) fn adopt(path: &Path, identity: FileIdentity) -> Option<Self> {
        let there = FileIdentity::of(&std::fs::symlink_metadata(path).ok()?);
        (there == identity).then(|| Self {
            path: path.into(),
            identity,
            ours: AtomicBool::new(false),
        })
    }

    /// Which file it is.
    pub(crate) fn identity(&self) -> FileIdentity {
        self.identity
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Gives it those permissions, as far as it does not have them: to the file that it is, whatever has
    /// its name by now.
    pub(crate) fn permit(&self, permissions: &SocketPermissions) -> Result<(), SocketFileError> {
        let SocketPermissions {
            mode: SocketMode(mode),
            owner,
        } = *permissions;
        let permit = || {
            let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let file = File::from(rustix::fs::open(&self.path, flags, FileMode::empty())?);
            let found = file.metadata()?;
            if FileIdentity::of(&found) != self.identity {
                // It is another server's.
                return Ok(());
            }
            // What a path leads to can change; what a descriptor does not. Its own system calls do not take
            // one that was opened so.
            let this = format!("/proc/self/fd/{}", file.as_raw_fd());
            if found.mode() & 0o777 != mode {
                std::fs::set_permissions(&this, PermissionsExt::from_mode(mode))?;
            }
            let (user, group) = owner.at(&self.path);
            match (user, group) == (found.uid(), found.gid()) {
                true => Ok(()),
                false => chown(&this, Some(user), Some(group)),
            }
        };
        match permit() {
            // Then it is nobody's.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            permitted => permitted.map_err(|error: io::Error| {
                (error, "name an owner that this user may give files to")
            }),
        }
    }

    /// The process that it was adopted from leaves it to this one.
    pub(crate) fn take_over(&self) {
        self.ours.store(true, Ordering::Relaxed);
    }

    /// Leaves it to the process that has adopted it.
    pub(crate) fn hand_over(&self) {
        self.ours.store(false, Ordering::Relaxed);
    }
}

impl Drop for UnixSocketFile {
    fn drop(&mut self) {
        let there = std::fs::symlink_metadata(&self.path);
        if self.ours.load(Ordering::Relaxed)
            && there.is_ok_and(|there| FileIdentity::of(&there) == self.identity)
        {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Tells a file from another one that was made in its place: some file systems give the number of a file
/// that is gone to the next one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FileIdentity {
    device: u64,
    inode: u64,
    /// In nanoseconds since 1970, where the file system knows.
    made: u128,
}

impl FileIdentity {
    fn of(metadata: &Metadata) -> Self {
        let made = metadata.created().ok();
        let made = made.and_then(|made| made.duration_since(SystemTime::UNIX_EPOCH).ok());
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            made: made.map_or(0, |made| made.as_nanos()),
        }
    }
}

/// As one process tells another.
impl fmt::Display for FileIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{},{},{}", self.device, self.inode, self.made)
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
            made: part().parse()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mode_is_octal() {
        assert_eq!("660".parse(), Ok(SocketMode(0o660)));
        assert_eq!("0777".parse::<SocketMode>().unwrap().to_string(), "0777");
        for text in ["", "8", "1777", "+7", "-1", "0o660", "u=rw", "99999999999"] {
            assert!(text.parse::<SocketMode>().is_err(), "{text}");
        }
    }

    #[test]
    fn an_owner_is_a_user_a_group_or_both() {
        let owner = |user, group| Ok(SocketOwner { user, group });
        assert_eq!("root".parse(), owner(Some(0), None));
        assert_eq!("root:root".parse(), owner(Some(0), Some(0)));
        assert_eq!(":12345".parse(), owner(None, Some(12345)));
        assert_eq!("54321:0".parse(), owner(Some(54321), Some(0)));
        for text in [
            "",
            ":",
            "root:",
            "nobody-is-called-so",
            ":nor-a-group",
            "4294967295",
            "-1",
        ] {
            assert!(text.parse::<SocketOwner>().is_err(), "{text}");
        }
    }

    #[test]
    fn permissions_are_for_the_socket_and_for_nothing_in_its_place() {
        let directory = tempfile::tempdir().unwrap();
        let [path, other, elsewhere] =
            ["socket", "other", "elsewhere"].map(|name| directory.path().join(name));
        let mode = |path: &Path| std::fs::metadata(path).unwrap().mode() & 0o777;
        let (_socket, file) = bind(&path, 1).unwrap();
        assert_eq!(mode(&path), 0);
        file.permit(&SocketPermissions::default()).unwrap();
        assert_eq!(mode(&path), 0o660);
        std::fs::rename(&path, elsewhere).unwrap();
        std::fs::write(&other, "theirs").unwrap();
        let before = mode(&other);
        std::os::unix::fs::symlink(&other, &path).unwrap();
        let all = SocketPermissions {
            mode: SocketMode(0o666),
            ..SocketPermissions::default()
        };
        file.permit(&all).unwrap();
        assert_eq!(mode(&other), before);
        std::fs::remove_file(&path).unwrap();
        file.permit(&all).unwrap();
    }

    #[test]
    fn a_file_is_known_again() {
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
    fn a_file_that_took_the_place_of_ours_stays() {
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
