//! Sources of connections: a network of addresses, or a local user.

use std::net::IpAddr;
use std::str::FromStr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::net::Peer;

/// The clients that share the limits per source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Source {
    /// TCP clients with the same address prefix.
    Network(IpNet),
    /// A local user, by number, for clients of Unix sockets.
    User(u32),
}

/// Number of leading address bits that identify a source.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SourcePrefix {
    /// Bits of an IPv4 address, 1 to 32.
    pub v4: u8,
    /// Bits of an IPv6 address, 1 to 128.
    pub v6: u8,
}

impl Default for SourcePrefix {
    /// A single IPv4 address, or one IPv6 site.
    ///
    /// A client in an IPv6 network (RFC 6177) can use any of its addresses.
    fn default() -> Self {
        Self { v4: 32, v6: 64 }
    }
}

impl SourcePrefix {
    /// The source that `peer` belongs to.
    pub(super) fn source(self, peer: Peer) -> Source {
        match peer {
            Peer::Ip(address) => Source::Network(self.network(address.ip())),
            Peer::Unix { uid, .. } => Source::User(uid),
        }
    }

    fn network(self, address: IpAddr) -> IpNet {
        match address.to_canonical() {
            IpAddr::V4(address) => Ipv4Net::new_assert(address, self.v4.min(32)).trunc().into(),
            IpAddr::V6(address) => Ipv6Net::new_assert(address, self.v6.min(128))
                .trunc()
                .into(),
        }
    }
}

/// Why a text is no [`SourcePrefix`].
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[error("not a number from 1 to 32 and one from 1 to 128, such as 32,64")]
pub struct SourcePrefixError;

impl FromStr for SourcePrefix {
    type Err = SourcePrefixError;

    fn from_str(text: &str) -> Result<Self, SourcePrefixError> {
        let bits = |text: &str, max| {
            let bits = text.parse().ok();
            bits.filter(|bits| (1..=max).contains(bits))
                .ok_or(SourcePrefixError)
        };
        let (v4, v6) = text.split_once(',').ok_or(SourcePrefixError)?;
        Ok(Self {
            v4: bits(v4, 32)?,
            v6: bits(v6, 128)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_is_two_numbers_of_bits() {
        assert_eq!("24,48".parse(), Ok(SourcePrefix { v4: 24, v6: 48 }));
        for text in ["", "24", "0,64", "33,64", "32,0", "32,129", "32,64,", "a,b"] {
            assert_eq!(
                text.parse::<SourcePrefix>(),
                Err(SourcePrefixError),
                "{text}"
            );
        }
    }
}
