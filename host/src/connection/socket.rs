//! The socket of a connection, worked on with as few system calls and turns of the reactor as will
//! do.

use std::ffi::c_int;
use std::future::poll_fn;
use std::io::{self, IoSliceMut};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::PathBuf;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use nix::libc::{SO_PEEK_OFF, SOL_SOCKET, c_void, setsockopt, socklen_t};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::readv;
use rustix::ioctl::{Getter, Opcode, ioctl};
use rustix::net::{RecvFlags, SendFlags, recv, send};
use socket2::{SockAddr, SockRef};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::{TcpStream, UnixStream};

use crate::net::StreamSocket;
use crate::net::TransportAddress;

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
    /// At a Unix socket, whether the last byte of what was received is left in the kernel: see
    /// [`Socket::receive_and_keep`].
    keeps: bool,
    /// How much of it is.
    kept: usize,
    /// Whether it may be: not beneath what can tell by itself that something is missing.
    may_keep: bool,
}

enum State {
    /// Not known to the reactor.
    Fresh(StreamSocket),
    Tcp(TcpStream),
    Unix(UnixStream),
    /// The reactor would not have it.
    Closed,
}

/// Does the same with a socket as the reactor has it, of either kind.
macro_rules! watched {
    ($socket:expr, $stream:ident => $what:expr) => {
        match $socket.watched()? {
            State::Tcp($stream) => $what,
            State::Unix($stream) => $what,
            _ => return Err(io::Error::from(io::ErrorKind::NotConnected)).into(),
        }
    };
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
    pub(super) fn new(socket: StreamSocket) -> Self {
        Self {
            state: State::Fresh(socket),
            received: false,
            pushing: Pushing::Later,
            keeps: false,
            kept: 0,
            may_keep: true,
        }
    }

    /// Leaves nothing of what was received in the kernel. To be called before anything is.
    pub(super) fn keep_nothing(&mut self) {
        self.may_keep = false;
    }

    fn is_unix(&self) -> bool {
        matches!(
            self.state,
            State::Unix(_) | State::Fresh(StreamSocket::Unix(_))
        )
    }

    /// Where the client has connected to.
    pub(super) fn local_address(&self) -> io::Result<TransportAddress> {
        Ok(address(SockRef::from(&self.fd()?).local_addr()?))
    }

    /// Where the client has connected from.
    pub(super) fn remote_address(&self) -> io::Result<TransportAddress> {
        Ok(address(SockRef::from(&self.fd()?).peer_addr()?))
    }

    /// Receives into `buf`.
    pub(super) fn poll_receive(
        &mut self,
        cx: &mut Context<'_>,
        buf: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        if self.is_unix() {
            return self.poll_receive_and_keep(cx, buf);
        }
        if !std::mem::replace(&mut self.received, true) {
            match self.try_receive(buf) {
                Err(error) if is_for_later(&error) => {}
                result => return Poll::Ready(result),
            }
        }
        let mut buf = ReadBuf::new(buf);
        // Not `try_read`: only this remembers that a short read has emptied the socket, which
        // spares the system call that would find nothing.
        ready!(watched!(self, stream => Pin::new(stream).poll_read(cx, &mut buf)))?;
        Poll::Ready(Ok(buf.filled().len()))
    }

    /// Looks at what is received next, and leaves it there. Zero bytes are the end. Not at a Unix socket of
    /// which something was received.
    pub(super) fn poll_peek(
        &mut self,
        cx: &mut Context<'_>,
        buf: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        if let State::Fresh(_) = self.state {
            match self.fd().and_then(|fd| peek(fd, buf)) {
                Err(error) if is_for_later(&error) => {}
                result => return Poll::Ready(result),
            }
        }
        loop {
            let peeked = watched!(self, stream => {
                ready!(stream.poll_read_ready(cx))?;
                // The reactor tells of what comes after this has found nothing.
                stream.try_io(Interest::READABLE, || peek(stream.as_fd(), buf))
            });
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

    /// Whether the end of the stream comes next. Waits until bytes or the end come.
    pub(super) async fn is_end_next(&mut self) -> bool {
        !matches!(self.first_byte().await, Ok(Some(_)))
    }

    fn poll_receive_and_keep(
        &mut self,
        cx: &mut Context<'_>,
        buf: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        if !std::mem::replace(&mut self.received, true) {
            self.keeps = self.may_keep && remember_peeks(self.fd()?);
            match self.receive_and_keep(buf) {
                Err(error) if is_for_later(&error) => {}
                result => return Poll::Ready(result),
            }
        }
        loop {
            ready!(watched!(self, stream => stream.poll_read_ready(cx)))?;
            match self.receive_and_keep(buf) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    // The reactor is to look again.
                    let empty = || Err::<(), _>(io::ErrorKind::WouldBlock.into());
                    if let State::Unix(stream) = &self.state {
                        let _ = stream.try_io(Interest::READABLE, empty);
                    }
                }
                Err(error) if is_for_later(&error) => {}
                result => return Poll::Ready(result),
            }
        }
    }

    /// Receives, and leaves the last byte in the kernel.
    ///
    /// A Unix socket has no reset, but for this: when one is closed with something unread, the other side
    /// reads an error after what was sent, and not the end. So what a client has sent is never read to its last
    /// byte before it is known that all is well. The kernel remembers what was received.
    fn receive_and_keep(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if !self.keeps {
            return self.try_receive(buf);
        }
        let (n, _) = recv(self.fd()?, &mut *buf, RecvFlags::PEEK | RecvFlags::DONTWAIT)?;
        if n == 0 {
            return Ok(0);
        }
        self.take_kept(1);
        let mut before = [0; 1];
        let taken = match self.kept {
            // The same bytes once more, to the same place, but for the last one. Fewer come where
            // descriptors were sent along (unix(7), `SCM_RIGHTS`): the others are taken the next time.
            0 if n == 1 => 0,
            kept @ 0..=1 => {
                let bufs = &mut [
                    IoSliceMut::new(&mut before[..kept]),
                    IoSliceMut::new(&mut buf[..n - 1]),
                ];
                readv(self.fd()?, bufs).unwrap_or(0)
            }
            _ => 0,
        };
        self.kept = self.kept + n - taken;
        Ok(n)
    }

    /// Takes what was received and left in the kernel, but for the last bytes.
    fn take_kept(&mut self, but: usize) {
        while self.kept > but {
            let mut sink = [0; 1024];
            let most = (self.kept - but).min(sink.len());
            match self.try_receive(&mut sink[..most]) {
                Ok(n @ 1..) => self.kept -= n,
                _ => return,
            }
        }
    }

    /// Ready when something can be received.
    pub(super) fn poll_receivable(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        watched!(self, stream => stream.poll_read_ready(cx))
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
        watched!(self, stream => Pin::new(stream).poll_write(cx, bytes))
    }

    /// Ready when something can be sent.
    pub(super) fn poll_sendable(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        watched!(self, stream => stream.poll_write_ready(cx))
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

    /// What was written and the client's system has not acknowledged, in bytes; at a Unix socket, what the
    /// client has not read, and what the kernel takes to hold it.
    pub(super) fn unsent(&self) -> usize {
        /// `SIOCOUTQ` (tcp(7), unix(7)), where it is the number of `TIOCOUTQ`: on all that we run on.
        const SIOCOUTQ: Opcode = 0x5411;
        // SAFETY: it takes a pointer to an int, and writes there.
        let held = self
            .fd()
            .and_then(|fd| unsafe { Ok(ioctl(fd, Getter::<SIOCOUTQ, c_int>::new())?) });
        held.map_or(0, |held| usize::try_from(held).unwrap_or(0))
    }

    /// Sends what the kernel holds back. To be called when the guest waits.
    pub(super) fn push(&mut self) {
        // A Unix socket holds nothing back.
        if self.pushing == Pushing::Due && !self.is_unix() {
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

    /// Makes the end of this a reset. At a Unix socket it is one if anything was ever received, and the end
    /// of the stream otherwise.
    pub(super) fn reset_when_dropped(&self) {
        if self.is_unix() {
            return;
        }
        // Closing with a linger time of zero is how a reset is asked for (socket(7), SO_LINGER). It
        // fails for no socket that is still open.
        let _ = self
            .fd()
            .and_then(|fd| SockRef::from(&fd).set_linger(Some(Duration::ZERO)));
    }

    /// Makes the end of this none that the client takes for a failure. To be called when all is well.
    pub(super) fn end_in_order(&mut self) {
        self.take_kept(0);
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
        watched!(self, stream => {
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
        })
    }

    /// Receives what is there.
    pub(super) fn try_receive(&self, buf: &mut [u8]) -> io::Result<usize> {
        let (n, _) = recv(self.fd()?, buf, RecvFlags::DONTWAIT)?;
        Ok(n)
    }

    /// The socket as the reactor has it.
    fn watched(&mut self) -> io::Result<&mut State> {
        if let State::Fresh(_) = self.state
            && let State::Fresh(socket) = std::mem::replace(&mut self.state, State::Closed)
        {
            self.state = match socket {
                StreamSocket::Tcp(socket) => State::Tcp(TcpStream::from_std(socket)?),
                StreamSocket::Unix(socket) => State::Unix(UnixStream::from_std(socket)?),
            };
        }
        Ok(&mut self.state)
    }

    fn fd(&self) -> io::Result<BorrowedFd<'_>> {
        match &self.state {
            State::Fresh(socket) => Ok(socket.as_fd()),
            State::Tcp(stream) => Ok(stream.as_fd()),
            State::Unix(stream) => Ok(stream.as_fd()),
            State::Closed => Err(io::ErrorKind::NotConnected.into()),
        }
    }
}

fn peek(fd: BorrowedFd<'_>, buf: &mut [u8]) -> io::Result<usize> {
    let (n, _) = recv(fd, buf, RecvFlags::DONTWAIT | RecvFlags::PEEK)?;
    Ok(n)
}

/// Has the kernel remember how much of what is received with `MSG_PEEK` was looked at (socket(7),
/// `SO_PEEK_OFF`). Whether it does.
fn remember_peeks(socket: BorrowedFd<'_>) -> bool {
    let from: c_int = 0;
    // SAFETY: it reads an int, and is told the size of one.
    let set = unsafe {
        setsockopt(
            socket.as_raw_fd(),
            SOL_SOCKET,
            SO_PEEK_OFF,
            (&raw const from).cast::<c_void>(),
            size_of_val(&from) as socklen_t,
        )
    };
    set == 0
}

/// An address of the kernel's, for the guest.
fn address(address: SockAddr) -> TransportAddress {
    match address.as_socket() {
        Some(ip) => TransportAddress::Ip(ip),
        None => TransportAddress::Unix(address.as_pathname().map(PathBuf::from)),
    }
}

/// Whether an operation that does not wait is to be tried again.
fn is_for_later(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}
