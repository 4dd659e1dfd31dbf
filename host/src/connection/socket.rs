//! The socket of a connection, worked on with as few system calls and turns of the reactor as will
//! do.

use std::ffi::c_int;
use std::future::poll_fn;
use std::io;
use std::net::{Shutdown, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::ioctl::{Getter, Opcode, ioctl};
use rustix::net::{RecvFlags, SendFlags, recv, send};
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::TcpStream;

/// A socket that does not block.
///
/// The kernel is asked before the reactor: a client has often sent its first message before anyone
/// gets to read it, and there is always room for a first answer. The reactor learns of the socket
/// when something has to wait.
pub(super) struct Socket {
    state: State,
    /// What was received first is asked of the kernel.
    received: bool,
    pushing: Pushing,
}

enum State {
    /// Not known to the reactor.
    Fresh(std::net::TcpStream),
    Watched(TcpStream),
    /// The reactor would not have it.
    Closed,
}

/// When the kernel sends what is written.
///
/// A guest that answers and ends would make two packets, and two interrupts of the client, where one
/// will do: so what it writes before it first waits for anything is held by the kernel until it does,
/// or ends. From then on it is in a conversation, and each write is sent at once.
#[derive(Clone, Copy, PartialEq)]
enum Pushing {
    /// With what follows.
    Later,
    /// Some is held.
    Due,
    /// At once.
    Now,
}

impl Socket {
    /// Takes a socket that is set not to block.
    pub(super) fn new(stream: std::net::TcpStream) -> Self {
        Self {
            state: State::Fresh(stream),
            received: false,
            pushing: Pushing::Later,
        }
    }

    /// None at all.
    pub(super) fn closed() -> Self {
        Self {
            state: State::Closed,
            received: true,
            pushing: Pushing::Now,
        }
    }

    pub(super) fn local_addr(&self) -> io::Result<SocketAddr> {
        match &self.state {
            State::Fresh(stream) => stream.local_addr(),
            State::Watched(stream) => stream.local_addr(),
            State::Closed => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    /// Receives into `buf`.
    pub(super) fn poll_receive(
        &mut self,
        cx: &mut Context<'_>,
        buf: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        if !std::mem::replace(&mut self.received, true) {
            match self.try_receive(buf) {
                Err(error) if is_for_later(&error) => {}
                result => return Poll::Ready(result),
            }
        }
        let mut buf = ReadBuf::new(buf);
        // Not `try_read`: only this remembers that a short read has emptied the socket, which
        // spares the system call that would find nothing.
        ready!(Pin::new(self.watched()?).poll_read(cx, &mut buf))?;
        Poll::Ready(Ok(buf.filled().len()))
    }

    /// Looks at what is received next, and leaves it there. Zero bytes are the end.
    pub(super) fn poll_peek(
        &mut self,
        cx: &mut Context<'_>,
        buf: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        if let State::Fresh(_) = self.state {
            match self.try_peek(buf) {
                Err(error) if is_for_later(&error) => {}
                result => return Poll::Ready(result),
            }
        }
        loop {
            let stream = self.watched()?;
            ready!(stream.poll_read_ready(cx))?;
            // The reactor tells of what comes after this has found nothing.
            let peeked = stream.try_io(Interest::READABLE, || peek(stream.as_fd(), buf));
            match peeked {
                Err(error) if is_for_later(&error) => {}
                result => return Poll::Ready(result),
            }
        }
    }

    /// Takes what was looked at before.
    pub(super) fn take(&mut self, buf: &mut [u8]) -> io::Result<()> {
        let mut taken = 0;
        while taken < buf.len() {
            match self.try_receive(&mut buf[taken..])? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                n => taken += n,
            }
        }
        Ok(())
    }

    /// What comes next, which stays there. Waits until something, or the end, comes.
    pub(super) async fn first_byte(&mut self) -> io::Result<Option<u8>> {
        let mut first = [0];
        let n = poll_fn(|cx| self.poll_peek(cx, &mut first)).await?;
        Ok((n > 0).then_some(first[0]))
    }

    /// Whether what comes next is the end of what is received. Waits until something comes.
    pub(super) async fn ends_now(&mut self) -> bool {
        !matches!(self.first_byte().await, Ok(Some(_)))
    }

    /// Ready when something can be received.
    pub(super) fn poll_receivable(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.watched()?.poll_read_ready(cx)
    }

    /// Sends some of `bytes`.
    pub(super) fn poll_send(
        &mut self,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.pushing != Pushing::Now {
            let flags = SendFlags::MORE | SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match self.fd().and_then(|fd| Ok(send(fd, bytes, flags)?)) {
                // A conversation, if of one side only.
                Err(error) if is_for_later(&error) => self.push(),
                result => {
                    self.pushing = Pushing::Due;
                    return Poll::Ready(result);
                }
            }
        }
        Pin::new(self.watched()?).poll_write(cx, bytes)
    }

    /// Ready when something can be sent.
    pub(super) fn poll_sendable(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.watched()?.poll_write_ready(cx)
    }

    /// Whether something can be sent right now.
    pub(super) fn can_send(&self) -> bool {
        self.is_ready(PollFlags::OUT)
    }

    /// Whether something, or the end, can be received right now.
    pub(super) fn can_receive(&self) -> bool {
        self.is_ready(PollFlags::IN)
    }

    fn is_ready(&self, flags: PollFlags) -> bool {
        self.fd().is_ok_and(|fd| {
            let mut fds = [PollFd::new(&fd, flags)];
            poll(&mut fds, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
        })
    }

    /// What was written and the client's system has not acknowledged, in bytes.
    pub(super) fn unsent(&self) -> usize {
        /// `SIOCOUTQ` (tcp(7)), where it is the number of `TIOCOUTQ`: on all that we run on.
        const SIOCOUTQ: Opcode = 0x5411;
        // SAFETY: it takes a pointer to an int, and writes there.
        let held = self
            .fd()
            .and_then(|fd| unsafe { Ok(ioctl(fd, Getter::<SIOCOUTQ, c_int>::new())?) });
        held.map_or(0, |held| usize::try_from(held).unwrap_or(0))
    }

    /// Sends what the kernel holds back. To be called when the guest waits.
    pub(super) fn push(&mut self) {
        if self.pushing == Pushing::Due {
            // It has been set before: setting it is how the kernel is told to wait for no more
            // (tcp(7), TCP_NODELAY). It fails where nothing can be sent any more.
            let _ = self
                .fd()
                .and_then(|fd| SockRef::from(&fd).set_tcp_nodelay(true));
        }
        if self.pushing != Pushing::Later {
            self.pushing = Pushing::Now;
        }
    }

    /// Sends all that was written, and FIN.
    pub(super) fn shutdown_sending(&self) {
        // It fails when the client is gone, which the next operation finds out.
        let _ = self
            .fd()
            .and_then(|fd| SockRef::from(&fd).shutdown(Shutdown::Write));
    }

    /// Makes the end of this a reset.
    pub(super) fn reset_when_dropped(&self) {
        // Closing with a linger time of zero is how a reset is asked for (socket(7), SO_LINGER). It
        // fails for no socket that is still open.
        let _ = self
            .fd()
            .and_then(|fd| SockRef::from(&fd).set_linger(Some(Duration::ZERO)));
    }

    /// Whether the client is known to have closed its side, or to be gone, and nothing that it sent
    /// is left. Takes a byte if there is one.
    pub(super) fn is_at_end(&self) -> bool {
        match self.try_receive(&mut [0]) {
            Ok(n) => n == 0,
            Err(error) => !is_for_later(&error),
        }
    }

    /// Reads what the client still sends, and forgets it, until it closes its side or has sent
    /// `most`.
    pub(super) async fn drain(&mut self, most: usize) -> io::Result<()> {
        let stream = self.watched()?;
        let mut left = most;
        while left > 0 {
            stream.readable().await?;
            // Not kept while waiting: each connection would take that much more memory.
            let mut sink = [0; 1024];
            match stream.try_read(&mut sink) {
                Ok(0) => return Ok(()),
                Ok(n) => left = left.saturating_sub(n),
                Err(error) if is_for_later(&error) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Receives what is there.
    pub(super) fn try_receive(&self, buf: &mut [u8]) -> io::Result<usize> {
        let (n, _) = recv(self.fd()?, buf, RecvFlags::DONTWAIT)?;
        Ok(n)
    }

    fn try_peek(&self, buf: &mut [u8]) -> io::Result<usize> {
        peek(self.fd()?, buf)
    }

    /// The socket as the reactor has it.
    fn watched(&mut self) -> io::Result<&mut TcpStream> {
        if let State::Fresh(_) = self.state
            && let State::Fresh(stream) = std::mem::replace(&mut self.state, State::Closed)
        {
            self.state = State::Watched(TcpStream::from_std(stream)?);
        }
        match &mut self.state {
            State::Watched(stream) => Ok(stream),
            _ => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    fn fd(&self) -> io::Result<BorrowedFd<'_>> {
        match &self.state {
            State::Fresh(stream) => Ok(stream.as_fd()),
            State::Watched(stream) => Ok(stream.as_fd()),
            State::Closed => Err(io::ErrorKind::NotConnected.into()),
        }
    }
}

fn peek(fd: BorrowedFd<'_>, buf: &mut [u8]) -> io::Result<usize> {
    let (n, _) = recv(fd, buf, RecvFlags::DONTWAIT | RecvFlags::PEEK)?;
    Ok(n)
}

/// Whether an operation that does not wait is to be tried again.
fn is_for_later(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}
