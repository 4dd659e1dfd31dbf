//! The header in which a proxy names its client: the PROXY protocol, versions 1 and 2
//! (<https://www.haproxy.org/download/3.2/doc/proxy-protocol.txt>).

mod outcome;

use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::task::{Poll, ready};

use ppp::{v1, v2};

use super::socket::Socket;
use crate::net::Cidr;
pub(super) use outcome::{HEADERS, HeaderOutcome};

/// The proxies whose headers are trusted.
#[derive(Clone, Debug, PartialEq)]
pub struct TrustedProxies {
    /// Networks of the proxies. Each connection from them begins with a header. Connections from
    /// elsewhere have none: bytes that look like a header are data of the client there.
    pub from: Vec<Cidr>,
}

impl TrustedProxies {
    /// Whether connections of `peer` begin with a header.
    pub(super) fn contains(&self, peer: SocketAddr) -> bool {
        self.from.iter().any(|network| network.contains(peer.ip()))
    }
}

/// The content of a header.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum ProxyHeader {
    /// The addresses of a client's connection to the proxy.
    Client {
        source: SocketAddr,
        destination: SocketAddr,
    },
    /// No client with an IP address: `UNKNOWN` in version 1; `LOCAL`, or another family of
    /// addresses, in version 2.
    NoClient,
}

/// Why there is no header.
#[derive(Debug)]
pub(super) enum ProxyHeaderError {
    /// The proxy closed the connection at once, as in a health check.
    Nothing,
    /// The connection ended within the header.
    Gone,
    /// The bytes are no header, for this reason.
    Bad(String),
}

/// The longest header to accept, in bytes.
///
/// Version 2 can say much more about a client than its addresses, such as the name in its
/// certificate. None of that is used. 4 KiB is what haproxy leaves for it in its own buffers.
const MAX_LENGTH: usize = 4096;

/// The longest header of version 1, with its line end.
const MAX_LENGTH_V1: usize = 107;

/// The length of a header.
#[derive(Debug, PartialEq)]
enum Extent {
    /// Its length in bytes.
    Complete(usize),
    /// The header goes on after the bytes at hand.
    Incomplete,
}

/// Finds the length of the header at the start of `bytes`.
fn extent(bytes: &[u8]) -> Result<Extent, String> {
    let begins_with = |prefix: &[u8]| {
        let n = prefix.len().min(bytes.len());
        bytes[..n] == prefix[..n]
    };
    if begins_with(v2::PROTOCOL_PREFIX) {
        let &[.., high, low] = bytes.get(..16).unwrap_or_default() else {
            return Ok(Extent::Incomplete);
        };
        let length = 16 + usize::from(u16::from_be_bytes([high, low]));
        return match length {
            _ if length > MAX_LENGTH => Err(format!(
                "a header of {length} bytes is longer than {MAX_LENGTH}"
            )),
            _ if length > bytes.len() => Ok(Extent::Incomplete),
            _ => Ok(Extent::Complete(length)),
        };
    }
    if begins_with(b"PROXY ") {
        let line = &bytes[..bytes.len().min(MAX_LENGTH_V1)];
        return match line.windows(2).position(|end| end == b"\r\n") {
            Some(end) => Ok(Extent::Complete(end + 2)),
            None if bytes.len() >= MAX_LENGTH_V1 => Err("the line of the header has no end".into()),
            None => Ok(Extent::Incomplete),
        };
    }
    Err("there is no header".into())
}

/// Parses a complete header.
fn parse(header: &[u8]) -> Result<ProxyHeader, String> {
    if header.starts_with(b"PROXY ") {
        let parsed = v1::Header::try_from(header).map_err(|error| error.to_string())?;
        return Ok(match parsed.addresses {
            v1::Addresses::Tcp4(ip) => client(
                (ip.source_address, ip.source_port),
                (ip.destination_address, ip.destination_port),
            ),
            v1::Addresses::Tcp6(ip) => client(
                (ip.source_address, ip.source_port),
                (ip.destination_address, ip.destination_port),
            ),
            v1::Addresses::Unknown => ProxyHeader::NoClient,
        });
    }
    /// Version 2 with the command `LOCAL`. The receiver must ignore the rest of such a header, the
    /// family of addresses included.
    const LOCAL: u8 = 0x20;
    if header.get(v2::PROTOCOL_PREFIX.len()) == Some(&LOCAL) {
        return Ok(ProxyHeader::NoClient);
    }
    let parsed = v2::Header::try_from(header).map_err(|error| error.to_string())?;
    Ok(match (parsed.protocol, parsed.addresses) {
        (v2::Protocol::Stream, v2::Addresses::IPv4(ip)) => client(
            (ip.source_address, ip.source_port),
            (ip.destination_address, ip.destination_port),
        ),
        (v2::Protocol::Stream, v2::Addresses::IPv6(ip)) => client(
            (ip.source_address, ip.source_port),
            (ip.destination_address, ip.destination_port),
        ),
        (v2::Protocol::Datagram, _) => return Err("the header is about datagrams".into()),
        _ => ProxyHeader::NoClient,
    })
}

fn client(source: impl Into<SocketAddr>, destination: impl Into<SocketAddr>) -> ProxyHeader {
    ProxyHeader::Client {
        source: source.into(),
        destination: destination.into(),
    }
}

/// Receives a header, and no byte of the data behind it.
pub(super) async fn receive(socket: &mut Socket) -> Result<ProxyHeader, ProxyHeaderError> {
    let mut header = Vec::new();
    loop {
        let extent = poll_fn(|cx| {
            // Longer headers are read in several rounds.
            let mut peeked = [0; 512];
            let n = ready!(socket.poll_peek(cx, &mut peeked)).map_err(gone)?;
            let before = header.len();
            header.extend_from_slice(&peeked[..n]);
            let extent = match n {
                0 if before == 0 => Err(ProxyHeaderError::Nothing),
                0 => Err(ProxyHeaderError::Gone),
                _ => extent(&header).map_err(ProxyHeaderError::Bad),
            }?;
            if let Extent::Complete(length) = extent {
                header.truncate(length);
            }
            let taken = header.len() - before;
            socket.receive_peeked(&mut peeked[..taken]).map_err(gone)?;
            Poll::Ready(Ok(extent))
        })
        .await?;
        if let Extent::Complete(_) = extent {
            return parse(&header).map_err(ProxyHeaderError::Bad);
        }
    }
}

fn gone(_: io::Error) -> ProxyHeaderError {
    ProxyHeaderError::Gone
}

#[cfg(test)]
mod tests {
    use super::*;

    const V1: &[u8] = b"PROXY TCP4 192.0.2.1 198.51.100.2 56324 443\r\n";

    fn v2(command: u8, family: u8, rest: &[u8]) -> Vec<u8> {
        let length = u16::try_from(rest.len()).unwrap().to_be_bytes();
        [
            v2::PROTOCOL_PREFIX,
            &[0x20 | command, family],
            &length,
            rest,
        ]
        .concat()
    }

    const IPV4: [u8; 12] = [192, 0, 2, 1, 198, 51, 100, 2, 0xdc, 0x04, 1, 0xbb];

    fn expected() -> ProxyHeader {
        client(([192, 0, 2, 1], 56324), ([198, 51, 100, 2], 443))
    }

    /// Parses the header at the start of `bytes`. Returns its length, too.
    fn read(bytes: &[u8]) -> Result<(ProxyHeader, usize), String> {
        match extent(bytes)? {
            Extent::Complete(length) => Ok((parse(&bytes[..length])?, length)),
            Extent::Incomplete => Err("incomplete".into()),
        }
    }

    #[test]
    fn each_form_is_parsed_to_its_end_and_no_further() {
        let ipv6 = [[0x20; 16], [0x30; 16]].concat();
        let v6 = SocketAddr::from(([0x2020; 8], 1));
        let to_v6 = SocketAddr::from(([0x3030; 8], 2));
        let with_extension = [&IPV4[..], &[0x04, 0, 3, 1, 2, 3]].concat();
        for (header, content) in [
            (V1.to_vec(), expected()),
            (b"PROXY UNKNOWN\r\n".to_vec(), ProxyHeader::NoClient),
            (b"PROXY UNKNOWN ffff:: ffff:: 1 2\r\n".to_vec(), ProxyHeader::NoClient),
            (
                b"PROXY TCP6 2020:2020:2020:2020:2020:2020:2020:2020 3030:3030:3030:3030:3030:3030:3030:3030 1 2\r\n".to_vec(),
                client(v6, to_v6),
            ),
            (v2(1, 0x11, &IPV4), expected()),
            (v2(1, 0x11, &with_extension), expected()),
            (v2(1, 0x21, &[&ipv6[..], &[0, 1, 0, 2]].concat()), client(v6, to_v6)),
            (v2(0, 0x11, &IPV4), ProxyHeader::NoClient),
            (v2(0, 0, &[]), ProxyHeader::NoClient),
            (v2(1, 0, b"whatever"), ProxyHeader::NoClient),
            (v2(1, 0x31, &[b'x'; 216]), ProxyHeader::NoClient),
        ] {
            let length = header.len();
            let with_data = [&header[..], b"\r\n\r\nGET /"].concat();
            assert_eq!(read(&with_data), Ok((content, length)), "{header:?}");
            for n in 1..length {
                assert_eq!(extent(&header[..n]), Ok(Extent::Incomplete), "{n} of {header:?}");
            }
        }
    }

    #[test]
    fn an_invalid_header_is_refused_as_early_as_possible() {
        let endless = [&b"PROXY TCP4 "[..], &[b'1'; MAX_LENGTH_V1]].concat();
        for bytes in [
            &b"GET / HTTP/1.1"[..],
            b"\r\n\r\n\0\r\nQUIET",
            b"P.",
            b"\x16\x03\x01",
            &endless,
            &v2(1, 0x11, &[0; MAX_LENGTH]),
            b"PROXY TCP4 192.0.2.1 198.51.100.2 056324 443\r\n",
            b"PROXY TCP4 192.0.2.1 198.51.100.2 65536 443\r\n",
            b"PROXY TCP4 2001:db8::1 198.51.100.2 1 2\r\n",
            b"PROXY UDP4 192.0.2.1 198.51.100.2 1 2\r\n",
            b"PROXY TCP4 192.0.2.1\r\n",
            b"PROXY \r\n",
            &v2(2, 0x11, &IPV4),
            &v2(1, 0x11, &IPV4[..11]),
            &v2(1, 0x12, &IPV4),
            &v2(1, 0x41, &IPV4),
        ] {
            let error = read(bytes).unwrap_err();
            assert_ne!(error, "incomplete", "{bytes:?}");
        }
    }

    #[test]
    fn a_parsed_header_was_complete() {
        // Most inputs begin like a header.
        let inputs = bolero::generator::produce::<(u8, Vec<u8>)>();
        bolero::check!()
            .with_generator(inputs)
            .for_each(|(kind, rest)| {
                let start: &[u8] = match kind % 3 {
                    0 => v2::PROTOCOL_PREFIX,
                    1 => b"PROXY ",
                    _ => b"",
                };
                let bytes = [start, rest].concat();
                match extent(&bytes) {
                    Ok(Extent::Complete(length)) => {
                        assert!(length <= bytes.len().min(MAX_LENGTH));
                        let _ = parse(&bytes[..length]);
                        // Without its last byte the header is incomplete.
                        assert_eq!(extent(&bytes[..length - 1]), Ok(Extent::Incomplete));
                    }
                    Ok(Extent::Incomplete) => assert!(bytes.len() < MAX_LENGTH),
                    Err(_) => {}
                }
            });
    }
}
