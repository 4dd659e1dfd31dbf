//! Accepted connections and their permits.

use super::admission::SourcePermit;
use super::connection_limit::ConnectionPermit;
use super::source::Source;
use crate::limit::Limit;
use crate::net::{Peer, StreamSocket};

/// An accepted connection, with its permit.
pub struct Accepted<T> {
    /// Route to the service of the connection.
    pub route: T,
    /// The nonblocking socket. It is registered with no runtime: the shard is not chosen yet.
    pub stream: StreamSocket,
    /// The client, or the proxy that speaks for it.
    pub peer: Peer,
    /// Released when dropped.
    pub permit: AcceptPermit,
}

/// Permit of one connection: its share of all connections and of those from its source.
///
/// Drop order: the source's share is released first. A waiter that gets the connection permit is
/// then not refused because of its source.
pub struct AcceptPermit {
    source_permit: SourcePermit,
    _connection_permit: ConnectionPermit,
}

impl AcceptPermit {
    pub(super) fn new(source_permit: SourcePermit, connection_permit: ConnectionPermit) -> Self {
        Self {
            source_permit,
            _connection_permit: connection_permit,
        }
    }

    /// The source of the client, if connections per source are limited.
    pub(crate) fn source(&self) -> Option<Source> {
        self.source_permit.source()
    }

    /// Admits the client that a proxy speaks for. Has no effect on a connection of any other peer.
    ///
    /// Call this for connections of [proxies](super::AdmissionRules::proxies) when the client is
    /// known.
    ///
    /// # Errors
    ///
    /// The limit that refuses the client. The connection must be reset.
    pub fn admit(&mut self, client: Peer) -> Result<(), Limit> {
        self.source_permit.admit(client)
    }
}
