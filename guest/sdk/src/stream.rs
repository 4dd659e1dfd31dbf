//! The connection as the futures crate sees a stream.

use std::fmt;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::path::PathBuf;
use std::pin::Pin;
use std::task::{Context, Poll};

use futures::io::{AsyncBufRead, AsyncRead, AsyncWrite};

use crate::TlsInfo;
use crate::half::{ReadHalf, WriteHalf};
use crate::rt::Connection;
use crate::rt::bindings::wasinetd::tcp::types::SocketAddress;

/// The connection that a handler is called with.
///
/// It reads and writes as any stream of the [futures] crate does; as an [`AsyncBufRead`] it has
/// `read_line` and `lines`, and lends what was received without a copy.
/// What a write has accepted is on its way when it returns, and needs no flush. A write waits
/// while the client does not read, and fails once the client is gone.
///
/// Dropping it does not end the connection: returning from the handler does.
pub struct TcpStream {
    // All of it is left where it is when the handler returns, and gone with the instance: to drop
    // the writing direction would tell the client that the answer is complete (FIN), which after an
    // error it is not, and to drop the rest would be calls of the host for nothing.
    connection: &'static Connection,
    read: ReadHalf,
    write: WriteHalf,
}

impl TcpStream {
    pub(crate) fn new(connection: Connection) -> Self {
        let connection: &'static Connection = Box::leak(Box::new(connection));
        Self {
            connection,
            read: ReadHalf::new(connection),
            write: WriteHalf::new(connection),
        }
    }

    /// The two directions, to be used side by side.
    pub fn into_split(self) -> (ReadHalf, WriteHalf) {
        (self.read, self.write)
    }

    /// The number by which the host's log names this connection.
    pub fn id(&self) -> u64 {
        self.connection.id()
    }

    /// Where the client has connected from, over whichever transport.
    pub fn peer(&self) -> Address {
        self.connection.remote_address().into()
    }

    /// Where the client has connected to, over whichever transport.
    pub fn local(&self) -> Address {
        self.connection.local_address().into()
    }

    /// The address of the client, of one that has connected over IP. See [`Self::peer`] for others.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::Unsupported`] when the client did not connect over IP.
    pub fn peer_addr(&self) -> io::Result<SocketAddr> {
        self.peer().ip()
    }

    /// The address that the client connected to over IP. See [`Self::local`] for others.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::Unsupported`] when the client did not connect over IP.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.local().ip()
    }

    /// What is known of TLS, if the host speaks it with the client (`--tls-cert`). What is read and
    /// written here is within.
    ///
    /// Reading ends in order only if the client said by TLS that it is at its end. If it just closed, or
    /// somebody on the way did, the last read is an error, for what came may be cut short.
    ///
    /// ```no_run
    /// # fn example(stream: &wasinetd_guest::TcpStream) {
    /// if let Some(client) = stream.tls().and_then(|tls| tls.client_certificate) {
    ///     println!("this is {}", client.subject);
    /// }
    /// # }
    /// ```
    pub fn tls(&self) -> Option<TlsInfo> {
        self.connection.tls().map(Into::into)
    }

    /// How to learn that the host is draining, for as long as the stream itself is in use.
    pub fn drain(&self) -> Drain {
        Drain {
            connection: self.connection,
        }
    }
}

impl AsyncBufRead for TcpStream {
    fn poll_fill_buf(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<&[u8]>> {
        Pin::new(&mut self.get_mut().read).poll_fill_buf(cx)
    }

    fn consume(mut self: Pin<&mut Self>, n: usize) {
        Pin::new(&mut self.read).consume(n);
    }
}

impl AsyncRead for TcpStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.read).poll_read(cx, buffer)
    }
}

impl AsyncWrite for TcpStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.write).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.write).poll_flush(cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.write).poll_close(cx)
    }
}

/// Tells a handler that its connection is waited for, and how urgently.
///
/// When a newer version of the guest has taken over, a protocol that keeps connections open should
/// make the next exchange the last, so that the client connects again. An idle connection may be kept:
/// the host waits for long (`--max-old-version-age`).
///
/// When the host drains, it accepts no new connections, and idle ones should end at once: it waits
/// only for so long (`--drain-timeout`).
pub struct Drain {
    connection: &'static Connection,
}

impl Drain {
    /// Whether the host has begun to drain. Cheap enough to ask once for each exchange.
    pub fn has_begun(&self) -> bool {
        self.connection.is_draining()
    }

    /// Waits until the host begins to drain.
    pub async fn begun(&self) {
        self.connection.draining().await;
    }

    /// Whether a newer version of the guest has taken over, or the host has begun to drain. Cheap
    /// enough to ask once for each exchange.
    pub fn is_replaced(&self) -> bool {
        self.connection.is_replaced()
    }

    /// Waits until a newer version of the guest has taken over, or the host begins to drain.
    pub async fn replaced(&self) {
        self.connection.replaced().await;
    }
}

/// One end of a connection.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Address {
    /// Of a TCP connection.
    Ip(SocketAddr),
    /// Of a Unix socket, with its path unless it has none: clients mostly have none.
    Unix(Option<PathBuf>),
}

impl Address {
    /// The address of a TCP connection.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::Unsupported`] when it is none.
    pub fn ip(&self) -> io::Result<SocketAddr> {
        match self {
            Self::Ip(address) => Ok(*address),
            Self::Unix(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }
}

/// An address and a port, `unix:PATH`, or `unix`.
impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(address) => address.fmt(f),
            Self::Unix(Some(path)) => write!(f, "unix:{}", path.display()),
            Self::Unix(None) => f.write_str("unix"),
        }
    }
}

impl From<SocketAddress> for Address {
    fn from(address: SocketAddress) -> Self {
        match address {
            SocketAddress::Ipv4(ip) => {
                let (a, b, c, d) = ip.address;
                Self::Ip((Ipv4Addr::new(a, b, c, d), ip.port).into())
            }
            SocketAddress::Ipv6(ip) => {
                let (a, b, c, d, e, f, g, h) = ip.address;
                let address = Ipv6Addr::new(a, b, c, d, e, f, g, h);
                let address = SocketAddrV6::new(address, ip.port, ip.flow_info, ip.scope_id);
                Self::Ip(address.into())
            }
            SocketAddress::Unix(path) => Self::Unix(path.map(PathBuf::from)),
        }
    }
}
