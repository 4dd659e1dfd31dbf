//! Identities of clients.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;

use nix::sys::socket::{getsockopt, sockopt};
use rustix::io::Errno;
use rustix::net::SocketAddrAny;

/// A client, as the kernel reports it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// A TCP client.
    Ip(SocketAddr),
    /// A client of a Unix socket, with its credentials at connect time.
    ///
    /// See `SO_PEERCRED` in unix(7).
    Unix {
        /// Effective user.
        uid: u32,
        /// Process. Zero if the process is in a PID namespace that this one cannot see.
        pid: i32,
    },
}

impl Peer {
    /// The client at the other end of an accepted Unix socket.
    ///
    /// # Errors
    ///
    /// Fails if the kernel does not report its credentials.
    pub fn of_unix_socket(socket: &UnixStream) -> io::Result<Self> {
        let credentials = getsockopt(socket, sockopt::PeerCredentials)?;
        Ok(Self::Unix {
            uid: credentials.uid(),
            pid: credentials.pid(),
        })
    }
}

impl From<SocketAddr> for Peer {
    fn from(address: SocketAddr) -> Self {
        Self::Ip(address)
    }
}

/// Converts the address that `accept` returned. Fails if it is no IP address.
impl TryFrom<SocketAddrAny> for Peer {
    type Error = Errno;

    fn try_from(address: SocketAddrAny) -> Result<Self, Errno> {
        SocketAddr::try_from(address).map(Self::Ip)
    }
}

/// Writes an address and a port, or `unix:uid=1000,pid=42`, for the log.
impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(address) => address.fmt(f),
            Self::Unix { uid, pid: 0 } => write!(f, "unix:uid={uid}"),
            Self::Unix { uid, pid } => write!(f, "unix:uid={uid},pid={pid}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_is_written_with_what_the_kernel_reports() {
        let ip: SocketAddr = "192.0.2.1:80".parse().unwrap();
        assert_eq!(Peer::from(ip).to_string(), "192.0.2.1:80");
        let unix = |pid| Peer::Unix { uid: 1000, pid }.to_string();
        assert_eq!(unix(42), "unix:uid=1000,pid=42");
        assert_eq!(unix(0), "unix:uid=1000");
    }

    #[test]
    fn a_unix_client_is_known_by_its_credentials() {
        let (client, _server) = UnixStream::pair().unwrap();
        let peer = Peer::of_unix_socket(&client).unwrap();
        let pid = std::process::id().try_into().unwrap();
        let uid = nix::unistd::geteuid().as_raw();
        assert_eq!(peer, Peer::Unix { uid, pid });
    }
}
