//! Hands connections to a handler, one way or the other, and drains them at the end.

mod balance;
mod shards;

use std::future::{poll_fn, ready};
use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::Poll;
use std::time::Duration;

use futures::future::try_join_all;
use futures::stream::FuturesUnordered;
use futures::{FutureExt, Stream, StreamExt};
use tokio::task::unconstrained;
use tokio_util::task::TaskTracker;
use tracing::{error, info, warn};

use crate::Error;
use crate::lifecycle::Controller;
pub use shards::{Liveness, Shards};

/// How connections share the processor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Dispatch {
    /// A task for each connection, which any thread may go on with.
    Spawn,
    /// A share of the connections for each thread, all of a share in one task.
    Concurrent,
}

/// What makes the server stop.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum StopRequest {
    /// Drain. Whoever wishes it once more wishes for nothing more.
    Drain,
    /// Drain; and when it comes while the server does so already, end.
    Now,
}

/// How the server came to its end.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum DrainOutcome {
    /// All connections had finished.
    Drained,
    /// Some were ended before they had.
    Cut,
}

/// Calls `handler` for each of the connections, on the threads of the shards that they come with, until
/// they end, as they should once the server drains. There is a stream for each shard.
///
/// The first item of `stop` begins to drain: the open connections have `drain_timeout` to finish.
/// Then, or at a [`Stop::Now`] that follows, those that are left are told to end, through the
/// lifecycle of `controller`, which the handler must heed.
///
/// # Errors
///
/// [`Error::Internal`] when a thread cannot be started, or has died.
pub async fn serve<S, H, F>(
    connections: Vec<(Shards, Vec<S>)>,
    handler: H,
    controller: &Controller,
    stop: impl Stream<Item = StopRequest>,
    drain_timeout: Duration,
) -> Result<DrainOutcome, Error>
where
    S: Stream + Send + Unpin + 'static,
    S::Item: Send + 'static,
    H: Fn(S::Item) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = ()> + Send + 'static,
{
    let mut stop = pin!(stop.fuse());
    let threads = connections
        .into_iter()
        .map(|(shards, connections)| shards.run(connections, handler.clone()))
        .collect::<Result<Vec<_>, _>>()?;
    let mut work = pin!(try_join_all(threads.into_iter().flatten()).fuse());
    let died = |_| Error::internal("serving", "a thread has died");
    futures::select! {
        ended = work => return ended.map(|_| DrainOutcome::Drained).map_err(died),
        _ = stop.next() => {}
    }
    info!(
        ?drain_timeout,
        "draining: no new connections, waiting for the open ones to finish"
    );
    controller.drain();
    let mut again = stop.filter(|stop| ready(*stop == StopRequest::Now)).fuse();
    futures::select! {
        ended = work => {
            ended.map_err(died)?;
            info!("drained");
            return Ok(DrainOutcome::Drained);
        }
        () = tokio::time::sleep(drain_timeout).fuse() => {
            warn!(?drain_timeout, "the drain timeout is over: ending the open connections");
        }
        _ = again.next() => warn!("asked to stop a second time: ending the open connections"),
    }
    controller.end();
    work.await.map(|_| DrainOutcome::Cut).map_err(died)
}

/// Handles all of `connections` on the present runtime.
async fn dispatch_all<S, H, F>(connections: S, handler: H, dispatch: Dispatch)
where
    S: Stream,
    H: Fn(S::Item) -> F,
    F: Future<Output = ()> + Send + 'static,
{
    let handle = |connection| contain(handler(connection));
    match dispatch {
        // A task is let do only so much at a time. Here all connections are one, and those whose turn
        // came last would be put off again and again: the others, of which the reactor hears first,
        // use up what there is. Connections make way of themselves.
        Dispatch::Concurrent => unconstrained(concurrently(connections, handle)).await,
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

/// How many connections are begun in a turn, at least. Of those that are open, an eighth comes on
/// top, so that a crowd is let in before it has grown impatient.
const BEGUN: usize = 8;

/// Handles all of `connections` in one task.
///
/// In each of its turns some are begun, everyone who is ready is polled, and then the reactor is
/// asked who else is. A [`StreamExt::for_each_concurrent`] goes on for as long as it makes progress,
/// which under load is for long: those whom only the reactor knows of would wait.
async fn concurrently<S, F>(connections: S, handle: impl Fn(S::Item) -> F)
where
    S: Stream,
    F: Future<Output = ()>,
{
    let mut connections = pin!(connections.fuse());
    let polled = &AtomicUsize::new(0);
    let mut open = FuturesUnordered::new();
    // Boxed, so that the set's nodes are small.
    let counted = |handling: F| {
        let mut handling = Box::pin(handling);
        poll_fn(move |cx| {
            polled.fetch_add(1, Ordering::Relaxed);
            handling.as_mut().poll(cx)
        })
    };
    poll_fn(|cx| {
        let most = BEGUN + open.len() / 8;
        let begun = (0..most)
            .map_while(|_| match connections.as_mut().poll_next(cx) {
                Poll::Ready(connection) => connection,
                Poll::Pending => None,
            })
            .map(|connection| open.push(counted(handle(connection))))
            .count();
        // As many as there are: more may have become ready meanwhile, for the next turn.
        let turns = open.len();
        let mut had = 0;
        polled.store(0, Ordering::Relaxed);
        while had < turns {
            // It is pending as soon as two of them have woken themselves, which it takes for a wish
            // to make way. A sandbox does so in passing: the rest are not to wait for a turn more.
            let _ = open.poll_next_unpin(cx);
            let now = polled.load(Ordering::Relaxed);
            if now == had {
                break;
            }
            had = now;
        }
        if connections.is_done() && open.is_empty() {
            return Poll::Ready(());
        }
        if begun == most || (had == turns && had > 0) {
            cx.waker().wake_by_ref();
        }
        Poll::Pending
    })
    .await;
}

/// Keeps a panic in the handling of one connection away from the others.
///
/// Not an async function: that would hold the handling twice, as its argument and as what it waits
/// for.
fn contain(handling: impl Future<Output = ()>) -> impl Future<Output = ()> {
    // What the handler shares with others is behind locks that do not hide a panic.
    AssertUnwindSafe(handling).catch_unwind().map(|outcome| {
        if outcome.is_err() {
            error!("the handling of a connection panicked; this is a bug in wasinetd");
        }
    })
}
