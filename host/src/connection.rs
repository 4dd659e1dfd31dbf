//! The way of one connection, from `accept` to its line in the log.

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
use handshake::ReadyConnection;
pub use handshake::{Handshake, register};
pub use kill_switch::KillSwitch;
pub use limits::ConnectionLimits;
use limits::LimitTimer;
pub use outcome::OutcomeKind;
use outcome::{EndedBy, Outcome};
pub use proxy_header::TrustedProxies;
pub use registry::{ConnectionRecord, ConnectionRegistry};
pub use stats::{ServiceStats, VersionStats};
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

/// Performs the handshake of an accepted connection, serves it, and logs its end.
pub fn handle<R: Route>(accepted: Accepted<Arc<R>>) -> impl Future<Output = ()> + Send + use<R> {
    // The handshake is boxed, and only made where there is one: other connections need no memory
    // for it.
    let start = if accepted.to.handshake().applies_to(accepted.peer) {
        Err(Box::pin(async move {
            let route = accepted.to.clone();
            let client = route.handshake().perform(accepted).await?;
            let tls = client.stream.tls();
            let version = route.version(tls.and_then(|tls| tls.server_name.as_deref()));
            Some((client, version, route.registry().clone()))
        }))
    } else {
        let version = accepted.to.version(None);
        let registry = accepted.to.registry().clone();
        Ok((ReadyConnection::from(accepted), version, registry))
    };
    async move {
        let start = match start {
            Ok(start) => Some(start),
            Err(handshake) => handshake.await,
        };
        if let Some((client, version, registry)) = start {
            serve(client, version, registry).await;
        }
    }
}

/// Serves a client in a fresh sandbox.
///
/// The connection is reset unless the guest returns `ok` within the limits.
async fn serve(client: ReadyConnection, version: Arc<Version>, registry: Arc<ConnectionRegistry>) {
    let ReadyConnection {
        stream,
        peer,
        via,
        local,
        permit,
    } = client;
    let _open = version.stats.begin();
    let record = registry.add(ConnectionRecord::new(peer, via, version.clone()));
    let connection = ActiveConnection::new(stream, local, record.clone());
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
    } else {
        connection.reset_when_dropped();
    }
    connection.record_end(&outcome, duration);
    // The socket first: a free permit stands for a free file descriptor.
    drop(connection);
    drop(permit);
}
