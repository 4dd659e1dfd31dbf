//! The connection as a stream of the futures crate.

use std::fmt;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::path::PathBuf;
use std::pin::Pin;
use std::task::{Context, Poll};

use futures::io::{AsyncBufRead, AsyncRead, AsyncWrite};

use crate::half::{ReadHalf, WriteHalf};
use crate::rt::Connection;
use crate::rt::bindings::wasinetd::tcp::types::SocketAddress;
use crate::tls::TlsInfo;

/// The client connection that the host passes to the handler.
///
/// The stream implements the I/O traits of the [futures] crate. [`AsyncBufRead`] adds `read_line`
/// and `lines`, and gives access to received bytes without a copy.
///
/// A write that returns has handed its bytes to the host; no flush is needed. A write waits while
/// the client does not read, and fails once the client is gone.
///
/// Dropping the stream does not end the connection. Returning from the handler does.
pub struct TcpStream {
    // The fields are leaked and go away with the instance. Dropping the writer would send FIN,
    // which tells the client that the answer is complete, even after an error. Dropping the others
    // would cost host calls and achieve nothing.
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

    /// Splits the stream into halves that can be used concurrently.
    pub fn into_split(self) -> (ReadHalf, WriteHalf) {
        (self.read, self.write)
    }

    /// The number of this connection in the host's log.
    pub fn id(&self) -> u64 {
        self.connection.id()
    }

    /// The client's address, over IP or a Unix socket.
    pub fn peer(&self) -> Address {
        self.connection.remote_address().into()
    }

    /// The address that the client connected to, over IP or a Unix socket.
    pub fn local(&self) -> Address {
        self.connection.local_address().into()
    }

    /// The client's IP address and port. See [`Self::peer`] for other transports.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::Unsupported`] when the client did not connect over IP.
    pub fn peer_addr(&self) -> io::Result<SocketAddr> {
        self.peer().ip()
    }

    /// The IP address and port that the client connected to. See [`Self::local`] for other
    /// transports.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::Unsupported`] when the client did not connect over IP.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.local().ip()
    }

    /// The TLS session, if the host terminates TLS for this connection (`--tls-cert`).
    ///
    /// The handler reads and writes plaintext. Reading reaches the end of the stream only after the
    /// client's `close_notify`. If the connection was closed without one, the last read fails,
    /// because the data may have been truncated on the way.
    ///
    /// ```no_run
    /// # fn example(stream: &wasinetd_guest::TcpStream) {
    /// if let Some(client) = stream.tls().and_then(|tls| tls.client_certificate) {
    ///     println!("authenticated as {}", client.subject);
    /// }
    /// # }
    /// ```
    pub fn tls(&self) -> Option<TlsInfo> {
        self.connection.tls().map(Into::into)
    }

    /// A handle that tells when to end the connection. It can be used beside the stream.
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

/// Tells a handler that the host is draining or has a newer guest version.
///
/// When a newer version of the guest has taken over, a protocol with long connections should end
/// the connection after the next exchange, so that the client reconnects to the new version. Idle
/// connections may stay open: the host waits up to `--max-old-version-age` for them.
///
/// While the host drains, it accepts no new connections. Idle connections should then close at
/// once, because the host resets any that are still open after `--drain-timeout`.
pub struct Drain {
    connection: &'static Connection,
}

impl Drain {
    /// Whether the host has begun to drain. Cheap enough to call once per exchange.
    pub fn has_begun(&self) -> bool {
        self.connection.is_draining()
    }

    /// Waits until the host begins to drain.
    pub async fn begun(&self) {
        self.connection.draining().await;
    }

    /// Whether a newer guest version has taken over or the host drains.
    ///
    /// Cheap enough to call once per exchange.
    pub fn is_replaced(&self) -> bool {
        self.connection.is_replaced()
    }

    /// Waits until a newer guest version has taken over or the host drains.
    pub async fn replaced(&self) {
        self.connection.replaced().await;
    }
}

/// The address of one end of a connection.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Address {
    /// The IP address and port of a TCP socket.
    Ip(SocketAddr),
    /// The path of a Unix socket. Client sockets are mostly unnamed and have none.
    Unix(Option<PathBuf>),
}

impl Address {
    /// The IP address and port, if this is a TCP address.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::Unsupported`] for a Unix socket.
    pub fn ip(&self) -> io::Result<SocketAddr> {
        match self {
            Self::Ip(address) => Ok(*address),
            Self::Unix(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }
}

/// Formats as `IP:PORT`, `unix:PATH` or, for an unnamed socket, `unix`.
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
