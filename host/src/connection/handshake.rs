//! Steps before a guest gets a connection: PROXY header and TLS handshake.
//!
//! Until they are done a connection holds its permit and nothing else: no sandbox, no version of a
//! guest. A connection that fails here is in no list of connections. It is counted here.

mod failure;

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use prometheus_client::registry::Registry;
use tokio::time::timeout;

use super::proxy_header::{
    self, HEADERS, HeaderOutcome, ProxyHeader, ProxyHeaderError, TrustedProxies,
};
use super::socket::Socket;
use super::stream::MaybeTls;
use super::tls::{HANDSHAKES, HandshakeOutcome, Tls};
use crate::lifecycle::Lifecycle;
use crate::listener::{AcceptPermit, Accepted};
use crate::net::Peer;
use failure::HandshakeFailure;

/// Steps before a guest gets a connection. By default there are none, which costs nothing.
#[derive(Clone)]
pub struct Handshake {
    /// Proxies whose connections begin with a header that names the client.
    pub proxy: Option<TrustedProxies>,
    /// TLS with clients, if the listener speaks it.
    pub tls: Option<Arc<Tls>>,
    /// Time for all steps together.
    pub timeout: Duration,
    /// Ends the handshakes that are under way when the server ends.
    pub lifecycle: Option<Lifecycle>,
}

impl Default for Handshake {
    /// The timeout is that of the command line, where it has its reason.
    fn default() -> Self {
        Self {
            proxy: None,
            tls: None,
            timeout: Duration::from_secs(10),
            lifecycle: None,
        }
    }
}

/// A connection that is ready for a guest.
pub(super) struct ReadyConnection {
    pub(super) stream: MaybeTls,
    pub(super) peer: Peer,
    /// The proxy between the client and this server.
    pub(super) via: Option<SocketAddr>,
    /// The address that the client connected to, if a proxy reported another one.
    pub(super) local: Option<SocketAddr>,
    pub(super) permit: AcceptPermit,
}

impl<T> From<Accepted<T>> for ReadyConnection {
    /// A connection without a handshake.
    fn from(accepted: Accepted<T>) -> Self {
        Self {
            stream: MaybeTls::Plain(Socket::new(accepted.stream)),
            peer: accepted.peer,
            via: None,
            local: None,
            permit: accepted.place,
        }
    }
}

impl Handshake {
    /// Whether connections of `peer` have a handshake.
    pub(super) fn applies_to(&self, peer: Peer) -> bool {
        self.tls.is_some() || self.proxy_at(peer).is_some()
    }

    /// The address of `peer` if it is a proxy.
    fn proxy_at(&self, peer: Peer) -> Option<SocketAddr> {
        match (&self.proxy, peer) {
            (Some(proxies), Peer::Ip(address)) => proxies.contains(address).then_some(address),
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
                () = ended => Some(Err(HandshakeFailure::server_ended())),
            }
        };
        let failure = match met {
            Some(Ok(())) => return Some(client),
            Some(Err(failure)) => failure,
            None => match stage {
                Stage::Header => HandshakeFailure::header_timeout(),
                Stage::Handshake => HandshakeFailure::tls_timeout(),
            },
        };
        failure.log(client.peer, client.via);
        match failure.alerted {
            false => client.stream.socket().reset_when_dropped(),
            true => {
                // To close what has something unread would be a reset, which can destroy what the client
                // is told.
                let (time, most) = FAREWELL;
                let _ = timeout(time, client.stream.socket().drain(most)).await;
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
        let source = client.permit.source();
        let hands = tls.shake_hands(&mut client.stream, source).await;
        hands.map_err(HandshakeFailure::tls)?;
        HANDSHAKES.add(HandshakeOutcome::Ok);
        Ok(())
    }
}

/// Time that a proxy has to send or close after a header without a client. A proxy that closes has
/// only checked whether the port is open. A guest that speaks first waits for as long.
const GRACE: Duration = Duration::from_millis(50);

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
    let header = proxy_header::receive(client.stream.socket()).await;
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
            HEADERS.add(HeaderOutcome::Client);
            client
                .permit
                .admit(peer.into())
                .map_err(HandshakeFailure::not_admitted)
        }
        _ if timeout(GRACE, client.stream.socket().ends_now()).await == Ok(true) => {
            Err(HandshakeFailure::health_check())
        }
        _ => {
            HEADERS.add(HeaderOutcome::NoClient);
            Ok(())
        }
    }
}

/// Whether two addresses are one, be it written as one of IPv6 that stands for one of IPv4.
fn is_same(one: SocketAddr, other: SocketAddr) -> bool {
    one.ip().to_canonical() == other.ip().to_canonical() && one.port() == other.port()
}

/// Adds the outcomes of handshakes to `registry`.
pub fn register(registry: &mut Registry) {
    registry.register_collector(Box::new(HandshakeCollector));
}

#[derive(Debug)]
struct HandshakeCollector;

impl Collector for HandshakeCollector {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        let help = "Connections from proxies by the outcome of their PROXY protocol header";
        HEADERS.encode(&mut encoder, "proxy_headers", help, "outcome")?;
        let help = "TLS handshakes by outcome";
        HANDSHAKES.encode(&mut encoder, "handshakes", help, "outcome")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_listeners_with_tls_and_proxies_have_a_handshake() {
        let peer: SocketAddr = "192.0.2.1:1".parse().unwrap();
        let peer = Peer::Ip(peer);
        assert!(!Handshake::default().applies_to(peer));
        let with_proxies = |network: &str| Handshake {
            proxy: Some(TrustedProxies {
                from: vec![network.parse().unwrap()],
            }),
            ..Handshake::default()
        };
        assert!(with_proxies("192.0.2.0/24").applies_to(peer));
        assert!(!with_proxies("198.51.100.0/24").applies_to(peer));
    }
}
