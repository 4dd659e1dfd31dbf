//! The header with which a proxy says whom it speaks for: the PROXY protocol, versions 1 and 2
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

/// Who is a proxy.
#[derive(Clone, Debug, PartialEq)]
pub struct TrustedProxies {
    /// From these networks each connection begins with a header. From all others none does: there what
    /// looks like one is the client's, like any other bytes.
    pub from: Vec<Cidr>,
}

impl TrustedProxies {
    /// Whether a connection of `peer` begins with a header.
    pub(super) fn contains(&self, peer: SocketAddr) -> bool {
        self.from.iter().any(|network| network.contains(peer.ip()))
    }
}

/// What a header says.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum ProxyHeader {
    /// The proxy speaks for this client, which connected to that address.
    Client(SocketAddr, SocketAddr),
    /// The proxy speaks for itself, or for somebody without an address of IP: version 1's `UNKNOWN`,
    /// version 2's `LOCAL` and other families of addresses.
    NoClient,
}

/// Why there is no header.
#[derive(Debug)]
pub(super) enum ProxyHeaderError {
    /// There was none before the end of the stream, nor anything else: how some proxies ask whether
    /// we are there.
    Nothing,
    /// The proxy closed in the middle of it, or was gone.
    Gone,
    /// What came instead is none, for this reason.
    Bad(String),
}

/// The longest header that is taken, in bytes. Version 2 can say much more about a client than its
/// address, such as its certificate's name, none of which is used: 4 KiB is what haproxy's own
/// buffers leave for it.
const MOST: usize = 4096;

/// As the protocol has it for version 1, with its end.
const MOST_OF_V1: usize = 107;

/// How many bytes a header has.
#[derive(Debug, PartialEq)]
enum Extent {
    /// So many.
    Of(usize),
    /// More than there are.
    More,
}

/// Looks for the end of the header that `bytes` begin with.
fn extent(bytes: &[u8]) -> Result<Extent, String> {
    let begins_with = |prefix: &[u8]| {
        let n = prefix.len().min(bytes.len());
        bytes[..n] == prefix[..n]
    };
    if begins_with(v2::PROTOCOL_PREFIX) {
        let &[.., high, low] = bytes.get(..16).unwrap_or_default() else {
            return Ok(Extent::More);
        };
        let length = 16 + usize::from(u16::from_be_bytes([high, low]));
        return match length {
            _ if length > MOST => Err(format!("it has {length} bytes, above {MOST}")),
            _ if length > bytes.len() => Ok(Extent::More),
            _ => Ok(Extent::Of(length)),
        };
    }
    if begins_with(b"PROXY ") {
        let line = &bytes[..bytes.len().min(MOST_OF_V1)];
        return match line.windows(2).position(|end| end == b"\r\n") {
            Some(end) => Ok(Extent::Of(end + 2)),
            None if bytes.len() >= MOST_OF_V1 => Err("its line has no end".into()),
            None => Ok(Extent::More),
        };
    }
    Err("there is none".into())
}

/// Reads a header that is there to its end.
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
    /// The version and the command of one that the proxy sends for itself: whatever follows is left out,
    /// the family of addresses as well.
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
        (v2::Protocol::Datagram, _) => return Err("it is about datagrams".into()),
        _ => ProxyHeader::NoClient,
    })
}

fn client(source: impl Into<SocketAddr>, destination: impl Into<SocketAddr>) -> ProxyHeader {
    ProxyHeader::Client(source.into(), destination.into())
}

/// Takes the header off the beginning of a connection, and nothing that follows it.
pub(super) async fn receive(socket: &mut Socket) -> Result<ProxyHeader, ProxyHeaderError> {
    let mut header = Vec::new();
    loop {
        let extent = poll_fn(|cx| {
            // What is longer comes in parts.
            let mut next = [0; 512];
            let n = ready!(socket.poll_peek(cx, &mut next)).map_err(gone)?;
            let before = header.len();
            header.extend_from_slice(&next[..n]);
            let extent = match n {
                0 if before == 0 => Err(ProxyHeaderError::Nothing),
                0 => Err(ProxyHeaderError::Gone),
                _ => extent(&header).map_err(ProxyHeaderError::Bad),
            }?;
            if let Extent::Of(length) = extent {
                header.truncate(length);
            }
            let taken = header.len() - before;
            socket.take(&mut next[..taken]).map_err(gone)?;
            Poll::Ready(Ok(extent))
        })
        .await?;
        if let Extent::Of(_) = extent {
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

    /// What is read of `bytes`, and how many of them are the header.
    fn read(bytes: &[u8]) -> Result<(ProxyHeader, usize), String> {
        match extent(bytes)? {
            Extent::Of(length) => Ok((parse(&bytes[..length])?, length)),
            Extent::More => Err("more".into()),
        }
    }

    #[test]
    fn each_form_is_read_to_its_end_and_no_further() {
        let ipv6 = [[0x20; 16], [0x30; 16]].concat();
        let v6 = SocketAddr::from(([0x2020; 8], 1));
        let to_v6 = SocketAddr::from(([0x3030; 8], 2));
        let with_more = [&IPV4[..], &[0x04, 0, 3, 1, 2, 3]].concat();
        for (header, says) in [
            (V1.to_vec(), expected()),
            (b"PROXY UNKNOWN\r\n".to_vec(), ProxyHeader::NoClient),
            (b"PROXY UNKNOWN ffff:: ffff:: 1 2\r\n".to_vec(), ProxyHeader::NoClient),
            (
                b"PROXY TCP6 2020:2020:2020:2020:2020:2020:2020:2020 3030:3030:3030:3030:3030:3030:3030:3030 1 2\r\n".to_vec(),
                ProxyHeader::Client(v6, to_v6),
            ),
            (v2(1, 0x11, &IPV4), expected()),
            (v2(1, 0x11, &with_more), expected()),
            (v2(1, 0x21, &[&ipv6[..], &[0, 1, 0, 2]].concat()), ProxyHeader::Client(v6, to_v6)),
            (v2(0, 0x11, &IPV4), ProxyHeader::NoClient),
            (v2(0, 0, &[]), ProxyHeader::NoClient),
            (v2(1, 0, b"whatever"), ProxyHeader::NoClient),
            (v2(1, 0x31, &[b'x'; 216]), ProxyHeader::NoClient),
        ] {
            let length = header.len();
            let followed = [&header[..], b"\r\n\r\nGET /"].concat();
            assert_eq!(read(&followed), Ok((says, length)), "{header:?}");
            for n in 1..length {
                assert_eq!(extent(&header[..n]), Ok(Extent::More), "{n} of {header:?}");
            }
        }
    }

    #[test]
    fn what_is_none_is_refused_as_soon_as_it_is_known() {
        let endless = [&b"PROXY TCP4 "[..], &[b'1'; MOST_OF_V1]].concat();
        for bytes in [
            &b"GET / HTTP/1.1"[..],
            b"\r\n\r\n\0\r\nQUIET",
            b"P.",
            b"\x16\x03\x01",
            &endless,
            &v2(1, 0x11, &[0; MOST]),
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
            assert_ne!(error, "more", "{bytes:?}");
        }
    }

    #[test]
    fn a_header_that_is_read_was_there_whole() {
        // Much of what is made up begins as headers do.
        let given = bolero::generator::produce::<(u8, Vec<u8>)>();
        bolero::check!()
            .with_generator(given)
            .for_each(|(kind, rest)| {
                let begin: &[u8] = match kind % 3 {
                    0 => v2::PROTOCOL_PREFIX,
                    1 => b"PROXY ",
                    _ => b"",
                };
                let bytes = [begin, rest].concat();
                match extent(&bytes) {
                    Ok(Extent::Of(length)) => {
                        assert!(length <= bytes.len().min(MOST));
                        let _ = parse(&bytes[..length]);
                        // It would have been asked for to this very byte.
                        assert_eq!(extent(&bytes[..length - 1]), Ok(Extent::More));
                    }
                    Ok(Extent::More) => assert!(bytes.len() < MOST),
                    Err(_) => {}
                }
            });
    }
}
