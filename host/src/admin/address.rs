//! The address of the admin API.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;

/// Address of the admin API.
#[derive(Clone, Debug, PartialEq)]
pub enum AdminAddress {
    /// A Unix socket. Only the user of the server's process can connect.
    Unix(PathBuf),
    /// A loopback address. Any user of the machine can connect, so requests need a token.
    Loopback(SocketAddr),
}

impl fmt::Display for AdminAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Loopback(address) => address.fmt(f),
        }
    }
}

impl FromStr for AdminAddress {
    type Err = &'static str;

    fn from_str(value: &str) -> Result<Self, Self::Err> {
        if let Some(path) = value.strip_prefix("unix:").filter(|path| !path.is_empty()) {
            return Ok(Self::Unix(path.into()));
        }
        match value.parse::<SocketAddr>() {
            Ok(address) if address.ip().is_loopback() => Ok(Self::Loopback(address)),
            Ok(_) => Err(
                "not a loopback address: the admin API is not encrypted; use 127.0.0.1 or [::1], or unix:PATH",
            ),
            Err(_) => Err(
                "neither unix:PATH, such as unix:/run/wasinetd/admin.sock, nor a loopback address with a port, such as 127.0.0.1:7879",
            ),
        }
    }
}
