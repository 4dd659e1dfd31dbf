//! The open connections, for an operator to list and to end.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll};
use std::time::Instant;

use futures::task::AtomicWaker;

use super::kill_switch::KillSwitch;
use super::outcome::EndReason;
use super::usage::Usage;
use super::version::Version;
use crate::net::Peer;
use crate::sync::lock;

/// Number of locks, so that two threads seldom contend for one.
const SHARDS: usize = 16;

/// All open connections of the server.
#[derive(Default)]
pub struct ConnectionRegistry {
    shards: [Mutex<HashMap<u64, Arc<ConnectionRecord>>>; SHARDS],
}

impl ConnectionRegistry {
    /// Adds a connection. Dropping the registration removes it.
    pub(super) fn add(self: Arc<Self>, record: ConnectionRecord) -> Registration {
        let record = Arc::new(record);
        self.shard(record.id).insert(record.id, record.clone());
        // `end_all` turns the switch on before it reads the shards: it finds this record, or this
        // record finds the switch on.
        if record.version.kill_switch.is_active() {
            record.end(EndReason::ServerShutdown);
        }
        Registration {
            record,
            registry: self,
        }
    }

    fn shard(&self, id: u64) -> MutexGuard<'_, HashMap<u64, Arc<ConnectionRecord>>> {
        lock(&self.shards[id as usize % SHARDS])
    }

    /// All open connections in the order of their start.
    pub fn list(&self) -> Vec<Arc<ConnectionRecord>> {
        let shards = 0..SHARDS as u64;
        let mut list: Vec<_> = shards
            .flat_map(|shard| self.shard(shard).values().cloned().collect::<Vec<_>>())
            .collect();
        list.sort_by_key(|record| record.id);
        list
    }

    /// Number of open connections.
    pub fn count(&self) -> usize {
        let shards = 0..SHARDS as u64;
        shards.map(|shard| self.shard(shard).len()).sum()
    }

    /// Resets the connection with this id. False if no such connection is open.
    pub fn kill(&self, id: u64) -> bool {
        let record = self.shard(id).get(&id).cloned();
        record
            .inspect(|record| record.end(EndReason::Killed))
            .is_some()
    }

    /// Ends all connections of the service with this switch.
    pub fn end_all(&self, kill_switch: &Arc<KillSwitch>) {
        kill_switch.activate();
        for record in self.list() {
            if Arc::ptr_eq(&record.version.kill_switch, kill_switch) {
                record.end(EndReason::ServerShutdown);
            }
        }
    }

    /// Ends the connections of `version`, which was replaced too long ago.
    pub fn end_old(&self, version: &Arc<Version>) {
        for record in self.list() {
            if Arc::ptr_eq(&record.version, version) {
                record.end(EndReason::VersionTooOld);
            }
        }
    }
}

/// An open connection.
pub struct ConnectionRecord {
    /// Number of the connection, unique in this process.
    pub id: u64,
    /// The client.
    pub peer: Peer,
    /// The proxy between the client and this server, if there is one.
    pub via: Option<SocketAddr>,
    /// The version that serves the connection.
    pub version: Arc<Version>,
    /// When a guest got the connection.
    pub began: Instant,
    /// Resources used so far.
    pub usage: Usage,
    /// An [`EndReason`], or zero.
    end_reason: AtomicU8,
    waker: AtomicWaker,
}

impl ConnectionRecord {
    /// Record of a connection that starts now.
    pub(super) fn new(peer: Peer, via: Option<SocketAddr>, version: Arc<Version>) -> Self {
        static NEXT_ID: AtomicU64 = AtomicU64::new(1);
        Self {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            peer,
            via,
            version,
            began: Instant::now(),
            usage: Usage::default(),
            end_reason: AtomicU8::new(0),
            waker: AtomicWaker::new(),
        }
    }

    /// Asks the connection to end. The first reason counts.
    fn end(&self, reason: EndReason) {
        let first =
            self.end_reason
                .compare_exchange(0, reason as u8, Ordering::Release, Ordering::Relaxed);
        if first.is_ok() {
            self.waker.wake();
        }
    }

    /// Ready when the connection is asked to end.
    pub(super) fn poll_end_reason(&self, cx: &mut Context<'_>) -> Poll<EndReason> {
        self.waker.register(cx.waker());
        match self.end_reason.load(Ordering::Acquire) {
            1 => Poll::Ready(EndReason::Killed),
            2 => Poll::Ready(EndReason::VersionTooOld),
            3 => Poll::Ready(EndReason::ServerShutdown),
            _ => Poll::Pending,
        }
    }
}

/// Entry of a connection in the registry.
pub(super) struct Registration {
    record: Arc<ConnectionRecord>,
    registry: Arc<ConnectionRegistry>,
}

impl std::ops::Deref for Registration {
    type Target = Arc<ConnectionRecord>;

    fn deref(&self) -> &Self::Target {
        &self.record
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.registry.shard(self.record.id).remove(&self.record.id);
    }
}
