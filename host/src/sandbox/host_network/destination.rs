//! Destinations that guests may connect to: `HOST:PORT`, or `NAME:PORT/CIDR`.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

use ipnet::{Ipv4Net, Ipv6Net};

use crate::net::{Cidr, CidrError};

/// Addresses and one TCP port that guests may connect to.
#[derive(Clone, Debug, PartialEq)]
pub struct Destination {
    host: Host,
    port: u16,
}

#[derive(Clone, Debug, PartialEq)]
enum Host {
    /// A network. A single address is a network of one.
    Network(Cidr),
    Name {
        name: String,
        /// The network that the name may lead to. None allows all public addresses.
        within: Option<Cidr>,
    },
}

impl Destination {
    /// Whether this destination is a network with `address` in it. False for a name.
    pub(super) fn covers(&self, address: SocketAddr) -> bool {
        match &self.host {
            Host::Network(network) => self.port == address.port() && network.contains(address.ip()),
            Host::Name { .. } => false,
        }
    }

    /// The name in lower case. None for a network.
    pub(super) fn name(&self) -> Option<&str> {
        match &self.host {
            Host::Network(_) => None,
            Host::Name { name, .. } => Some(name),
        }
    }

    /// The socket address for `address`, to which the name was resolved.
    ///
    /// None if the name must not lead there. The owner of a name chooses its addresses, and must
    /// not get guests into networks that only this host can reach (DNS rebinding).
    pub(super) fn permit(&self, address: IpAddr) -> Option<SocketAddr> {
        let address = address.to_canonical();
        let allowed = match &self.host {
            Host::Network(_) => false,
            Host::Name { within, .. } => match within {
                Some(network) => network.contains(address),
                None => is_public(address),
            },
        };
        allowed.then_some(SocketAddr::new(address, self.port))
    }
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            Host::Network(network) if network.is_ipv6() => write!(f, "[{network}]")?,
            Host::Network(network) => write!(f, "{network}")?,
            Host::Name { name, .. } => write!(f, "{name}")?,
        }
        write!(f, ":{}", self.port)?;
        match &self.host {
            Host::Name {
                within: Some(network),
                ..
            } => write!(f, "/{network}"),
            _ => Ok(()),
        }
    }
}

/// Why a text is not a [`Destination`].
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
pub enum DestinationError {
    /// The text has no known form.
    #[error(
        "not HOST:PORT, such as db.example.com:5432, 192.0.2.7:5432, 10.0.0.0/8:5432 or [2001:db8::1]:5432"
    )]
    Form,
    /// The port is not a port number.
    #[error("the port is not a number from 1 to 65535")]
    Port,
    /// The host is not a valid name.
    #[error("the host is neither an address, nor a network, nor a name of letters, digits and -")]
    Name,
    /// The text after the port is not a network.
    #[error("the text after the port is not a network of the name, such as /10.0.0.0/8")]
    Network,
    /// A network follows the port of an address.
    #[error(
        "only a name may have a network after its port; write 10.0.0.0/8:5432 for all of a network"
    )]
    NetworkOfNetwork,
    /// An IPv4 address is written as an IPv6 address.
    #[error("an IPv4 address written as IPv6; write it as IPv4")]
    Mapped,
}

impl FromStr for Destination {
    type Err = DestinationError;

    fn from_str(text: &str) -> Result<Self, DestinationError> {
        let (host, rest, is_bracketed) = split_host(text).ok_or(DestinationError::Form)?;
        let (port, within) = match rest.split_once('/') {
            Some((port, network)) => (port, Some(network)),
            None => (rest, None),
        };
        let network = match host.parse::<Cidr>() {
            Ok(network) => Some(network),
            Err(CidrError::Mapped) => return Err(DestinationError::Mapped),
            Err(CidrError::Form) => None,
        };
        let is_ipv6 = network.is_some_and(|network| network.is_ipv6());
        if is_ipv6 != is_bracketed || port.contains(':') {
            return Err(DestinationError::Form);
        }
        let port = match port.parse() {
            // Rust's parser accepts a sign.
            Ok(number) if number > 0 && !port.starts_with('+') => number,
            _ => return Err(DestinationError::Port),
        };
        let host = match network {
            Some(_) if within.is_some() => return Err(DestinationError::NetworkOfNetwork),
            Some(network) => Host::Network(network),
            None => Host::Name {
                name: normalize_name(host)
                    .filter(|name| is_name(name))
                    .ok_or(DestinationError::Name)?,
                within: within
                    .map(str::parse)
                    .transpose()
                    .map_err(|error| match error {
                        CidrError::Form => DestinationError::Network,
                        CidrError::Mapped => DestinationError::Mapped,
                    })?,
            },
        };
        Ok(Self { host, port })
    }
}

/// Splits a text into its host and the rest after the colon.
///
/// True if the host is in brackets.
fn split_host(text: &str) -> Option<(&str, &str, bool)> {
    match text.strip_prefix('[') {
        Some(text) => {
            let (host, rest) = text.split_once(']')?;
            Some((host, rest.strip_prefix(':')?, true))
        }
        None => {
            let (host, rest) = text.split_once(':')?;
            Some((host, rest, false))
        }
    }
}

/// Normalizes a name for comparison.
///
/// The result is in lower case, without the dot of the root.
/// None if its length is invalid (RFC 1035, section 2.3.4).
pub(super) fn normalize_name(name: &str) -> Option<String> {
    let name = name.strip_suffix('.').unwrap_or(name);
    (1..=253)
        .contains(&name.len())
        .then(|| name.to_ascii_lowercase())
}

fn is_name(name: &str) -> bool {
    let is_label = |label: &str| {
        (1..=63).contains(&label.len())
            && label
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
    };
    // A name whose last label is a number is a mistyped address (RFC 1123, section 2.1).
    let is_number = |label: &str| label.bytes().all(|byte| byte.is_ascii_digit());
    name.split('.').all(is_label) && !name.rsplit('.').next().is_some_and(is_number)
}

/// IPv4 networks that a public name must not lead to.
///
/// IANA's registry of special-purpose addresses (RFC 6890 and its successors), and multicast. Such
/// a network is not reachable from the whole Internet, or relays to an address within the address.
const SPECIAL_V4: [Ipv4Net; 18] = [
    v4([0, 0, 0, 0], 8),
    v4([10, 0, 0, 0], 8),
    v4([100, 64, 0, 0], 10),
    v4([127, 0, 0, 0], 8),
    // The platform services of a cloud (Azure), reachable from its machines.
    v4([168, 63, 129, 16], 32),
    v4([169, 254, 0, 0], 16),
    v4([172, 16, 0, 0], 12),
    v4([192, 0, 0, 0], 24),
    v4([192, 0, 2, 0], 24),
    v4([192, 31, 196, 0], 24),
    v4([192, 52, 193, 0], 24),
    v4([192, 88, 99, 0], 24),
    v4([192, 168, 0, 0], 16),
    v4([192, 175, 48, 0], 24),
    v4([198, 18, 0, 0], 15),
    v4([198, 51, 100, 0], 24),
    v4([203, 0, 113, 0], 24),
    // Multicast, reserved and broadcast.
    v4([224, 0, 0, 0], 3),
];

const fn v4([a, b, c, d]: [u8; 4], prefix: u8) -> Ipv4Net {
    Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, d), prefix)
}

/// The allocated part of IPv6: global unicast addresses (RFC 4291, section 2.4).
const GLOBAL_UNICAST_V6: Ipv6Net = v6([0x2000, 0, 0], 3);

/// IPv6 networks within [`GLOBAL_UNICAST_V6`] that a public name must not lead to.
const SPECIAL_V6: [Ipv6Net; 5] = [
    v6([0x2001, 0, 0], 23),
    v6([0x2001, 0xdb8, 0], 32),
    v6([0x2002, 0, 0], 16),
    v6([0x2620, 0x4f, 0x8000], 48),
    v6([0x3fff, 0, 0], 20),
];

const fn v6([a, b, c]: [u16; 3], prefix: u8) -> Ipv6Net {
    Ipv6Net::new_assert(Ipv6Addr::new(a, b, c, 0, 0, 0, 0, 0), prefix)
}

fn is_public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => !SPECIAL_V4.iter().any(|special| special.contains(&address)),
        IpAddr::V6(address) => {
            GLOBAL_UNICAST_V6.contains(&address)
                && !SPECIAL_V6.iter().any(|special| special.contains(&address))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn destination(text: &str) -> Destination {
        text.parse()
            .unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn each_form_is_parsed_and_displayed() {
        for text in [
            "192.0.2.7:5432",
            "10.0.0.0/8:5432",
            "[2001:db8::1]:5432",
            "[fd00::/8]:5432",
            "db.example.com:5432",
            "db.internal:5432/10.0.0.0/8",
            "db:1/fd00::/8",
        ] {
            assert_eq!(destination(text).to_string(), text);
        }
        assert_eq!(
            destination("DB.Example.com.:1").to_string(),
            "db.example.com:1"
        );
        assert_eq!(destination("10.1.2.3/8:1").to_string(), "10.0.0.0/8:1");
    }

    #[test]
    fn invalid_texts_are_refused() {
        use DestinationError::{Form, Mapped, Name, Network, NetworkOfNetwork, Port};
        for (text, error) in [
            ("", Form),
            ("db", Form),
            ("2001:db8::1:5432", Form),
            ("[2001:db8::1]", Form),
            ("[db]:1", Form),
            ("db:", Port),
            ("db:0", Port),
            ("db:65536", Port),
            ("db:http", Port),
            ("db:+80", Port),
            (":1", Name),
            ("a b:1", Name),
            ("a..b:1", Name),
            ("300.1.2.3:1", Name),
            ("10.0.0.0/33:1", Name),
            ("db:1/", Network),
            ("db:1/10.0.0.0/33", Network),
            ("10.0.0.1:1/10.0.0.0/8", NetworkOfNetwork),
            ("[::ffff:10.0.0.1]:1", Mapped),
            ("db:1/::ffff:0:0/96", Mapped),
        ] {
            assert_eq!(text.parse::<Destination>(), Err(error), "{text}");
        }
    }

    #[test]
    fn a_displayed_destination_parses_to_the_same() {
        bolero::check!().for_each(|bytes: &[u8]| {
            let text = String::from_utf8_lossy(bytes);
            if let Ok(destination) = text.parse::<Destination>() {
                assert_eq!(destination.to_string().parse(), Ok(destination), "{text}");
            }
        });
        // Texts made of parts of destinations: more of them are valid.
        let parts = [
            "10.0.0.0", "fd00::", "db", "[", "]", ":", "/", ".", "8", "80", "-", "a",
        ];
        let words = bolero::generator::produce::<Vec<u8>>();
        bolero::check!().with_generator(words).for_each(|words| {
            let parts = words
                .iter()
                .map(|word| parts[usize::from(*word) % parts.len()]);
            let text: String = parts.take(12).collect();
            if let Ok(destination) = text.parse::<Destination>() {
                assert_eq!(destination.to_string().parse(), Ok(destination), "{text}");
            }
        });
    }

    #[test]
    fn a_name_never_leads_inside() {
        let anywhere = destination("db.example.com:80");
        let addresses = bolero::generator::produce::<(u32, u128)>();
        bolero::check!()
            .with_generator(addresses)
            .for_each(|&(v4, v6)| {
                let (v4, v6) = (Ipv4Addr::from(v4), Ipv6Addr::from(v6));
                let inside = v4.is_private()
                    || v4.is_loopback()
                    || v4.is_link_local()
                    || v4.is_multicast()
                    || v4.is_broadcast()
                    || v4.is_unspecified()
                    || v4.is_documentation();
                assert!(!inside || anywhere.permit(v4.into()).is_none(), "{v4}");
                assert_eq!(
                    anywhere.permit(v4.into()),
                    anywhere.permit(v4.to_ipv6_mapped().into())
                );
                let inside = v6.is_loopback()
                    || v6.is_multicast()
                    || v6.is_unique_local()
                    || v6.is_unicast_link_local()
                    || v6.is_unspecified();
                assert!(!inside || anywhere.permit(v6.into()).is_none(), "{v6}");
            });
    }

    #[test]
    fn a_network_covers_its_addresses_on_its_port() {
        let socket = |ip: &str, port| SocketAddr::new(address(ip), port);
        assert!(destination("192.0.2.7:80").covers(socket("192.0.2.7", 80)));
        assert!(destination("192.0.2.7:80").covers(socket("::ffff:192.0.2.7", 80)));
        assert!(!destination("192.0.2.7:80").covers(socket("192.0.2.7", 81)));
        assert!(!destination("192.0.2.7:80").covers(socket("192.0.2.8", 80)));
        assert!(destination("[fd00::/8]:80").covers(socket("fd12::1", 80)));
        assert!(!destination("[fd00::/8]:80").covers(socket("fe80::1", 80)));
        // A name covers no address without a lookup.
        assert!(!destination("localhost:80").covers(socket("127.0.0.1", 80)));
    }

    #[test]
    fn a_name_leads_to_public_addresses_or_its_network() {
        let anywhere = destination("db.example.com:80");
        for public in ["8.8.8.8", "100.63.255.255", "172.32.0.1", "2606:4700::1111"] {
            assert_eq!(
                anywhere.permit(address(public)),
                Some(SocketAddr::new(address(public), 80))
            );
        }
        for special in [
            "0.0.0.0",
            "10.1.2.3",
            "100.127.0.1",
            "127.0.0.1",
            "168.63.129.16",
            "169.254.169.254",
            "172.31.0.1",
            "192.168.0.1",
            "198.19.0.1",
            "224.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::ffff:10.0.0.1",
            "::ffff:127.0.0.1",
            "64:ff9b::a00:1",
            "fd00::1",
            "fe80::1",
            "ff02::1",
            "2001::1",
            "2001:db8::1",
            "2002:a00:1::",
            "3fff::1",
        ] {
            assert_eq!(anywhere.permit(address(special)), None, "{special}");
        }
        let inside = destination("db.internal:80/10.0.0.0/8");
        assert!(inside.permit(address("10.1.2.3")).is_some());
        assert!(inside.permit(address("::ffff:10.1.2.3")).is_some());
        assert!(inside.permit(address("127.0.0.1")).is_none());
        assert!(inside.permit(address("8.8.8.8")).is_none());
        assert!(
            destination("10.0.0.0/8:80")
                .permit(address("10.1.2.3"))
                .is_none()
        );
    }
}
