//! Parsers of flag values.

use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use bytesize::ByteSize;

/// Name of values that are pairs. A config file may write them as a table.
pub(super) const NAME_VALUE: &str = "NAME[=VALUE]";

/// Part of the name of values that may be the path of a Unix socket.
pub(super) const UNIX_PATH: &str = "unix:PATH";

/// A limit, or `off`.
#[derive(Clone, Copy)]
pub(super) struct OrOff<T>(pub(super) Option<T>);

/// A backlog: the kernel takes a positive `int`.
pub(super) fn backlog(value: &str) -> Result<u32, String> {
    match value.parse() {
        Ok(n @ 1..=0x7fff_ffff) => Ok(n),
        _ => Err("not a whole number from 1 to 2147483647".into()),
    }
}

/// Text with the escapes of C, as bytes.
pub(super) fn escaped(value: &str) -> Result<Bytes, String> {
    let mut bytes = Vec::new();
    let mut rest = value.as_bytes().iter();
    while let Some(&byte) = rest.next() {
        if byte != b'\\' {
            bytes.push(byte);
            continue;
        }
        bytes.push(match rest.next() {
            Some(b'r') => b'\r',
            Some(b'n') => b'\n',
            Some(b't') => b'\t',
            Some(b'0') => 0,
            Some(b'\\') => b'\\',
            Some(b'x') => hex(rest.next(), rest.next())
                .ok_or("\\x needs two hexadecimal digits, such as \\x0a")?,
            _ => return Err("after \\ comes r, n, t, 0, xHH or another \\".into()),
        });
    }
    Ok(bytes.into())
}

fn hex(high: Option<&u8>, low: Option<&u8>) -> Option<u8> {
    let digit = |digit: &u8| (*digit as char).to_digit(16);
    Some((digit(high?)? * 16 + digit(low?)?) as u8)
}

pub(super) fn collector(value: &str) -> Result<String, String> {
    let authority = value
        .strip_prefix("http://")
        .map(|rest| rest.trim_end_matches('/'));
    let host_and_port = authority.and_then(|authority| authority.rsplit_once(':'));
    match host_and_port {
        Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok() => Ok(value.into()),
        _ => Err("not http://, a host and a port, such as http://127.0.0.1:4318".into()),
    }
}

pub(super) fn directory(value: &str) -> Result<(PathBuf, String), String> {
    let (host, guest) = value.split_once("::").unwrap_or((value, value));
    if host.is_empty() || guest.is_empty() {
        return Err("a name is empty; write HOST or HOST::GUEST, such as static::/static".into());
    }
    Ok((host.into(), guest.into()))
}

/// Names that rustc or cargo reserves: keywords (The Rust Reference), crates of Rust itself, and the
/// dependencies of a new crate.
#[rustfmt::skip]
const NO_CRATES: &[&str] = &[
    "Self", "abstract", "alloc", "as", "async", "await", "become", "box", "break", "build", "const",
    "continue", "core", "crate", "deps", "do", "dyn", "else", "enum", "examples", "extern", "false",
    "final", "fn", "for", "futures", "gen", "if", "impl", "in", "incremental", "let", "loop",
    "macro", "match", "mod", "move", "mut", "override", "priv", "proc_macro", "pub", "ref",
    "return", "self", "static", "std", "struct", "super", "test", "trait", "true", "try", "type",
    "typeof", "unsafe", "unsized", "use", "virtual", "wasinetd_guest", "where", "while",
    "wit_bindgen", "yield",
];

/// A path whose last component can name a crate.
pub(super) fn new_crate(value: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(value);
    let name = path.file_name().and_then(|name| name.to_str());
    let name =
        name.ok_or("the path does not end in a name; write NAME or DIR/NAME, such as greeter")?;
    let begins = name.starts_with(|c: char| c.is_ascii_alphabetic());
    let goes_on = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if !begins || !name.chars().all(goes_on) {
        return Err(format!(
            "{name:?} cannot name a crate: use a letter, then letters, digits, - and _, such as greeter"
        ));
    }
    if NO_CRATES.contains(&name.replace('-', "_").as_str()) {
        return Err(format!(
            "{name:?} is reserved in Rust; choose another name, such as my-{name}"
        ));
    }
    Ok(path)
}

pub(super) fn variable(value: &str) -> Result<(String, String), String> {
    let (name, value) = match value.split_once('=') {
        Some((name, value)) => (name, value.to_string()),
        None => {
            let inherited = std::env::var(value)
                .map_err(|error| format!("{error}; write {value}=VALUE or set it for wasinetd"))?;
            (value, inherited)
        }
    };
    if name.is_empty() {
        return Err("the name is empty; write NAME or NAME=VALUE".into());
    }
    Ok((name.into(), value))
}

/// Longest name of a service. Arbitrary: the name is in each log line and each metric.
const NAME_LETTERS: usize = 64;

pub(super) fn service_name(value: &str) -> Result<String, String> {
    let is_fine = |letter: char| letter.is_ascii_alphanumeric() || matches!(letter, '-' | '_');
    if (1..=NAME_LETTERS).contains(&value.len()) && value.chars().all(is_fine) {
        Ok(value.into())
    } else {
        Err(format!(
            "not a name of 1 to {NAME_LETTERS} letters, digits, - and _, such as smtp-in"
        ))
    }
}

pub(super) fn server_name(value: &str) -> Result<String, String> {
    let rest = value.strip_prefix("*.").unwrap_or(value);
    let is_fine = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
    let is_label = |label: &str| !label.is_empty() && label.bytes().all(is_fine);
    if rest.split('.').all(is_label) {
        Ok(value.into())
    } else {
        Err("not a name such as chat.example, or *.example".into())
    }
}

pub(super) fn positive(value: &str) -> Result<usize, String> {
    match value.parse() {
        Ok(n) if n > 0 => Ok(n),
        _ => Err("not a whole number above zero".into()),
    }
}

/// A size in bytes that is not zero.
pub(super) fn size(value: &str) -> Result<usize, String> {
    match value
        .parse::<ByteSize>()
        .map(|size| usize::try_from(size.0))
    {
        Ok(Ok(bytes)) if bytes > 0 => Ok(bytes),
        _ => {
            Err("not a size above zero; write a number and a unit, such as 512KiB or 64MiB".into())
        }
    }
}

/// Sizes of a call stack, in bytes. With less a guest does not reach its first function; with more,
/// thousands of stacks do not fit into the address space.
const STACK_BYTES: std::ops::RangeInclusive<usize> = (16 << 10)..=(64 << 20);

pub(super) fn stack(value: &str) -> Result<usize, String> {
    let bytes = size(value)?;
    if STACK_BYTES.contains(&bytes) {
        Ok(bytes)
    } else {
        Err("not between 16KiB and 64MiB".into())
    }
}

fn or_off<T>(value: &str, parse: impl Fn(&str) -> Result<T, String>) -> Result<OrOff<T>, String> {
    if value == "off" {
        return Ok(OrOff(None));
    }
    parse(value)
        .map(|value| OrOff(Some(value)))
        .map_err(|error| format!("{error}, or off"))
}

pub(super) fn positive_or_off(value: &str) -> Result<OrOff<usize>, String> {
    or_off(value, positive)
}

pub(super) fn size_or_off(value: &str) -> Result<OrOff<usize>, String> {
    or_off(value, size)
}

pub(super) fn duration_or_off(value: &str) -> Result<OrOff<Duration>, String> {
    or_off(value, some_duration)
}

/// Range of `TCP_KEEPIDLE` (tcp(7)), in seconds.
const KEEPALIVE_SECONDS: std::ops::RangeInclusive<u64> = 1..=32767;

pub(super) fn keepalive(value: &str) -> Result<OrOff<Duration>, String> {
    or_off(value, |value| {
        let time = duration(value)?;
        if time.subsec_nanos() == 0 && KEEPALIVE_SECONDS.contains(&time.as_secs()) {
            Ok(time)
        } else {
            Err("not whole seconds from 1s to 32767s".into())
        }
    })
}

/// A duration above zero.
pub(super) fn some_duration(value: &str) -> Result<Duration, String> {
    match duration(value)? {
        Duration::ZERO => Err("not a duration above zero".into()),
        duration => Ok(duration),
    }
}

pub(super) fn duration(value: &str) -> Result<Duration, String> {
    humantime::parse_duration(value)
        .map_err(|error| format!("{error}; write a number and a unit, such as 500ms, 2s or 5m"))
}
