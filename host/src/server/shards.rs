//! The threads that connections run on.

use std::sync::Arc;
use std::thread;

use futures::Stream;
use futures::channel::oneshot;
use tokio::runtime::{Builder, Handle, Runtime};

use super::balance::{Balanced, ShardLoad, balanced};
use super::{Dispatch, dispatch_all};
use crate::Error;

/// Runtimes for connections: with [`Dispatch::Spawn`] one of several threads, which share all
/// tasks, and with [`Dispatch::Concurrent`] one for each thread, which share nothing.
///
/// A thread that shares nothing with others needs no locks, and its caches stay its own. In return a
/// connection stays on the thread that it began on: so each is begun where there are not clearly
/// more.
pub struct Shards {
    dispatch: Dispatch,
    runtimes: Vec<Runtime>,
}

impl Shards {
    /// Makes runtimes for `threads` threads.
    ///
    /// # Errors
    ///
    /// [`Error::Internal`] when the system has no more files or threads for us.
    pub fn new(dispatch: Dispatch, threads: usize) -> Result<Self, Error> {
        let count = match dispatch {
            Dispatch::Spawn => 1,
            Dispatch::Concurrent => threads,
        };
        let runtimes = (0..count)
            .map(|_| runtime(dispatch, threads))
            .collect::<Result<_, _>>()
            .map_err(|error| Error::internal("starting a runtime", error))?;
        Ok(Self { dispatch, runtimes })
    }

    /// How many streams of connections there are to be: one for each runtime.
    pub fn count(&self) -> usize {
        self.runtimes.len()
    }

    /// The runtimes, to make what is to be polled there.
    pub fn handles(&self) -> Vec<Handle> {
        self.runtimes
            .iter()
            .map(|runtime| runtime.handle().clone())
            .collect()
    }

    /// Handles the connections of each stream on its runtime. The futures resolve when their stream
    /// has ended and the connections are done; to an error if the thread has died.
    pub(super) fn run<S, H, F>(
        self,
        connections: Vec<S>,
        handler: H,
    ) -> Result<Vec<oneshot::Receiver<()>>, Error>
    where
        S: Stream + Send + Unpin + 'static,
        S::Item: Send + 'static,
        H: Fn(S::Item) -> F + Clone + Send + Sync + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        let dispatch = self.dispatch;
        self.runtimes
            .into_iter()
            .zip(balanced(connections))
            .map(|(runtime, connections)| {
                let work = count_open(connections, handler.clone(), dispatch);
                let (done, ended) = oneshot::channel();
                thread::Builder::new()
                    .name("connections".into())
                    .spawn(move || {
                        // A task of its own runs on the runtime's threads. The one that blocks here
                        // would have to be woken by one of them for each connection.
                        let outcome = runtime.block_on(async { tokio::spawn(work).await });
                        if outcome.is_ok() {
                            // Whoever waited for it may have given up.
                            let _ = done.send(());
                        }
                    })
                    .map_err(|error| Error::internal("starting a thread", error))?;
                Ok(ended)
            })
            .collect()
    }
}

/// Tells whether the threads that connections run on go on.
pub struct Liveness(Vec<Handle>);

impl Liveness {
    /// Of these runtimes.
    pub fn new(runtimes: Vec<Handle>) -> Self {
        Self(runtimes)
    }

    /// Resolves when each has had a turn. One that has ended, as those do that have drained, needs none.
    pub async fn check(&self) {
        for runtime in &self.0 {
            let _ = runtime.spawn(async {}).await;
        }
    }
}

/// Handles `connections`, and keeps count of those that are open for the sake of the balance.
async fn count_open<S, H, F>(connections: Balanced<S>, handler: H, dispatch: Dispatch)
where
    S: Stream + Unpin,
    H: Fn(S::Item) -> F,
    F: Future<Output = ()> + Send + 'static,
{
    let load: Arc<ShardLoad> = connections.load();
    let handler = |connection| {
        let place = load.clone().place();
        let handling = handler(connection);
        async move {
            handling.await;
            drop(place);
        }
    };
    dispatch_all(connections, handler, dispatch).await;
}

fn runtime(dispatch: Dispatch, threads: usize) -> std::io::Result<Runtime> {
    let mut builder = match dispatch {
        Dispatch::Spawn => {
            let mut builder = Builder::new_multi_thread();
            builder.worker_threads(threads);
            builder
        }
        Dispatch::Concurrent => {
            let mut builder = Builder::new_current_thread();
            // Sockets are looked at after so many turns of tasks. All connections are one task
            // here, whose turn takes as long as theirs together.
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

    #[test]
    fn there_is_no_pulse_while_a_thread_is_stuck() {
        for dispatch in [Dispatch::Concurrent, Dispatch::Spawn] {
            let shards = Shards::new(dispatch, 1).unwrap();
            let pulse = Liveness::new(shards.handles());
            let (is_stuck, stuck) = oneshot::channel();
            let (go_on, release) = mpsc::channel::<()>();
            let held = Arc::new(Mutex::new(Some((is_stuck, release))));
            let handler = move |()| {
                let held = held.lock().unwrap().take();
                async move {
                    let (is_stuck, release) = held.expect("there is one connection");
                    is_stuck.send(()).unwrap();
                    release.recv().unwrap();
                    std::future::pending().await
                }
            };
            let connections = Box::pin(stream::iter([()]));
            let _running = shards.run(vec![connections], handler).unwrap();
            let control = Builder::new_current_thread().enable_all().build().unwrap();
            control.block_on(async {
                stuck.await.unwrap();
                let beat = timeout(Duration::from_millis(100), pulse.check());
                assert!(beat.await.is_err(), "{dispatch:?}");
                go_on.send(()).unwrap();
                pulse.check().await;
            });
        }
    }
}
