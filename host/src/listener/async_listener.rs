//! Listeners that a reactor watches.

use std::io;
use std::task::{Context, Poll, ready};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::listening::Listener;
use crate::net::{Peer, StreamSocket};

/// A listener, registered with the reactor of the current runtime.
pub(super) struct AsyncListener(AsyncFd<Listener>);

impl AsyncListener {
    pub(super) fn new(listener: Listener) -> io::Result<Self> {
        // SAFETY: a `Listener` keeps the same file descriptor for its whole life, and closes it
        // only when dropped. `AsyncFd` deregisters the descriptor before it drops the `Listener`.
        let registered = unsafe { AsyncFd::register_with_interest(listener, Interest::READABLE) };
        Ok(Self(registered?))
    }

    pub(super) fn listener(&self) -> &Listener {
        self.0.get_ref()
    }

    /// Accepts a client from the backlog, or waits for one.
    pub(super) fn poll_accept(
        &self,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<(StreamSocket, Peer)>> {
        loop {
            let mut ready = ready!(self.0.poll_read_ready(cx))?;
            match self.listener().accept() {
                // The socket is shut down, perhaps by another shard that has a duplicate of it. No
                // client comes any more, but the reactor reports it as ready for ever.
                Poll::Pending if ready.ready().is_read_closed() => return Poll::Pending,
                // The next round waits until the socket is ready again.
                Poll::Pending => ready.clear_ready(),
                result => return result,
            }
        }
    }
}
