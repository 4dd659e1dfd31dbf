//! Limit on concurrent TLS handshakes, of all clients and of each source.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::limit::Limit;
use crate::listener::Source;
use crate::sync::lock;

/// Limit on concurrent TLS handshakes.
///
/// One source gets half of the permits at most: a client that begins handshakes without completing
/// them must not block the others.
pub(super) struct HandshakeLimit {
    permits: Arc<Semaphore>,
    max_per_source: usize,
    /// The sources that hold permits or wait for one.
    sources: Mutex<HashMap<Source, Arc<Semaphore>>>,
}

/// Permission for one handshake, returned when dropped.
pub(super) struct HandshakePermit<'a> {
    // Drop order: the global permit first, so a waiter of the same source never wakes without one.
    _global: Option<OwnedSemaphorePermit>,
    _source: Option<SourceHandshakePermit<'a>>,
}

/// A permit of one source, or its place in the queue.
struct SourceHandshakePermit<'a> {
    limit: &'a HandshakeLimit,
    source: Source,
    permit: Option<OwnedSemaphorePermit>,
}

impl HandshakeLimit {
    /// A limit of `max` concurrent handshakes.
    pub(super) fn new(max: usize) -> Self {
        Self {
            permits: Arc::new(Semaphore::new(max.min(Semaphore::MAX_PERMITS))),
            max_per_source: max.div_ceil(2).min(Semaphore::MAX_PERMITS),
            sources: Mutex::default(),
        }
    }

    /// Waits for a permit for a client of `source`. None: sources are not limited.
    pub(super) async fn acquire(&self, source: Option<Source>) -> HandshakePermit<'_> {
        let mut has_waited = false;
        let mut source = source.map(|source| SourceHandshakePermit {
            limit: self,
            source,
            permit: None,
        });
        if let Some(source) = &mut source {
            let permits = self.permits_of(source.source);
            source.permit = acquire(permits, &mut has_waited).await;
        }
        HandshakePermit {
            _global: acquire(self.permits.clone(), &mut has_waited).await,
            _source: source,
        }
    }

    fn permits_of(&self, source: Source) -> Arc<Semaphore> {
        let mut sources = self.sources();
        let permits = sources.entry(source);
        let new = || Arc::new(Semaphore::new(self.max_per_source));
        permits.or_insert_with(new).clone()
    }

    fn sources(&self) -> MutexGuard<'_, HashMap<Source, Arc<Semaphore>>> {
        lock(&self.sources)
    }
}

/// Waits for a permit. Counts the limit as met the first time that a client has to wait.
async fn acquire(permits: Arc<Semaphore>, has_waited: &mut bool) -> Option<OwnedSemaphorePermit> {
    if let Ok(permit) = permits.clone().try_acquire_owned() {
        return Some(permit);
    }
    if !std::mem::replace(has_waited, true) {
        Limit::MaxHandshakes.count();
    }
    // The semaphore is never closed.
    permits.acquire_owned().await.ok()
}

impl Drop for SourceHandshakePermit<'_> {
    fn drop(&mut self) {
        self.permit = None;
        let mut sources = self.limit.sources();
        let permits = sources.get(&self.source);
        // Each permit, and each waiter, holds a reference to the semaphore.
        if permits.is_some_and(|permits| Arc::strong_count(permits) == 1) {
            sources.remove(&self.source);
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    fn source(n: u32) -> Option<Source> {
        Some(Source::User(n))
    }

    #[test]
    fn one_source_gets_half_of_the_permits_at_most() {
        let limit = HandshakeLimit::new(4);
        let acquire = |source| limit.acquire(source).now_or_never();
        let mut permits = vec![acquire(source(1)).unwrap(), acquire(source(1)).unwrap()];
        assert!(acquire(source(1)).is_none());
        permits.push(acquire(source(2)).unwrap());
        permits.push(acquire(None).unwrap());
        assert!(acquire(source(3)).is_none());
        permits.remove(0);
        let third = acquire(source(3)).unwrap();
        assert!(acquire(source(1)).is_none());
        drop((permits, third));
        assert!(limit.sources().is_empty());
        assert_eq!(limit.permits.available_permits(), 4);
    }

    #[test]
    fn a_waiter_is_served_next_and_forgotten_when_it_gives_up() {
        let limit = HandshakeLimit::new(1);
        let first = limit.acquire(source(1)).now_or_never().unwrap();
        let mut second = Box::pin(limit.acquire(source(1)));
        assert!(second.as_mut().now_or_never().is_none());
        drop(first);
        assert!(second.as_mut().now_or_never().is_some());
        drop(second);
        assert!(limit.sources().is_empty());
    }
}
