//! Sockets of clients: TCP or Unix.

use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::net::{RecvFlags, SendFlags, recv, send};
use socket2::SockRef;

/// The socket of a client, which does not block, and which no runtime knows of.
#[derive(Debug)]
pub enum StreamSocket {
    /// TCP.
    Tcp(TcpStream),
    /// A Unix socket.
    Unix(UnixStream),
}

impl AsFd for StreamSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(socket) => socket.as_fd(),
            Self::Unix(socket) => socket.as_fd(),
        }
    }
}

impl StreamSocket {
    /// Sends a text that is to be the last, without waiting for anything.
    pub(crate) fn answer(&self, text: &[u8]) {
        // What the client has sent is taken: closing a socket with something unread resets it,
        // and the text with it. A client that sends on may miss it.
        let _ = recv(self, &mut [0; 4096], RecvFlags::DONTWAIT);
        let _ = send(self, text, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
        let _ = SockRef::from(self).shutdown(Shutdown::Write);
    }

    /// Makes the end of the connection a reset. It fails for no socket that is open. At a Unix socket
    /// it is one if the client has sent anything.
    pub(crate) fn reset_when_dropped(&self) {
        if let Self::Tcp(socket) = self {
            let _ = SockRef::from(socket).set_linger(Some(Duration::ZERO));
        }
    }
}
