//! Listening sockets as one stream of accepted connections.

mod admission;
mod closing;

use std::io::{self, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::{Arc, LazyLock};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use futures::Stream;
use futures::future::BoxFuture;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::registry::Registry;
use rustix::io::Errno;
use rustix::net::{SocketFlags, acceptfrom_with};
use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Sleep;
use tokio_util::sync::PollSemaphore;
use tracing::{debug, info, warn};

use crate::Error;
use crate::lifecycle::Lifecycle;
use crate::limit::Limit;
pub use admission::{Admission, Prefix, PrefixError, Rules, SourcePlace};

/// The clients that the kernel keeps for us while we are full or busy. The kernel lowers it to
/// `net.core.somaxconn`, whose default is the same.
const BACKLOG: i32 = 4096;

/// How long to wait after a failed `accept`. A failure lasts (EMFILE, ENOBUFS) and would be met
/// again at once, at the cost of a whole core; the wait doubles up to the second figure.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(1));

/// An address that is ours. Clients are not answered before [`Bound::listen`].
pub struct Bound {
    address: SocketAddr,
    sockets: Vec<Socket>,
}

impl Bound {
    /// Takes an address, with a socket for each of `shards`: the kernel spreads clients over them.
    ///
    /// Clients from whom nothing comes for `keepalive` are asked by the kernel whether they are
    /// still there. One that is gone has its connection ended in twice that.
    ///
    /// # Errors
    ///
    /// [`Error::Listen`] when it cannot be had.
    pub fn new(
        address: SocketAddr,
        shards: usize,
        keepalive: Option<Duration>,
    ) -> Result<Self, Error> {
        bind_all(address, shards, keepalive)
            .map(|sockets| Self { address, sockets })
            .map_err(|error| cannot_listen(address, error))
    }

    /// Goes on with sockets that listen already, at `address` as it was asked for.
    pub fn adopt(address: SocketAddr, sockets: Vec<OwnedFd>) -> Self {
        let sockets = sockets.into_iter().map(Socket::from).collect();
        Self { address, sockets }
    }

    /// Lets clients connect.
    ///
    /// # Errors
    ///
    /// [`Error::Listen`] when another server listens there.
    pub fn listen(self) -> Result<Listening, Error> {
        self.sockets
            .iter()
            .try_for_each(|socket| socket.listen(BACKLOG))
            .and_then(|()| {
                let sockets: Vec<TcpListener> = self.sockets.into_iter().map(Into::into).collect();
                let address = sockets[0].local_addr()?;
                Ok(Listening { address, sockets })
            })
            .map_err(|error| cannot_listen(self.address, error))
    }
}

/// An address that clients can connect to.
pub struct Listening {
    /// With the port that was found where any was asked for.
    pub address: SocketAddr,
    /// One for each shard.
    sockets: Vec<TcpListener>,
}

impl Listening {
    /// Spreads the sockets of all addresses over `shards`. A server that has taken over from one with
    /// other shards has more or fewer of them.
    pub fn by_shard(listening: Vec<Self>, shards: usize) -> Vec<Vec<TcpListener>> {
        let mut spread: Vec<Vec<TcpListener>> = (0..shards).map(|_| Vec::new()).collect();
        for sockets in listening.into_iter().map(|one| one.sockets) {
            for (n, socket) in sockets.into_iter().enumerate() {
                spread[n % shards].push(socket);
            }
        }
        spread
    }

    /// The same sockets once more, to be handed over.
    ///
    /// # Errors
    ///
    /// Fails when the process has no more files.
    pub fn try_clone_sockets(&self) -> io::Result<Vec<OwnedFd>> {
        let sockets = self.sockets.iter();
        sockets
            .map(|socket| Ok(socket.try_clone()?.into()))
            .collect()
    }
}

fn bind_all(
    address: SocketAddr,
    shards: usize,
    keepalive: Option<Duration>,
) -> io::Result<Vec<Socket>> {
    // Sockets that share a port by SO_REUSEPORT would share it with those of another server of ours
    // that was started by mistake. The first one is bound without, and so meets any other.
    let first = bind(address, false, keepalive)?;
    if shards == 1 {
        return Ok(vec![first]);
    }
    let address = first.local_addr()?.as_socket().unwrap_or(address);
    (0..shards)
        .map(|_| bind(address, true, keepalive))
        .collect()
}

/// How often a client that does not answer is asked whether it is there.
const KEEPALIVE_PROBES: u32 = 4;

fn bind(address: SocketAddr, share_port: bool, keepalive: Option<Duration>) -> io::Result<Socket> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM,
        Some(Protocol::TCP),
    )?;
    socket.set_nonblocking(true)?;
    // A restart must not wait for the connections of its predecessor to be forgotten.
    socket.set_reuse_address(true)?;
    if share_port {
        socket.set_reuse_port(true)?;
    }
    if address.is_ipv6() {
        // Otherwise [::] would take the IPv4 addresses too, and 0.0.0.0 beside it would be refused.
        socket.set_only_v6(true)?;
    }
    // Linux hands it down to accepted sockets. Guests write whole messages; waiting for more
    // (Nagle, RFC 896) only delays them.
    socket.set_tcp_nodelay(true)?;
    if let Some(time) = keepalive {
        // So are these. The kernel counts in whole seconds (tcp(7)).
        let pause = Duration::from_secs((time / KEEPALIVE_PROBES).as_secs().max(1));
        let keepalive = TcpKeepalive::new()
            .with_time(time)
            .with_interval(pause)
            .with_retries(KEEPALIVE_PROBES);
        socket.set_tcp_keepalive(&keepalive)?;
    }
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

/// The places for connections, which all that accept share.
#[derive(Clone)]
pub struct Places(Arc<Semaphore>);

impl Places {
    /// Places for `max_connections` at once.
    pub fn new(max_connections: usize) -> Self {
        Self(Arc::new(Semaphore::new(max_connections)))
    }
}

/// An accepted connection, and its place among those that may be open at once.
pub struct Accepted {
    /// The socket, which does not block. It is not known to any runtime yet: where the connection
    /// is to be handled is not decided.
    pub stream: TcpStream,
    /// The client.
    pub peer: SocketAddr,
    /// Given back when it is dropped.
    pub place: Place,
}

/// A connection's place among all, and among those of its source.
///
/// The source's is given back first: whoever comes by the other is not to be refused for it.
pub struct Place {
    of_source: SourcePlace,
    _among_all: OwnedSemaphorePermit,
}

impl Place {
    /// Lets in the client that a proxy speaks for, or says which limit is in its way. To be called for
    /// the connections of proxies (see [`Rules::proxies`]) when it is known whom they are for.
    ///
    /// # Errors
    ///
    /// The limit. The connection is to be reset.
    pub fn admit(&mut self, client: IpAddr) -> Result<(), Limit> {
        self.of_source.admit(client)
    }
}

/// What becomes of clients while the server is full.
#[derive(Clone, Debug, PartialEq)]
pub enum WhenFull {
    /// They wait in the kernel's backlog.
    Wait,
    /// They are sent this, and their connection is closed.
    Close(Vec<u8>),
}

/// The connections of some listeners, as a stream that outlives every error.
///
/// A permit is taken before `accept`, so that a full server leaves clients in the kernel's backlog.
/// It is given back when no client waits: an idle listener holds no place that another could use.
///
/// Once the server drains, the stream ends: without losing a client whose connection the kernel
/// has completed for us, because that client may have sent its request already.
pub struct Incoming {
    listeners: Vec<AsyncFd<TcpListener>>,
    /// The listener to ask first, so that a busy one does not starve the others.
    next: usize,
    permits: PollSemaphore,
    places: Arc<Semaphore>,
    lifecycle: Lifecycle,
    when_full: WhenFull,
    admission: Admission,
    /// Leave to accept a client was taken, and none has come yet.
    has_turn: bool,
    refusals: Refusals,
    backoff: Option<Pin<Box<Sleep>>>,
    delay: Duration,
    phase: Phase,
    ended: BoxFuture<'static, ()>,
}

/// How often `accept` failed for a reason that lasts, since the process began.
static ACCEPT_ERRORS: LazyLock<Counter> = LazyLock::new(Counter::default);

/// Adds to `registry` what goes wrong with accepting.
pub fn register(registry: &mut Registry) {
    registry.register(
        "accept_errors",
        "How often accepting a connection failed for want of something",
        ACCEPT_ERRORS.clone(),
    );
}

/// How often accepting failed.
pub(crate) fn accept_errors() -> u64 {
    ACCEPT_ERRORS.get()
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
    /// Accepts from `listeners` whom `admission` lets in, at most as many at once as there are
    /// `places`, until `lifecycle` drains. To be called within the tokio runtime that it is to be
    /// polled in.
    ///
    /// # Errors
    ///
    /// [`Error::Internal`] when the system has no more files for the runtime.
    pub fn new(
        listeners: Vec<TcpListener>,
        places: Places,
        when_full: WhenFull,
        admission: Admission,
        lifecycle: &Lifecycle,
    ) -> Result<Self, Error> {
        let (draining, ended) = (lifecycle.clone(), lifecycle.clone());
        let listeners = listeners
            .into_iter()
            .map(watch)
            .collect::<Result<_, _>>()
            .map_err(|error| Error::internal("watching a listener", error))?;
        Ok(Self {
            listeners,
            next: 0,
            permits: PollSemaphore::new(places.0.clone()),
            places: places.0,
            lifecycle: lifecycle.clone(),
            when_full,
            admission,
            has_turn: false,
            refusals: Refusals::default(),
            backoff: None,
            delay: BACKOFF.0,
            phase: Phase::Serving(Box::pin(async move { draining.draining().await })),
            ended: Box::pin(async move { ended.ended().await }),
        })
    }

    /// Asks each listener once. None when no client waits at any.
    fn poll_accept(&mut self, cx: &mut Context<'_>) -> Option<io::Result<(TcpStream, SocketAddr)>> {
        for _ in 0..self.listeners.len() {
            let listener = &self.listeners[self.next];
            self.next = (self.next + 1) % self.listeners.len();
            let accepted = match self.phase {
                // The reactor may not have seen yet what the kernel has: ask the kernel.
                Phase::Sweeping => accept(listener.get_ref()),
                _ => poll_accept(listener, cx),
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
            if self.lifecycle.is_handed_over() {
                // Who waits is accepted by our successor, at the same sockets.
                self.phase = Phase::Closed;
                return;
            }
            let listeners = || self.listeners.iter().map(AsyncFd::get_ref);
            listeners().for_each(closing::refuse_handshakes);
            let addresses = listeners().flat_map(TcpListener::local_addr);
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
        ACCEPT_ERRORS.inc();
        warn!(%error, retry_in = ?self.delay, "cannot accept connections");
        self.backoff = Some(Box::pin(tokio::time::sleep(self.delay)));
        self.delay = (self.delay * 2).min(BACKOFF.1);
    }

    /// Ready when the next client may be accepted, as fast as clients are to be.
    fn poll_turn(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        while !self.has_turn {
            match self.admission.take_turn() {
                Ok(()) => self.has_turn = true,
                Err(wait) => {
                    self.refusals.hold_up(wait);
                    let pause = self.backoff.insert(Box::pin(tokio::time::sleep(wait)));
                    ready!(pause.as_mut().poll(cx));
                    self.backoff = None;
                }
            }
        }
        Poll::Ready(())
    }

    /// Tells a client that the server is full.
    fn close(&mut self, mut stream: &TcpStream, peer: SocketAddr) {
        if let WhenFull::Close(banner) = &self.when_full {
            // What the client has sent is taken: closing a socket with something unread resets it,
            // and the banner with it. Neither waits; a client that sends on may miss it.
            let _ = stream.read(&mut [0; 4096]);
            let _ = stream.write(banner);
            let _ = stream.shutdown(Shutdown::Write);
        }
        self.refusals.add(Limit::MaxConnections, peer);
    }

    fn accepted(&mut self) {
        if self.delay > BACKOFF.0 {
            info!("accepting connections again");
            self.delay = BACKOFF.0;
        }
    }
}

/// How many clients are refused in a turn, at most: to refuse costs little, and is not to take what
/// is left from those who are served.
const REFUSED: usize = 64;

impl Stream for Incoming {
    type Item = Accepted;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Accepted>> {
        let this = self.get_mut();
        this.poll_phase(cx);
        for _ in 0..REFUSED {
            if matches!(this.phase, Phase::Closed) {
                this.listeners.clear();
                return Poll::Ready(None);
            }
            if let Some(backoff) = &mut this.backoff {
                ready!(backoff.as_mut().poll(cx));
                this.backoff = None;
            }
            let permit = match this.when_full {
                WhenFull::Wait => {
                    let permit = ready!(this.permits.poll_acquire(cx));
                    Some(permit.expect("it is never closed"))
                }
                // Nobody stands in line for a place here: who has none is told so.
                WhenFull::Close(_) => this.places.clone().try_acquire_owned().ok(),
            };
            // The last ones are not held up: they are known, and soon reset.
            if !matches!(this.phase, Phase::Sweeping) {
                ready!(this.poll_turn(cx));
            }
            match this.poll_accept(cx) {
                Some(Ok((stream, peer))) => {
                    this.accepted();
                    this.has_turn = false;
                    let admitted = this.admission.admit(peer.ip());
                    match (admitted, permit) {
                        (Ok(of_source), Some(among_all)) => {
                            return Poll::Ready(Some(Accepted {
                                stream,
                                peer,
                                place: Place {
                                    of_source,
                                    _among_all: among_all,
                                },
                            }));
                        }
                        (Ok(_), None) => this.close(&stream, peer),
                        (Err(limit), _) => {
                            reset(&stream);
                            this.refusals.add(limit, peer);
                        }
                    }
                }
                Some(Err(error)) => this.failed(&error),
                None if matches!(this.phase, Phase::Sweeping) => this.phase = Phase::Closed,
                None => return Poll::Pending,
            }
        }
        // There may be more, after everyone else's turn.
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

/// Counts clients that are refused or held up, for a line in the log once in a while: a flood of
/// clients is not to become a flood of lines.
#[derive(Default)]
struct Refusals {
    last_line: Option<Instant>,
    since: u64,
}

/// The least time between two lines about refusals.
const BETWEEN_LINES: Duration = Duration::from_secs(1);

impl Refusals {
    /// A client is refused.
    fn add(&mut self, limit: Limit, peer: SocketAddr) {
        limit.count();
        self.since += 1;
        if self.is_line_due() {
            warn!(
                %limit,
                %peer,
                refused = self.since,
                "refused a client, the last of so many since the last such line"
            );
            self.since = 0;
        }
    }

    /// Clients have to wait, for they come too fast.
    fn hold_up(&mut self, wait: Duration) {
        Limit::AcceptRate.count();
        if self.is_line_due() {
            warn!(limit = %Limit::AcceptRate, ?wait, "clients come too fast: they wait");
        }
    }

    fn is_line_due(&mut self) -> bool {
        let due = self
            .last_line
            .is_none_or(|last| last.elapsed() >= BETWEEN_LINES);
        if due {
            self.last_line = Some(Instant::now());
        }
        due
    }
}

/// Makes the end of a client's connection a reset. It fails for no socket that is open.
fn reset(stream: &TcpStream) {
    let _ = SockRef::from(stream).set_linger(Some(Duration::ZERO));
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

fn watch(listener: TcpListener) -> io::Result<AsyncFd<TcpListener>> {
    // SAFETY: a `TcpListener` has the same file from its beginning to its end, and closes it only
    // when it is dropped, which `AsyncFd` does after it has ceased to watch it.
    let watched = unsafe { AsyncFd::register_with_interest(listener, Interest::READABLE) };
    watched.map_err(Into::into)
}

fn poll_accept(
    listener: &AsyncFd<TcpListener>,
    cx: &mut Context<'_>,
) -> Poll<io::Result<(TcpStream, SocketAddr)>> {
    loop {
        let mut ready = ready!(listener.poll_read_ready(cx))?;
        match accept(listener.get_ref()) {
            // The next round waits until it is ready again.
            Poll::Pending => ready.clear_ready(),
            result => return result,
        }
    }
}

/// Accepts a client that waits. Pending, without a waker, when there is none.
fn accept(listener: &TcpListener) -> Poll<io::Result<(TcpStream, SocketAddr)>> {
    match acceptfrom_with(listener, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC) {
        Ok((socket, peer)) => {
            let peer = peer.and_then(|peer| SocketAddr::try_from(peer).ok());
            Poll::Ready(match peer {
                Some(peer) => Ok((socket.into(), peer)),
                None => Err(io::ErrorKind::ConnectionAborted.into()),
            })
        }
        Err(Errno::WOULDBLOCK) => Poll::Pending,
        Err(error) => Poll::Ready(Err(error.into())),
    }
}
