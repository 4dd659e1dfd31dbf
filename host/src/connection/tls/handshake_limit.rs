//! The places for handshakes: so many at once, of all clients and of each source.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::limit::Limit;
use crate::listener::Source;

/// The places for handshakes. Nobody has more than half of them: clients that begin one and go no further
/// would keep those of others waiting.
pub(super) struct HandshakeLimit {
    places: Arc<Semaphore>,
    /// Of one source.
    most: usize,
    /// Of the sources that have some, or wait for one.
    of_source: Mutex<HashMap<Source, Arc<Semaphore>>>,
}

/// A place, given back when it is dropped.
pub(super) struct HandshakePermit<'a> {
    // In this order: who waits among those of its source is not to be let on before there is a place.
    _among_all: Option<OwnedSemaphorePermit>,
    _of_source: Option<SourceHandshakePermit<'a>>,
}

/// One of the places of a source, or the wish for one.
struct SourceHandshakePermit<'a> {
    handshakes: &'a HandshakeLimit,
    source: Source,
    permit: Option<OwnedSemaphorePermit>,
}

impl HandshakeLimit {
    /// So many at once.
    pub(super) fn new(most: usize) -> Self {
        Self {
            places: Arc::new(Semaphore::new(most.min(Semaphore::MAX_PERMITS))),
            most: most.div_ceil(2).min(Semaphore::MAX_PERMITS),
            of_source: Mutex::default(),
        }
    }

    /// A place for a client of `source`, as soon as there is one. Where sources do not count, there is none.
    pub(super) async fn place(&self, source: Option<Source>) -> HandshakePermit<'_> {
        let mut has_waited = false;
        let mut of_source = source.map(|source| SourceHandshakePermit {
            handshakes: self,
            source,
            permit: None,
        });
        if let Some(place) = &mut of_source {
            place.permit = take(self.places_of(place.source), &mut has_waited).await;
        }
        HandshakePermit {
            _among_all: take(self.places.clone(), &mut has_waited).await,
            _of_source: of_source,
        }
    }

    fn places_of(&self, source: Source) -> Arc<Semaphore> {
        let mut of_source = self.of_source();
        let places = of_source.entry(source);
        let new = || Arc::new(Semaphore::new(self.most));
        places.or_insert_with(new).clone()
    }

    fn of_source(&self) -> MutexGuard<'_, HashMap<Source, Arc<Semaphore>>> {
        let of_source = self.of_source.lock();
        of_source.unwrap_or_else(PoisonError::into_inner)
    }
}

/// One of the places. Whoever waits for one is counted once.
async fn take(places: Arc<Semaphore>, has_waited: &mut bool) -> Option<OwnedSemaphorePermit> {
    if let Ok(place) = places.clone().try_acquire_owned() {
        return Some(place);
    }
    if !std::mem::replace(has_waited, true) {
        Limit::MaxHandshakes.count();
    }
    // It is never closed.
    places.acquire_owned().await.ok()
}

impl Drop for SourceHandshakePermit<'_> {
    fn drop(&mut self) {
        self.permit = None;
        let mut of_source = self.handshakes.of_source();
        let places = of_source.get(&self.source);
        // Who has a place, or waits for one, holds it as well.
        if places.is_some_and(|places| Arc::strong_count(places) == 1) {
            of_source.remove(&self.source);
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
    fn no_source_has_more_than_half() {
        let handshakes = HandshakeLimit::new(4);
        let place = |of| handshakes.place(of).now_or_never();
        let mut places = vec![place(source(1)).unwrap(), place(source(1)).unwrap()];
        assert!(place(source(1)).is_none());
        places.push(place(source(2)).unwrap());
        places.push(place(None).unwrap());
        assert!(place(source(3)).is_none());
        places.remove(0);
        let third = place(source(3)).unwrap();
        assert!(place(source(1)).is_none());
        drop((places, third));
        assert!(handshakes.of_source().is_empty());
        assert_eq!(handshakes.places.available_permits(), 4);
    }

    #[test]
    fn who_waits_is_next_and_forgotten_when_it_gives_up() {
        let handshakes = HandshakeLimit::new(1);
        let first = handshakes.place(source(1)).now_or_never().unwrap();
        let mut second = Box::pin(handshakes.place(source(1)));
        assert!(second.as_mut().now_or_never().is_none());
        drop(first);
        assert!(second.as_mut().now_or_never().is_some());
        drop(second);
        assert!(handshakes.of_source().is_empty());
    }
}
