//! Limits of concurrent connections: of all services together, and of each.

use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, ready};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::PollSemaphore;

use crate::sync::lock;

/// The connection limit of a service, within the limit of the server. Clones share it.
#[derive(Clone)]
pub struct ConnectionLimit {
    server: Arc<Semaphore>,
    service: Arc<Semaphore>,
    /// Permits of the service, taken or not.
    size: Arc<Mutex<usize>>,
}

/// Permit for one connection. Released when dropped.
pub(super) struct ConnectionPermit {
    _service: OwnedSemaphorePermit,
    _server: OwnedSemaphorePermit,
}

impl ConnectionLimit {
    /// Limits a service to `size` connections, within the permits of `server`.
    pub fn new(server: Arc<Semaphore>, size: usize) -> Self {
        Self {
            server,
            service: Arc::new(Semaphore::new(size)),
            size: Arc::new(Mutex::new(size)),
        }
    }

    /// Changes the limit of the service to `new_size`.
    ///
    /// A lower limit ends no connection. It takes effect as connections end. Call this within a
    /// tokio runtime.
    pub fn resize(&self, new_size: usize) {
        let mut size = lock(&self.size);
        if let Some(added) = new_size.checked_sub(*size) {
            self.service.add_permits(added);
        } else {
            let removed = *size - new_size;
            let in_use = removed - self.service.forget_permits(removed);
            let service = self.service.clone();
            // Waits in the queue of the semaphore, among the shards that wait for a permit.
            tokio::spawn(async move {
                let in_use = u32::try_from(in_use).unwrap_or(u32::MAX);
                if let Ok(permits) = service.acquire_many(in_use).await {
                    permits.forget();
                }
            });
        }
        *size = new_size;
    }

    /// A permit, if one is free.
    pub(super) fn try_acquire(&self) -> Option<ConnectionPermit> {
        Some(ConnectionPermit {
            _service: self.service.clone().try_acquire_owned().ok()?,
            _server: self.server.clone().try_acquire_owned().ok()?,
        })
    }

    /// A queue to wait for a permit.
    pub(super) fn queue(&self) -> PermitQueue {
        PermitQueue {
            service: PollSemaphore::new(self.service.clone()),
            server: PollSemaphore::new(self.server.clone()),
        }
    }
}

/// Waits for permits.
pub(super) struct PermitQueue {
    service: PollSemaphore,
    server: PollSemaphore,
}

impl PermitQueue {
    /// Ready with a permit. Never holds a permit of one limit while waiting for the other.
    pub(super) fn poll_acquire(&mut self, cx: &mut Context<'_>) -> Poll<ConnectionPermit> {
        const OPEN: &str = "the semaphore is never closed";
        let Poll::Ready(service) = self.service.poll_acquire(cx) else {
            // A clone waits for no permit. This returns a permit of the server that an earlier poll
            // may have waited for, so that another service can use it.
            self.server = self.server.clone();
            return Poll::Pending;
        };
        Poll::Ready(ConnectionPermit {
            _server: ready!(self.server.poll_acquire(cx)).expect(OPEN),
            _service: service.expect(OPEN),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn acquire(queue: &mut PermitQueue) -> Option<ConnectionPermit> {
        match queue.poll_acquire(&mut Context::from_waker(std::task::Waker::noop())) {
            Poll::Ready(permit) => Some(permit),
            Poll::Pending => None,
        }
    }

    #[test]
    fn a_waiter_for_one_limit_holds_no_permit_of_the_other() {
        let server = Arc::new(Semaphore::new(2));
        let full = ConnectionLimit::new(server.clone(), 1);
        let other = ConnectionLimit::new(server.clone(), 2);
        let mut queues = [full.queue(), full.queue()];
        let others = [other.try_acquire(), other.try_acquire()];
        // The second queue waits for the server and has returned the permit of the service.
        assert!(acquire(&mut queues[1]).is_none());
        drop(others);
        let first = full.try_acquire();
        assert!(first.is_some());
        // Now the server has a permit for it, and the service has none.
        assert!(acquire(&mut queues[1]).is_none());
        assert!(other.try_acquire().is_some());
        drop(first);
        assert!(acquire(&mut queues[1]).is_some());
        assert!(acquire(&mut queues[0]).is_some());
        assert_eq!(server.available_permits(), 2);
    }

    #[tokio::test]
    async fn the_limit_of_a_service_can_be_raised_and_lowered() {
        let limit = ConnectionLimit::new(Arc::new(Semaphore::new(100)), 2);
        let mut permits: Vec<_> = (0..2).map(|_| limit.try_acquire().unwrap()).collect();
        assert!(limit.try_acquire().is_none());
        limit.resize(3);
        permits.extend(limit.try_acquire());
        assert_eq!(permits.len(), 3);
        limit.resize(1);
        for left in (0..3).rev() {
            tokio::task::yield_now().await;
            assert!(limit.try_acquire().is_none(), "{left} more are taken");
            permits.pop();
        }
        tokio::task::yield_now().await;
        assert!(limit.try_acquire().is_some());
        let only = limit.try_acquire();
        assert!(only.is_some() && limit.try_acquire().is_none());
        limit.resize(5);
        limit.resize(2);
        assert!(limit.try_acquire().is_some());
    }
}
