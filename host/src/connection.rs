//! One connection, from `accept` to its line in the log.

mod handshake;
mod limits;
mod proxy_header;
mod registry;
mod socket;
mod stats;
mod stream;
pub mod tls;

use std::fmt;
use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use opentelemetry::KeyValue;
use tracing::info;

use crate::lifecycle::Lifecycle;
use crate::limit::{Limit, LimitsHit};
use crate::listener::Accepted;
use crate::net::Peer;
use crate::net::TransportAddress;
use crate::sandbox::{self, Guest, TlsInfo, Transport};
use crate::telemetry::spans::{ConnectionSpan, SpanSender};
use handshake::ReadyConnection;
pub use handshake::{Handshake, register};
pub use limits::ConnectionLimits;
use limits::{Activity, LimitTimer};
pub use proxy_header::TrustedProxies;
use registry::EndReason;
pub use registry::{ConnectionRecord, ConnectionRegistry, KillSwitch, Usage};
use stats::OutcomeKind;
pub use stats::{OUTCOMES, ServiceStats, VersionStats};
use stream::MaybeTls;

/// How long after the last byte of an answer the client may take to close its side, and how much
/// it may still send meanwhile.
///
/// Closing a socket while the client is sending makes the kernel reset the connection, which can
/// destroy an answer that the client has not read yet (RFC 9112, section 9.6). Arbitrary: a round
/// trip to the far side of the world, several times over, and a large socket buffer.
const LINGER: (Duration, usize) = (Duration::from_secs(2), 4 << 20);

/// A version of a service: what connections are served with that begin while it is the current one.
pub struct Version {
    /// The service.
    pub service: Arc<str>,
    /// What is called for each connection.
    pub guest: Arc<Guest>,
    /// What each may take.
    pub limits: ConnectionLimits,
    /// Says when there is a newer version, and when the server drains.
    pub lifecycle: Lifecycle,
    /// What became of them.
    pub counts: VersionStats,
    /// What those of the service took.
    pub measures: Arc<ServiceStats>,
    /// Where they are listed while they are open.
    pub open: Arc<ConnectionRegistry>,
    /// Whether those of the service are to end at once.
    pub cutoff: Arc<KillSwitch>,
    /// Where it is told how they went, if anywhere.
    pub spans: Option<Arc<SpanSender>>,
}

/// Leads the clients of a listener to what they are served with.
pub trait Route: Send + Sync + 'static {
    /// What is done with a connection before a guest has it.
    fn front(&self) -> &Handshake;

    /// What it is served with, by the name that the client has for the server, if it has said one.
    fn version(&self, server_name: Option<&str>) -> Arc<Version>;
}

/// Does with an accepted connection what is to be done before a guest has it, then serves it in a fresh
/// sandbox, and logs how it went.
pub fn handle<R: Route>(accepted: Accepted<Arc<R>>) -> impl Future<Output = ()> + Send + use<R> {
    // Boxed, and only where there is something to do: what others have is not to be larger for it.
    let begun = match accepted.route.front().applies_to(accepted.peer) {
        false => {
            let version = accepted.route.version(None);
            Ok((ReadyConnection::from(accepted), version))
        }
        true => Err(Box::pin(async move {
            let route = accepted.route.clone();
            let client = route.front().perform(accepted).await?;
            let tls = client.channel.tls();
            let version = route.version(tls.and_then(|tls| tls.server_name.as_deref()));
            Some((client, version))
        })),
    };
    async move {
        let begun = match begun {
            Ok(begun) => Some(begun),
            Err(meeting) => meeting.await,
        };
        if let Some((client, version)) = begun {
            serve(client, version).await;
        }
    }
}

/// Serves a client in a fresh sandbox.
///
/// The connection is reset when it meets one of its limits, or when it is told to end before the
/// guest is done.
async fn serve(client: ReadyConnection, version: Arc<Version>) {
    let ReadyConnection {
        channel,
        peer,
        via,
        local,
        place,
    } = client;
    let _counted = version.counts.begin();
    let entry = version
        .open
        .add(ConnectionRecord::new(peer, via, version.clone()));
    let connection = Connection::new(channel, local, entry.clone());
    let connection = Arc::new(Mutex::new(connection));
    let mut outcome = {
        let mut call = Box::pin(version.guest.handle(connection.clone()));
        let mut timer = LimitTimer::default();
        let ending = poll_fn(|cx| {
            if let Poll::Ready(result) = call.as_mut().poll(cx) {
                return Poll::Ready(EndedBy::Guest(result));
            }
            let mut connection = lock(&connection);
            connection.push(cx);
            if let Poll::Ready(limit) = connection.poll_limit(cx, &mut timer) {
                return Poll::Ready(EndedBy::Limit(limit));
            }
            entry.poll_end_reason(cx).map(EndedBy::Order)
        })
        .await;
        let connection = lock(&connection);
        Outcome::new(ending, connection.lost || connection.channel.is_truncated())
        // The sandbox is gone after this block: none is held by a client that takes its time to
        // close.
    };
    let mut connection = Arc::into_inner(connection)
        .expect("the sandbox that shared it is gone")
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner);
    if outcome == Outcome::Ok
        && let Some(ending) = connection.finish().await
    {
        outcome = Outcome::new(ending, connection.lost);
    }
    let duration = entry.began.elapsed();
    match outcome {
        Outcome::Ok => connection.close().await,
        // The client is not to take what it got for all.
        _ => connection.channel.socket().reset_when_dropped(),
    }
    if let Outcome::Limit(limit) = outcome {
        connection.met.add(limit);
    }
    connection.log(&outcome, duration);
    version.counts.end(outcome.kind());
    version.measures.add(duration, &entry.used);
    if let Some(spans) = &version.spans {
        spans.ended(connection.span(&outcome, duration));
    }
    // The socket first: a place that is free has no file open.
    drop(connection);
    drop(place);
}

/// Who ends a connection.
enum EndedBy {
    Guest(Result<(), sandbox::Failure>),
    Limit(Limit),
    Order(EndReason),
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
    /// An operator ended it.
    Killed,
    /// The server ended first.
    DrainTimeout,
    /// No sandbox could be made.
    NoSandbox(String),
}

impl Outcome {
    fn new(ending: EndedBy, client_lost: bool) -> Self {
        match ending {
            EndedBy::Guest(Ok(())) => Self::Ok,
            EndedBy::Guest(Err(sandbox::Failure::Guest(_))) if client_lost => Self::ClientGone,
            EndedBy::Guest(Err(sandbox::Failure::Guest(text))) => Self::GuestError(text),
            EndedBy::Guest(Err(sandbox::Failure::Trap(trap))) => Self::Trap(trap),
            EndedBy::Guest(Err(sandbox::Failure::NotStarted(reason))) => Self::NoSandbox(reason),
            EndedBy::Limit(limit) => Self::Limit(limit),
            EndedBy::Order(EndReason::Kill) => Self::Killed,
            EndedBy::Order(EndReason::TooOld) => Self::Limit(Limit::MaxOldVersionAge),
            EndedBy::Order(EndReason::ServerEnds) => Self::DrainTimeout,
        }
    }
}

impl Outcome {
    /// As it is counted.
    fn kind(&self) -> OutcomeKind {
        match self {
            Self::Ok => OutcomeKind::Ok,
            Self::GuestError(_) => OutcomeKind::GuestError,
            Self::Trap(_) => OutcomeKind::Trap,
            Self::ClientGone => OutcomeKind::ClientGone,
            Self::Limit(_) => OutcomeKind::Limit,
            Self::Killed => OutcomeKind::Killed,
            Self::DrainTimeout => OutcomeKind::DrainTimeout,
            Self::NoSandbox(_) => OutcomeKind::NoSandbox,
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
            Self::Killed => write!(f, "killed"),
            Self::DrainTimeout => write!(f, "drain timeout"),
            Self::NoSandbox(reason) => write!(f, "no sandbox: {reason}"),
        }
    }
}

/// A socket with what is counted and remembered about it.
struct Connection {
    entry: Arc<ConnectionRecord>,
    channel: MaybeTls,
    /// Where the client connected to, if that is not where the socket is.
    local: Option<SocketAddr>,
    limits: ConnectionLimits,
    times: Activity,
    /// A limit of bytes that the guest or the client wants to go beyond.
    exceeded: Option<Limit>,
    /// What the kernel held for the client when it was last asked, in bytes.
    held: Option<usize>,
    met: LimitsHit,
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
    fn new(channel: MaybeTls, local: Option<SocketAddr>, entry: Arc<ConnectionRecord>) -> Self {
        Self {
            channel,
            local,
            limits: entry.version.limits,
            times: Activity::new(entry.began),
            entry,
            exceeded: None,
            held: None,
            met: LimitsHit::default(),
            lost: false,
            received_end: false,
            sent_end: false,
            released: false,
        }
    }

    /// Sends what is held back. To be called when the guest waits.
    fn push(&mut self, cx: &mut Context<'_>) {
        let (moved, pushed) = self.channel.poll_push(cx);
        if moved {
            self.times.sent(Instant::now());
        }
        match pushed {
            Poll::Ready(result) => {
                // The guest's next write finds out as well.
                let _ = self.note(result);
            }
            Poll::Pending => self.waits_to_send(),
        }
    }

    fn waits_to_send(&mut self) {
        if self.times.waits_to_send() {
            self.held = Some(self.channel.unsent());
        }
    }

    /// Sends the end, with TLS after what the kernel has yet to take: some when it does not come to that.
    async fn finish(&mut self) -> Option<EndedBy> {
        if self.lost {
            return None;
        }
        self.channel.end_in_order();
        self.shutdown_sending();
        if !self.channel.is_pushing() {
            return None;
        }
        let entry = self.entry.clone();
        let mut timer = LimitTimer::default();
        poll_fn(|cx| {
            self.push(cx);
            if self.lost || !self.channel.is_pushing() {
                return Poll::Ready(None);
            }
            if let Poll::Ready(limit) = self.poll_limit(cx, &mut timer) {
                return Poll::Ready(Some(EndedBy::Limit(limit)));
            }
            entry
                .poll_end_reason(cx)
                .map(|order| Some(EndedBy::Order(order)))
        })
        .await
    }

    /// Closes in order: FIN was sent, and what the client still sends is waited for.
    async fn close(&mut self) {
        if self.lost || self.received_end {
            return;
        }
        // A client that has its answer mostly closes its side at once. When everyone else has had a
        // turn that is known, and nothing has to be set up to wait for it.
        tokio::task::yield_now().await;
        if self.channel.socket().is_at_end() {
            return;
        }
        tokio::select! {
            _ = self.channel.socket().drain(LINGER.1) => {}
            () = tokio::time::sleep(LINGER.0) => {}
            _ = poll_fn(|cx| self.entry.poll_end_reason(cx)) => {}
        }
    }

    /// Ready with a limit that the connection has met and ends for.
    fn poll_limit(&mut self, cx: &mut Context<'_>, timer: &mut LimitTimer) -> Poll<Limit> {
        match self.exceeded {
            Some(limit) => Poll::Ready(limit),
            None => self.poll_time(cx, timer),
        }
    }

    fn poll_time(&mut self, cx: &mut Context<'_>, timer: &mut LimitTimer) -> Poll<Limit> {
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
            Limit::FirstByteTimeout if self.channel.can_receive() => self.times.can_receive(),
            // The guest may have given up a write that was stuck.
            Limit::WriteTimeout if self.channel.can_send() => self.times.can_send(),
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
        let held = self.channel.unsent();
        let before = self.held.replace(held);
        before.map_or(held > 0, |before| held < before)
    }

    fn shutdown_sending(&mut self) {
        if !std::mem::replace(&mut self.sent_end, true) {
            self.channel.shutdown_sending();
        }
    }

    fn log(&self, outcome: &Outcome, duration: Duration) {
        let backtrace = match outcome {
            Outcome::Trap(trap) if !trap.backtrace.is_empty() => Some(trap.backtrace.join(" < ")),
            _ => None,
        };
        info!(
            id = self.entry.id,
            peer = %self.entry.peer,
            via = self.entry.via.map(tracing::field::display),
            service = &*self.entry.version.service,
            version = self.entry.version.guest.digest().short(),
            tls = self.channel.tls().map(tracing::field::display),
            duration = ?duration,
            bytes_in = self.entry.used.received(),
            bytes_out = self.entry.used.sent(),
            outcome = %outcome,
            limit = self.met.names(),
            backtrace,
            "connection ended"
        );
    }

    /// What is told of it elsewhere, under the names that OpenTelemetry has for it where there are any.
    fn span(&self, outcome: &Outcome, duration: Duration) -> ConnectionSpan {
        let used = &self.entry.used;
        let kind = OUTCOMES[outcome.kind() as usize];
        let of_version = &self.entry.version;
        let mut attributes = match self.entry.peer {
            Peer::Ip(address) => vec![
                KeyValue::new("network.transport", "tcp"),
                KeyValue::new("client.address", address.ip().to_string()),
                KeyValue::new("client.port", i64::from(address.port())),
            ],
            Peer::Unix { uid, pid } => vec![
                KeyValue::new("network.transport", "unix"),
                KeyValue::new("wasinetd.client.uid", i64::from(uid)),
                KeyValue::new("wasinetd.client.pid", i64::from(pid)),
            ],
        };
        attributes.extend([
            KeyValue::new("wasinetd.connection", self.entry.id as i64),
            KeyValue::new("wasinetd.service", of_version.service.to_string()),
            KeyValue::new("wasinetd.version", of_version.guest.digest().to_string()),
            KeyValue::new("wasinetd.outcome", kind),
            KeyValue::new("wasinetd.received", used.received() as i64),
            KeyValue::new("wasinetd.sent", used.sent() as i64),
            KeyValue::new("wasinetd.cpu", used.computed().as_secs_f64()),
            KeyValue::new("wasinetd.memory", used.memory() as i64),
        ]);
        if let Some(tls) = self.channel.tls() {
            attributes.push(KeyValue::new("tls.protocol.version", tls.version.clone()));
            let name = tls.server_name.clone();
            attributes.extend(name.map(|name| KeyValue::new("tls.client.server_name", name)));
        }
        let via = self.entry.via.map(|via| via.ip().to_string());
        attributes.extend(via.map(|via| KeyValue::new("network.peer.address", via)));
        attributes.extend(
            self.met
                .names()
                .map(|names| KeyValue::new("wasinetd.limits", names)),
        );
        ConnectionSpan {
            attributes,
            duration,
            instantiation: used.instantiation(),
            wrong: (*outcome != Outcome::Ok).then_some(kind),
        }
    }

    /// Counts what was received.
    fn received(&mut self, result: io::Result<usize>) -> io::Result<usize> {
        if let Ok(n) = result {
            self.entry.used.receive(n);
            self.received_end |= n == 0;
            self.times.received(Instant::now());
        }
        if result.is_err() && self.channel.is_truncated() {
            // It says no more, and not that this is all; it takes an answer all the same.
            self.received_end = true;
            return result;
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
        self.entry.id
    }

    fn remote_address(&self) -> TransportAddress {
        match self.entry.peer {
            Peer::Ip(address) => address.into(),
            // One that is gone has no path either.
            Peer::Unix { .. } => self
                .channel
                .remote_address()
                .unwrap_or(TransportAddress::Unix(None)),
        }
    }

    fn local_address(&self) -> io::Result<TransportAddress> {
        match self.local {
            Some(local) => Ok(local.into()),
            None => self.channel.local_address(),
        }
    }

    fn tls(&self) -> Option<&TlsInfo> {
        self.channel.tls()
    }

    fn poll_receive(&mut self, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<io::Result<usize>> {
        let left = left(self.limits.bytes_in, self.entry.used.received());
        // With nothing left, the end may still come.
        let most = left.max(1).min(buf.len());
        match self.channel.poll_receive(cx, &mut buf[..most]) {
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
        let receivable = self.channel.poll_receivable(cx);
        if receivable.is_pending() {
            self.times.waits_to_receive();
        }
        receivable.map(|_| ())
    }

    fn poll_send(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let most = left(self.limits.bytes_out, self.entry.used.sent()).min(bytes.len());
        if most == 0 {
            self.exceeded = Some(Limit::MaxBytesOut);
            return Poll::Pending;
        }
        let Poll::Ready(result) = self.channel.poll_send(cx, &bytes[..most]) else {
            self.waits_to_send();
            return Poll::Pending;
        };
        if let Ok(n) = result {
            self.entry.used.send(n);
            self.times.sent(Instant::now());
        }
        Poll::Ready(self.note(result))
    }

    fn poll_sendable(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.channel.poll_sendable(cx).map(|_| ())
    }

    fn close_sending(&mut self) {
        if !self.released {
            self.shutdown_sending();
        }
    }

    fn limit_hit(&mut self, limit: Limit) {
        self.met.add(limit);
    }

    fn release(&mut self) {
        self.released = true;
    }

    fn is_draining(&self) -> bool {
        self.entry.version.lifecycle.is_draining()
    }

    fn draining(&self) -> BoxFuture<'static, ()> {
        let lifecycle = self.entry.version.lifecycle.clone();
        Box::pin(async move { lifecycle.draining().await })
    }

    fn is_replaced(&self) -> bool {
        self.entry.version.lifecycle.is_replaced()
    }

    fn replaced(&self) -> BoxFuture<'static, ()> {
        let lifecycle = self.entry.version.lifecycle.clone();
        Box::pin(async move { lifecycle.replaced().await })
    }

    fn instantiated(&mut self, took: Duration) {
        self.entry.used.set_instantiation(took);
    }

    fn computed(&mut self, time: Duration) {
        self.entry.used.set_computed(time);
    }

    fn has_memory(&mut self, bytes: usize) {
        self.entry.used.set_memory(bytes);
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
