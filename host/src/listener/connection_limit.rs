//! The places for connections: those of all services, and those of each.

use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::PollSemaphore;

/// The places that a service has, of those that all services share. Clones are the same ones.
#[derive(Clone)]
pub struct ConnectionLimit {
    all: Arc<Semaphore>,
    of_service: Arc<Semaphore>,
    /// How many the service has.
    count: Arc<Mutex<usize>>,
}

/// A place, given back when it is dropped.
pub(super) struct ConnectionPermit {
    _of_service: OwnedSemaphorePermit,
    _of_all: OwnedSemaphorePermit,
}

impl ConnectionLimit {
    /// So many of `all` places, for one service.
    pub fn new(all: Arc<Semaphore>, count: usize) -> Self {
        Self {
            all,
            of_service: Arc::new(Semaphore::new(count)),
            count: Arc::new(Mutex::new(count)),
        }
    }

    /// From now on the service has so many. Where they are fewer, nobody loses a place, and nobody gets one
    /// until enough have been given back. To be called within a tokio runtime.
    pub fn resize(&self, to: usize) {
        let mut count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(more) = to.checked_sub(*count) {
            self.of_service.add_permits(more);
        } else {
            let fewer = *count - to;
            let taken = fewer - self.of_service.forget_permits(fewer);
            let places = self.of_service.clone();
            // It stands in line with the clients.
            tokio::spawn(async move {
                let taken = u32::try_from(taken).unwrap_or(u32::MAX);
                if let Ok(permits) = places.acquire_many(taken).await {
                    permits.forget();
                }
            });
        }
        *count = to;
    }

    /// A place, if there is one right now.
    pub(super) fn try_take(&self) -> Option<ConnectionPermit> {
        Some(ConnectionPermit {
            _of_service: self.of_service.clone().try_acquire_owned().ok()?,
            _of_all: self.all.clone().try_acquire_owned().ok()?,
        })
    }

    /// A line to stand in for a place.
    pub(super) fn line(&self) -> PermitQueue {
        PermitQueue {
            of_service: PollSemaphore::new(self.of_service.clone()),
            of_all: PollSemaphore::new(self.all.clone()),
        }
    }
}

/// Stands in line for places.
pub(super) struct PermitQueue {
    of_service: PollSemaphore,
    of_all: PollSemaphore,
}

impl PermitQueue {
    /// Ready with a place. Neither half of one is held by whoever waits for the other.
    pub(super) fn poll_take(&mut self, cx: &mut Context<'_>) -> Poll<ConnectionPermit> {
        const OPEN: &str = "it is never closed";
        let Poll::Ready(of_service) = self.of_service.poll_acquire(cx) else {
            // What it has waited for among all may have come: others have more use for it.
            self.of_all = self.of_all.clone();
            return Poll::Pending;
        };
        Poll::Ready(ConnectionPermit {
            _of_all: ready!(self.of_all.poll_acquire(cx)).expect(OPEN),
            _of_service: of_service.expect(OPEN),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(line: &mut PermitQueue) -> Option<ConnectionPermit> {
        match line.poll_take(&mut Context::from_waker(std::task::Waker::noop())) {
            Poll::Ready(taken) => Some(taken),
            Poll::Pending => None,
        }
    }

    #[test]
    fn who_waits_for_one_half_of_a_place_holds_no_other() {
        let all = Arc::new(Semaphore::new(2));
        let (full, other) = (
            ConnectionLimit::new(all.clone(), 1),
            ConnectionLimit::new(all.clone(), 2),
        );
        let mut lines = [full.line(), full.line()];
        let elsewhere = [other.try_take(), other.try_take()];
        // The second stands in line among all, with the half of the service given back.
        assert!(take(&mut lines[1]).is_none());
        drop(elsewhere);
        let first = full.try_take();
        assert!(first.is_some());
        // Now there is one for it among all, and none of the service.
        assert!(take(&mut lines[1]).is_none());
        assert!(other.try_take().is_some());
        drop(first);
        assert!(take(&mut lines[1]).is_some());
        assert!(take(&mut lines[0]).is_some());
        assert_eq!(all.available_permits(), 2);
    }

    #[tokio::test]
    async fn a_service_may_have_more_or_fewer() {
        let places = ConnectionLimit::new(Arc::new(Semaphore::new(100)), 2);
        let mut taken: Vec<_> = (0..2).map(|_| places.try_take().unwrap()).collect();
        assert!(places.try_take().is_none());
        places.resize(3);
        taken.extend(places.try_take());
        assert_eq!(taken.len(), 3);
        places.resize(1);
        for left in (0..3).rev() {
            tokio::task::yield_now().await;
            assert!(places.try_take().is_none(), "{left} more are taken");
            taken.pop();
        }
        tokio::task::yield_now().await;
        assert!(places.try_take().is_some());
        let one = places.try_take();
        assert!(one.is_some() && places.try_take().is_none());
        places.resize(5);
        places.resize(2);
        assert!(places.try_take().is_some());
    }
}
