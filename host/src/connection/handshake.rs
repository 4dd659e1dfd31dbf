//! What is done with a connection before a guest has it.
//!
//! Until then it has a place among all connections and nothing else: no sandbox, no version of a guest. Who
//! comes no further than this is in no list of connections; it is counted here.

use std::fmt;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::registry::Registry;
use tokio::time::timeout;
use tracing::{debug, warn};

use super::proxy_header::{self, ProxyHeader, ProxyHeaderError, TrustedProxies};
use super::socket::Socket;
use super::stream::MaybeTls;
use super::tls::{Refused, Tls};
use crate::lifecycle::Lifecycle;
use crate::limit::Limit;
use crate::listener::{AcceptPermit, Accepted};
use crate::net::Peer;

/// What is done with a connection before a guest has it. By default nothing is, which costs nothing.
#[derive(Clone)]
pub struct Handshake {
    /// Whose connections begin with a header that says whom they are for.
    pub proxy: Option<TrustedProxies>,
    /// How TLS is spoken with clients, if it is.
    pub tls: Option<Arc<Tls>>,
    /// How long all of this may take.
    pub timeout: Duration,
    /// When the server ends, so does what is under way here.
    pub lifecycle: Option<Lifecycle>,
}

impl Default for Handshake {
    /// The time is that of the command line, where it has its reason.
    fn default() -> Self {
        Self {
            proxy: None,
            tls: None,
            timeout: Duration::from_secs(10),
            lifecycle: None,
        }
    }
}

/// A client that a guest can have.
pub(super) struct ReadyConnection {
    pub(super) channel: MaybeTls,
    pub(super) peer: Peer,
    /// The proxy that speaks for it.
    pub(super) via: Option<SocketAddr>,
    /// Where it connected to, if that is not where the socket is.
    pub(super) local: Option<SocketAddr>,
    pub(super) place: AcceptPermit,
}

impl<T> From<Accepted<T>> for ReadyConnection {
    /// As it is when nothing is done before.
    fn from(accepted: Accepted<T>) -> Self {
        Self {
            channel: MaybeTls::Plain(Socket::new(accepted.stream)),
            peer: accepted.peer,
            via: None,
            local: None,
            place: accepted.permit,
        }
    }
}

/// How long a proxy may take to say or to close something after a header without a client, for it to
/// be a question whether we are there. A guest that speaks first is held up by so much then.
const GRACE: Duration = Duration::from_millis(50);

impl Handshake {
    /// Whether anything is to be done with connections of `peer`.
    pub(super) fn applies_to(&self, peer: Peer) -> bool {
        self.tls.is_some() || self.proxy_at(peer).is_some()
    }

    /// The address of a peer that is a proxy.
    fn proxy_at(&self, peer: Peer) -> Option<SocketAddr> {
        match (&self.proxy, peer) {
            (Some(proxy), Peer::Ip(address)) => proxy.is_at(address).then_some(address),
            _ => None,
        }
    }

    /// Does what is to be done. None if nothing came of it, which is counted and logged then.
    pub(super) async fn perform<T>(&self, accepted: Accepted<T>) -> Option<ReadyConnection> {
        let mut client = ReadyConnection::from(accepted);
        let mut stage = Stage::Header;
        let met = {
            let meeting = timeout(self.timeout, self.run_stages(&mut client, &mut stage));
            let ended = async {
                match &self.lifecycle {
                    Some(lifecycle) => lifecycle.clone().ended().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                met = meeting => met.ok(),
                () = ended => Some(Err(HandshakeFailure::ended())),
            }
        };
        let failure = match met {
            Some(Ok(())) => return Some(client),
            Some(Err(failure)) => failure,
            None => HandshakeFailure::timeout(stage),
        };
        failure.tell(&client);
        match failure.told {
            false => client.channel.socket().reset_when_dropped(),
            true => {
                // To close what has something unread would be a reset, which can destroy what the client
                // is told.
                let (time, most) = FAREWELL;
                let _ = timeout(time, client.channel.socket().drain(most)).await;
            }
        }
        None
    }

    async fn run_stages(
        &self,
        client: &mut ReadyConnection,
        stage: &mut Stage,
    ) -> Result<(), HandshakeFailure> {
        if let Some(proxy) = self.proxy_at(client.peer) {
            read_proxy_header(client, proxy).await?;
        }
        *stage = Stage::Handshake;
        let Some(tls) = &self.tls else {
            return Ok(());
        };
        let source = client.place.source();
        let hands = tls.shake_hands(&mut client.channel, source).await;
        hands.map_err(HandshakeFailure::handshake)?;
        HANDSHAKES.count(HandshakeOutcome::Ok as usize);
        Ok(())
    }
}

/// How far it has come.
#[derive(Clone, Copy)]
enum Stage {
    Header,
    Handshake,
}

/// How long a client that is told why there is no handshake may take to close, and what it may still
/// send: what it had on its way.
const FAREWELL: (Duration, usize) = (Duration::from_secs(1), 64 << 10);

/// Learns from the proxy at the other end whom it speaks for.
async fn read_proxy_header(
    client: &mut ReadyConnection,
    proxy: SocketAddr,
) -> Result<(), HandshakeFailure> {
    let header = proxy_header::receive(client.channel.socket()).await;
    let header = header.map_err(|none| match none {
        ProxyHeaderError::Nothing => HandshakeFailure::health_check(),
        ProxyHeaderError::Gone => {
            HandshakeFailure::header(HeaderOutcome::Gone, "the proxy is gone".into())
        }
        ProxyHeaderError::Bad(reason) => HandshakeFailure::header(HeaderOutcome::Bad, reason),
    })?;
    match header {
        // With version 1 haproxy speaks for itself as for a client, when it asks whether we are there.
        ProxyHeader::Client(peer, local) if !is_same(peer, proxy) => {
            client.via = Some(proxy);
            client.peer = peer.into();
            client.local = Some(local);
            HEADERS.count(HeaderOutcome::Client as usize);
            client
                .place
                .admit(peer.into())
                .map_err(HandshakeFailure::refused)
        }
        _ if timeout(GRACE, client.channel.socket().ends_now()).await == Ok(true) => {
            Err(HandshakeFailure::health_check())
        }
        _ => {
            HEADERS.count(HeaderOutcome::NoClient as usize);
            Ok(())
        }
    }
}

/// Whether two addresses are one, be it written as one of IPv6 that stands for one of IPv4.
fn is_same(one: SocketAddr, other: SocketAddr) -> bool {
    one.ip().to_canonical() == other.ip().to_canonical() && one.port() == other.port()
}

/// Why no guest has a client.
struct HandshakeFailure {
    /// What is said of all of its kind together.
    said: Option<&'static Said>,
    /// In the words of the metrics.
    outcome: &'static str,
    reason: String,
    /// The client was told so, and may read it.
    told: bool,
}

impl HandshakeFailure {
    fn handshake(refused: Refused) -> Self {
        let Refused {
            outcome,
            reason,
            told,
            said_nothing,
        } = refused;
        HANDSHAKES.count(outcome as usize);
        Self {
            said: (!said_nothing).then_some(&NO_HANDSHAKE),
            outcome: HandshakeOutcome::NAMES[outcome as usize],
            reason,
            told,
        }
    }

    fn header(outcome: HeaderOutcome, reason: String) -> Self {
        HEADERS.count(outcome as usize);
        Self {
            said: Some(&NO_HEADER),
            outcome: HeaderOutcome::NAMES[outcome as usize],
            reason,
            told: false,
        }
    }

    fn health_check() -> Self {
        HEADERS.count(HeaderOutcome::HealthCheck as usize);
        Self {
            said: None,
            outcome: HeaderOutcome::NAMES[HeaderOutcome::HealthCheck as usize],
            reason: "the proxy asked whether we are there".into(),
            told: false,
        }
    }

    fn timeout(stage: Stage) -> Self {
        Limit::HandshakeTimeout.count();
        let reason = "it took too long".into();
        match stage {
            Stage::Header => Self::header(HeaderOutcome::Timeout, reason),
            Stage::Handshake => Self::handshake(Refused {
                outcome: HandshakeOutcome::Timeout,
                reason,
                told: false,
                said_nothing: false,
            }),
        }
    }

    fn refused(limit: Limit) -> Self {
        limit.count();
        Self {
            said: Some(&REFUSED),
            outcome: limit.name(),
            reason: "it may not connect".into(),
            told: false,
        }
    }

    fn ended() -> Self {
        Self {
            said: None,
            outcome: "ended",
            reason: "the server ended first".into(),
            told: false,
        }
    }

    /// Logs it. A flood of clients is not to become a flood of lines.
    fn tell(&self, client: &ReadyConnection) {
        let Self {
            outcome, reason, ..
        } = self;
        let via = client.via.map(tracing::field::display);
        let peer = client.peer;
        let Some(said) = self.said else {
            debug!(%peer, via, outcome, reason, "no guest has this client");
            return;
        };
        if let Some(since) = said.is_due() {
            warn!(%peer, via, outcome, reason, since, "{}", said.text);
        }
    }
}

/// What is logged once in a while of what may happen often.
struct Said {
    text: &'static str,
    /// When it was said last, and how often it has happened since.
    last: Mutex<(Option<Instant>, u64)>,
}

/// The least time between two lines of one kind.
const BETWEEN_LINES: Duration = Duration::from_secs(1);

impl Said {
    const fn new(text: &'static str) -> Self {
        Self {
            text,
            last: Mutex::new((None, 0)),
        }
    }

    /// It has happened once more. How often it has since it was said last, if it is to be said now.
    fn is_due(&self) -> Option<u64> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let (when, since) = &mut *last;
        *since += 1;
        if when.is_some_and(|when| when.elapsed() < BETWEEN_LINES) {
            return None;
        }
        *when = Some(Instant::now());
        Some(std::mem::take(since))
    }
}

static NO_HEADER: Said =
    Said::new("a proxy sent no good header, the last of so many since the last such line");

static NO_HANDSHAKE: Said =
    Said::new("a TLS handshake came to nothing, the last of so many since the last such line");

static REFUSED: Said =
    Said::new("refused a client of a proxy, the last of so many since the last such line");

/// What came of the header of a proxy.
#[derive(Clone, Copy)]
enum HeaderOutcome {
    Client,
    NoClient,
    HealthCheck,
    Bad,
    Timeout,
    Gone,
}

impl HeaderOutcome {
    const NAMES: [&str; 6] = [
        "client",
        "no_client",
        "health_check",
        "bad",
        "timeout",
        "gone",
    ];
}

/// What came of a TLS handshake.
#[derive(Clone, Copy)]
pub(super) enum HandshakeOutcome {
    Ok,
    Timeout,
    ClientGone,
    /// What came first is text.
    PlainText,
    Bad,
    /// There is no version, cipher or protocol that both sides have.
    Incompatible,
    /// The client sent an alert: it does not like the certificate, mostly.
    RefusedByClient,
    NoClientCertificate,
    BadClientCertificate,
}

impl HandshakeOutcome {
    const NAMES: [&str; 9] = [
        "ok",
        "timeout",
        "client_gone",
        "plain_text",
        "bad",
        "incompatible",
        "refused_by_client",
        "no_client_certificate",
        "bad_client_certificate",
    ];
}

static HANDSHAKES: Tally<{ HandshakeOutcome::NAMES.len() }> = Tally {
    name: "handshakes",
    help: "TLS handshakes, and what came of them",
    outcomes: HandshakeOutcome::NAMES,
    counts: [const { AtomicU64::new(0) }; HandshakeOutcome::NAMES.len()],
};

static HEADERS: Tally<{ HeaderOutcome::NAMES.len() }> = Tally {
    name: "proxy_headers",
    help: "Connections from proxies, and what came of their PROXY protocol header",
    outcomes: HeaderOutcome::NAMES,
    counts: [const { AtomicU64::new(0) }; HeaderOutcome::NAMES.len()],
};

/// How often something had each of its outcomes, since the process began.
struct Tally<const N: usize> {
    name: &'static str,
    help: &'static str,
    outcomes: [&'static str; N],
    counts: [AtomicU64; N],
}

impl<const N: usize> Tally<N> {
    fn count(&self, outcome: usize) {
        self.counts[outcome].fetch_add(1, Ordering::Relaxed);
    }

    fn encode(&self, encoder: &mut DescriptorEncoder) -> fmt::Result {
        let mut family =
            encoder.encode_descriptor(self.name, self.help, None, MetricType::Counter)?;
        for (outcome, count) in self.outcomes.iter().zip(&self.counts) {
            let count = ConstCounter::new(count.load(Ordering::Relaxed));
            count.encode(family.encode_family(&[("outcome", *outcome)])?)?;
        }
        Ok(())
    }
}

/// Adds to `registry` what came of connections before a guest had them.
pub fn register(registry: &mut Registry) {
    registry.register_collector(Box::new(Tallies));
}

#[derive(Debug)]
struct Tallies;

impl Collector for Tallies {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        HEADERS.encode(&mut encoder)?;
        HANDSHAKES.encode(&mut encoder)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_happens_often_is_said_once_and_counted() {
        let said = Said::new("");
        assert_eq!(said.is_due(), Some(1));
        assert_eq!(said.is_due(), None);
        assert_eq!(said.is_due(), None);
        let before = Instant::now().checked_sub(BETWEEN_LINES);
        said.last.lock().unwrap().0 = before;
        assert_eq!(said.is_due(), Some(3));
    }

    #[test]
    fn nothing_is_done_by_default_nor_for_others_than_proxies() {
        let peer: SocketAddr = "192.0.2.1:1".parse().unwrap();
        let peer = Peer::Ip(peer);
        assert!(!Handshake::default().applies_to(peer));
        let of_proxy = |network: &str| Handshake {
            proxy: Some(TrustedProxies {
                from: vec![network.parse().unwrap()],
            }),
            ..Handshake::default()
        };
        assert!(of_proxy("192.0.2.0/24").applies_to(peer));
        assert!(!of_proxy("198.51.100.0/24").applies_to(peer));
    }
}
