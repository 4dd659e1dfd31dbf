//! Permissions of a Unix socket: the mode and the owner of its file.

use std::fmt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::str::FromStr;

use nix::unistd::{Group, User, getegid, geteuid};

use super::unix_path::directory_of;

/// Users that may connect to a Unix socket, as they may write to its file.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SocketPermissions {
    /// Mode of the file. The umask does not apply.
    pub mode: SocketMode,
    /// Owner of the file. By default as for a new file of this process.
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

/// Permission bits of a file.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SocketMode(u32);

impl SocketMode {
    /// Read and write for the owner only.
    pub(crate) const PRIVATE: Self = Self(0o600);

    /// The bits, at most `0o777`.
    pub(super) fn bits(self) -> u32 {
        self.0
    }
}

impl fmt::Display for SocketMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04o}", self.0)
    }
}

impl FromStr for SocketMode {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        // `from_str_radix` accepts a sign, which no mode has.
        let octal = text.bytes().all(|byte| (b'0'..=b'7').contains(&byte));
        match u32::from_str_radix(text, 8) {
            Ok(bits @ 0..=0o777) if octal => Ok(Self(bits)),
            _ => Err("not an octal mode from 0000 to 0777, such as 0660"),
        }
    }
}

/// User and group that own the file. None keeps the default.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SocketOwner {
    user: Option<u32>,
    group: Option<u32>,
}

impl FromStr for SocketOwner {
    type Err = String;

    /// Parses `USER`, `USER:GROUP` or `:GROUP`, each a name or a number.
    fn from_str(text: &str) -> Result<Self, String> {
        let (user, group) = match text.split_once(':') {
            Some((_, "")) => {
                return Err("the group is empty; write USER, USER:GROUP or :GROUP".into());
            }
            Some((user, group)) => (user, Some(group)),
            None => (text, None),
        };
        let user = match (user, group) {
            ("", None) => {
                return Err("the owner is empty; write USER, USER:GROUP or :GROUP".into());
            }
            ("", Some(_)) => None,
            (name, _) => Some(find_id(name, "user", |name| {
                Ok(User::from_name(name)?.map(|user| user.uid.as_raw()))
            })?),
        };
        let group = group.map(|name| {
            find_id(name, "group", |name| {
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
    /// Resolves user and group for a file at `path`.
    ///
    /// The defaults are those of the kernel for a new file.
    pub(super) fn resolve(self, path: &Path) -> (u32, u32) {
        /// New files inherit the group of a directory with this bit (inode(7)).
        const SET_GROUP: u32 = 0o2000;
        let directory = std::fs::metadata(directory_of(path)).ok();
        let directory = directory.filter(|directory| directory.mode() & SET_GROUP != 0);
        let group = directory.map_or_else(|| getegid().as_raw(), |directory| directory.gid());
        let user = self.user.unwrap_or_else(|| geteuid().as_raw());
        (user, self.group.unwrap_or(group))
    }
}

/// Looks up a user or group by its name or number.
fn find_id(
    name: &str,
    kind: &str,
    look_up: impl Fn(&str) -> nix::Result<Option<u32>>,
) -> Result<u32, String> {
    match look_up(name) {
        Ok(Some(id)) => Ok(id),
        // For chown(2), the largest number means no change.
        Ok(None) => match name.parse() {
            Ok(id) if id != u32::MAX => Ok(id),
            _ => Err(format!("there is no {kind} {name:?} on this machine")),
        },
        Err(error) => Err(format!("the {kind} {name:?} cannot be looked up: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_are_octal_numbers() {
        assert_eq!("660".parse(), Ok(SocketMode(0o660)));
        assert_eq!("0777".parse::<SocketMode>().unwrap().to_string(), "0777");
        for text in ["", "8", "1777", "+7", "-1", "0o660", "u=rw", "99999999999"] {
            assert!(text.parse::<SocketMode>().is_err(), "{text}");
        }
    }

    #[test]
    fn owners_are_a_user_a_group_or_both() {
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
}
