//! Listening sockets as one stream of accepted connections.

mod closing;

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures::Stream;
use futures::future::BoxFuture;
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Sleep;
use tokio_util::sync::PollSemaphore;
use tracing::{debug, info, warn};

use crate::Error;
use crate::lifecycle::Lifecycle;

/// The clients that the kernel keeps for us while we are full or busy. The kernel lowers it to
/// `net.core.somaxconn`, whose default is the same.
const BACKLOG: i32 = 4096;

/// How long to wait after a failed `accept`. A failure lasts (EMFILE, ENOBUFS) and would be met
/// again at once, at the cost of a whole core; the wait doubles up to the second figure.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(1));

/// An address that is ours. Clients are not answered before [`Bound::listen`].
pub struct Bound {
    address: SocketAddr,
    socket: Socket,
}

impl Bound {
    /// Takes an address.
    ///
    /// # Errors
    ///
    /// [`Error::Listen`] when it cannot be had.
    pub fn new(address: SocketAddr) -> Result<Self, Error> {
        bind(address)
            .map(|socket| Self { address, socket })
            .map_err(|error| cannot_listen(address, error))
    }

    /// Lets clients connect. To be called within a tokio runtime.
    ///
    /// # Errors
    ///
    /// [`Error::Listen`] when another server listens there.
    pub fn listen(self) -> Result<TcpListener, Error> {
        self.socket
            .listen(BACKLOG)
            .and_then(|()| TcpListener::from_std(self.socket.into()))
            .map_err(|error| cannot_listen(self.address, error))
    }
}

fn bind(address: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM,
        Some(Protocol::TCP),
    )?;
    socket.set_nonblocking(true)?;
    // A restart must not wait for the connections of its predecessor to be forgotten.
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        // Otherwise [::] would take the IPv4 addresses too, and 0.0.0.0 beside it would be refused.
        socket.set_only_v6(true)?;
    }
    // Linux hands it down to accepted sockets. Guests write whole messages; waiting for more
    // (Nagle, RFC 896) only delays them.
    socket.set_tcp_nodelay(true)?;
    socket.bind(&address.into())?;
    Ok(socket)
}

fn cannot_listen(address: SocketAddr, source: io::Error) -> Error {
    let fix = match source.kind() {
        io::ErrorKind::AddrInUse => {
            "stop the server that holds the port, or choose another one (port 0 takes any that is free)"
        }
        io::ErrorKind::PermissionDenied => {
            "choose a port above 1023, or grant CAP_NET_BIND_SERVICE"
        }
        io::ErrorKind::AddrNotAvailable => {
            "use an address of this machine, or 0.0.0.0 or [::] for all"
        }
        _ => "choose another address",
    };
    Error::Listen {
        address,
        source,
        fix,
    }
}

/// An accepted connection, and its place among those that may be open at once.
#[derive(Debug)]
pub struct Accepted {
    /// The socket.
    pub stream: TcpStream,
    /// The client.
    pub peer: SocketAddr,
    /// Given back when it is dropped.
    pub permit: OwnedSemaphorePermit,
}

/// The connections of all listeners, as a stream that outlives every error.
///
/// A permit is taken before `accept`, so that a full server leaves clients in the kernel's backlog.
/// One permit is waited for at a time, whatever the number of listeners: an idle one holds no place.
///
/// Once the server drains, the stream ends: without losing a client whose connection the kernel
/// has completed for us, because that client may have sent its request already.
pub struct Incoming {
    listeners: Vec<TcpListener>,
    /// The listener to ask first, so that a busy one does not starve the others.
    next: usize,
    permits: PollSemaphore,
    permit: Option<OwnedSemaphorePermit>,
    backoff: Option<Pin<Box<Sleep>>>,
    delay: Duration,
    phase: Phase,
    ended: BoxFuture<'static, ()>,
}

enum Phase {
    Serving(BoxFuture<'static, ()>),
    /// New handshakes are refused, those under way may complete.
    Closing(BoxFuture<'static, ()>),
    /// What is left in the backlog is the last.
    Sweeping,
    Closed,
}

impl Incoming {
    /// Accepts from `listeners`, at most `max_connections` at once, until `lifecycle` drains.
    pub fn new(listeners: Vec<TcpListener>, max_connections: usize, lifecycle: &Lifecycle) -> Self {
        let (draining, ended) = (lifecycle.clone(), lifecycle.clone());
        Self {
            listeners,
            next: 0,
            permits: PollSemaphore::new(Arc::new(Semaphore::new(max_connections))),
            permit: None,
            backoff: None,
            delay: BACKOFF.0,
            phase: Phase::Serving(Box::pin(async move { draining.draining().await })),
            ended: Box::pin(async move { ended.ended().await }),
        }
    }

    /// Asks each listener once. None when no client waits at any.
    fn poll_accept(&mut self, cx: &mut Context<'_>) -> Option<io::Result<(TcpStream, SocketAddr)>> {
        for _ in 0..self.listeners.len() {
            let listener = &self.listeners[self.next];
            self.next = (self.next + 1) % self.listeners.len();
            let accepted = match self.phase {
                // The reactor may not have seen yet what the kernel has: ask the kernel.
                Phase::Sweeping => accept_now(listener),
                _ => listener.poll_accept(cx),
            };
            if let Poll::Ready(result) = accepted {
                return Some(result);
            }
        }
        None
    }

    /// Moves on from the phases that end by themselves. It is asked first, and not only when nobody
    /// waits: a server that is full or busy has to stop as well.
    fn poll_phase(&mut self, cx: &mut Context<'_>) {
        if let Phase::Serving(draining) = &mut self.phase
            && draining.as_mut().poll(cx).is_ready()
        {
            self.listeners.iter().for_each(closing::refuse_handshakes);
            let addresses = self.listeners.iter().flat_map(TcpListener::local_addr);
            let ports = addresses.map(|address| address.port()).collect();
            self.phase = Phase::Closing(Box::pin(closing::handshakes_completed(ports)));
        }
        if let Phase::Closing(completed) = &mut self.phase
            && completed.as_mut().poll(cx).is_ready()
        {
            self.phase = Phase::Sweeping;
        }
        if self.ended.as_mut().poll(cx).is_ready() {
            self.phase = Phase::Closed;
        }
    }

    /// Waits before the next `accept` when the last one failed for a reason that lasts.
    fn failed(&mut self, error: &io::Error) {
        if is_clients_fault(error) {
            debug!(%error, "a client was gone before it was accepted");
            return;
        }
        warn!(%error, retry_in = ?self.delay, "cannot accept connections");
        self.backoff = Some(Box::pin(tokio::time::sleep(self.delay)));
        self.delay = (self.delay * 2).min(BACKOFF.1);
    }

    fn accepted(&mut self) {
        if self.delay > BACKOFF.0 {
            info!("accepting connections again");
            self.delay = BACKOFF.0;
        }
    }
}

impl Stream for Incoming {
    type Item = Accepted;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Accepted>> {
        let this = self.get_mut();
        this.poll_phase(cx);
        loop {
            if matches!(this.phase, Phase::Closed) {
                this.listeners.clear();
                return Poll::Ready(None);
            }
            if let Some(backoff) = &mut this.backoff {
                ready!(backoff.as_mut().poll(cx));
                this.backoff = None;
            }
            let permit = match this.permit.take() {
                Some(permit) => permit,
                None => ready!(this.permits.poll_acquire(cx)).expect("it is never closed"),
            };
            match this.poll_accept(cx) {
                Some(Ok((stream, peer))) => {
                    this.accepted();
                    return Poll::Ready(Some(Accepted {
                        stream,
                        peer,
                        permit,
                    }));
                }
                Some(Err(error)) => this.failed(&error),
                None if matches!(this.phase, Phase::Sweeping) => this.phase = Phase::Closed,
                None => {
                    this.permit = Some(permit);
                    return Poll::Pending;
                }
            }
        }
    }
}

/// Whether `error` is about one client only. Linux passes errors that a new connection already has
/// on through `accept` (accept(2), "Error handling").
fn is_clients_fault(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::Interrupted
    )
}

fn accept_now(listener: &TcpListener) -> Poll<io::Result<(TcpStream, SocketAddr)>> {
    let accept = || {
        let (socket, peer) = SockRef::from(listener).accept()?;
        socket.set_nonblocking(true)?;
        let peer = peer.as_socket().ok_or(io::ErrorKind::InvalidData)?;
        io::Result::Ok((TcpStream::from_std(socket.into())?, peer))
    };
    match accept() {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Poll::Pending,
        result => Poll::Ready(result),
    }
}
