//! Networks in CIDR notation.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use ipnet::IpNet;

/// A network of IP addresses in CIDR notation (RFC 4632).
///
/// A single address is a network of one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cidr(IpNet);

impl Cidr {
    /// Whether the network contains `address`. An IPv4-mapped IPv6 address counts as IPv4.
    pub fn contains(&self, address: IpAddr) -> bool {
        self.0.contains(&address.to_canonical())
    }

    /// Whether this is an IPv6 network.
    pub fn is_ipv6(&self) -> bool {
        matches!(self.0, IpNet::V6(_))
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.prefix_len() == self.0.max_prefix_len() {
            write!(f, "{}", self.0.addr())
        } else {
            write!(f, "{}", self.0)
        }
    }
}

/// Why a text is no [`Cidr`].
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
pub enum CidrError {
    /// The text has none of the known forms.
    #[error("not a network or an address, such as 192.0.2.0/24, 2001:db8::/32 or 192.0.2.1")]
    Form,
    /// An IPv4-mapped IPv6 network. Clients are compared as IPv4, so none would match.
    #[error("an IPv4 address written as IPv6; write it as IPv4, such as 192.0.2.0/24")]
    Mapped,
}

impl FromStr for Cidr {
    type Err = CidrError;

    fn from_str(text: &str) -> Result<Self, CidrError> {
        let address = || text.parse::<IpAddr>().map(IpNet::from);
        let network = text.parse::<IpNet>().or_else(|_| address());
        match network.map_err(|_| CidrError::Form)? {
            IpNet::V6(v6) if v6.addr().to_ipv4_mapped().is_some() => Err(CidrError::Mapped),
            network => Ok(Self(network.trunc())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_form_is_parsed_and_written() {
        for (text, written) in [
            ("192.0.2.0/24", "192.0.2.0/24"),
            ("192.0.2.7/24", "192.0.2.0/24"),
            ("192.0.2.7", "192.0.2.7"),
            ("192.0.2.7/32", "192.0.2.7"),
            ("2001:DB8::/32", "2001:db8::/32"),
            ("::1", "::1"),
            ("0.0.0.0/0", "0.0.0.0/0"),
        ] {
            assert_eq!(text.parse::<Cidr>().unwrap().to_string(), written);
        }
        for text in [
            "",
            "192.0.2",
            "192.0.2.0/33",
            "::/129",
            "name",
            "10.0.0.0/8 ",
        ] {
            assert_eq!(text.parse::<Cidr>(), Err(CidrError::Form), "{text}");
        }
        for text in ["::ffff:10.0.0.1", "::ffff:0:0/96"] {
            assert_eq!(text.parse::<Cidr>(), Err(CidrError::Mapped), "{text}");
        }
    }

    #[test]
    fn any_parsed_network_is_parsed_back_from_its_text() {
        bolero::check!().for_each(|bytes: &[u8]| {
            let text = String::from_utf8_lossy(bytes);
            if let Ok(network) = text.parse::<Cidr>() {
                assert_eq!(network.to_string().parse(), Ok(network), "{text}");
            }
        });
    }

    #[test]
    fn a_network_contains_exactly_its_addresses() {
        let cases = bolero::generator::produce::<(u32, u32, u8)>();
        bolero::check!()
            .with_generator(cases)
            .for_each(|&(a, b, bits)| {
                let bits = u32::from(bits % 33);
                let [a, b] = [a, b].map(std::net::Ipv4Addr::from);
                let network: Cidr = format!("{a}/{bits}").parse().unwrap();
                let mask = u32::MAX.checked_shl(32 - bits).unwrap_or(0);
                let same = (a.to_bits() ^ b.to_bits()) & mask == 0;
                assert_eq!(network.contains(b.into()), same, "{network} {b}");
                assert_eq!(network.contains(b.to_ipv6_mapped().into()), same);
            });
    }
}
