//! What a connection's bytes go through: its socket, or TLS on it.

use std::io;
use std::sync::Arc;
use std::task::{Context, Poll};

use rustls::ServerConfig;

use super::socket::Socket;
use super::tls::TlsStream;
use crate::net::TransportAddress;
use crate::sandbox::TlsInfo;

/// A socket, or TLS on one. What has no TLS pays for a branch.
pub(super) enum MaybeTls {
    Plain(Socket),
    Tls(Box<TlsStream>),
}

/// Calls the same of either.
macro_rules! either {
    ($channel:expr, $it:ident => $call:expr) => {
        match $channel {
            Self::Plain($it) => $call,
            Self::Tls($it) => $call,
        }
    };
}

impl MaybeTls {
    /// The socket beneath.
    pub(super) fn socket(&mut self) -> &mut Socket {
        match self {
            Self::Plain(socket) => socket,
            Self::Tls(secured) => secured.socket(),
        }
    }

    /// Puts TLS on the socket, with the handshake still to come.
    pub(super) fn secure(
        &mut self,
        config: Arc<ServerConfig>,
    ) -> Result<&mut TlsStream, rustls::Error> {
        if let Self::Plain(socket) = self {
            let mut socket = std::mem::replace(socket, Socket::closed());
            // TLS has an end of its own.
            socket.keep_nothing();
            *self = Self::Tls(Box::new(TlsStream::new(socket, config)?));
        }
        match self {
            Self::Tls(secured) => Ok(secured),
            Self::Plain(_) => unreachable!("it is TLS by now"),
        }
    }

    /// What is known of TLS, where there is some.
    pub(super) fn tls(&self) -> Option<&TlsInfo> {
        match self {
            Self::Plain(_) => None,
            Self::Tls(secured) => secured.info(),
        }
    }

    /// Where the client has connected to.
    pub(super) fn local_address(&self) -> io::Result<TransportAddress> {
        either!(self, it => it.local_address())
    }

    /// Where the client has connected from.
    pub(super) fn remote_address(&self) -> io::Result<TransportAddress> {
        either!(self, it => it.remote_address())
    }

    /// The end is to be one of which nothing is missing.
    pub(super) fn end_in_order(&mut self) {
        if let Self::Plain(socket) = self {
            socket.end_in_order();
        }
    }

    /// Receives into `buf`.
    pub(super) fn poll_receive(
        &mut self,
        cx: &mut Context<'_>,
        buf: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        either!(self, it => it.poll_receive(cx, buf))
    }

    /// Ready when something can be received.
    pub(super) fn poll_receivable(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self, it => it.poll_receivable(cx))
    }

    /// Sends some of `bytes`. What TLS makes of them may be on its way to the kernel still, in
    /// [`Self::poll_push`].
    pub(super) fn poll_send(
        &mut self,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        either!(self, it => it.poll_send(cx, bytes))
    }

    /// Ready when something can be sent.
    pub(super) fn poll_sendable(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self, it => it.poll_sendable(cx))
    }

    /// Whether something can be sent right now.
    pub(super) fn can_send(&self) -> bool {
        either!(self, it => it.can_send())
    }

    /// Whether something, or the end, can be received right now.
    pub(super) fn can_receive(&mut self) -> bool {
        either!(self, it => it.can_receive())
    }

    /// What was sent and the client's system has not acknowledged, in bytes, as far as the kernel has
    /// it.
    pub(super) fn unsent(&self) -> usize {
        either!(self, it => it.unsent())
    }

    /// Whether something is on its way to the kernel that [`Self::poll_push`] goes on with.
    pub(super) fn is_pushing(&self) -> bool {
        match self {
            Self::Plain(_) => false,
            Self::Tls(secured) => secured.is_pushing(),
        }
    }

    /// Sends what is held back. To be called when the guest waits, and until it is ready. Whether
    /// anything was moved.
    pub(super) fn poll_push(&mut self, cx: &mut Context<'_>) -> (bool, Poll<io::Result<()>>) {
        match self {
            Self::Plain(socket) => {
                socket.push();
                (false, Poll::Ready(Ok(())))
            }
            Self::Tls(secured) => secured.poll_push(cx),
        }
    }

    /// Sends all that was written, and the end. With TLS that takes [`Self::poll_push`].
    pub(super) fn shutdown_sending(&mut self) {
        either!(self, it => it.shutdown_sending())
    }

    /// Whether it is known that what was received is not all that the client has sent, or meant to.
    pub(super) fn is_truncated(&self) -> bool {
        match self {
            Self::Plain(_) => false,
            Self::Tls(secured) => secured.is_truncated(),
        }
    }
}
