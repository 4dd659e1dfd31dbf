//! The HTTP connections of the admin API: one request each, with deadlines.

use std::convert::Infallible;
use std::io;
use std::pin::pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tracing::{debug, warn};

use super::api::Api;
use super::long_running::LongRunning;
use crate::sync::lock;

/// Largest number of open admin connections; more wait in the kernel. Many times what operators need,
/// because any user of the machine can hold connections to a loopback address.
const MAX_CONNECTIONS: usize = 256;

/// Longest time for receiving the head of a request.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);

/// Longest time for a request and its response, apart from long-running requests.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(30);

/// Longest time for sending the last responses when the process exits.
const FINISH_TIMEOUT: Duration = Duration::from_secs(1);

/// Pause after a failed `accept`.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

/// Responses that have not been sent yet.
pub(super) struct ResponsesInProgress(Arc<Semaphore>);

impl Default for ResponsesInProgress {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(MAX_CONNECTIONS)))
    }
}

impl ResponsesInProgress {
    /// Counts a response until the permit is dropped.
    fn begin(&self) -> Option<OwnedSemaphorePermit> {
        self.0.clone().try_acquire_owned().ok()
    }

    /// Waits until all responses are sent, for at most [`FINISH_TIMEOUT`].
    pub(super) async fn finish(&self) {
        let all = self.0.acquire_many(MAX_CONNECTIONS as u32);
        // A client may never read its response.
        let _ = tokio::time::timeout(FINISH_TIMEOUT, all).await;
    }
}

/// Serves the connections that `accept` returns, without end.
pub(super) async fn serve<S>(
    api: Arc<Api>,
    in_progress: &ResponsesInProgress,
    accept: impl AsyncFn() -> io::Result<S>,
) -> io::Result<Infallible>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let permit = permits.clone().acquire_owned().await;
        let permit = permit.expect("the semaphore is never closed");
        match accept().await {
            Ok(stream) => {
                let api = api.clone();
                let in_progress = ResponsesInProgress(in_progress.0.clone());
                tokio::spawn(async move {
                    serve_connection(api, in_progress, stream).await;
                    drop(permit);
                });
            }
            Err(error) => {
                warn!(%error, "cannot accept an admin connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn serve_connection(
    api: Arc<Api>,
    in_progress: ResponsesInProgress,
    stream: impl AsyncRead + AsyncWrite + Unpin,
) {
    let long_running = &LongRunning::default();
    // Held from the request until the connection ends: the response is sent by then.
    let permit = &Mutex::new(None);
    let (api, in_progress) = (&*api, &in_progress);
    let answer = service_fn(|request| async move {
        *lock(permit) = in_progress.begin();
        let response = api.answer(request, long_running).await;
        if long_running.is_set() {
            // The response follows the log and has no end.
            *lock(permit) = None;
        }
        Ok::<_, Infallible>(response)
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), answer);
    let mut connection = pin!(connection);
    loop {
        match tokio::time::timeout(RESPONSE_TIMEOUT, connection.as_mut()).await {
            Ok(Ok(())) => return,
            Ok(Err(error)) => return debug!(%error, "an admin connection failed"),
            Err(_) if long_running.is_set() => {}
            Err(_) => return debug!("an admin client did not take its response in time"),
        }
    }
}
