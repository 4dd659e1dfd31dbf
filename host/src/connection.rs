//! One connection, from `accept` to its line in the log.

mod counts;
mod limits;
mod socket;

use std::fmt;
use std::future::poll_fn;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use tracing::info;

use crate::lifecycle::Lifecycle;
use crate::limit::{Limit, Met};
use crate::listener::Accepted;
use crate::sandbox::{self, Guest, Transport};
pub use counts::Counts;
use counts::Kind;
pub use limits::Limits;
use limits::{Timer, Times};
use socket::Socket;

/// How long after the last byte of an answer the client may take to close its side, and how much
/// it may still send meanwhile.
///
/// Closing a socket while the client is sending makes the kernel reset the connection, which can
/// destroy an answer that the client has not read yet (RFC 9112, section 9.6). Arbitrary: a round
/// trip to the far side of the world, several times over, and a large socket buffer.
const LINGER: (Duration, usize) = (Duration::from_secs(2), 4 << 20);

/// What connections are served with.
pub struct Service {
    /// What is called for each.
    pub guest: Guest,
    /// What each may take.
    pub limits: Limits,
    /// Those that are left are reset when it ends.
    pub lifecycle: Lifecycle,
    /// What became of them.
    pub counts: Counts,
}

/// Serves one accepted connection in a fresh sandbox, and logs how it went.
///
/// The connection is reset when it meets one of its limits, or when the server ends before the guest
/// is done.
pub async fn handle(accepted: Accepted, service: Arc<Service>) {
    let started = Instant::now();
    let Service {
        guest,
        limits,
        lifecycle,
        counts,
    } = &*service;
    let _open = counts.begin();
    let Accepted {
        stream,
        peer,
        place,
    } = accepted;
    let connection = Connection::new(stream, peer, started, *limits, lifecycle.clone());
    let connection = Arc::new(Mutex::new(connection));
    let outcome = {
        let mut call = Box::pin(guest.handle(connection.clone()));
        let mut timer = Timer::default();
        let call = poll_fn(|cx| {
            let polled = call.as_mut().poll(cx);
            if polled.is_ready() {
                return polled.map(Ending::Guest);
            }
            let mut connection = lock(&connection);
            connection.socket.push();
            connection.poll_limit(cx, &mut timer).map(Ending::Limit)
        });
        let ending = tokio::select! {
            biased;
            ending = call => ending,
            () = lifecycle.ended() => Ending::Server,
        };
        Outcome::new(ending, lock(&connection).lost)
        // The sandbox is gone after this block: none is held by a client that takes its time to
        // close.
    };
    let mut connection = Arc::into_inner(connection)
        .expect("the sandbox that shared it is gone")
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner);
    let duration = started.elapsed();
    match outcome {
        Outcome::Ok => connection.close().await,
        // The client is not to take what it got for all.
        _ => connection.socket.reset_when_dropped(),
    }
    connection.log(&outcome, duration);
    counts.ended(
        outcome.kind(),
        duration,
        connection.bytes_in,
        connection.bytes_out,
    );
    // The socket first: a place that is free has no file open.
    drop(connection);
    drop(place);
}

/// Who ends a connection.
enum Ending {
    Guest(Result<(), sandbox::Failure>),
    Limit(Limit),
    Server,
}

/// How a connection ended, for the log.
#[derive(Debug, PartialEq)]
enum Outcome {
    Ok,
    /// The guest said so.
    GuestError(String),
    Trap(sandbox::Trap),
    /// The guest gave up because the client was gone.
    ClientGone,
    /// It met a limit.
    Limit(Limit),
    /// The server ended first.
    DrainTimeout,
    /// No sandbox could be made.
    NoSandbox(String),
}

impl Outcome {
    fn new(ending: Ending, client_lost: bool) -> Self {
        match ending {
            Ending::Guest(Ok(())) => Self::Ok,
            Ending::Guest(Err(sandbox::Failure::Guest(_))) if client_lost => Self::ClientGone,
            Ending::Guest(Err(sandbox::Failure::Guest(text))) => Self::GuestError(text),
            Ending::Guest(Err(sandbox::Failure::Trap(trap))) => Self::Trap(trap),
            Ending::Guest(Err(sandbox::Failure::NotStarted(reason))) => Self::NoSandbox(reason),
            Ending::Limit(limit) => Self::Limit(limit),
            Ending::Server => Self::DrainTimeout,
        }
    }
}

impl Outcome {
    /// As it is counted.
    fn kind(&self) -> Kind {
        match self {
            Self::Ok => Kind::Ok,
            Self::GuestError(_) => Kind::GuestError,
            Self::Trap(_) => Kind::Trap,
            Self::ClientGone => Kind::ClientGone,
            Self::Limit(_) => Kind::Limit,
            Self::DrainTimeout => Kind::DrainTimeout,
            Self::NoSandbox(_) => Kind::NoSandbox,
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ok => write!(f, "ok"),
            Self::GuestError(text) => write!(f, "guest error: {text}"),
            Self::Trap(trap) => write!(f, "trap: {}", trap.reason),
            Self::ClientGone => write!(f, "client gone"),
            Self::Limit(limit) => write!(f, "limit: {limit}"),
            Self::DrainTimeout => write!(f, "drain timeout"),
            Self::NoSandbox(reason) => write!(f, "no sandbox: {reason}"),
        }
    }
}

/// A socket with what is counted and remembered about it.
struct Connection {
    id: u64,
    socket: Socket,
    peer: SocketAddr,
    limits: Limits,
    times: Times,
    /// A limit of bytes that the guest or the client wants to go beyond.
    exceeded: Option<Limit>,
    /// What the kernel held for the client when it was last asked, in bytes.
    held: Option<usize>,
    met: Met,
    lifecycle: Lifecycle,
    bytes_in: u64,
    bytes_out: u64,
    /// The client is known to be gone.
    lost: bool,
    /// The client has closed its side.
    received_end: bool,
    /// We have closed ours.
    sent_end: bool,
    /// The guest is gone: what becomes of the connection is no longer up to it.
    released: bool,
}

impl Connection {
    fn new(
        stream: TcpStream,
        peer: SocketAddr,
        now: Instant,
        limits: Limits,
        lifecycle: Lifecycle,
    ) -> Self {
        static NEXT_ID: AtomicU64 = AtomicU64::new(1);
        Self {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            socket: Socket::new(stream),
            peer,
            limits,
            times: Times::new(now),
            exceeded: None,
            held: None,
            met: Met::default(),
            lifecycle,
            bytes_in: 0,
            bytes_out: 0,
            lost: false,
            received_end: false,
            sent_end: false,
            released: false,
        }
    }

    /// Closes in order: what was sent is delivered, then FIN.
    async fn close(&mut self) {
        if self.lost {
            return;
        }
        self.shutdown_sending();
        if self.received_end {
            return;
        }
        // A client that has its answer mostly closes its side at once. When everyone else has had a
        // turn that is known, and nothing has to be set up to wait for it.
        tokio::task::yield_now().await;
        if self.socket.is_at_end() {
            return;
        }
        tokio::select! {
            _ = self.socket.drain(LINGER.1) => {}
            () = tokio::time::sleep(LINGER.0) => {}
            () = self.lifecycle.ended() => {}
        }
    }

    /// Ready with a limit that the connection has met and ends for.
    fn poll_limit(&mut self, cx: &mut Context<'_>, timer: &mut Timer) -> Poll<Limit> {
        let limit = match self.exceeded {
            Some(limit) => limit,
            None => ready!(self.poll_time(cx, timer)),
        };
        self.met.add(limit);
        Poll::Ready(limit)
    }

    fn poll_time(&mut self, cx: &mut Context<'_>, timer: &mut Timer) -> Poll<Limit> {
        loop {
            let limit = ready!(timer.poll(cx, &self.times, &self.limits));
            if self.is_met(limit) {
                return Poll::Ready(limit);
            }
        }
    }

    /// Looks again at what `limit` is about. What is known of a client is what the kernel has said of
    /// late, and it may have done more since.
    fn is_met(&mut self, limit: Limit) -> bool {
        match limit {
            // The guest may have given up to read, or not have begun again.
            Limit::FirstByteTimeout if self.socket.can_receive() => self.times.can_receive(),
            // The guest may have given up a write that was stuck.
            Limit::WriteTimeout if self.socket.can_send() => self.times.can_send(),
            // A slow client takes what the kernel holds for it long after the guest has written it.
            Limit::WriteTimeout | Limit::IdleTimeout if self.client_takes() => {
                self.times.taken(Instant::now());
            }
            _ => return true,
        }
        false
    }

    /// Whether the kernel holds less for the client than when it was last asked. The first time,
    /// whether it holds anything.
    fn client_takes(&mut self) -> bool {
        let held = self.socket.unsent();
        let before = self.held.replace(held);
        before.map_or(held > 0, |before| held < before)
    }

    fn shutdown_sending(&mut self) {
        if !std::mem::replace(&mut self.sent_end, true) {
            self.socket.shutdown_sending();
        }
    }

    fn log(&self, outcome: &Outcome, duration: Duration) {
        let backtrace = match outcome {
            Outcome::Trap(trap) if !trap.backtrace.is_empty() => Some(trap.backtrace.join(" < ")),
            _ => None,
        };
        info!(
            id = self.id,
            peer = %self.peer,
            duration = ?duration,
            bytes_in = self.bytes_in,
            bytes_out = self.bytes_out,
            outcome = %outcome,
            limit = self.met.names(),
            backtrace,
            "connection ended"
        );
    }

    /// Counts what was received.
    fn received(&mut self, result: io::Result<usize>) -> io::Result<usize> {
        if let Ok(n) = result {
            self.bytes_in += n as u64;
            self.received_end |= n == 0;
            self.times.received(Instant::now());
        }
        self.note(result)
    }

    /// Remembers that the client is gone if `result` says so.
    fn note<T>(&mut self, result: io::Result<T>) -> io::Result<T> {
        self.lost |= result.is_err();
        if matches!(&result, Err(error) if error.kind() == io::ErrorKind::TimedOut) {
            // What else makes the kernel give up, data that nobody acknowledges, takes it far longer.
            self.met.add(Limit::Keepalive);
        }
        result
    }
}

impl Transport for Connection {
    fn id(&self) -> u64 {
        self.id
    }

    fn remote_address(&self) -> SocketAddr {
        self.peer
    }

    fn local_address(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    fn poll_receive(&mut self, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<io::Result<usize>> {
        let left = left(self.limits.bytes_in, self.bytes_in);
        // With nothing left, the end may still come.
        let most = left.max(1).min(buf.len());
        match self.socket.poll_receive(cx, &mut buf[..most]) {
            Poll::Ready(Ok(1..)) if left == 0 => {
                self.exceeded = Some(Limit::MaxBytesIn);
                Poll::Pending
            }
            Poll::Ready(result) => Poll::Ready(self.received(result)),
            Poll::Pending => {
                self.times.waits_to_receive();
                Poll::Pending
            }
        }
    }

    fn poll_receivable(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let receivable = self.socket.poll_receivable(cx);
        if receivable.is_pending() {
            self.times.waits_to_receive();
        }
        receivable.map(|_| ())
    }

    fn poll_send(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let most = left(self.limits.bytes_out, self.bytes_out).min(bytes.len());
        if most == 0 {
            self.exceeded = Some(Limit::MaxBytesOut);
            return Poll::Pending;
        }
        let Poll::Ready(result) = self.socket.poll_send(cx, &bytes[..most]) else {
            if self.times.waits_to_send() {
                self.held = Some(self.socket.unsent());
            }
            return Poll::Pending;
        };
        if let Ok(n) = result {
            self.bytes_out += n as u64;
            self.times.sent(Instant::now());
        }
        Poll::Ready(self.note(result))
    }

    fn poll_sendable(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.socket.poll_sendable(cx).map(|_| ())
    }

    fn close_sending(&mut self) {
        if !self.released {
            self.shutdown_sending();
        }
    }

    fn limited(&mut self, limit: Limit) {
        self.met.add(limit);
    }

    fn release(&mut self) {
        self.released = true;
    }

    fn is_draining(&self) -> bool {
        self.lifecycle.is_draining()
    }

    fn draining(&self) -> BoxFuture<'static, ()> {
        let lifecycle = self.lifecycle.clone();
        Box::pin(async move { lifecycle.draining().await })
    }
}

/// What is left of a limit of bytes.
fn left(limit: Option<u64>, used: u64) -> usize {
    limit.map_or(usize::MAX, |limit| {
        usize::try_from(limit.saturating_sub(used)).unwrap_or(usize::MAX)
    })
}

fn lock(connection: &Mutex<Connection>) -> MutexGuard<'_, Connection> {
    connection.lock().unwrap_or_else(PoisonError::into_inner)
}
