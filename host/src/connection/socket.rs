//! The socket of a connection, used with few system calls.

mod unix_reset;

use std::ffi::c_int;
use std::future::poll_fn;
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::task::{Context, Poll, ready};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::ioctl::{Getter, Opcode, ioctl};
use rustix::net::{RecvFlags, SendFlags, recv, send};
use socket2::SockRef;
use tokio::io::unix::AsyncFd;

use crate::net::{StreamSocket, TransportAddress};
use unix_reset::UnixReset;

/// The non-blocking socket of a connection.
///
/// Operations ask the kernel before the reactor: the first message of a client has often arrived
/// before anyone reads, and there is always room for a first answer. The socket is registered with
/// the reactor when an operation has to wait.
///
/// Dropping the socket resets the connection, unless [`Self::finish`] was called: see
/// [`StreamSocket`].
pub(super) struct Socket {
    state: State,
    /// The first receive has asked the kernel.
    has_received: bool,
    batching: Batching,
    unix_reset: UnixReset,
    has_unix_reset: bool,
}

enum State {
    /// Not registered with the reactor.
    Fresh(StreamSocket),
    Registered(AsyncFd<StreamSocket>),
    /// Registration failed, and the connection was reset.
    Closed,
}

/// When the kernel sends written data.
///
/// A guest that answers and ends at once would make two packets, and two interrupts at the client,
/// where one is enough. So the kernel holds back data until the guest first waits, or ends. After
/// that the connection is a conversation, and each write is sent at once.
#[derive(Clone, Copy, PartialEq)]
enum Batching {
    /// The kernel will hold back data.
    On,
    /// The kernel holds back data.
    Holding,
    /// The kernel sends data at once.
    Off,
}

impl Socket {
    /// The socket of a new connection.
    pub(super) fn new(socket: StreamSocket) -> Self {
        Self {
            state: State::Fresh(socket),
            has_received: false,
            batching: Batching::On,
            unix_reset: UnixReset::default(),
            has_unix_reset: true,
        }
    }

    /// Does without the reset of a Unix socket. Call it before anything is received.
    pub(super) fn disable_unix_reset(&mut self) {
        self.has_unix_reset = false;
    }

    fn is_unix(&self) -> bool {
        self.state.socket().is_some_and(StreamSocket::is_unix)
    }

    /// The address that the client connected to.
    pub(super) fn local_address(&self) -> io::Result<TransportAddress> {
        TransportAddress::local(&self.fd()?)
    }

    /// The address of the client.
    pub(super) fn remote_address(&self) -> io::Result<TransportAddress> {
        TransportAddress::remote(&self.fd()?)
    }

    /// Receives into `buf`.
    pub(super) fn poll_receive(
        &mut self,
        cx: &mut Context<'_>,
        buf: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        if self.is_unix() {
            return self.poll_receive_unix(cx, buf);
        }
        if !std::mem::replace(&mut self.has_received, true) {
            match self.try_receive(buf) {
                Err(error) if is_retryable(&error) => {}
                result => return Poll::Ready(result),
            }
        }
        self.poll_receive_registered(cx, buf)
    }

    fn poll_receive_registered(
        &mut self,
        cx: &mut Context<'_>,
        buf: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        let socket = self.state.registered()?;
        loop {
            let mut readiness = ready!(socket.poll_read_ready(cx))?;
            match recv(socket.get_ref(), &mut *buf, RecvFlags::DONTWAIT) {
                Ok((n, _)) => {
                    // A short read has emptied the socket. Waiting for the reactor spares the
                    // system call that would find nothing.
                    if 0 < n && n < buf.len() {
                        readiness.clear_ready();
                    }
                    return Poll::Ready(Ok(n));
                }
                Err(Errno::WOULDBLOCK) => readiness.clear_ready(),
                Err(Errno::INTR) => {}
                Err(error) => return Poll::Ready(Err(error.into())),
            }
        }
    }

    fn poll_receive_unix(
        &mut self,
        cx: &mut Context<'_>,
        buf: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        if !std::mem::replace(&mut self.has_received, true) {
            let fd = self.state.fd()?;
            if self.has_unix_reset {
                self.unix_reset.enable(fd);
            }
            match self.unix_reset.receive(fd, buf) {
                Err(error) if is_retryable(&error) => {}
                result => return Poll::Ready(result),
            }
        }
        let unix_reset = &mut self.unix_reset;
        self.state
            .poll_readable(cx, |fd| unix_reset.receive(fd, buf))
    }

    /// Receives the next bytes, and leaves them in the kernel.
    ///
    /// Zero bytes are the end of the stream. Not for a Unix socket after its first receive.
    pub(super) fn poll_peek(
        &mut self,
        cx: &mut Context<'_>,
        buf: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        if let State::Fresh(_) = self.state {
            match self.fd().and_then(|fd| peek(fd, buf)) {
                Err(error) if is_retryable(&error) => {}
                result => return Poll::Ready(result),
            }
        }
        self.state.poll_readable(cx, |fd| peek(fd, buf))
    }

    /// Receives bytes that were peeked at before.
    pub(super) fn receive_peeked(&mut self, buf: &mut [u8]) -> io::Result<()> {
        let mut received = 0;
        while received < buf.len() {
            match self.try_receive(&mut buf[received..])? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                n => received += n,
            }
        }
        Ok(())
    }

    /// Waits for the next byte, and leaves it in the kernel. None: the stream is at its end.
    pub(super) async fn first_byte(&mut self) -> io::Result<Option<u8>> {
        let mut first = [0];
        let n = poll_fn(|cx| self.poll_peek(cx, &mut first)).await?;
        Ok((n > 0).then_some(first[0]))
    }

    /// Whether the end of the stream comes next. Waits until bytes or the end come.
    pub(super) async fn is_end_next(&mut self) -> bool {
        !matches!(self.first_byte().await, Ok(Some(_)))
    }

    /// Ready when bytes, or the end of the stream, can be received.
    pub(super) fn poll_receivable(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let socket = self.state.registered()?;
        socket.poll_read_ready(cx).map_ok(|_| ())
    }

    /// Sends some of `bytes`.
    pub(super) fn poll_send(
        &mut self,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.batching != Batching::Off {
            let flags = SendFlags::MORE | SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match self.fd().and_then(|fd| Ok(send(fd, bytes, flags)?)) {
                // The kernel holds as much as it can.
                Err(error) if is_retryable(&error) => self.push(),
                result => {
                    self.batching = Batching::Holding;
                    return Poll::Ready(result);
                }
            }
        }
        let socket = self.state.registered()?;
        loop {
            let mut readiness = ready!(socket.poll_write_ready(cx))?;
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match send(socket.get_ref(), bytes, flags) {
                Ok(n) => {
                    // A short write has filled the socket.
                    if 0 < n && n < bytes.len() {
                        readiness.clear_ready();
                    }
                    return Poll::Ready(Ok(n));
                }
                Err(Errno::WOULDBLOCK) => readiness.clear_ready(),
                Err(Errno::INTR) => {}
                Err(error) => return Poll::Ready(Err(error.into())),
            }
        }
    }

    /// Ready when bytes can be sent.
    pub(super) fn poll_sendable(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let socket = self.state.registered()?;
        socket.poll_write_ready(cx).map_ok(|_| ())
    }

    /// Whether bytes can be sent now.
    pub(super) fn can_send(&self) -> bool {
        self.is_ready(PollFlags::OUT)
    }

    /// Whether bytes, or the end of the stream, can be received now.
    pub(super) fn can_receive(&self) -> bool {
        self.is_ready(PollFlags::IN)
    }

    fn is_ready(&self, flags: PollFlags) -> bool {
        self.fd().is_ok_and(|fd| {
            let mut fds = [PollFd::new(&fd, flags)];
            poll(&mut fds, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
        })
    }

    /// Bytes that the client's system has not acknowledged.
    ///
    /// At a Unix socket: memory of the kernel for data that the client has not read.
    pub(super) fn unsent(&self) -> usize {
        /// `SIOCOUTQ` (tcp(7), unix(7)). All our platforms give it this number.
        const SIOCOUTQ: Opcode = 0x5411;
        // SAFETY: the kernel writes an int to the address that `Getter` passes.
        let unsent = self
            .fd()
            .and_then(|fd| unsafe { Ok(ioctl(fd, Getter::<SIOCOUTQ, c_int>::new())?) });
        unsent.map_or(0, |unsent| usize::try_from(unsent).unwrap_or(0))
    }

    /// Sends data that the kernel holds back. Call it whenever the guest waits.
    pub(super) fn push(&mut self) {
        // A Unix socket holds nothing back.
        if self.batching == Batching::Holding && !self.is_unix() {
            // The option is set already. Setting it again makes the kernel send (tcp(7),
            // TCP_NODELAY). It fails if nothing can be sent any more.
            let _ = self
                .fd()
                .and_then(|fd| SockRef::from(&fd).set_tcp_nodelay(true));
        }
        if self.batching != Batching::On {
            self.batching = Batching::Off;
        }
    }

    /// Sends all data, and the end of the stream (FIN).
    pub(super) fn shutdown_sending(&self) {
        // This fails if the client is gone, which the next operation reports.
        let _ = self
            .fd()
            .and_then(|fd| SockRef::from(&fd).shutdown(Shutdown::Write));
    }

    /// Declares that the answer is complete: see [`StreamSocket::finish`].
    pub(super) fn finish(&mut self) {
        if let Ok(fd) = self.state.fd() {
            self.unix_reset.disarm(fd);
        }
        match &mut self.state {
            State::Fresh(socket) => socket.finish(),
            State::Registered(socket) => socket.get_mut().finish(),
            State::Closed => {}
        }
    }

    /// Whether all data was received and the client has closed its side.
    ///
    /// True for a client that is gone, too. Discards a byte if there is one.
    pub(super) fn is_at_end(&self) -> bool {
        match self.try_receive(&mut [0]) {
            Ok(n) => n == 0,
            Err(error) => !is_retryable(&error),
        }
    }

    /// Discards data until the client closes its side, or `most` bytes.
    pub(super) async fn discard(&mut self, most: usize) -> io::Result<()> {
        let mut remaining = most;
        poll_fn(|cx| {
            while remaining > 0 {
                // On the stack: a buffer in the future would cost each connection its memory.
                let mut sink = [0; 1024];
                match ready!(self.poll_receive_registered(cx, &mut sink))? {
                    0 => break,
                    n => remaining = remaining.saturating_sub(n),
                }
            }
            Poll::Ready(Ok(()))
        })
        .await
    }

    /// Receives without waiting.
    pub(super) fn try_receive(&self, buf: &mut [u8]) -> io::Result<usize> {
        let (n, _) = recv(self.fd()?, buf, RecvFlags::DONTWAIT)?;
        Ok(n)
    }

    fn fd(&self) -> io::Result<BorrowedFd<'_>> {
        self.state.fd()
    }
}

impl State {
    fn socket(&self) -> Option<&StreamSocket> {
        match self {
            Self::Fresh(socket) => Some(socket),
            Self::Registered(socket) => Some(socket.get_ref()),
            Self::Closed => None,
        }
    }

    fn fd(&self) -> io::Result<BorrowedFd<'_>> {
        let socket = self.socket().ok_or(io::ErrorKind::NotConnected)?;
        Ok(socket.as_fd())
    }

    /// The socket, registered with the reactor. If that fails, the connection ends.
    fn registered(&mut self) -> io::Result<&AsyncFd<StreamSocket>> {
        if let Self::Fresh(_) = self
            && let Self::Fresh(socket) = std::mem::replace(self, Self::Closed)
        {
            // SAFETY: a `StreamSocket` has one descriptor all its life, and closes it when dropped,
            // which `AsyncFd` does after it has deregistered the descriptor.
            let registered = unsafe { AsyncFd::register(socket) };
            // An error drops the socket, which resets the connection.
            *self = Self::Registered(registered?);
        }
        match self {
            Self::Registered(socket) => Ok(socket),
            _ => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    /// Tries `operation` whenever the socket is readable, until it succeeds or fails.
    fn poll_readable<T>(
        &mut self,
        cx: &mut Context<'_>,
        mut operation: impl FnMut(BorrowedFd<'_>) -> io::Result<T>,
    ) -> Poll<io::Result<T>> {
        let socket = self.registered()?;
        loop {
            let mut readiness = ready!(socket.poll_read_ready(cx))?;
            match operation(socket.get_ref().as_fd()) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => readiness.clear_ready(),
                Err(error) if is_retryable(&error) => {}
                result => return Poll::Ready(result),
            }
        }
    }
}

fn peek(fd: BorrowedFd<'_>, buf: &mut [u8]) -> io::Result<usize> {
    let (n, _) = recv(fd, buf, RecvFlags::DONTWAIT | RecvFlags::PEEK)?;
    Ok(n)
}

/// Whether an operation would succeed later, or if repeated.
fn is_retryable(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}

#[cfg(test)]
mod tests {
    use std::io::{ErrorKind, Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::{AsRawFd, RawFd};
    use std::os::unix::net::UnixStream;

    use super::*;

    fn tcp() -> (TcpStream, StreamSocket) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (server, _) = listener.accept().unwrap();
        server.set_nonblocking(true).unwrap();
        (client, server.into())
    }

    fn unix() -> (UnixStream, StreamSocket) {
        let (client, server) = UnixStream::pair().unwrap();
        server.set_nonblocking(true).unwrap();
        (client, server.into())
    }

    async fn receive(socket: &mut Socket, buf: &mut [u8]) -> io::Result<usize> {
        poll_fn(|cx| socket.poll_receive(cx, buf)).await
    }

    async fn send(socket: &mut Socket, bytes: &[u8]) -> io::Result<usize> {
        poll_fn(|cx| socket.poll_send(cx, bytes)).await
    }

    /// Descriptor of a socket that somebody else owns.
    struct Borrowed(RawFd);

    impl AsRawFd for Borrowed {
        fn as_raw_fd(&self) -> RawFd {
            self.0
        }
    }

    /// Registers a descriptor, so that registering it once more fails with EEXIST.
    fn register(socket: &StreamSocket) -> AsyncFd<Borrowed> {
        // SAFETY: the descriptor outlives its use. Deregistering its number later can only concern
        // descriptors of the reactor of a test, and there is no other.
        unsafe { AsyncFd::register(Borrowed(socket.as_raw_fd())) }.unwrap()
    }

    #[tokio::test]
    async fn a_failed_registration_resets_before_an_orderly_end_can_be_sent() {
        let (mut client, server) = tcp();
        let registered = register(&server);
        let mut socket = Socket::new(server);
        assert_eq!(send(&mut socket, b"half").await.unwrap(), 4);
        let error = receive(&mut socket, &mut [0]).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::AlreadyExists);
        // The guest drops its stream, and may return `ok` all the same.
        socket.shutdown_sending();
        socket.finish();
        let end = client.read_to_end(&mut Vec::new());
        assert_eq!(end.unwrap_err().kind(), ErrorKind::ConnectionReset);
        let error = receive(&mut socket, &mut [0]).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotConnected);
        drop(registered);
    }

    #[tokio::test]
    async fn a_failed_registration_of_a_finished_socket_takes_nothing_from_the_client() {
        let (mut client, server) = tcp();
        let registered = register(&server);
        let mut socket = Socket::new(server);
        assert_eq!(send(&mut socket, b"whole").await.unwrap(), 5);
        socket.shutdown_sending();
        socket.finish();
        assert!(socket.discard(1).await.is_err());
        let mut received = Vec::new();
        client.read_to_end(&mut received).unwrap();
        assert_eq!(received, b"whole");
        drop(registered);
    }

    #[tokio::test]
    async fn a_registered_socket_resets_unless_it_is_finished() {
        for finished in [false, true] {
            let (mut client, server) = tcp();
            let mut socket = Socket::new(server);
            assert_eq!(send(&mut socket, b"answer").await.unwrap(), 6);
            socket.push();
            poll_fn(|cx| socket.poll_sendable(cx)).await.unwrap();
            if finished {
                socket.finish();
            }
            drop(socket);
            let mut received = Vec::new();
            let end = client.read_to_end(&mut received);
            assert_eq!(received, b"answer");
            let expected = (!finished).then_some(ErrorKind::ConnectionReset);
            assert_eq!(end.err().map(|error| error.kind()), expected);
        }
    }

    #[tokio::test]
    async fn a_unix_client_reads_an_error_unless_the_socket_is_finished() {
        for finished in [false, true] {
            let (mut client, server) = unix();
            let mut socket = Socket::new(server);
            let mut buf = [0; 16];
            for request in [&b"a"[..], b"request"] {
                client.write_all(request).unwrap();
                let n = receive(&mut socket, &mut buf).await.unwrap();
                assert_eq!(&buf[..n], request);
            }
            assert_eq!(send(&mut socket, b"answer").await.unwrap(), 6);
            if finished {
                socket.finish();
            }
            drop(socket);
            let mut received = Vec::new();
            let end = client.read_to_end(&mut received);
            assert_eq!(received, b"answer");
            let expected = (!finished).then_some(ErrorKind::ConnectionReset);
            assert_eq!(end.err().map(|error| error.kind()), expected);
        }
    }

    #[tokio::test]
    async fn data_that_arrives_after_a_short_read_is_received() {
        let (mut client, server) = tcp();
        let mut socket = Socket::new(server);
        let mut buf = [0; 16];
        for message in [&b"first"[..], b"second", b"third"] {
            let mut receiving = Box::pin(receive(&mut socket, &mut buf));
            assert!(futures::poll!(&mut receiving).is_pending());
            client.write_all(message).unwrap();
            let n = receiving.await.unwrap();
            assert_eq!(&buf[..n], message);
        }
    }

    #[tokio::test]
    async fn a_write_that_was_short_goes_on_when_the_client_reads() {
        let (mut client, server) = tcp();
        let mut socket = Socket::new(server);
        let bytes = vec![b'x'; 1 << 20];
        let mut sent = 0;
        while let std::task::Poll::Ready(n) = futures::poll!(Box::pin(send(&mut socket, &bytes))) {
            sent += n.unwrap();
        }
        let mut received = vec![0; sent];
        let reading = tokio::task::spawn_blocking(move || {
            client.read_exact(&mut received).unwrap();
            client
        });
        assert!(send(&mut socket, &bytes).await.unwrap() > 0);
        reading.await.unwrap();
    }
}
