//! A connection as the sandbox sees it.

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use futures::future::BoxFuture;

use crate::limit::Limit;
use crate::net::TransportAddress;

/// A connection: its addresses and two directions of bytes.
///
/// A transport also tells the guest whether the server drains, and records the resources that the
/// guest used. An error of either direction is final for that direction.
pub trait Transport: Send + 'static {
    /// The number of this connection. No other connection of this process has the same number.
    fn id(&self) -> u64;

    /// The address of the peer.
    fn remote_address(&self) -> TransportAddress;

    /// The address that the peer connected to.
    ///
    /// # Errors
    ///
    /// Fails if the system no longer knows the address.
    fn local_address(&self) -> io::Result<TransportAddress>;

    /// The TLS session with the peer. None without TLS.
    fn tls(&self) -> Option<&TlsInfo> {
        None
    }

    /// Receives into `buf`, which is not empty. Zero bytes mean the end of the stream.
    fn poll_receive(&mut self, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<io::Result<usize>>;

    /// Ready when [`Self::poll_receive`] is likely to be ready.
    fn poll_receivable(&mut self, cx: &mut Context<'_>) -> Poll<()>;

    /// Sends a part of `bytes`, which is not empty. Returns the length of that part.
    fn poll_send(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>>;

    /// Ready when [`Self::poll_send`] is likely to be ready.
    fn poll_sendable(&mut self, cx: &mut Context<'_>) -> Poll<()>;

    /// Ends the stream to the peer (FIN). The guest sends nothing after this call.
    fn close_sending(&mut self);

    /// Records that the guest hit `limit`.
    fn limit_hit(&mut self, limit: Limit);

    /// Hands the connection back to its owner, who ends it.
    ///
    /// Streams of the guest that are dropped later still call [`Self::close_sending`]. The
    /// implementation must ignore that call: a FIN would tell the peer that a broken answer is
    /// complete.
    fn release(&mut self);

    /// Whether the server is draining: it waits for this connection to end.
    fn is_draining(&self) -> bool;

    /// Resolves when [`Self::is_draining`] is true.
    fn draining(&self) -> BoxFuture<'static, ()>;

    /// Whether a newer version of the guest, or none, gets new connections.
    fn is_replaced(&self) -> bool;

    /// Resolves when [`Self::is_replaced`] is true.
    fn replaced(&self) -> BoxFuture<'static, ()>;

    /// Records how long it took to make an instance.
    fn instantiated(&mut self, took: Duration) {
        let _ = took;
    }

    /// Records the CPU time that the guest has used so far.
    fn computed(&mut self, time: Duration) {
        let _ = time;
    }

    /// Records the memory that the guest has now, in bytes.
    fn has_memory(&mut self, bytes: usize) {
        let _ = bytes;
    }
}

/// A transport that the sandbox shares with the owner of the connection.
pub(super) type SharedTransport = Arc<Mutex<dyn Transport>>;

/// The TLS session of a connection.
#[derive(Clone, Debug, PartialEq)]
pub struct TlsInfo {
    /// The host name that the peer asked for (SNI, RFC 6066).
    pub server_name: Option<String>,
    /// The protocol that both sides agreed on (ALPN, RFC 7301).
    pub alpn: Option<String>,
    /// The version of TLS: `TLSv1.2` or `TLSv1.3`.
    pub version: String,
    /// The verified certificate of the peer.
    pub client_certificate: Option<ClientCertificate>,
}

/// Writes the version and the host name, as the log shows them.
impl fmt::Display for TlsInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.version)?;
        match &self.server_name {
            Some(name) => write!(f, " {name}"),
            None => Ok(()),
        }
    }
}

/// A certificate that a peer presented.
#[derive(Clone, Debug, PartialEq)]
pub struct ClientCertificate {
    /// The subject in the form of RFC 4514. Empty if the certificate has no subject, or one of more
    /// than 4 KiB.
    pub subject: String,
    /// The SHA-256 of the certificate (DER), in hexadecimal digits.
    pub fingerprint: String,
}
