//! Compiled guests, kept on disk.
//!
//! What is in there is native code that this process will run. So it is believed only when nobody
//! else can have put it there, and when it is what was written.

use std::fs::{DirBuilder, File};
use std::hash::{Hash, Hasher};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use rustix::fs::{AtFlags, Dir, Mode, OFlags, Timestamps, UTIME_NOW};
use rustix::fs::{futimens, openat, renameat, statat, unlinkat};
use rustix::process::geteuid;
use sha2::{Digest as _, Sha256};
use tracing::{debug, warn};

use super::Digest;

/// How many are kept; those that were not used for longest go. Arbitrary: some hundred MB at most.
const KEPT: usize = 64;

/// The digest that comes before the code in a file.
const DIGEST_BYTES: usize = 32;

/// A directory of compiled guests, which nobody else may enter.
pub struct Cache {
    path: PathBuf,
    directory: OwnedFd,
}

/// Why a directory is not to be trusted, or cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// It is somebody else's, and what is in it would be run.
    #[error("it belongs to user {owner}, and wasinetd runs as {own}; name a directory of its own")]
    Owner {
        /// Whose it is.
        owner: u32,
        /// Who we are.
        own: u32,
    },
    /// Others may enter it.
    #[error(
        "others may enter it (its mode is {mode:03o}), and what is in it is run as native code; look who wrote to it, and then: chmod 700"
    )]
    Mode {
        /// The mode that it has.
        mode: u32,
    },
    /// It is not there and cannot be made, or it is no directory.
    #[error("{0}; name a directory that wasinetd may create or write to")]
    Unusable(#[from] io::Error),
}

impl Cache {
    /// Opens the directory at `path`, and creates it if it is not there.
    ///
    /// # Errors
    ///
    /// Says why it is not to be trusted, or cannot be had.
    pub fn open(path: &Path) -> Result<Self, CacheError> {
        let made = DirBuilder::new().recursive(true).mode(0o700).create(path);
        let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let directory = made
            .and_then(|()| Ok(rustix::fs::open(path, flags, Mode::empty())?))
            .map(File::from)?;
        // Of what was opened, not of what is at the path by now.
        let metadata = directory.metadata()?;
        let own = geteuid().as_raw();
        if metadata.uid() != own {
            let owner = metadata.uid();
            return Err(CacheError::Owner { owner, own });
        }
        let mode = metadata.mode() & 0o777;
        if mode & 0o077 != 0 {
            return Err(CacheError::Mode { mode });
        }
        Ok(Self {
            path: path.into(),
            directory: directory.into(),
        })
    }

    /// What was kept of the component with this digest, for engines of this key.
    pub(super) fn get(&self, component: &Digest, engine: &str) -> Option<Vec<u8>> {
        let name = name(component, engine);
        match self.read(&name) {
            Ok(code) => code,
            Err(error) => {
                let path = self.path.join(name);
                warn!(?path, %error, "what is kept of a guest is not usable; it is compiled again");
                None
            }
        }
    }

    fn read(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut file = match openat(&self.directory, name, flags, Mode::empty()) {
            Ok(file) => File::from(file),
            Err(rustix::io::Errno::NOENT) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let metadata = file.metadata()?;
        let ours = metadata.uid() == geteuid().as_raw() && metadata.mode() & 0o022 == 0;
        if !metadata.is_file() || !ours {
            return Err(io::Error::other("it is not a file that only we can write"));
        }
        let mut digest = [0; DIGEST_BYTES];
        file.read_exact(&mut digest)?;
        let mut code = Vec::with_capacity(metadata.len() as usize);
        file.read_to_end(&mut code)?;
        if Sha256::digest(&code)[..] != digest {
            return Err(io::Error::other("it is not what was written"));
        }
        // Whatever is used stays. Where that cannot be noted, it goes earlier.
        let now = rustix::fs::Timespec {
            tv_sec: 0,
            tv_nsec: UTIME_NOW as _,
        };
        let _ = futimens(
            &file,
            &Timestamps {
                last_access: now,
                last_modification: now,
            },
        );
        Ok(Some(code))
    }

    /// Keeps compiled code. Where it cannot be kept, it is compiled again the next time.
    pub(super) fn put(&self, component: &Digest, engine: &str, code: &[u8]) {
        let name = name(component, engine);
        let written = self.write(&name, code).and_then(|()| self.prune());
        if let Err(error) = written {
            let path = self.path.join(name);
            warn!(?path, %error, "a compiled guest cannot be kept");
        }
    }

    fn write(&self, name: &str, code: &[u8]) -> io::Result<()> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let unique = NEXT.fetch_add(1, Ordering::Relaxed);
        let partial = format!(".{name}.{}-{unique}", std::process::id());
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(0o600);
        let mut file = File::from(openat(&self.directory, &partial, flags, mode)?);
        let written = file
            .write_all(&Sha256::digest(code))
            .and_then(|()| file.write_all(code))
            .and_then(|()| Ok(renameat(&self.directory, &partial, &self.directory, name)?));
        if written.is_err() {
            // It is of no use, and what is left of it would be taken for an old one some time.
            let _ = unlinkat(&self.directory, &partial, AtFlags::empty());
        }
        written
    }

    /// Removes those that were not used for longest. Whatever else is in the directory is not ours.
    fn prune(&self) -> io::Result<()> {
        let mut files: Vec<(SystemTime, std::ffi::CString)> = Vec::new();
        for entry in Dir::read_from(&self.directory)? {
            let name = entry?.file_name().to_owned();
            let Ok(stat) = statat(&self.directory, &name, AtFlags::SYMLINK_NOFOLLOW) else {
                continue;
            };
            let is_file = rustix::fs::FileType::from_raw_mode(stat.st_mode).is_file();
            if is_file && is_ours(name.to_bytes()) {
                let seconds = u64::try_from(stat.st_mtime).unwrap_or(0);
                let nanos = stat.st_mtime_nsec as u32;
                let used = SystemTime::UNIX_EPOCH + std::time::Duration::new(seconds, nanos);
                files.push((used, name));
            }
        }
        files.sort();
        for (_, name) in files.iter().rev().skip(KEPT) {
            debug!(
                ?name,
                "a compiled guest that was not used for long is removed"
            );
            match unlinkat(&self.directory, name, AtFlags::empty()) {
                // Another process has removed it as well.
                Ok(()) | Err(rustix::io::Errno::NOENT) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

fn name(component: &Digest, engine: &str) -> String {
    format!("{component}-{engine}.cwasm")
}

/// Whether a file of this name is one that we keep, or one that we did not finish writing.
fn is_ours(name: &[u8]) -> bool {
    let name = name.strip_prefix(b".").unwrap_or(name);
    let is_hex = |bytes: &[u8]| bytes.iter().all(u8::is_ascii_hexdigit);
    let Some((digest, rest)) = name.split_at_checked(64) else {
        return false;
    };
    let Some((key, rest)) = rest.split_at_checked(1 + KEY_DIGITS) else {
        return false;
    };
    is_hex(digest) && key[0] == b'-' && is_hex(&key[1..]) && rest.starts_with(b".cwasm")
}

/// The digits that tell engines apart.
const KEY_DIGITS: usize = 16;

/// What tells engines apart whose code is not each other's.
pub(super) fn key(engine: &wasmtime::Engine) -> String {
    let mut hasher = Bytes(Sha256::new());
    engine.precompile_compatibility_hash().hash(&mut hasher);
    format!("{:x}", hasher.0.finalize())[..KEY_DIGITS].into()
}

/// The standard library's hashers may change from one release to the next.
struct Bytes(Sha256);

impl Hasher for Bytes {
    fn write(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    fn finish(&self) -> u64 {
        unreachable!("the digest is taken instead")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    const ENGINE: &str = "0123456789abcdef";

    fn cache() -> (tempfile::TempDir, Cache) {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::open(&directory.path().join("cache")).unwrap();
        (directory, cache)
    }

    #[test]
    fn what_was_kept_is_found_by_both_its_names() {
        let (_directory, cache) = cache();
        let (one, other) = (Digest::of(b"one"), Digest::of(b"other"));
        assert_eq!(cache.get(&one, ENGINE), None);
        cache.put(&one, ENGINE, b"code");
        assert_eq!(cache.get(&one, ENGINE).unwrap(), b"code");
        assert_eq!(cache.get(&one, "another"), None);
        assert_eq!(cache.get(&other, ENGINE), None);
    }

    #[test]
    fn what_was_changed_is_not_trusted() {
        let (_directory, cache) = cache();
        let one = Digest::of(b"one");
        cache.put(&one, ENGINE, b"code");
        let path = cache.path.join(name(&one, ENGINE));
        let mut bytes = std::fs::read(&path).unwrap();
        for changed in 0..bytes.len() {
            bytes[changed] ^= 1;
            std::fs::write(&path, &bytes).unwrap();
            assert_eq!(cache.get(&one, ENGINE), None, "byte {changed}");
            bytes[changed] ^= 1;
        }
        std::fs::write(&path, &bytes[..10]).unwrap();
        assert_eq!(cache.get(&one, ENGINE), None);
        std::fs::write(&path, &bytes).unwrap();
        assert!(cache.get(&one, ENGINE).is_some());
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o622)).unwrap();
        assert_eq!(cache.get(&one, ENGINE), None);
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", &path).unwrap();
        assert_eq!(cache.get(&one, ENGINE), None);
    }

    #[test]
    fn those_that_were_not_used_go() {
        let (_directory, cache) = cache();
        let digest = |n: usize| Digest::of(&n.to_le_bytes());
        cache.put(&digest(0), ENGINE, b"first");
        for n in 1..KEPT {
            cache.put(&digest(n), ENGINE, b"code");
        }
        assert!(cache.get(&digest(0), ENGINE).is_some());
        for n in KEPT..2 * KEPT - 1 {
            cache.put(&digest(n), ENGINE, b"code");
        }
        assert!(cache.get(&digest(0), ENGINE).is_some());
        assert!(cache.get(&digest(1), ENGINE).is_none());
        let files = std::fs::read_dir(&cache.path).unwrap().count();
        assert_eq!(files, KEPT);
        // What somebody else has put there stays.
        for n in 0..100 {
            std::fs::write(cache.path.join(format!("letter-{n}")), "dear").unwrap();
        }
        cache.put(&digest(1), ENGINE, b"code");
        let files = std::fs::read_dir(&cache.path).unwrap().count();
        assert_eq!(files, KEPT + 100);
    }

    #[test]
    fn a_directory_that_others_may_enter_is_refused() {
        let (_directory, cache) = cache();
        for mode in [0o777, 0o750, 0o701] {
            std::fs::set_permissions(&cache.path, PermissionsExt::from_mode(mode)).unwrap();
            let refused = Cache::open(&cache.path);
            assert!(matches!(refused, Err(CacheError::Mode { mode: m }) if m == mode));
        }
        std::fs::set_permissions(&cache.path, PermissionsExt::from_mode(0o700)).unwrap();
        let link = cache.path.with_extension("link");
        std::os::unix::fs::symlink(&cache.path, &link).unwrap();
        assert!(matches!(Cache::open(&link), Err(CacheError::Unusable(_))));
    }
}
