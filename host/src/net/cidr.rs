//! Networks, as an operator writes them.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use ipnet::IpNet;

/// A network of IP addresses in CIDR notation (RFC 4632). An address is a network of one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cidr(IpNet);

impl Cidr {
    /// Whether it has this address in it. IPv4 addresses in the form of IPv6 ones are IPv4 addresses.
    pub fn contains(&self, address: IpAddr) -> bool {
        self.0.contains(&address.to_canonical())
    }

    /// Whether its addresses are of IPv6.
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

/// What is wrong with the text of a [`Network`].
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
pub enum CidrError {
    /// It is of no known form.
    #[error("not a network or an address, such as 192.0.2.0/24, 2001:db8::/32 or 192.0.2.1")]
    Form,
    /// Addresses are compared as IPv4 ones where they are: it would have none in it.
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
    fn each_form_is_read_and_written() {
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
    fn whatever_is_read_is_written_so_that_it_is_read_again() {
        bolero::check!().for_each(|bytes: &[u8]| {
            let text = String::from_utf8_lossy(bytes);
            if let Ok(network) = text.parse::<Cidr>() {
                assert_eq!(network.to_string().parse(), Ok(network), "{text}");
            }
        });
    }

    #[test]
    fn an_address_is_in_its_networks_and_in_no_others() {
        let given = bolero::generator::produce::<(u32, u32, u8)>();
        bolero::check!()
            .with_generator(given)
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
