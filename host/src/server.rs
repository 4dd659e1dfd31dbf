//! Serves streams of connections on shards, and drains them at the end.

mod balance;
mod dispatch;
mod error;
mod liveness;
mod shards;

use std::future::ready;
use std::pin::pin;
use std::time::Duration;

use futures::future::try_join_all;
use futures::{FutureExt, Stream, StreamExt};
use tracing::{info, warn};

use crate::lifecycle::Controller;
pub use dispatch::Dispatch;
pub use error::{ServeError, StartError};
pub use liveness::Liveness;
pub use shards::Shards;

/// A request to stop the server.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum StopRequest {
    /// Start draining. Repeating it has no effect.
    Drain,
    /// Start draining. If the server drains already, end the open connections.
    Now,
}

/// Result of a drain.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum DrainOutcome {
    /// All connections finished in time.
    Drained,
    /// The server ended some connections.
    Cut,
}

/// Calls `handler` for each connection, until all streams have ended.
///
/// Each of the [`Shards`] comes with one stream of connections per shard. The streams must end when
/// the lifecycle of `controller` drains.
///
/// The first item of `stop` starts to drain: open connections have `drain_timeout` to finish. After
/// that, or at a second [`StopRequest::Now`], the lifecycle ends, and the handlers must obey it.
///
/// # Errors
///
/// [`ServeError::Start`] if a thread cannot be started, [`ServeError::ThreadDied`] if one panicked.
pub async fn serve<S, H, F>(
    connections: Vec<(Shards, Vec<S>)>,
    handler: H,
    controller: &Controller,
    stop: impl Stream<Item = StopRequest>,
    drain_timeout: Duration,
) -> Result<DrainOutcome, ServeError>
where
    S: Stream + Send + Unpin + 'static,
    S::Item: Send + 'static,
    H: Fn(S::Item) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = ()> + Send + 'static,
{
    let mut stop = pin!(stop.fuse());
    let shards = connections
        .into_iter()
        .map(|(shards, connections)| shards.run(connections, handler.clone()))
        .collect::<Result<Vec<_>, _>>()?;
    let mut work = pin!(try_join_all(shards.into_iter().flatten()).fuse());
    let died = |_| ServeError::ThreadDied;
    futures::select! {
        ended = work => return ended.map(|_| DrainOutcome::Drained).map_err(died),
        _ = stop.next() => {}
    }
    info!(
        ?drain_timeout,
        "draining: no new connections, waiting for the open ones to finish"
    );
    controller.drain();
    let mut stop_now = stop.filter(|stop| ready(*stop == StopRequest::Now)).fuse();
    futures::select! {
        ended = work => {
            ended.map_err(died)?;
            info!("drained");
            return Ok(DrainOutcome::Drained);
        }
        () = tokio::time::sleep(drain_timeout).fuse() => {
            warn!(?drain_timeout, "the drain timeout is over: ending the open connections");
        }
        _ = stop_now.next() => warn!("asked to stop a second time: ending the open connections"),
    }
    controller.end();
    work.await.map(|_| DrainOutcome::Cut).map_err(died)
}
