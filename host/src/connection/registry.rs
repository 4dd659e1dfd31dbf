//! The connections that are open, for an operator to see and to end.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use futures::task::AtomicWaker;

use super::Version;
use crate::net::Peer;

/// So many locks, so that threads seldom want the same one.
const SHARDS: usize = 16;

/// All connections that are open.
#[derive(Default)]
pub struct ConnectionRegistry {
    shards: [Mutex<HashMap<u64, Arc<ConnectionRecord>>>; SHARDS],
}

/// Whether the connections of a service are to end at once, those that begin now among them.
#[derive(Debug, Default)]
pub struct KillSwitch(AtomicBool);

impl ConnectionRegistry {
    /// Adds a connection until what is returned is dropped.
    pub(super) fn add(self: &Arc<Self>, entry: ConnectionRecord) -> Registration {
        let entry = Arc::new(entry);
        self.shard(entry.id).insert(entry.id, entry.clone());
        // Whoever ends all looks at the shards after it has said so: it finds this one, or is found.
        if entry.version.cutoff.0.load(Ordering::SeqCst) {
            entry.end(EndReason::ServerEnds);
        }
        Registration {
            entry,
            open: self.clone(),
        }
    }

    fn shard(&self, id: u64) -> MutexGuard<'_, HashMap<u64, Arc<ConnectionRecord>>> {
        let shard = &self.shards[id as usize % SHARDS];
        shard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All of them, by their number: in the order in which they began.
    pub fn list(&self) -> Vec<Arc<ConnectionRecord>> {
        let shards = 0..SHARDS as u64;
        let mut list: Vec<_> = shards
            .flat_map(|shard| self.shard(shard).values().cloned().collect::<Vec<_>>())
            .collect();
        list.sort_by_key(|entry| entry.id);
        list
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        let shards = 0..SHARDS as u64;
        shards.map(|shard| self.shard(shard).len()).sum()
    }

    /// Resets the connection of this number. False if there is none.
    pub fn kill(&self, id: u64) -> bool {
        let entry = self.shard(id).get(&id).cloned();
        entry.inspect(|entry| entry.end(EndReason::Kill)).is_some()
    }

    /// Ends those of a service that are open, and those that begin from now on.
    pub fn end_all(&self, cutoff: &Arc<KillSwitch>) {
        cutoff.0.store(true, Ordering::SeqCst);
        for entry in self.list() {
            if Arc::ptr_eq(&entry.version.cutoff, cutoff) {
                entry.end(EndReason::ServerEnds);
            }
        }
    }

    /// Ends those that are served with `version`, which has been replaced for too long.
    pub fn end_old(&self, version: &Arc<Version>) {
        for entry in self.list() {
            if Arc::ptr_eq(&entry.version, version) {
                entry.end(EndReason::TooOld);
            }
        }
    }
}

/// Why a connection is told to end.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(u8)]
pub(super) enum EndReason {
    Kill = 1,
    TooOld,
    ServerEnds,
}

/// A connection that is open.
pub struct ConnectionRecord {
    /// Its number.
    pub id: u64,
    /// The client.
    pub peer: Peer,
    /// The proxy that speaks for it, if one does.
    pub via: Option<SocketAddr>,
    /// What it is served with.
    pub version: Arc<Version>,
    /// When it began.
    pub began: Instant,
    /// What it has used so far.
    pub used: Usage,
    order: AtomicU8,
    waker: AtomicWaker,
}

impl ConnectionRecord {
    /// A connection that begins now.
    pub(super) fn new(peer: Peer, via: Option<SocketAddr>, version: Arc<Version>) -> Self {
        static NEXT_ID: AtomicU64 = AtomicU64::new(1);
        Self {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            peer,
            via,
            version,
            began: Instant::now(),
            used: Usage::default(),
            order: AtomicU8::new(0),
            waker: AtomicWaker::new(),
        }
    }

    /// Tells it to end. The first order is the one.
    fn end(&self, order: EndReason) {
        let first =
            self.order
                .compare_exchange(0, order as u8, Ordering::Release, Ordering::Relaxed);
        if first.is_ok() {
            self.waker.wake();
        }
    }

    /// Ready when it is told to end.
    pub(super) fn poll_end_reason(&self, cx: &mut Context<'_>) -> Poll<EndReason> {
        self.waker.register(cx.waker());
        match self.order.load(Ordering::Acquire) {
            1 => Poll::Ready(EndReason::Kill),
            2 => Poll::Ready(EndReason::TooOld),
            3 => Poll::Ready(EndReason::ServerEnds),
            _ => Poll::Pending,
        }
    }
}

/// What a connection has used. One writes it, anyone reads it.
#[derive(Debug, Default)]
pub struct Usage {
    received: AtomicU64,
    sent: AtomicU64,
    /// In microseconds.
    computed: AtomicU64,
    memory: AtomicU64,
    /// In nanoseconds. Zero: there is no instance.
    instantiation: AtomicU64,
}

impl Usage {
    /// What was received, in bytes.
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// What was sent, in bytes.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// How long its guest has computed, as the clock of the guests has it: right on the average.
    pub fn computed(&self) -> Duration {
        Duration::from_micros(self.computed.load(Ordering::Relaxed))
    }

    /// The memory that its guest has, in bytes: memories do not shrink.
    pub fn memory(&self) -> u64 {
        self.memory.load(Ordering::Relaxed)
    }

    /// How long it took to make its instance. None if there is none.
    pub fn instantiation(&self) -> Option<Duration> {
        match self.instantiation.load(Ordering::Relaxed) {
            0 => None,
            nanos => Some(Duration::from_nanos(nanos)),
        }
    }

    pub(super) fn receive(&self, n: usize) {
        add(&self.received, n as u64);
    }

    pub(super) fn send(&self, n: usize) {
        add(&self.sent, n as u64);
    }

    pub(super) fn set_computed(&self, time: Duration) {
        self.computed
            .store(time.as_micros() as u64, Ordering::Relaxed);
    }

    pub(super) fn set_memory(&self, bytes: usize) {
        self.memory.store(bytes as u64, Ordering::Relaxed);
    }

    pub(super) fn set_instantiation(&self, took: Duration) {
        let nanos = took.as_nanos().max(1) as u64;
        self.instantiation.store(nanos, Ordering::Relaxed);
    }
}

/// Adds to what nobody else writes: cheaper than an atomic addition.
fn add(figure: &AtomicU64, more: u64) {
    let sum = figure.load(Ordering::Relaxed) + more;
    figure.store(sum, Ordering::Relaxed);
}

/// A connection's place among those that are open.
pub(super) struct Registration {
    entry: Arc<ConnectionRecord>,
    open: Arc<ConnectionRegistry>,
}

impl std::ops::Deref for Registration {
    type Target = Arc<ConnectionRecord>;

    fn deref(&self) -> &Self::Target {
        &self.entry
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.open.shard(self.entry.id).remove(&self.entry.id);
    }
}
