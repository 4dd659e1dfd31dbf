//! Values in tables: digests, sizes and times.

use bytesize::ByteSize;

/// The first digits of a digest, enough to tell versions apart.
pub(super) fn short_digest(digest: &str) -> &str {
    digest.get(..12).unwrap_or(digest)
}

pub(super) fn size(bytes: u64) -> String {
    ByteSize(bytes).to_string().replace(' ', "")
}

/// A time in its largest unit, from seconds to days.
pub(super) fn age(seconds: f64) -> String {
    match seconds {
        ..60.0 => format!("{seconds:.1}s"),
        ..3600.0 => format!("{:.1}m", seconds / 60.0),
        ..86400.0 => format!("{:.1}h", seconds / 3600.0),
        _ => format!("{:.1}d", seconds / 86400.0),
    }
}
