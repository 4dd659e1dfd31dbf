//! Balances new connections over the shards.
//!
//! The kernel spreads connections over the listeners of an address by chance, not by load. A shard
//! that accepts a connection while it has clearly more than another passes it on. It compares
//! itself with one other shard at a time, in turn: that comes close to the best choice, at the same
//! cost for any number of shards.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};

use futures::Stream;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

/// Open connections of a shard.
#[derive(Default)]
pub(super) struct ShardLoad {
    open: AtomicUsize,
}

impl ShardLoad {
    /// Counts a connection until the guard is dropped.
    pub(super) fn count_connection(self: Arc<Self>) -> LoadGuard {
        self.open.fetch_add(1, Ordering::Relaxed);
        LoadGuard(self)
    }

    fn open(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }
}

/// One open connection of a [`ShardLoad`].
pub(super) struct LoadGuard(Arc<ShardLoad>);

impl Drop for LoadGuard {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Whether a shard passes a new connection to another shard.
///
/// `own` and `other` are their open connections.
///
/// Passing a connection on wakes another thread, which costs about as much as a sandbox. Chance
/// balances large numbers well enough, so a small difference stays.
fn should_pass_on(own: usize, other: usize) -> bool {
    own > other + other / 4 + 4
}

/// The connections of one shard: from its own stream and from other shards.
pub(super) struct Balanced<S: Stream> {
    /// None if the stream has ended.
    connections: Option<S>,
    load: Arc<ShardLoad>,
    received: UnboundedReceiver<S::Item>,
    /// Empty if the own stream has ended. The streams of other shards end when all senders are
    /// gone.
    others: Vec<(Arc<ShardLoad>, UnboundedSender<S::Item>)>,
    /// The shard to compare with next.
    next: usize,
}

/// Balances the streams of all shards.
///
/// The channels between shards need no bound: each connection in them holds one of the permits that
/// limit the open connections.
pub(super) fn balance<S: Stream>(streams: Vec<S>) -> Vec<Balanced<S>> {
    let (shards, receivers): (Vec<_>, Vec<_>) = streams
        .iter()
        .map(|_| {
            let (sender, receiver) = unbounded_channel();
            ((Arc::new(ShardLoad::default()), sender), receiver)
        })
        .unzip();
    streams
        .into_iter()
        .zip(receivers)
        .enumerate()
        .map(|(own, (connections, received))| {
            let mut others = shards.clone();
            let (load, _) = others.remove(own);
            Balanced {
                connections: Some(connections),
                load,
                received,
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

    /// Passes a connection to another shard, or returns it if it stays.
    fn pass_on(&mut self, connection: S::Item) -> Option<S::Item> {
        if self.others.is_empty() {
            return Some(connection);
        }
        self.next = (self.next + 1) % self.others.len();
        let (load, sender) = &self.others[self.next];
        if should_pass_on(self.load.open(), load.open()) {
            // Fails if the other thread has died, which ends the server.
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
        let received = this.received.poll_recv(cx);
        if let Poll::Ready(Some(_)) = received {
            return received;
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
        received
    }
}

#[cfg(test)]
mod tests {
    use futures::{StreamExt, stream};

    use super::*;

    #[test]
    fn small_differences_stay_and_large_ones_are_balanced() {
        assert!(!should_pass_on(4, 0));
        assert!(should_pass_on(5, 0));
        assert!(!should_pass_on(129, 100));
        assert!(should_pass_on(130, 100));
    }

    #[test]
    fn connections_accepted_by_one_shard_are_shared() {
        let shards = balance(vec![stream::iter(0..100).boxed(), stream::empty().boxed()]);
        let mut shards = shards.into_iter();
        let (left, right) = (shards.next().unwrap(), shards.next().unwrap());
        let keep_open = |shard: Balanced<_>| {
            let load = shard.load();
            shard.map(move |n: i32| (n, load.clone().count_connection()))
        };
        let (mut left, mut right) = (keep_open(left), keep_open(right));
        let mut cx = Context::from_waker(std::task::Waker::noop());
        let (mut on_left, mut on_right) = (Vec::new(), Vec::new());
        loop {
            let l = left.poll_next_unpin(&mut cx);
            let r = right.poll_next_unpin(&mut cx);
            if let (Poll::Ready(None), Poll::Ready(None)) = (&l, &r) {
                break;
            }
            for (connections, item) in [(&mut on_left, l), (&mut on_right, r)] {
                if let Poll::Ready(Some(item)) = item {
                    connections.push(item);
                }
            }
        }
        // A shard with 52 keeps a connection if the other has 41, and passes it on if that has 38.
        assert_eq!(on_left.len() + on_right.len(), 100);
        assert!(
            on_right.len() > 35,
            "{} and {}",
            on_left.len(),
            on_right.len()
        );
    }
}
