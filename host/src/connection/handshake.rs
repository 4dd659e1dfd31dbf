//! Steps before a guest gets a connection: PROXY header and TLS handshake.
//!
//! Until they are done a connection holds its permit and nothing else: no sandbox, no version of a
//! guest. A connection that fails here is in no list of connections. It is counted here.

mod failure;

use std::fmt;
use std::net::SocketAddr;
use std::pin::pin;
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
use super::tls::{HANDSHAKES, HandshakeOutcome, Refused, Tls};
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
    /// The timeout is the default of the command line.
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
    // Drop order: the socket first. A free permit stands for a free file descriptor.
    pub(super) stream: MaybeTls,
    pub(super) client: Client,
    pub(super) permit: AcceptPermit,
}

/// The client of a connection, and where it connected to.
pub(super) struct Client {
    pub(super) peer: Peer,
    /// The proxy between the client and this server.
    pub(super) via: Option<SocketAddr>,
    /// The address that the client connected to, as a proxy reported it.
    pub(super) local: Option<SocketAddr>,
}

impl From<Peer> for Client {
    /// A client without a proxy.
    fn from(peer: Peer) -> Self {
        Self {
            peer,
            via: None,
            local: None,
        }
    }
}

impl<T> From<Accepted<T>> for ReadyConnection {
    /// A connection without a handshake.
    fn from(accepted: Accepted<T>) -> Self {
        Self {
            stream: MaybeTls::Plain(Socket::new(accepted.stream)),
            client: accepted.peer.into(),
            permit: accepted.permit,
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

    /// Performs the handshake. None if it failed, which is counted and logged then.
    pub(super) async fn perform<T>(&self, accepted: Accepted<T>) -> Option<ReadyConnection> {
        let mut client = Client::from(accepted.peer);
        let mut permit = accepted.permit;
        let mut socket = Socket::new(accepted.stream);
        let mut interrupted = pin!(self.interrupted());
        if let Some(proxy) = self.proxy_at(client.peer) {
            let header = tokio::select! {
                biased;
                header = read_proxy_header(&mut socket, &mut client, &mut permit, proxy) => header,
                interruption = &mut interrupted => Err(match interruption {
                    Interruption::Timeout => HandshakeFailure::header_timeout(),
                    Interruption::ServerEnded => HandshakeFailure::server_ended(),
                }),
            };
            if let Err(failure) = header {
                failure.log(client.peer, client.via);
                return None;
            }
        }
        let Some(tls) = &self.tls else {
            let stream = MaybeTls::Plain(socket);
            return Some(ReadyConnection {
                stream,
                client,
                permit,
            });
        };
        // The future owns the socket: it is dropped, which resets the connection, after a timeout
        // was logged.
        let mut accept = pin!(tls.accept(socket, permit.source()));
        let result = tokio::select! {
            biased;
            result = &mut accept => result,
            interruption = &mut interrupted => {
                let failure = match interruption {
                    Interruption::Timeout => HandshakeFailure::tls_timeout(),
                    Interruption::ServerEnded => HandshakeFailure::server_ended(),
                };
                failure.log(client.peer, client.via);
                return None;
            }
        };
        match result {
            Ok(stream) => {
                HANDSHAKES.add(HandshakeOutcome::Ok);
                Some(ReadyConnection {
                    stream: MaybeTls::Tls(stream),
                    client,
                    permit,
                })
            }
            Err(refused) => {
                let failure = HandshakeFailure::tls(&refused);
                failure.log(client.peer, client.via);
                refuse(refused).await;
                None
            }
        }
    }

    /// Waits for the timeout, or for the end of the server.
    async fn interrupted(&self) -> Interruption {
        let server_ended = async {
            match &self.lifecycle {
                Some(lifecycle) => lifecycle.clone().ended().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            () = tokio::time::sleep(self.timeout) => Interruption::Timeout,
            () = server_ended => Interruption::ServerEnded,
        }
    }
}

/// Why a handshake is not continued.
enum Interruption {
    Timeout,
    ServerEnded,
}

/// Ends a connection that TLS refused.
///
/// After an alert the connection ends in order. Otherwise it is reset.
async fn refuse(refused: Refused) {
    /// Time that a client has to read an alert and close. The bytes are those that it may still
    /// send: they were on their way when the alert was sent.
    const FAREWELL: (Duration, usize) = (Duration::from_secs(1), 64 << 10);
    let mut socket = refused.socket;
    if refused.alerted {
        socket.finish();
        // Closing a socket with unread data resets the connection, which can destroy the alert.
        let _ = timeout(FAREWELL.0, socket.discard(FAREWELL.1)).await;
    }
}

/// Reads the header of a proxy, and admits its client.
async fn read_proxy_header(
    socket: &mut Socket,
    client: &mut Client,
    permit: &mut AcceptPermit,
    proxy: SocketAddr,
) -> Result<(), HandshakeFailure> {
    /// Time that a proxy without a client has to send or close. A proxy that closes only checked
    /// whether the port is open. A guest that speaks first waits for so long.
    const GRACE: Duration = Duration::from_millis(50);
    let header = proxy_header::receive(socket).await;
    let header = header.map_err(|error| match error {
        ProxyHeaderError::Nothing => HandshakeFailure::health_check(),
        ProxyHeaderError::Gone => {
            HandshakeFailure::header(HeaderOutcome::Gone, "the proxy is gone".into())
        }
        ProxyHeaderError::Bad(reason) => HandshakeFailure::header(HeaderOutcome::Bad, reason),
    })?;
    match header {
        // In a health check by version 1, haproxy names itself as the client.
        ProxyHeader::Client {
            source,
            destination,
        } if !is_same(source, proxy) => {
            client.via = Some(proxy);
            client.peer = source.into();
            client.local = Some(destination);
            HEADERS.add(HeaderOutcome::Client);
            permit
                .admit(client.peer)
                .map_err(HandshakeFailure::not_admitted)
        }
        _ if timeout(GRACE, socket.is_end_next()).await == Ok(true) => {
            Err(HandshakeFailure::health_check())
        }
        _ => {
            HEADERS.add(HeaderOutcome::NoClient);
            Ok(())
        }
    }
}

/// Whether two addresses are the same. An IPv4 address may be mapped to IPv6.
fn is_same(first: SocketAddr, second: SocketAddr) -> bool {
    first.ip().to_canonical() == second.ip().to_canonical() && first.port() == second.port()
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
    use std::io::{ErrorKind, Read, Write};
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[tokio::test]
    async fn a_refused_client_is_reset_unless_it_has_an_alert_to_read() {
        for alerted in [false, true] {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            client.write_all(b"hello").unwrap();
            client.shutdown(std::net::Shutdown::Write).unwrap();
            let (server, _) = listener.accept().unwrap();
            server.set_nonblocking(true).unwrap();
            refuse(Refused {
                socket: Socket::new(server.into()),
                outcome: HandshakeOutcome::Bad,
                reason: String::new(),
                alerted,
                silent: false,
            })
            .await;
            let end = client.read(&mut [0]);
            let expected = (!alerted).then_some(ErrorKind::ConnectionReset);
            assert_eq!(end.err().map(|error| error.kind()), expected);
        }
    }

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
