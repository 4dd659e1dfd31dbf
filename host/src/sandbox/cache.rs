//! Compiled guests on disk.
//!
//! The cache holds native code that this process runs. So a file counts only if no other user can
//! have written it, and if its digest shows that it is unchanged.

use std::ffi::CString;
use std::fs::{DirBuilder, File};
use std::hash::{Hash, Hasher};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, Timespec, Timestamps, UTIME_NOW};
use rustix::fs::{futimens, openat, renameat, statat, unlinkat};
use rustix::io::Errno;
use rustix::process::geteuid;
use sha2::{Digest as _, Sha256};
use tracing::{debug, warn};

use super::digest::Digest;

/// The most files in the cache. The least recently used ones are removed.
///
/// Arbitrary: a few hundred MB at most.
const MAX_FILES: usize = 64;

/// The length of the digest (SHA-256) before the code in a file.
const DIGEST_BYTES: usize = 32;

/// A directory of compiled guests that no other user may enter.
pub struct Cache {
    path: PathBuf,
    directory: OwnedFd,
}

/// Why a directory cannot be the cache.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// The directory belongs to another user.
    #[error("it belongs to user {owner}, and wasinetd runs as {own}; name a directory of its own")]
    Owner {
        /// The user ID of the directory's owner.
        owner: u32,
        /// The user ID of this process.
        own: u32,
    },
    /// Other users may enter the directory.
    #[error(
        "other users may enter it (its mode is {mode:03o}), and its files run as native code; check who wrote to it, and then run chmod 700"
    )]
    Mode {
        /// The mode of the directory.
        mode: u32,
    },
    /// The path cannot be opened or created as a directory.
    #[error("{0}; name a directory that wasinetd may create or write to")]
    Unusable(#[from] io::Error),
}

impl Cache {
    /// Opens the directory at `path`, and creates it if necessary.
    ///
    /// # Errors
    ///
    /// Fails if the directory cannot be opened, or if other users could write to it.
    pub fn open(path: &Path) -> Result<Self, CacheError> {
        let created = DirBuilder::new().recursive(true).mode(0o700).create(path);
        let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let directory = created
            .and_then(|()| Ok(rustix::fs::open(path, flags, Mode::empty())?))
            .map(File::from)?;
        // The metadata of the open directory: another one may have taken over the path.
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

    /// The compiled code of a component for engines with this key. None if there is no usable file.
    pub(super) fn get(&self, component: &Digest, engine_key: &str) -> Option<Vec<u8>> {
        let name = file_name(component, engine_key);
        match self.read(&name) {
            Ok(code) => code,
            Err(error) => {
                let path = self.path.join(name);
                warn!(?path, %error, "the cached code of a guest is not usable; it is compiled again");
                None
            }
        }
    }

    fn read(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut file = match openat(&self.directory, name, flags, Mode::empty()) {
            Ok(file) => File::from(file),
            Err(Errno::NOENT) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let metadata = file.metadata()?;
        let is_own = metadata.uid() == geteuid().as_raw() && metadata.mode() & 0o022 == 0;
        if !metadata.is_file() || !is_own {
            return Err(io::Error::other(
                "it is not a file that only this user can write",
            ));
        }
        let mut digest = [0; DIGEST_BYTES];
        file.read_exact(&mut digest)?;
        let mut code = Vec::with_capacity(metadata.len() as usize);
        file.read_to_end(&mut code)?;
        if Sha256::digest(&code)[..] != digest {
            return Err(io::Error::other("its content does not match its digest"));
        }
        // Marks the file as recently used. If that fails, the file is removed earlier: no harm.
        let now = Timespec {
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

    /// Writes compiled code. If that fails, the component is compiled again the next time.
    pub(super) fn put(&self, component: &Digest, engine_key: &str, code: &[u8]) {
        let name = file_name(component, engine_key);
        let written = self.write(&name, code).and_then(|()| self.prune());
        if let Err(error) = written {
            let path = self.path.join(name);
            warn!(?path, %error, "cannot write a compiled guest to the cache");
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
            // Otherwise the partial file would stay until its turn as the least recently used one.
            let _ = unlinkat(&self.directory, &partial, AtFlags::empty());
        }
        written
    }

    /// Removes the least recently used files. Files with other names are left alone.
    fn prune(&self) -> io::Result<()> {
        let mut files: Vec<(SystemTime, CString)> = Vec::new();
        for entry in Dir::read_from(&self.directory)? {
            let name = entry?.file_name().to_owned();
            let Ok(stat) = statat(&self.directory, &name, AtFlags::SYMLINK_NOFOLLOW) else {
                continue;
            };
            let is_file = FileType::from_raw_mode(stat.st_mode).is_file();
            if is_file && is_cache_file(name.to_bytes()) {
                let seconds = u64::try_from(stat.st_mtime).unwrap_or(0);
                let nanos = stat.st_mtime_nsec as u32;
                let last_used = SystemTime::UNIX_EPOCH + Duration::new(seconds, nanos);
                files.push((last_used, name));
            }
        }
        files.sort();
        for (_, name) in files.iter().rev().skip(MAX_FILES) {
            debug!(?name, "removing the least recently used compiled guest");
            match unlinkat(&self.directory, name, AtFlags::empty()) {
                // Another process may have removed the file.
                Ok(()) | Err(Errno::NOENT) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

fn file_name(component: &Digest, engine_key: &str) -> String {
    format!("{component}-{engine_key}.cwasm")
}

/// Whether a file of this name belongs to the cache.
///
/// True for complete and for partial files.
fn is_cache_file(name: &[u8]) -> bool {
    let name = name.strip_prefix(b".").unwrap_or(name);
    let is_hex = |bytes: &[u8]| bytes.iter().all(u8::is_ascii_hexdigit);
    let Some((digest, rest)) = name.split_at_checked(2 * DIGEST_BYTES) else {
        return false;
    };
    let Some((key, rest)) = rest.split_at_checked(1 + KEY_DIGITS) else {
        return false;
    };
    is_hex(digest) && key[0] == b'-' && is_hex(&key[1..]) && rest.starts_with(b".cwasm")
}

/// The hexadecimal digits of an engine's key.
const KEY_DIGITS: usize = 16;

/// The key of an engine. Engines with the same key can run each other's code.
pub(super) fn key(engine: &wasmtime::Engine) -> String {
    let mut hasher = Sha256Hasher(Sha256::new());
    engine.precompile_compatibility_hash().hash(&mut hasher);
    format!("{:x}", hasher.0.finalize())[..KEY_DIGITS].into()
}

/// A stable hasher.
///
/// The hashers of the standard library may change with any release.
struct Sha256Hasher(Sha256);

impl Hasher for Sha256Hasher {
    fn write(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    fn finish(&self) -> u64 {
        unreachable!("`key` finalizes the digest itself")
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
    fn code_is_found_by_component_and_engine() {
        let (_directory, cache) = cache();
        let (one, other) = (Digest::of(b"one"), Digest::of(b"other"));
        assert_eq!(cache.get(&one, ENGINE), None);
        cache.put(&one, ENGINE, b"code");
        assert_eq!(cache.get(&one, ENGINE).unwrap(), b"code");
        assert_eq!(cache.get(&one, "another"), None);
        assert_eq!(cache.get(&other, ENGINE), None);
    }

    #[test]
    fn a_changed_file_is_not_used() {
        let (_directory, cache) = cache();
        let one = Digest::of(b"one");
        cache.put(&one, ENGINE, b"code");
        let path = cache.path.join(file_name(&one, ENGINE));
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
    fn the_least_recently_used_files_are_removed() {
        let (_directory, cache) = cache();
        let digest = |n: usize| Digest::of(&n.to_le_bytes());
        cache.put(&digest(0), ENGINE, b"first");
        for n in 1..MAX_FILES {
            cache.put(&digest(n), ENGINE, b"code");
        }
        assert!(cache.get(&digest(0), ENGINE).is_some());
        for n in MAX_FILES..2 * MAX_FILES - 1 {
            cache.put(&digest(n), ENGINE, b"code");
        }
        assert!(cache.get(&digest(0), ENGINE).is_some());
        assert!(cache.get(&digest(1), ENGINE).is_none());
        let files = std::fs::read_dir(&cache.path).unwrap().count();
        assert_eq!(files, MAX_FILES);
        // Files with other names stay.
        for n in 0..100 {
            std::fs::write(cache.path.join(format!("letter-{n}")), "dear").unwrap();
        }
        cache.put(&digest(1), ENGINE, b"code");
        let files = std::fs::read_dir(&cache.path).unwrap().count();
        assert_eq!(files, MAX_FILES + 100);
    }

    #[test]
    fn a_directory_open_to_other_users_is_refused() {
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
