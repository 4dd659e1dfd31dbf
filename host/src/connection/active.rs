//! A connection while a guest handles it: its stream, its limits and its accounting.

use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use opentelemetry::KeyValue;
use tracing::info;

use super::limits::{Activity, ConnectionLimits, LimitTimer};
use super::outcome::{EndedBy, Outcome};
use super::registry::ConnectionRecord;
use super::stream::MaybeTls;
use crate::limit::{Limit, LimitsHit};
use crate::net::{Peer, TransportAddress};
use crate::sandbox::{TlsInfo, Transport};
use crate::telemetry::counters::Named;
use crate::telemetry::spans::ConnectionSpan;

/// Time that a client has to close its side after the answer.
///
/// The bytes are those that it may still send.
/// Closing a socket while the client sends makes the kernel reset the connection, and a reset can
/// destroy an answer that the client has not read yet (RFC 9112, section 9.6). Arbitrary: several
/// round trips to the far side of the world, and one large socket buffer.
const LINGER: (Duration, usize) = (Duration::from_secs(2), 4 << 20);

/// A connection while a guest handles it.
///
/// Dropping it resets the connection, unless [`Self::finish`] has succeeded.
pub(super) struct ActiveConnection {
    record: Arc<ConnectionRecord>,
    stream: MaybeTls,
    /// The address that the client connected to, as a proxy reported it.
    local: Option<SocketAddr>,
    limits: ConnectionLimits,
    activity: Activity,
    /// A limit of bytes that the guest or the client exceeds.
    exceeded: Option<Limit>,
    /// Bytes that the kernel held for the client when last asked.
    unsent: Option<usize>,
    limits_hit: LimitsHit,
    /// An operation on the stream has failed: the client is gone.
    lost: bool,
    /// The client has closed its side.
    received_end: bool,
    /// We have closed our side.
    sent_end: bool,
    /// The call of the guest is over: its streams no longer end the connection.
    released: bool,
}

impl ActiveConnection {
    pub(super) fn new(
        stream: MaybeTls,
        local: Option<SocketAddr>,
        record: Arc<ConnectionRecord>,
    ) -> Self {
        Self {
            stream,
            local,
            limits: record.version.limits,
            activity: Activity::new(record.began),
            record,
            exceeded: None,
            unsent: None,
            limits_hit: LimitsHit::default(),
            lost: false,
            received_end: false,
            sent_end: false,
            released: false,
        }
    }

    /// Sends held data, then checks the limits. Call it whenever the guest waits.
    pub(super) fn poll_ended(
        &mut self,
        cx: &mut Context<'_>,
        timer: &mut LimitTimer,
    ) -> Poll<EndedBy> {
        self.push(cx);
        if let Poll::Ready(limit) = self.poll_limit(cx, timer) {
            return Poll::Ready(EndedBy::Limit(limit));
        }
        self.record.poll_end_reason(cx).map(EndedBy::Request)
    }

    /// Whether an error of the guest means that the client is gone.
    pub(super) fn is_client_gone(&self) -> bool {
        self.lost || self.stream.is_truncated()
    }

    /// The outcome of a connection that ended so.
    pub(super) fn outcome(&self, ended_by: EndedBy) -> Outcome {
        Outcome::new(ended_by, self.is_client_gone())
    }

    /// Sends the end of the stream, and finishes the connection.
    ///
    /// With TLS, a close_notify waits until the kernel has taken all data. Returns the limit or the
    /// request that comes first, if one does.
    pub(super) async fn finish(&mut self) -> Option<EndedBy> {
        if self.lost {
            if self.stream.is_broken() {
                // The client has to read the alert. An end without a close_notify looks like none.
                self.stream.socket().finish();
            }
            return None;
        }
        self.shutdown_sending();
        if self.stream.is_pushing() {
            let mut timer = LimitTimer::default();
            let ended_by = poll_fn(|cx| {
                let ended = self.poll_ended(cx, &mut timer);
                if self.lost || !self.stream.is_pushing() {
                    return Poll::Ready(None);
                }
                ended.map(Some)
            })
            .await;
            if self.lost || ended_by.is_some() {
                return ended_by;
            }
        }
        self.stream.socket().finish();
        None
    }

    /// Waits until the client has closed its side, for [`LINGER`] at most. The end was sent before.
    pub(super) async fn linger(&mut self) {
        if self.lost || self.received_end {
            return;
        }
        // Most clients close as soon as they have the answer. After one turn of all other tasks
        // that is known without a timer.
        tokio::task::yield_now().await;
        if self.stream.socket().is_at_end() {
            return;
        }
        tokio::select! {
            _ = self.stream.socket().discard(LINGER.1) => {}
            () = tokio::time::sleep(LINGER.0) => {}
            _ = poll_fn(|cx| self.record.poll_end_reason(cx)) => {}
        }
    }

    /// Counts and logs the end of the connection.
    pub(super) fn record_end(&mut self, outcome: &Outcome, duration: Duration) {
        if let Outcome::Limit(limit) = outcome {
            self.limits_hit.add(*limit);
        }
        self.log(outcome, duration);
        let version = &self.record.version;
        version.stats.end(outcome.kind());
        version.service_stats.add(duration, &self.record.usage);
        if let Some(spans) = &version.spans {
            spans.ended(self.span(outcome, duration));
        }
    }

    fn push(&mut self, cx: &mut Context<'_>) {
        let (moved, pushed) = self.stream.poll_push(cx);
        if moved {
            self.activity.sent(Instant::now());
        }
        match pushed {
            Poll::Ready(result) => {
                // The next write of the guest meets the error as well.
                let _ = self.note_error(result);
            }
            Poll::Pending => self.send_pending(),
        }
    }

    fn send_pending(&mut self) {
        if self.activity.send_pending() {
            self.unsent = Some(self.stream.unsent());
        }
    }

    /// Ready with the limit that ends the connection.
    fn poll_limit(&mut self, cx: &mut Context<'_>, timer: &mut LimitTimer) -> Poll<Limit> {
        if let Some(limit) = self.exceeded {
            return Poll::Ready(limit);
        }
        loop {
            let limit = ready!(timer.poll(cx, &self.activity, &self.limits));
            if self.is_exceeded(limit) {
                return Poll::Ready(limit);
            }
        }
    }

    /// Asks the kernel whether `limit` is really exceeded: the client may have been active since
    /// the last operation of the guest.
    fn is_exceeded(&mut self, limit: Limit) -> bool {
        match limit {
            // The guest may have cancelled its read, or does not read.
            Limit::FirstByteTimeout if self.stream.can_receive() => self.activity.can_receive(),
            // The guest may have cancelled its blocked write.
            Limit::WriteTimeout if self.stream.can_send() => self.activity.can_send(),
            // A slow client takes data from the kernel long after the guest has written it.
            Limit::WriteTimeout | Limit::IdleTimeout if self.has_acknowledged_more() => {
                self.activity.acknowledged(Instant::now());
            }
            _ => return true,
        }
        false
    }

    /// Whether the kernel holds less for the client than when last asked. The first time, whether
    /// it holds anything.
    fn has_acknowledged_more(&mut self) -> bool {
        let unsent = self.stream.unsent();
        let before = self.unsent.replace(unsent);
        before.map_or(unsent > 0, |before| unsent < before)
    }

    fn shutdown_sending(&mut self) {
        if !std::mem::replace(&mut self.sent_end, true) {
            self.stream.shutdown_sending();
        }
    }

    fn log(&self, outcome: &Outcome, duration: Duration) {
        let backtrace = match outcome {
            Outcome::Trap(trap) if !trap.backtrace.is_empty() => Some(trap.backtrace.join(" < ")),
            _ => None,
        };
        info!(
            id = self.record.id,
            peer = %self.record.peer,
            via = self.record.via.map(tracing::field::display),
            service = &*self.record.version.service,
            version = self.record.version.guest.digest().short(),
            tls = self.stream.tls().map(tracing::field::display),
            duration = ?duration,
            bytes_in = self.record.usage.received(),
            bytes_out = self.record.usage.sent(),
            outcome = %outcome,
            limit = self.limits_hit.names(),
            backtrace,
            "connection ended"
        );
    }

    /// The span of the connection, with OpenTelemetry's names for attributes.
    fn span(&self, outcome: &Outcome, duration: Duration) -> ConnectionSpan {
        let usage = &self.record.usage;
        let outcome_name = outcome.kind().name();
        let version = &self.record.version;
        let mut attributes = peer_attributes(self.record.peer);
        attributes.extend([
            KeyValue::new("wasinetd.connection", self.record.id as i64),
            KeyValue::new("wasinetd.service", version.service.to_string()),
            KeyValue::new("wasinetd.version", version.guest.digest().to_string()),
            KeyValue::new("wasinetd.outcome", outcome_name),
            KeyValue::new("wasinetd.received", usage.received() as i64),
            KeyValue::new("wasinetd.sent", usage.sent() as i64),
            KeyValue::new("wasinetd.cpu", usage.computed().as_secs_f64()),
            KeyValue::new("wasinetd.memory", usage.memory() as i64),
        ]);
        if let Some(tls) = self.stream.tls() {
            attributes.push(KeyValue::new("tls.protocol.version", tls.version.clone()));
            let name = tls.server_name.clone();
            attributes.extend(name.map(|name| KeyValue::new("tls.client.server_name", name)));
        }
        let via = self.record.via.map(|via| via.ip().to_string());
        attributes.extend(via.map(|via| KeyValue::new("network.peer.address", via)));
        let limits = self.limits_hit.names();
        attributes.extend(limits.map(|names| KeyValue::new("wasinetd.limits", names)));
        ConnectionSpan {
            attributes,
            duration,
            instantiation: usage.instantiation(),
            wrong: (*outcome != Outcome::Ok).then_some(outcome_name),
        }
    }

    /// Accounts for a result of receiving.
    fn note_received(&mut self, result: io::Result<usize>) -> io::Result<usize> {
        if let Ok(n) = result {
            self.record.usage.add_received(n);
            self.received_end |= n == 0;
            self.activity.received(Instant::now());
        }
        if result.is_err() && self.stream.is_truncated() {
            // The client has closed its side without a close_notify, and still takes an answer.
            self.received_end = true;
            return result;
        }
        self.note_error(result)
    }

    /// Remembers that the client is gone if `result` is an error.
    fn note_error<T>(&mut self, result: io::Result<T>) -> io::Result<T> {
        self.lost |= result.is_err();
        if matches!(&result, Err(error) if error.kind() == io::ErrorKind::TimedOut) {
            // The other timeout of the kernel, of unacknowledged data, takes far longer.
            self.limits_hit.add(Limit::Keepalive);
        }
        result
    }
}

fn peer_attributes(peer: Peer) -> Vec<KeyValue> {
    match peer {
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
    }
}

impl Transport for ActiveConnection {
    fn id(&self) -> u64 {
        self.record.id
    }

    fn remote_address(&self) -> TransportAddress {
        match self.record.peer {
            Peer::Ip(address) => address.into(),
            // The kernel forgets the path of a client that is gone.
            Peer::Unix { .. } => self
                .stream
                .remote_address()
                .unwrap_or(TransportAddress::Unix(None)),
        }
    }

    fn local_address(&self) -> io::Result<TransportAddress> {
        match self.local {
            Some(local) => Ok(local.into()),
            None => self.stream.local_address(),
        }
    }

    fn tls(&self) -> Option<&TlsInfo> {
        self.stream.tls()
    }

    fn poll_receive(&mut self, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<io::Result<usize>> {
        let remaining = remaining(self.limits.bytes_in, self.record.usage.received());
        // At the limit the end of the stream may still come.
        let most = remaining.max(1).min(buf.len());
        match self.stream.poll_receive(cx, &mut buf[..most]) {
            Poll::Ready(Ok(1..)) if remaining == 0 => {
                self.exceeded = Some(Limit::MaxBytesIn);
                Poll::Pending
            }
            Poll::Ready(result) => Poll::Ready(self.note_received(result)),
            Poll::Pending => {
                self.activity.receive_pending();
                Poll::Pending
            }
        }
    }

    fn poll_receivable(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let receivable = self.stream.poll_receivable(cx);
        if receivable.is_pending() {
            self.activity.receive_pending();
        }
        receivable.map(|_| ())
    }

    fn poll_send(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let most = remaining(self.limits.bytes_out, self.record.usage.sent()).min(bytes.len());
        if most == 0 {
            self.exceeded = Some(Limit::MaxBytesOut);
            return Poll::Pending;
        }
        let Poll::Ready(result) = self.stream.poll_send(cx, &bytes[..most]) else {
            self.send_pending();
            return Poll::Pending;
        };
        if let Ok(n) = result {
            self.record.usage.add_sent(n);
            self.activity.sent(Instant::now());
        }
        Poll::Ready(self.note_error(result))
    }

    fn poll_sendable(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.stream.poll_sendable(cx).map(|_| ())
    }

    fn close_sending(&mut self) {
        // A panic may drop the streams of the guest before the connection is released. It must not
        // end the answer in order.
        if !self.released && !std::thread::panicking() {
            self.shutdown_sending();
        }
    }

    fn limit_hit(&mut self, limit: Limit) {
        self.limits_hit.add(limit);
    }

    fn release(&mut self) {
        self.released = true;
    }

    fn is_draining(&self) -> bool {
        self.record.version.lifecycle.is_draining()
    }

    fn draining(&self) -> BoxFuture<'static, ()> {
        let lifecycle = self.record.version.lifecycle.clone();
        Box::pin(async move { lifecycle.draining().await })
    }

    fn is_replaced(&self) -> bool {
        self.record.version.lifecycle.is_replaced()
    }

    fn replaced(&self) -> BoxFuture<'static, ()> {
        let lifecycle = self.record.version.lifecycle.clone();
        Box::pin(async move { lifecycle.replaced().await })
    }

    fn instantiated(&mut self, took: Duration) {
        self.record.usage.set_instantiation(took);
    }

    fn computed(&mut self, time: Duration) {
        self.record.usage.set_computed(time);
    }

    fn has_memory(&mut self, bytes: usize) {
        self.record.usage.set_memory(bytes);
    }
}

/// Bytes that may still be moved within a limit.
fn remaining(limit: Option<u64>, used: u64) -> usize {
    limit.map_or(usize::MAX, |limit| {
        usize::try_from(limit.saturating_sub(used)).unwrap_or(usize::MAX)
    })
}
