//! Pauses between two calls of `accept`.

use std::io;
use std::pin::Pin;
use std::sync::LazyLock;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::registry::Registry;
use tokio::time::Sleep;
use tracing::{debug, info, warn};

/// First pause after a failed `accept`. It doubles with each further failure.
///
/// A shortage (EMFILE, ENOBUFS) lasts, and immediate retries would use a whole core.
const MIN_DELAY: Duration = Duration::from_millis(10);

/// Longest pause after a failed `accept`.
const MAX_DELAY: Duration = Duration::from_secs(1);

/// Failures of `accept` because of a shortage, since the process began.
static ACCEPT_ERRORS: LazyLock<Counter> = LazyLock::new(Counter::default);

/// Registers the count of failed accepts.
pub fn register(registry: &mut Registry) {
    registry.register(
        "accept_errors",
        "Failures to accept a connection because of a lack of resources",
        ACCEPT_ERRORS.clone(),
    );
}

/// Failures of `accept` because of a shortage, since the process began.
pub(crate) fn accept_errors() -> u64 {
    ACCEPT_ERRORS.get()
}

/// A pause of an accept loop: after a failure, or for the accept rate.
pub(super) struct Backoff {
    pause: Option<Pin<Box<Sleep>>>,
    /// Length of the next pause after a failure.
    delay: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Self {
            pause: None,
            delay: MIN_DELAY,
        }
    }
}

impl Backoff {
    /// Ready when no pause is left.
    pub(super) fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if let Some(pause) = &mut self.pause {
            ready!(pause.as_mut().poll(cx));
            self.pause = None;
        }
        Poll::Ready(())
    }

    /// Whether there is a pause that [`Self::poll_ready`] has to wait for.
    pub(super) fn is_pausing(&self) -> bool {
        self.pause.is_some()
    }

    /// Starts a pause.
    pub(super) fn pause(&mut self, length: Duration) {
        self.pause = Some(Box::pin(tokio::time::sleep(length)));
    }

    /// Starts a pause after a failed `accept`.
    ///
    /// No pause follows an error that is about one client only.
    pub(super) fn accept_failed(&mut self, error: &io::Error) {
        if is_clients_fault(error) {
            debug!(%error, "a client left before it was accepted");
            return;
        }
        ACCEPT_ERRORS.inc();
        warn!(%error, retry_in = ?self.delay, "cannot accept connections");
        self.pause(self.delay);
        self.delay = (self.delay * 2).min(MAX_DELAY);
    }

    /// Resets the delay after a successful `accept`.
    pub(super) fn accept_succeeded(&mut self) {
        if self.delay > MIN_DELAY {
            info!("accepting connections again");
            self.delay = MIN_DELAY;
        }
    }
}

/// Whether `error` is about one client only.
///
/// Linux reports errors that a new connection already has through `accept` (accept(2), "Error
/// handling").
fn is_clients_fault(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::Interrupted
    )
}
