//! The stream of a connection: a socket, or TLS on a socket.

use std::io;
use std::task::{Context, Poll};

use super::socket::Socket;
use super::tls::TlsStream;
use crate::net::TransportAddress;
use crate::sandbox::TlsInfo;

/// A socket, or TLS on one. A connection without TLS pays for a branch.
pub(super) enum MaybeTls {
    Plain(Socket),
    Tls(Box<TlsStream>),
}

/// Calls the same method of either stream.
macro_rules! either {
    ($self:expr, $stream:ident => $call:expr) => {
        match $self {
            Self::Plain($stream) => $call,
            Self::Tls($stream) => $call,
        }
    };
}

impl MaybeTls {
    /// The socket itself.
    pub(super) fn socket(&mut self) -> &mut Socket {
        match self {
            Self::Plain(socket) => socket,
            Self::Tls(stream) => stream.socket(),
        }
    }

    /// Properties of the TLS session, if there is one.
    pub(super) fn tls(&self) -> Option<&TlsInfo> {
        match self {
            Self::Plain(_) => None,
            Self::Tls(stream) => stream.info(),
        }
    }

    /// The address that the client connected to.
    pub(super) fn local_address(&self) -> io::Result<TransportAddress> {
        either!(self, stream => stream.local_address())
    }

    /// The address of the client.
    pub(super) fn remote_address(&self) -> io::Result<TransportAddress> {
        either!(self, stream => stream.remote_address())
    }

    /// Receives into `buf`.
    pub(super) fn poll_receive(
        &mut self,
        cx: &mut Context<'_>,
        buf: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        either!(self, stream => stream.poll_receive(cx, buf))
    }

    /// Ready when bytes, or the end of the stream, can be received.
    pub(super) fn poll_receivable(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self, stream => stream.poll_receivable(cx))
    }

    /// Sends some of `bytes`. Records of TLS may wait for [`Self::poll_push`] to send them.
    pub(super) fn poll_send(
        &mut self,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        either!(self, stream => stream.poll_send(cx, bytes))
    }

    /// Ready when bytes can be sent.
    pub(super) fn poll_sendable(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self, stream => stream.poll_sendable(cx))
    }

    /// Whether bytes can be sent now.
    pub(super) fn can_send(&self) -> bool {
        either!(self, stream => stream.can_send())
    }

    /// Whether bytes, or the end of the stream, can be received now.
    pub(super) fn can_receive(&mut self) -> bool {
        either!(self, stream => stream.can_receive())
    }

    /// Bytes that the kernel holds because the client has not acknowledged them.
    pub(super) fn unsent(&self) -> usize {
        either!(self, stream => stream.unsent())
    }

    /// Whether data waits for [`Self::poll_push`] to hand it to the kernel.
    pub(super) fn is_pushing(&self) -> bool {
        match self {
            Self::Plain(_) => false,
            Self::Tls(stream) => stream.is_pushing(),
        }
    }

    /// Sends held data. Call it whenever the guest waits, until it is ready. Returns whether the
    /// kernel took any data, too.
    pub(super) fn poll_push(&mut self, cx: &mut Context<'_>) -> (bool, Poll<io::Result<()>>) {
        match self {
            Self::Plain(socket) => {
                socket.push();
                (false, Poll::Ready(Ok(())))
            }
            Self::Tls(stream) => stream.poll_push(cx),
        }
    }

    /// Sends the end of the stream after all data. With TLS, [`Self::poll_push`] completes that.
    pub(super) fn shutdown_sending(&mut self) {
        either!(self, stream => stream.shutdown_sending())
    }

    /// Whether the client has sent bytes that are not TLS. It was sent an alert for them.
    pub(super) fn is_broken(&self) -> bool {
        match self {
            Self::Plain(_) => false,
            Self::Tls(stream) => stream.is_broken(),
        }
    }

    /// Whether the client has closed its side without a close_notify.
    pub(super) fn is_truncated(&self) -> bool {
        match self {
            Self::Plain(_) => false,
            Self::Tls(stream) => stream.is_truncated(),
        }
    }
}
