//! Threads and runtimes for connections.

use std::io;
use std::sync::Arc;
use std::thread;

use futures::Stream;
use futures::channel::oneshot;
use tokio::runtime::{Builder, Handle, Runtime};

use super::balance::{Balanced, ShardLoad, balance};
use super::dispatch::{Dispatch, dispatch_all};
use super::error::StartError;

/// Runtimes for connections. Each runtime is a shard with its own stream of connections.
///
/// [`Dispatch::Spawn`] has one runtime with several threads, which share all tasks.
/// [`Dispatch::Concurrent`] has one runtime per thread, and they share nothing: a thread needs no
/// locks and keeps its caches. A connection stays on the thread that it starts on, so each one
/// starts on a thread that has not clearly more than another.
pub struct Shards {
    dispatch: Dispatch,
    runtimes: Vec<Runtime>,
}

impl Shards {
    /// Creates runtimes for `threads` threads.
    ///
    /// # Errors
    ///
    /// [`StartError::Runtime`] if the system has no descriptors or threads left.
    pub fn new(dispatch: Dispatch, threads: usize) -> Result<Self, StartError> {
        let count = match dispatch {
            Dispatch::Spawn => 1,
            Dispatch::Concurrent => threads,
        };
        let runtimes = (0..count)
            .map(|_| new_runtime(dispatch, threads))
            .collect::<Result<_, _>>()
            .map_err(StartError::Runtime)?;
        Ok(Self { dispatch, runtimes })
    }

    /// Number of shards, and of the streams that they need.
    pub fn count(&self) -> usize {
        self.runtimes.len()
    }

    /// Handles of the runtimes, to create streams that are polled there.
    pub fn handles(&self) -> Vec<Handle> {
        self.runtimes
            .iter()
            .map(|runtime| runtime.handle().clone())
            .collect()
    }

    /// Handles the connections of each stream on its runtime.
    ///
    /// Each runtime gets a new thread. Its receiver resolves when the stream has ended and its
    /// connections are done, or to an error if the thread has died.
    pub(super) fn run<S, H, F>(
        self,
        connections: Vec<S>,
        handler: H,
    ) -> Result<Vec<oneshot::Receiver<()>>, StartError>
    where
        S: Stream + Send + Unpin + 'static,
        S::Item: Send + 'static,
        H: Fn(S::Item) -> F + Clone + Send + Sync + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        let dispatch = self.dispatch;
        self.runtimes
            .into_iter()
            .zip(balance(connections))
            .map(|(runtime, connections)| {
                let work = handle_counted(connections, handler.clone(), dispatch);
                let (done, ended) = oneshot::channel();
                thread::Builder::new()
                    .name("connections".into())
                    .spawn(move || {
                        // As a task, the work runs on the runtime's own threads. This thread would
                        // have to be woken by one of them for each connection.
                        let outcome = runtime.block_on(async { tokio::spawn(work).await });
                        if outcome.is_ok() {
                            // Fails if the server no longer waits for this shard.
                            let _ = done.send(());
                        }
                    })
                    .map_err(StartError::Thread)?;
                Ok(ended)
            })
            .collect()
    }
}

/// Handles `connections`, and counts the open ones for the balance between shards.
async fn handle_counted<S, H, F>(connections: Balanced<S>, handler: H, dispatch: Dispatch)
where
    S: Stream + Unpin,
    H: Fn(S::Item) -> F,
    F: Future<Output = ()> + Send + 'static,
{
    let load: Arc<ShardLoad> = connections.load();
    let handler = |connection| {
        let guard = load.clone().count_connection();
        let handling = handler(connection);
        async move {
            handling.await;
            drop(guard);
        }
    };
    dispatch_all(connections, handler, dispatch).await;
}

fn new_runtime(dispatch: Dispatch, threads: usize) -> io::Result<Runtime> {
    let mut builder = match dispatch {
        Dispatch::Spawn => {
            let mut builder = Builder::new_multi_thread();
            builder.worker_threads(threads);
            builder
        }
        Dispatch::Concurrent => {
            let mut builder = Builder::new_current_thread();
            // Polls the reactor after each turn of the single task, because one turn polls all
            // connections.
            builder.event_interval(1);
            builder
        }
    };
    builder.enable_all().build()
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::mpsc;
    use std::time::Duration;

    use futures::stream;
    use tokio::time::timeout;

    use super::*;
    use crate::server::liveness::Liveness;

    #[test]
    fn a_stuck_thread_fails_the_liveness_check() {
        for dispatch in [Dispatch::Concurrent, Dispatch::Spawn] {
            let shards = Shards::new(dispatch, 1).unwrap();
            let liveness = Liveness::new(shards.handles());
            let (report_stuck, stuck) = oneshot::channel();
            let (release, released) = mpsc::channel::<()>();
            let channels = Arc::new(Mutex::new(Some((report_stuck, released))));
            let handler = move |()| {
                let channels = channels.lock().unwrap().take();
                async move {
                    let (report_stuck, released) = channels.expect("there is one connection");
                    report_stuck.send(()).unwrap();
                    released.recv().unwrap();
                    std::future::pending().await
                }
            };
            let connections = Box::pin(stream::iter([()]));
            let _running = shards.run(vec![connections], handler).unwrap();
            let control = Builder::new_current_thread().enable_all().build().unwrap();
            control.block_on(async {
                stuck.await.unwrap();
                let check = timeout(Duration::from_millis(100), liveness.check());
                assert!(check.await.is_err(), "{dispatch:?}");
                release.send(()).unwrap();
                liveness.check().await;
            });
        }
    }
}
