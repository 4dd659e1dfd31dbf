//! The connection as the futures crate sees a stream.

use std::cell::RefCell;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use futures::io::{AsyncRead, AsyncWrite};

use crate::half::{ReadHalf, WriteHalf};
use crate::rt::Connection;
use crate::rt::bindings::wasinetd::tcp::types::SocketAddress;

/// The connection that a handler is called with.
///
/// It reads and writes as any stream of the [futures] crate does.
/// What a write has accepted is on its way when it returns, and needs no flush. A write waits
/// while the client does not read, and fails once the client is gone.
///
/// Dropping it does not end the connection: returning from the handler does.
pub struct TcpStream {
    shared: Rc<Shared>,
}

struct Shared {
    connection: Rc<Connection>,
    read: RefCell<Option<ReadHalf>>,
    write: RefCell<Option<WriteHalf>>,
}

impl TcpStream {
    pub(crate) fn new(connection: Connection) -> Self {
        Self {
            shared: Rc::new(Shared {
                connection: Rc::new(connection),
                read: RefCell::default(),
                write: RefCell::default(),
            }),
        }
    }

    /// Another handle to the same connection.
    pub(crate) fn share(&self) -> Self {
        Self {
            shared: self.shared.clone(),
        }
    }

    /// The number by which the host's log names this connection.
    pub fn id(&self) -> u64 {
        self.shared.connection.id()
    }

    /// The address of the client.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::Unsupported`] when the client did not connect over IP.
    pub fn peer_addr(&self) -> io::Result<SocketAddr> {
        socket_addr(self.shared.connection.remote_address())
    }

    /// The address that the client connected to.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::Unsupported`] when the client did not connect over IP.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        socket_addr(self.shared.connection.local_address())
    }

    /// How to learn that the host is draining, for as long as the stream itself is in use.
    pub fn drain(&self) -> Drain {
        Drain {
            connection: self.shared.connection.clone(),
        }
    }

    /// Polls the receiving direction, which starts with the first call.
    fn poll_receive<T>(
        &self,
        cx: &mut Context<'_>,
        consume: impl FnOnce(&[u8]) -> (usize, T),
    ) -> Poll<io::Result<T>> {
        self.shared
            .read
            .borrow_mut()
            .get_or_insert_with(|| ReadHalf::new(self.shared.connection.clone()))
            .poll_read(cx, consume)
    }

    /// Polls the sending direction, which starts with the first call.
    fn poll_send<T>(&self, poll: impl FnOnce(&mut WriteHalf) -> T) -> T {
        poll(
            self.shared
                .write
                .borrow_mut()
                .get_or_insert_with(|| WriteHalf::new(&self.shared.connection)),
        )
    }
}

impl AsyncRead for TcpStream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        if buffer.is_empty() {
            return Poll::Ready(Ok(0));
        }
        self.poll_receive(cx, |received| {
            let n = received.len().min(buffer.len());
            buffer[..n].copy_from_slice(&received[..n]);
            (n, n)
        })
    }
}

impl AsyncWrite for TcpStream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_send(|write| write.poll_write(cx, bytes))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // Nothing is held back.
        Poll::Ready(Ok(()))
    }

    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_send(|write| write.poll_close(cx))
    }
}

/// Tells a handler that the host accepts no new connections and waits for the open ones to end.
///
/// A protocol that keeps connections open between exchanges should end them at the next pause: the
/// host waits only for so long (`--drain-timeout`).
pub struct Drain {
    connection: Rc<Connection>,
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
}

fn socket_addr(address: SocketAddress) -> io::Result<SocketAddr> {
    match address {
        SocketAddress::Ipv4(ip) => {
            let (a, b, c, d) = ip.address;
            Ok((Ipv4Addr::new(a, b, c, d), ip.port).into())
        }
        SocketAddress::Ipv6(ip) => {
            let (a, b, c, d, e, f, g, h) = ip.address;
            let address = Ipv6Addr::new(a, b, c, d, e, f, g, h);
            Ok(SocketAddrV6::new(address, ip.port, ip.flow_info, ip.scope_id).into())
        }
        SocketAddress::Unix(_) => Err(io::ErrorKind::Unsupported.into()),
    }
}
