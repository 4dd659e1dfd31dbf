//! Runs the handlers of connections, as tasks or in one task.

use std::future::poll_fn;
use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::Poll;

use futures::stream::FuturesUnordered;
use futures::{FutureExt, Stream, StreamExt};
use tokio::task::unconstrained;
use tokio_util::task::TaskTracker;
use tracing::error;

/// How connections share the threads.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Dispatch {
    /// One task per connection. Any thread may run it.
    Spawn,
    /// One task per thread, for all of its connections.
    Concurrent,
}

/// Handles all `connections` on the current runtime.
pub(super) async fn dispatch_all<S, H, F>(connections: S, handler: H, dispatch: Dispatch)
where
    S: Stream,
    H: Fn(S::Item) -> F,
    F: Future<Output = ()> + Send + 'static,
{
    let handle = |connection| catch_panic(handler(connection));
    match dispatch {
        // Tokio gives each task a budget of operations per poll. Here all connections share one
        // task: the ones that the reactor reports first would use up the budget each time, and the
        // others would starve. Connections yield by themselves.
        Dispatch::Concurrent => unconstrained(run_concurrently(connections, handle)).await,
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

/// Connections that may start in one poll. An eighth of the open ones comes on top.
///
/// The share grows with the load, so that a crowd of clients is accepted before they give up.
const MIN_STARTS: usize = 8;

/// Handles all `connections` in one task.
///
/// Each poll starts some connections, polls every ready one once, and returns to the reactor. A
/// [`StreamExt::for_each_concurrent`] would go on as long as it makes progress. Under load that is
/// long, and connections that only the reactor knows to be ready would wait.
async fn run_concurrently<S, F>(connections: S, handle: impl Fn(S::Item) -> F)
where
    S: Stream,
    F: Future<Output = ()>,
{
    let mut connections = pin!(connections.fuse());
    let poll_count = &AtomicUsize::new(0);
    let mut open = FuturesUnordered::new();
    // Boxed, so that the nodes of the set are small.
    let count_polls = |handling: F| {
        let mut handling = Box::pin(handling);
        poll_fn(move |cx| {
            poll_count.fetch_add(1, Ordering::Relaxed);
            handling.as_mut().poll(cx)
        })
    };
    poll_fn(|cx| {
        let max_starts = MIN_STARTS + open.len() / 8;
        let started = (0..max_starts)
            .map_while(|_| match connections.as_mut().poll_next(cx) {
                Poll::Ready(connection) => connection,
                Poll::Pending => None,
            })
            .map(|connection| open.push(count_polls(handle(connection))))
            .count();
        // One poll for each connection. A connection that becomes ready again waits for the next
        // turn.
        let max_polls = open.len();
        let mut polls = 0;
        poll_count.store(0, Ordering::Relaxed);
        while polls < max_polls {
            // The set returns `Pending` as soon as two of its futures have woken themselves, and
            // takes that for a request to yield. Sandboxes do that in passing, so ask again as long
            // as any future is polled.
            let _ = open.poll_next_unpin(cx);
            let polls_now = poll_count.load(Ordering::Relaxed);
            if polls_now == polls {
                break;
            }
            polls = polls_now;
        }
        if connections.is_done() && open.is_empty() {
            return Poll::Ready(());
        }
        if started == max_starts || (polls == max_polls && polls > 0) {
            cx.waker().wake_by_ref();
        }
        Poll::Pending
    })
    .await;
}

/// Keeps a panic in the handler of one connection from the others.
///
/// Not an async function: its future would contain `handling` twice, as argument and as awaited
/// future.
fn catch_panic(handling: impl Future<Output = ()>) -> impl Future<Output = ()> {
    // The state that handlers share is behind locks, and valid after every statement.
    AssertUnwindSafe(handling).catch_unwind().map(|outcome| {
        if outcome.is_err() {
            error!("the handler of a connection panicked; this is a bug in wasinetd");
        }
    })
}
