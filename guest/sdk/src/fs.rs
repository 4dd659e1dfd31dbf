//! Reading small files with few host calls.
//!
//! [`std::fs`] works in a guest as anywhere else. It is built for programs that live longer than
//! one connection: it maintains tables of its own and makes more host calls than a small file is
//! worth.

use std::io;
use std::path::Path;

use crate::rt::bindings::wasi::filesystem0_2_12::preopens::get_directories;
use crate::rt::bindings::wasi::filesystem0_2_12::types::{
    Descriptor, DescriptorFlags, ErrorCode, OpenFlags, PathFlags,
};

/// Bytes per read. Most files that a protocol sends are smaller, and the host has to clear all
/// memory that a guest touched before the next connection reuses it.
const STEP: usize = 4 * 1024;

thread_local! {
    /// The directories that the operator has granted, with their paths in the guest.
    static GRANTED: Vec<(Descriptor, String)> = get_directories();
}

/// Reads the whole file at `path`.
///
/// `path` is absolute and lies below a directory that the operator has granted (`--dir`). The file
/// is a regular file.
///
/// Unlike [`std::fs::read`], this function neither queries the file size first nor reads once more
/// to find the end of the file. In a sandbox those two calls cost as much as reading a small file.
///
/// ```no_run
/// let page = wasinetd_guest::fs::read("/static/hello.html")?;
/// # std::io::Result::Ok(())
/// ```
///
/// # Errors
///
/// [`io::ErrorKind::NotFound`] if the file does not exist or no granted directory contains `path`.
/// Other errors of the host's file system keep their kinds.
///
/// # Panics
///
/// Panics outside a wasm guest, where there is no host to call.
pub fn read(path: impl AsRef<Path>) -> io::Result<Vec<u8>> {
    let path = path.as_ref();
    GRANTED.with(|granted| {
        let (directory, relative) = granted
            .iter()
            .filter_map(|(directory, name)| Some((directory, path.strip_prefix(name).ok()?)))
            // Of nested grants, the innermost applies.
            .min_by_key(|(_, relative)| relative.as_os_str().len())
            .ok_or(io::ErrorKind::NotFound)?;
        let relative = match relative.to_str().ok_or(io::ErrorKind::InvalidInput)? {
            "" => ".",
            relative => relative,
        };
        let file = directory
            .open_at(
                PathFlags::SYMLINK_FOLLOW,
                relative,
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
        // A short read of a regular file means that its end was reached (POSIX, read).
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
        // The descriptor was opened successfully, so a host that calls it bad means a directory.
        ErrorCode::IsDirectory | ErrorCode::BadDescriptor => io::ErrorKind::IsADirectory,
        ErrorCode::NotDirectory => io::ErrorKind::NotADirectory,
        ErrorCode::Invalid => io::ErrorKind::InvalidInput,
        ErrorCode::Interrupted => io::ErrorKind::Interrupted,
        other => return io::Error::other(other.message()),
    };
    kind.into()
}
