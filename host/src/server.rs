//! Hands connections to a handler, one way or the other, and drains them at the end.

use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::time::Duration;

use futures::{FutureExt, Stream, StreamExt};
use tokio_util::task::TaskTracker;
use tracing::{error, info, warn};

use crate::lifecycle::Controller;

/// How connections share the processor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Dispatch {
    /// A task for each connection: they run in parallel on all cores.
    Spawn,
    /// All connections in one task: they run concurrently on one core.
    Concurrent,
}

/// How the server came to its end.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Ended {
    /// All connections had finished.
    Drained,
    /// Some were ended before they had.
    Cut,
}

/// Calls `handler` for each of `connections` until they end, as they should once the server
/// drains.
///
/// The first item of `stop` begins to drain: the open connections have `drain_timeout` to finish.
/// Then, or at the second item of `stop`, those that are left are told to end, through the
/// lifecycle of `controller`, which the handler must heed.
pub async fn serve<S, H, F>(
    connections: S,
    handler: H,
    dispatch: Dispatch,
    controller: &Controller,
    stop: impl Stream<Item = ()>,
    drain_timeout: Duration,
) -> Ended
where
    S: Stream + Send,
    S::Item: Send + 'static,
    H: Fn(S::Item) -> F,
    F: Future<Output = ()> + Send + 'static,
{
    let mut stop = pin!(stop.fuse());
    let mut work = pin!(dispatch_all(connections, handler, dispatch).fuse());
    futures::select! {
        () = work => return Ended::Drained,
        _ = stop.next() => {}
    }
    info!(
        ?drain_timeout,
        "draining: no new connections, waiting for the open ones to finish"
    );
    controller.drain();
    futures::select! {
        () = work => {
            info!("drained");
            return Ended::Drained;
        }
        () = tokio::time::sleep(drain_timeout).fuse() => {
            warn!(?drain_timeout, "the drain timeout is over: ending the open connections");
        }
        _ = stop.next() => warn!("asked to stop a second time: ending the open connections"),
    }
    controller.end();
    work.await;
    Ended::Cut
}

async fn dispatch_all<S, H, F>(connections: S, handler: H, dispatch: Dispatch)
where
    S: Stream,
    H: Fn(S::Item) -> F,
    F: Future<Output = ()> + Send + 'static,
{
    let handle = |connection| contain(handler(connection));
    match dispatch {
        Dispatch::Concurrent => connections.for_each_concurrent(None, handle).await,
        Dispatch::Spawn => {
            let tasks = TaskTracker::new();
            connections
                .for_each(async |connection| {
                    tasks.spawn(handle(connection));
                })
                .await;
            tasks.close();
            tasks.wait().await;
        }
    }
}

/// Keeps a panic in the handling of one connection away from the others.
async fn contain(handling: impl Future<Output = ()>) {
    // What the handler shares with others is behind locks that do not hide a panic.
    if AssertUnwindSafe(handling).catch_unwind().await.is_err() {
        error!("the handling of a connection panicked; this is a bug in wasinetd");
    }
}
