//! Who has connected.

use std::fmt;
use std::net::SocketAddr;

/// A client, as its socket tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// One that has connected over IP.
    Ip(SocketAddr),
    /// One that has connected to a Unix socket: a user of this machine. It is the one that the process
    /// had when it connected.
    Unix {
        /// The user.
        uid: u32,
        /// The process. Zero: it is in a PID namespace that is not within ours.
        pid: i32,
    },
}

impl From<SocketAddr> for Peer {
    fn from(address: SocketAddr) -> Self {
        Self::Ip(address)
    }
}

/// As the log has it: an address and a port, or `unix:uid=1000,pid=42`.
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
    fn a_peer_is_written_as_it_is_known() {
        let ip: SocketAddr = "192.0.2.1:80".parse().unwrap();
        assert_eq!(Peer::from(ip).to_string(), "192.0.2.1:80");
        let of = |pid| Peer::Unix { uid: 1000, pid }.to_string();
        assert_eq!(of(42), "unix:uid=1000,pid=42");
        assert_eq!(of(0), "unix:uid=1000");
    }
}
