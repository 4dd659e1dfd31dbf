//! Paths of Unix sockets.

use std::path::Path;

/// Longest path of a Unix socket, in bytes.
///
/// The size of `sun_path` (unix(7)) without the final zero.
pub(super) const LONGEST_PATH: usize = 107;

/// The directory that contains the file at `path`.
pub(crate) fn directory_of(path: &Path) -> &Path {
    let parent = path.parent().filter(|parent| *parent != Path::new(""));
    parent.unwrap_or(Path::new("."))
}
