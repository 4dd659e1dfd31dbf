//! The way of a connection from `accept` to its log line.

mod active;
mod handshake;
mod kill_switch;
mod limits;
mod outcome;
mod proxy_header;
mod registry;
mod socket;
mod stats;
mod stream;
pub mod tls;
mod usage;
mod version;

use std::future::poll_fn;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;

use crate::listener::Accepted;
use crate::sync::lock;
use active::ActiveConnection;
use handshake::{Client, ReadyConnection};
pub use handshake::{Handshake, register};
pub use kill_switch::KillSwitch;
pub use limits::ConnectionLimits;
use limits::LimitTimer;
pub use outcome::OutcomeKind;
use outcome::{EndedBy, Outcome};
pub use proxy_header::TrustedProxies;
pub use registry::{ConnectionRecord, ConnectionRegistry};
pub use stats::{ServiceStats, VersionStats};
use stream::MaybeTls;
pub use usage::Usage;
pub use version::Version;

/// Route from a listener to the version that serves a connection.
pub trait Route: Send + Sync + 'static {
    /// Steps before a guest gets a connection.
    fn handshake(&self) -> &Handshake;

    /// The version for a new connection. The client may have asked for a server name by TLS.
    fn version(&self, server_name: Option<&str>) -> Arc<Version>;

    /// Where connections are registered while they are open.
    fn registry(&self) -> &Arc<ConnectionRegistry>;
}

/// Handles an accepted connection: handshake, guest, end, log line.
pub fn handle<R: Route>(accepted: Accepted<Arc<R>>) -> impl Future<Output = ()> + Send + use<R> {
    // The handshake is boxed, and only made where there is one: other connections need no memory
    // for it.
    let start = if accepted.route.handshake().applies_to(accepted.peer) {
        Err(Box::pin(async move {
            let route = accepted.route.clone();
            let connection = route.handshake().perform(accepted).await?;
            let tls = connection.stream.tls();
            let version = route.version(tls.and_then(|tls| tls.server_name.as_deref()));
            Some((connection, version, route.registry().clone()))
        }))
    } else {
        let version = accepted.route.version(None);
        let registry = accepted.route.registry().clone();
        Ok((ReadyConnection::from(accepted), version, registry))
    };
    async move {
        let start = match start {
            Ok(start) => Some(start),
            Err(handshake) => handshake.await,
        };
        if let Some((connection, version, registry)) = start {
            let ReadyConnection {
                stream,
                client,
                permit,
            } = connection;
            serve(stream, client, version, registry).await;
            // After the socket: a free permit stands for a free file descriptor.
            drop(permit);
        }
    }
}

/// Serves a client in a fresh sandbox.
///
/// The connection ends in order if the guest returns `ok` within the limits. In all other cases, a
/// panic and a dropped future included, it is reset when it is dropped.
async fn serve(
    stream: MaybeTls,
    client: Client,
    version: Arc<Version>,
    registry: Arc<ConnectionRegistry>,
) {
    let _open = version.stats.begin();
    let record = ConnectionRecord::new(client.peer, client.via, version.clone());
    let record = registry.add(record);
    let connection = ActiveConnection::new(stream, client.local, record.clone());
    let connection = Arc::new(Mutex::new(connection));
    let ended_by = {
        let mut call = Box::pin(version.guest.handle(connection.clone()));
        let mut timer = LimitTimer::default();
        poll_fn(|cx| match call.as_mut().poll(cx) {
            Poll::Ready(result) => Poll::Ready(EndedBy::Guest(result)),
            Poll::Pending => lock(&connection).poll_ended(cx, &mut timer),
        })
        .await
        // The sandbox is dropped here: a client that closes slowly must not hold one.
    };
    let mut connection = Arc::into_inner(connection)
        .expect("the sandbox that shared the connection is gone")
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner);
    let mut outcome = connection.outcome(ended_by);
    if outcome == Outcome::Ok
        && let Some(ended_by) = connection.finish().await
    {
        outcome = connection.outcome(ended_by);
    }
    let duration = record.began.elapsed();
    if outcome == Outcome::Ok {
        connection.linger().await;
    }
    connection.record_end(&outcome, duration);
}

#[cfg(test)]
mod tests {
    use std::io::{self, ErrorKind, Read};
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::{AsRawFd, RawFd};
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::time::Duration;

    use futures::FutureExt;
    use tokio::io::unix::AsyncFd;

    use super::socket::Socket;
    use super::*;
    use crate::lifecycle::Controller;
    use crate::net::{Peer, StreamSocket};
    use crate::sandbox::{
        Engine, Grants, Guest, GuestLimits, PoolSize, Requirements, SharedLimits, Transport,
    };

    /// A version whose guest sends without end.
    ///
    /// When the host drops its stream, the guest returns `ok` all the same.
    fn endless() -> Arc<Version> {
        let component = wat::parse_str(include_str!("connection/tests/endless.wat")).unwrap();
        let requirements = Requirements::of(&component).unwrap();
        let size = PoolSize {
            connections: 1,
            stacks: 2,
        };
        let engine = Engine::new(size, &requirements, SharedLimits::default(), None).unwrap();
        let grants = Grants::default();
        let guest = Guest::new(&engine, &component, grants, GuestLimits::default()).unwrap();
        Arc::new(Version {
            service: "test".into(),
            guest: Arc::new(guest),
            limits: ConnectionLimits::default(),
            lifecycle: Controller::default().lifecycle(),
            stats: VersionStats::default(),
            service_stats: Arc::default(),
            kill_switch: Arc::default(),
            spans: None,
        })
    }

    /// A client, and the connection as it was accepted.
    fn connect() -> (TcpStream, StreamSocket) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let timeout = Some(Duration::from_secs(60));
        client.set_read_timeout(timeout).unwrap();
        let (server, _) = listener.accept().unwrap();
        server.set_nonblocking(true).unwrap();
        (client, server.into())
    }

    fn serve_endless(
        socket: StreamSocket,
        registry: &Arc<ConnectionRegistry>,
    ) -> impl Future<Output = ()> + use<> {
        let stream = MaybeTls::Plain(Socket::new(socket));
        let peer = Peer::Unix { uid: 0, pid: 0 };
        serve(stream, peer.into(), endless(), registry.clone())
    }

    /// Serves a connection until the client has a part of the answer.
    ///
    /// The guest waits for the client to read. The client then reads all there is, so an end of the
    /// stream would reach it at once.
    async fn send_some(
        serving: &mut (impl Future<Output = ()> + Unpin),
        client: &mut TcpStream,
        registry: &ConnectionRegistry,
    ) {
        while registry
            .list()
            .iter()
            .all(|record| record.usage.sent() == 0)
        {
            assert!(futures::poll!(&mut *serving).is_pending());
            tokio::task::yield_now().await;
        }
        let timeout = client.read_timeout().unwrap();
        let moment = Some(Duration::from_millis(100));
        client.set_read_timeout(moment).unwrap();
        let (received, end) = read_all(client);
        assert!(received > 0);
        assert_eq!(end.unwrap_err().kind(), ErrorKind::WouldBlock);
        client.set_read_timeout(timeout).unwrap();
    }

    /// Reads until the end of the stream, or an error. Returns the number of bytes, too.
    fn read_all(client: &mut TcpStream) -> (usize, io::Result<()>) {
        let mut buf = [0; 65536];
        let mut received = 0;
        loop {
            match client.read(&mut buf) {
                Ok(0) => return (received, Ok(())),
                Ok(n) => received += n,
                Err(error) => return (received, Err(error)),
            }
        }
    }

    /// Expects a reset, with no end of the stream before it.
    fn expect_reset(client: &mut TcpStream) {
        let (_, end) = read_all(client);
        assert_eq!(end.unwrap_err().kind(), ErrorKind::ConnectionReset);
    }

    #[tokio::test]
    async fn a_panic_of_the_host_resets_the_connection() {
        let (mut client, server) = connect();
        let registry = Arc::default();
        let mut serving = Box::pin(serve_endless(server, &registry));
        send_some(&mut serving, &mut client, &registry).await;
        // The next bytes sent overflow the counter, which panics while the guest runs.
        let usage = &registry.list()[0].usage;
        usage.add_sent(usize::MAX - usage.sent() as usize);
        assert!(AssertUnwindSafe(serving).catch_unwind().await.is_err());
        expect_reset(&mut client);
        assert_eq!(registry.count(), 0);
    }

    /// Descriptor of a socket that somebody else owns.
    struct Borrowed(RawFd);

    impl AsRawFd for Borrowed {
        fn as_raw_fd(&self) -> RawFd {
            self.0
        }
    }

    #[tokio::test]
    async fn a_failed_registration_with_the_reactor_resets_the_connection() {
        let (mut client, server) = connect();
        // SAFETY: the descriptor outlives its use. Deregistering its number later can only concern
        // descriptors of the reactor of this test, and there is no other.
        let registered = unsafe { AsyncFd::register(Borrowed(server.as_raw_fd())) };
        let registered = registered.unwrap();
        // Sending fails when the kernel takes no more: the descriptor is registered already. The
        // guest returns `ok` in spite of that.
        serve_endless(server, &Arc::default()).await;
        expect_reset(&mut client);
        drop(registered);
    }

    /// Drops the stream of a guest, as unwinding might.
    struct CloseOnDrop<'a>(&'a mut ActiveConnection);

    impl Drop for CloseOnDrop<'_> {
        fn drop(&mut self) {
            self.0.close_sending();
        }
    }

    #[test]
    fn a_stream_that_a_panic_drops_does_not_end_in_order() {
        let (mut client, server) = connect();
        let stream = MaybeTls::Plain(Socket::new(server));
        let peer = Peer::Unix { uid: 0, pid: 0 };
        let record = Arc::new(ConnectionRecord::new(peer, None, endless()));
        let mut connection = ActiveConnection::new(stream, None, record);
        let panicked = catch_unwind(AssertUnwindSafe(|| {
            let _close = CloseOnDrop(&mut connection);
            panic!("while the guest sends");
        }));
        assert!(panicked.is_err());
        drop(connection);
        expect_reset(&mut client);
    }

    #[tokio::test]
    async fn a_dropped_future_resets_the_connection() {
        let (mut client, server) = connect();
        let registry = Arc::default();
        let mut serving = Box::pin(serve_endless(server, &registry));
        send_some(&mut serving, &mut client, &registry).await;
        drop(serving);
        expect_reset(&mut client);
        assert_eq!(registry.count(), 0);
    }
}
