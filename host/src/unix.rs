//! Unix sockets at a path: who may connect, what is replaced there, and what is removed in the end.

use std::fmt;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, lchown};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use nix::unistd::{Group, User};
use rustix::fs::{Mode as FileMode, fchmod};
use socket2::{Domain, SockAddr, Socket, Type};

/// What fits into the address of a Unix socket (unix(7), `sun_path`, less its final zero), in bytes.
pub const LONGEST_PATH: usize = 107;

/// Who may connect to a Unix socket: whoever may write to its file.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Permissions {
    /// The mode of the file, whatever the umask is.
    pub mode: Mode,
    /// Whose it is. By default that of whoever runs this.
    pub owner: Owner,
}

impl Default for Permissions {
    fn default() -> Self {
        Self {
            mode: Mode(0o660),
            owner: Owner::default(),
        }
    }
}

/// The permission bits of a file.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Mode(u32);

impl Mode {
    /// Only for the user.
    pub(crate) const PRIVATE: Self = Self(0o600);
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04o}", self.0)
    }
}

impl FromStr for Mode {
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
pub struct Owner {
    user: Option<u32>,
    group: Option<u32>,
}

impl FromStr for Owner {
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
pub(crate) type Failed = (io::Error, &'static str);

/// Takes a path for a socket that is to listen. What a server that is no more has left there is replaced.
///
/// Nobody can connect before the socket listens, and so before its permissions are those.
pub(crate) fn bind(path: &Path, permissions: &Permissions) -> Result<(Socket, SocketFile), Failed> {
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
    let (socket, file) = bind_new(path, permissions.mode)
        .map_err(|error| (error, "name a path in a directory of your own"))?;
    permissions
        .owner
        .apply(path)
        .map_err(|error| (error, "name an owner that this user may give files to"))?;
    Ok((socket, file))
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

/// Binds at a path where nothing is.
fn bind_new(path: &Path, mode: Mode) -> io::Result<(Socket, SocketFile)> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    // Linux makes the file with the mode that the socket has, less the umask. The umask itself belongs to
    // all threads, and so is left alone.
    fchmod(&socket, FileMode::from_raw_mode(mode.0))?;
    socket.bind(&SockAddr::unix(path)?)?;
    let file = SocketFile {
        identity: Identity::of(path)?,
        path: path.into(),
        ours: AtomicBool::new(true),
    };
    let metadata = std::fs::symlink_metadata(path)?;
    if metadata.mode() & 0o777 != mode.0 {
        std::fs::set_permissions(path, PermissionsExt::from_mode(mode.0))?;
    }
    Ok((socket, file))
}

impl Owner {
    /// The last thing that is done to the file: its new owner may put another one there.
    fn apply(self, path: &Path) -> io::Result<()> {
        if self == Self::default() {
            return Ok(());
        }
        lchown(path, self.user, self.group)
    }
}

/// The file of a Unix socket that listens. It is removed when this is dropped, as long as it is ours:
/// another server may have put its own there, or have taken over this one.
pub(crate) struct SocketFile {
    path: PathBuf,
    identity: Identity,
    ours: AtomicBool,
}

impl SocketFile {
    /// Of a socket that another process has handed over, and may go on with: it is not ours before
    /// [`Self::take_over`].
    pub(crate) fn adopt(path: &Path) -> io::Result<Self> {
        Ok(Self {
            path: path.into(),
            identity: Identity::of(path)?,
            ours: AtomicBool::new(false),
        })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
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

impl Drop for SocketFile {
    fn drop(&mut self) {
        if self.ours.load(Ordering::Relaxed)
            && Identity::of(&self.path).is_ok_and(|there| there == self.identity)
        {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Tells a file from another one that was made in its place: some file systems give the number of a file
/// that is gone to the next one.
#[derive(PartialEq)]
struct Identity {
    device: u64,
    inode: u64,
    made: Option<SystemTime>,
}

impl Identity {
    fn of(path: &Path) -> io::Result<Self> {
        let metadata = std::fs::symlink_metadata(path)?;
        Ok(Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            made: metadata.created().ok(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mode_is_octal() {
        assert_eq!("660".parse(), Ok(Mode(0o660)));
        assert_eq!("0777".parse::<Mode>().unwrap().to_string(), "0777");
        for text in ["", "8", "1777", "+7", "-1", "0o660", "u=rw", "99999999999"] {
            assert!(text.parse::<Mode>().is_err(), "{text}");
        }
    }

    #[test]
    fn an_owner_is_a_user_a_group_or_both() {
        let owner = |user, group| Ok(Owner { user, group });
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
            assert!(text.parse::<Owner>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_file_that_took_the_place_of_ours_stays() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let (_socket, file) = bind(&path, &Permissions::default()).unwrap();
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "theirs").unwrap();
        drop(file);
        assert!(path.exists());
        std::fs::remove_file(&path).unwrap();
        let (_socket, file) = bind(&path, &Permissions::default()).unwrap();
        drop(file);
        assert!(!path.exists());
        let (_socket, file) = bind(&path, &Permissions::default()).unwrap();
        file.hand_over();
        drop(file);
        assert!(path.exists());
    }
}
