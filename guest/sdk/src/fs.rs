//! Files by the shortest way through the host.
//!
//! [`std::fs`] works in a guest as anywhere else. It is built for programs that live longer than one
//! connection: it keeps tables of its own, and asks the host for more than a small file is worth.

use std::io;
use std::path::Path;

use crate::rt::bindings::wasi::filesystem0_2_12::preopens::get_directories;
use crate::rt::bindings::wasi::filesystem0_2_12::types::{
    Descriptor, DescriptorFlags, ErrorCode, OpenFlags, PathFlags,
};

/// How much the host is asked for at once. Most pages of a protocol are smaller, and what a sandbox
/// has touched has to be cleared for the next connection.
const STEP: usize = 4 * 1024;

thread_local! {
    /// The directories that the operator has granted, each with its name here.
    static GRANTED: Vec<(Descriptor, String)> = get_directories();
}

/// Reads the regular file at `path`, an absolute path below a directory that the operator has
/// granted.
///
/// Unlike [`std::fs::read`] it asks neither for the file's size first nor for what follows its last
/// byte: in a sandbox that costs as much as reading a small file does.
///
/// ```no_run
/// let page = wasinetd_guest::fs::read("/static/hello.html")?;
/// # std::io::Result::Ok(())
/// ```
///
/// # Errors
///
/// [`io::ErrorKind::NotFound`] where there is no such file, or no grant that it is in; other kinds
/// as the host's file system has them.
///
/// # Panics
///
/// Panics outside of a wasm guest: there is no host to ask.
pub fn read(path: impl AsRef<Path>) -> io::Result<Vec<u8>> {
    let path = path.as_ref();
    GRANTED.with(|granted| {
        let (directory, below) = granted
            .iter()
            .filter_map(|(directory, name)| Some((directory, path.strip_prefix(name).ok()?)))
            // A grant may be inside of another one; the one that is nearest to the file holds.
            .min_by_key(|(_, below)| below.as_os_str().len())
            .ok_or(io::ErrorKind::NotFound)?;
        let below = match below.to_str().ok_or(io::ErrorKind::InvalidInput)? {
            "" => ".",
            below => below,
        };
        let file = directory
            .open_at(
                PathFlags::SYMLINK_FOLLOW,
                below,
                OpenFlags::empty(),
                DescriptorFlags::READ,
            )
            .map_err(error)?;
        read_all(&file).map_err(error)
    })
}

fn read_all(file: &Descriptor) -> Result<Vec<u8>, ErrorCode> {
    let mut bytes = Vec::new();
    loop {
        let (mut next, end) = file.read(STEP as u64, bytes.len() as u64)?;
        // A regular file yields less than was asked for only at its end (POSIX, read).
        let last = end || next.len() < STEP;
        if bytes.is_empty() {
            bytes = next;
        } else {
            bytes.append(&mut next);
        }
        if last {
            return Ok(bytes);
        }
    }
}

fn error(code: ErrorCode) -> io::Error {
    let kind = match code {
        ErrorCode::NoEntry => io::ErrorKind::NotFound,
        ErrorCode::Access | ErrorCode::NotPermitted => io::ErrorKind::PermissionDenied,
        // What was opened just now, and is no file to a host.
        ErrorCode::IsDirectory | ErrorCode::BadDescriptor => io::ErrorKind::IsADirectory,
        ErrorCode::NotDirectory => io::ErrorKind::NotADirectory,
        ErrorCode::Invalid => io::ErrorKind::InvalidInput,
        ErrorCode::Interrupted => io::ErrorKind::Interrupted,
        other => return io::Error::other(other.message()),
    };
    kind.into()
}
