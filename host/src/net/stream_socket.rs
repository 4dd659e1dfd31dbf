//! Sockets of clients: TCP or Unix.

use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::net::{RecvFlags, SendFlags, recv, send};
use socket2::SockRef;

/// The non-blocking socket of a client.
///
/// Dropping the socket resets a TCP connection, unless [`Self::finish`] was called. So a panic, a
/// cancelled task or an error can never make a truncated answer look complete. A Unix socket has no
/// reset: the client reads an error if it has sent bytes that nobody has read, and the end of the
/// stream otherwise.
#[derive(Debug)]
pub struct StreamSocket {
    fd: OwnedFd,
    family: Family,
    is_finished: bool,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Family {
    Tcp,
    Unix,
}

impl StreamSocket {
    fn new(fd: OwnedFd, family: Family) -> Self {
        Self {
            fd,
            family,
            is_finished: false,
        }
    }

    /// Whether this is a Unix socket.
    pub fn is_unix(&self) -> bool {
        self.family == Family::Unix
    }

    /// Declares that the answer is complete.
    ///
    /// From now on, dropping the socket closes the connection in order (FIN).
    pub fn finish(&mut self) {
        self.is_finished = true;
    }

    /// Sends `text`, and closes the connection in order.
    ///
    /// This does not wait: a client that goes on sending may miss the text.
    pub fn finish_with(mut self, text: &[u8]) {
        self.finish();
        // Closing a socket with unread data resets the connection, which can destroy the text.
        let _ = recv(&self, &mut [0; 4096], RecvFlags::DONTWAIT);
        let _ = send(&self, text, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
        let _ = SockRef::from(&self).shutdown(Shutdown::Write);
    }
}

impl Drop for StreamSocket {
    fn drop(&mut self) {
        if !self.is_finished && !self.is_unix() {
            // Closing with a linger time of zero resets the connection (socket(7), SO_LINGER).
            // Setting it fails for no open socket.
            let _ = SockRef::from(&*self).set_linger(Some(Duration::ZERO));
        }
    }
}

impl From<TcpStream> for StreamSocket {
    fn from(socket: TcpStream) -> Self {
        Self::new(socket.into(), Family::Tcp)
    }
}

impl From<UnixStream> for StreamSocket {
    fn from(socket: UnixStream) -> Self {
        Self::new(socket.into(), Family::Unix)
    }
}

impl AsFd for StreamSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for StreamSocket {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::io::{ErrorKind, Read, Write};
    use std::net::TcpListener;

    use super::*;

    fn tcp() -> (TcpStream, StreamSocket) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (client, listener.accept().unwrap().0.into())
    }

    #[test]
    fn a_dropped_socket_resets_after_what_was_sent() {
        let (mut client, server) = tcp();
        send(&server, b"half", SendFlags::empty()).unwrap();
        drop(server);
        let mut received = [0; 4];
        client.read_exact(&mut received).unwrap();
        assert_eq!(&received, b"half");
        let end = client.read(&mut received);
        assert_eq!(end.unwrap_err().kind(), ErrorKind::ConnectionReset);
    }

    #[test]
    fn a_finished_socket_closes_in_order() {
        let (mut client, mut server) = tcp();
        send(&server, b"whole", SendFlags::empty()).unwrap();
        server.finish();
        drop(server);
        let mut received = Vec::new();
        client.read_to_end(&mut received).unwrap();
        assert_eq!(received, b"whole");
    }

    #[test]
    fn a_last_text_arrives_though_the_client_has_sent_something() {
        let (mut client, server) = tcp();
        client.write_all(b"request").unwrap();
        server.finish_with(b"full");
        let mut received = Vec::new();
        client.read_to_end(&mut received).unwrap();
        assert_eq!(received, b"full");
    }

    #[test]
    fn a_unix_socket_ends_with_an_error_if_something_is_unread() {
        for (sent, expected) in [
            (&b"request"[..], Some(ErrorKind::ConnectionReset)),
            (b"", None),
        ] {
            let (mut client, server) = UnixStream::pair().unwrap();
            client.write_all(sent).unwrap();
            drop(StreamSocket::from(server));
            let end = client.read(&mut [0]);
            assert_eq!(end.err().map(|error| error.kind()), expected);
        }
    }
}
