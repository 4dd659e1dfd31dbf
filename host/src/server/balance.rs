//! Connections begin where there are fewer.
//!
//! The kernel spreads connections over the listeners of an address by chance, not by load. Whoever
//! accepts one where clearly more are open than elsewhere passes it on. It compares itself with one
//! other at a time, in turn: that comes close to the best choice and costs the same for any number
//! of them.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};

use futures::Stream;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

/// How many connections are open on a shard.
#[derive(Default)]
pub(super) struct ShardLoad {
    open: AtomicUsize,
}

impl ShardLoad {
    /// Counts a connection in, until the place is dropped.
    pub(super) fn place(self: Arc<Self>) -> LoadGuard {
        self.open.fetch_add(1, Ordering::Relaxed);
        LoadGuard(self)
    }

    fn open(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }
}

/// An open connection's part of a [`Load`].
pub(super) struct LoadGuard(Arc<ShardLoad>);

impl Drop for LoadGuard {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Whether a connection is to be passed on from where `own` are open to where `other` are.
///
/// Passing one on wakes another thread, which costs about as much as a sandbox does; and chance is
/// no bad balance, of large numbers above all. So a few more than elsewhere are left as they are.
fn passes_on(own: usize, other: usize) -> bool {
    own > other + other / 4 + 4
}

/// The connections of one shard: its own stream's, less what it passes on, and what others pass on
/// to it.
pub(super) struct Balanced<S: Stream> {
    /// None when it has ended.
    connections: Option<S>,
    load: Arc<ShardLoad>,
    passed_on: UnboundedReceiver<S::Item>,
    /// Empty when our own stream has ended: theirs end when nobody can pass on anything.
    others: Vec<(Arc<ShardLoad>, UnboundedSender<S::Item>)>,
    /// The one to compare with next.
    next: usize,
}

/// Balances `connections` among each other. What is on its way between two of them is a connection
/// that was accepted and so has a place among those that may be open: there are never more of them.
pub(super) fn balanced<S: Stream>(connections: Vec<S>) -> Vec<Balanced<S>> {
    let (shards, receivers): (Vec<_>, Vec<_>) = connections
        .iter()
        .map(|_| {
            let (sender, receiver) = unbounded_channel();
            ((Arc::new(ShardLoad::default()), sender), receiver)
        })
        .unzip();
    connections
        .into_iter()
        .zip(receivers)
        .enumerate()
        .map(|(own, (connections, passed_on))| {
            let mut others = shards.clone();
            let (load, _) = others.remove(own);
            Balanced {
                connections: Some(connections),
                load,
                passed_on,
                others,
                next: own,
            }
        })
        .collect()
}

impl<S: Stream> Balanced<S> {
    pub(super) fn load(&self) -> Arc<ShardLoad> {
        self.load.clone()
    }

    /// Passes a connection on, or gives it back to be kept.
    fn pass_on(&mut self, connection: S::Item) -> Option<S::Item> {
        if self.others.is_empty() {
            return Some(connection);
        }
        self.next = (self.next + 1) % self.others.len();
        let (load, sender) = &self.others[self.next];
        if passes_on(self.load.open(), load.open()) {
            // It fails where the other thread has died, which ends the server.
            sender.send(connection).err().map(|returned| returned.0)
        } else {
            Some(connection)
        }
    }
}

impl<S: Stream + Unpin> Stream for Balanced<S> {
    type Item = S::Item;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<S::Item>> {
        let this = self.get_mut();
        let passed_on = this.passed_on.poll_recv(cx);
        if let Poll::Ready(Some(_)) = passed_on {
            return passed_on;
        }
        while let Some(connections) = &mut this.connections {
            match Pin::new(connections).poll_next(cx) {
                Poll::Ready(Some(connection)) => {
                    if let Some(kept) = this.pass_on(connection) {
                        return Poll::Ready(Some(kept));
                    }
                }
                Poll::Ready(None) => {
                    this.connections = None;
                    this.others.clear();
                }
                Poll::Pending => return Poll::Pending,
            }
        }
        passed_on
    }
}

#[cfg(test)]
mod tests {
    use futures::{StreamExt, stream};

    use super::*;

    #[test]
    fn a_few_more_are_left_and_many_more_are_not() {
        assert!(!passes_on(4, 0));
        assert!(passes_on(5, 0));
        assert!(!passes_on(129, 100));
        assert!(passes_on(130, 100));
    }

    #[test]
    fn what_is_accepted_on_one_side_is_shared() {
        let sides = balanced(vec![stream::iter(0..100).boxed(), stream::empty().boxed()]);
        let mut sides = sides.into_iter();
        let (left, right) = (sides.next().unwrap(), sides.next().unwrap());
        let keep = |side: Balanced<_>| {
            let load = side.load();
            side.map(move |n: i32| (n, load.clone().place()))
        };
        let (mut left, mut right) = (keep(left), keep(right));
        let mut cx = Context::from_waker(std::task::Waker::noop());
        let (mut on_left, mut on_right) = (Vec::new(), Vec::new());
        loop {
            let l = left.poll_next_unpin(&mut cx);
            let r = right.poll_next_unpin(&mut cx);
            if let (Poll::Ready(None), Poll::Ready(None)) = (&l, &r) {
                break;
            }
            for (side, item) in [(&mut on_left, l), (&mut on_right, r)] {
                if let Poll::Ready(Some(item)) = item {
                    side.push(item);
                }
            }
        }
        // 52 and 41 would not pass one on, and 53 and 38 would.
        assert_eq!(on_left.len() + on_right.len(), 100);
        assert!(
            on_right.len() > 35,
            "{} and {}",
            on_left.len(),
            on_right.len()
        );
    }
}
