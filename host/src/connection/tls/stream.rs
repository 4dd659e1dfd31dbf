//! TLS on the socket of a connection.

use std::future::poll_fn;
use std::io::{self, BufRead, Read, Write};
use std::task::{Context, Poll, Waker, ready};

use rustls::ServerConnection;

use super::certificates::describe_client;
use crate::connection::socket::Socket;
use crate::net::TransportAddress;
use crate::sandbox::TlsInfo;

/// A TLS session and its socket.
///
/// The session holds received data of incomplete records, and at most [`MAX_UNSENT`] bytes to send:
/// a write waits until the kernel has taken the data of the write before. When the guest writes no
/// more, [`Self::poll_push`] sends the rest. The connection calls it after each poll of the guest.
/// So the reactor wakes that call when the socket is writable, and the call wakes a waiting write.
pub(in crate::connection) struct TlsStream {
    socket: Socket,
    session: ServerConnection,
    /// Set when the handshake is complete.
    info: Option<TlsInfo>,
    /// A write of the guest that waits.
    writer: Option<Waker>,
    closing: Closing,
    /// The client has sent bytes that are not TLS. Data that came before them is read first.
    broken: Option<rustls::Error>,
    /// The client has closed its side without a close_notify.
    truncated: bool,
}

/// The most data to send that the session holds, in bytes: one record (RFC 8446, section 5.1).
const MAX_UNSENT: usize = 16 << 10;

/// The most reads of 4 KiB in one poll. The largest record takes five.
const MAX_READS: usize = 16;

/// Progress of the end of the stream to the client.
#[derive(Clone, Copy, PartialEq)]
enum Closing {
    No,
    /// FIN follows when the kernel has all data, the close_notify included.
    Due,
    Done,
}

impl TlsStream {
    /// A stream whose handshake has not begun.
    pub(super) fn new(mut socket: Socket, mut session: ServerConnection) -> Self {
        // TLS has an end of its own, and needs no reset to show that one is missing.
        socket.disable_unix_reset();
        session.set_buffer_limit(Some(MAX_UNSENT));
        Self {
            socket,
            session,
            info: None,
            writer: None,
            closing: Closing::No,
            broken: None,
            truncated: false,
        }
    }

    pub(in crate::connection) fn socket(&mut self) -> &mut Socket {
        &mut self.socket
    }

    pub(super) fn into_socket(self) -> Socket {
        self.socket
    }

    pub(in crate::connection) fn info(&self) -> Option<&TlsInfo> {
        self.info.as_ref()
    }

    /// Performs the handshake.
    ///
    /// A refused client gets an alert and the end of the stream, if the kernel takes them at once.
    pub(super) async fn perform_handshake(&mut self) -> Result<(), HandshakeError> {
        poll_fn(|cx| self.poll_handshake(cx)).await?;
        self.info = Some(self.describe());
        Ok(())
    }

    fn poll_handshake(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), HandshakeError>> {
        loop {
            let flushed = self.poll_flush(cx).1;
            // The kernel would hold back the first flight of the server otherwise.
            self.socket.push();
            ready!(flushed).map_err(HandshakeError::ClientGone)?;
            if !self.session.is_handshaking() {
                return Poll::Ready(Ok(()));
            }
            match ready!(self.poll_read_tls(Some(&mut *cx))) {
                Ok(0) => {
                    return Poll::Ready(Err(HandshakeError::ClientGone(
                        io::ErrorKind::UnexpectedEof.into(),
                    )));
                }
                Ok(_) => {}
                // The session's own error: the client's message is too long for its buffer.
                Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                    self.socket.shutdown_sending();
                    let error = rustls::Error::General(error.to_string());
                    return Poll::Ready(Err(HandshakeError::Refused(error)));
                }
                Err(error) => return Poll::Ready(Err(HandshakeError::ClientGone(error))),
            }
            if let Err(error) = self.session.process_new_packets() {
                if !self.session.is_handshaking() {
                    self.broken = Some(error);
                    return Poll::Ready(Ok(()));
                }
                // Sends the alert.
                let _ = self.poll_flush(cx);
                self.socket.push();
                self.socket.shutdown_sending();
                return Poll::Ready(Err(HandshakeError::Refused(error)));
            }
        }
    }

    fn describe(&self) -> TlsInfo {
        let session = &self.session;
        let version = session
            .protocol_version()
            .and_then(|version| version.as_str());
        let alpn = session.alpn_protocol();
        let certificate = session.peer_certificates().and_then(<[_]>::first);
        TlsInfo {
            server_name: session.server_name().map(Into::into),
            alpn: alpn.map(|name| String::from_utf8_lossy(name).into_owned()),
            version: version.unwrap_or("unknown").replace('_', "."),
            client_certificate: certificate.map(describe_client),
        }
    }

    pub(in crate::connection) fn local_address(&self) -> io::Result<TransportAddress> {
        self.socket.local_address()
    }

    pub(in crate::connection) fn remote_address(&self) -> io::Result<TransportAddress> {
        self.socket.remote_address()
    }

    pub(in crate::connection) fn poll_receive(
        &mut self,
        cx: &mut Context<'_>,
        buf: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        ready!(self.poll_fill(Some(cx)))?;
        Poll::Ready(self.session.reader().read(buf))
    }

    pub(in crate::connection) fn poll_receivable(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        self.poll_fill(Some(cx))
    }

    /// Ready when the session has data, or is at its end.
    ///
    /// Without a context this wakes nobody, and keeps the wakers that are registered.
    fn poll_fill(&mut self, mut cx: Option<&mut Context<'_>>) -> Poll<io::Result<()>> {
        for _ in 0..MAX_READS {
            match self.session.reader().fill_buf() {
                Ok(_) => return Poll::Ready(Ok(())),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                    self.truncated = true;
                    let text = "the client closed its side without a close_notify: its data may be cut short";
                    return Poll::Ready(Err(io::Error::new(error.kind(), text)));
                }
                Err(error) => return Poll::Ready(Err(error)),
            }
            if let Some(error) = &self.broken {
                return Poll::Ready(Err(invalid_data(error)));
            }
            ready!(self.poll_read_tls(cx.as_deref_mut()))?;
            self.broken = self.session.process_new_packets().err();
            // Sends the alert before the guest ends the connection.
            if let (Some(_), Some(cx)) = (&self.broken, &mut cx) {
                let _ = self.poll_flush(cx);
                self.socket.push();
            }
        }
        // An endless sequence of empty records must not block the other tasks.
        if let Some(cx) = cx {
            cx.waker().wake_by_ref();
        }
        Poll::Pending
    }

    /// Receives records for the session.
    fn poll_read_tls(&mut self, cx: Option<&mut Context<'_>>) -> Poll<io::Result<usize>> {
        let (socket, session) = (&mut self.socket, &mut self.session);
        pending(session.read_tls(&mut Io { socket, cx }))
    }

    pub(in crate::connection) fn poll_send(
        &mut self,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.closing != Closing::No {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        ready!(self.poll_flushed(cx))?;
        let n = self.session.writer().write(bytes)?;
        // The next push sends what the kernel does not take now.
        let (_, flushed) = self.poll_flush(cx);
        match flushed {
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            _ => Poll::Ready(Ok(n)),
        }
    }

    pub(in crate::connection) fn poll_sendable(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        ready!(self.poll_flushed(cx))?;
        let sendable = self.socket.poll_sendable(cx);
        if sendable.is_pending() {
            self.writer = Some(cx.waker().clone());
        }
        sendable
    }

    /// Ready when the kernel has all data. Until then, the push that completes that wakes `cx`.
    fn poll_flushed(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let (_, flushed) = self.poll_flush(cx);
        if flushed.is_pending() {
            self.writer = Some(cx.waker().clone());
        }
        flushed
    }

    /// Hands the records of the session to the kernel.
    ///
    /// Returns whether the kernel took any, and is ready when it took all.
    fn poll_flush(&mut self, cx: &mut Context<'_>) -> (bool, Poll<io::Result<()>>) {
        let mut moved = false;
        while self.session.wants_write() {
            let (socket, session) = (&mut self.socket, &mut self.session);
            let cx = Some(&mut *cx);
            match pending(session.write_tls(&mut Io { socket, cx })) {
                Poll::Ready(Ok(_)) => moved = true,
                Poll::Ready(Err(error)) => return (moved, Poll::Ready(Err(error))),
                Poll::Pending => return (moved, Poll::Pending),
            }
        }
        if self.closing == Closing::Due {
            self.closing = Closing::Done;
            self.socket.shutdown_sending();
        }
        (moved, Poll::Ready(Ok(())))
    }

    pub(in crate::connection) fn is_pushing(&self) -> bool {
        // Nothing can be sent after FIN.
        match self.closing {
            Closing::No => self.session.wants_write(),
            Closing::Due => true,
            Closing::Done => false,
        }
    }

    pub(in crate::connection) fn poll_push(
        &mut self,
        cx: &mut Context<'_>,
    ) -> (bool, Poll<io::Result<()>>) {
        if !self.is_pushing() {
            self.socket.push();
            return (false, Poll::Ready(Ok(())));
        }
        let (moved, pushed) = self.poll_flush(cx);
        self.socket.push();
        if pushed.is_ready()
            && let Some(writer) = self.writer.take()
        {
            writer.wake();
        }
        (moved, pushed)
    }

    pub(in crate::connection) fn can_send(&self) -> bool {
        !self.session.wants_write() && self.socket.can_send()
    }

    pub(in crate::connection) fn can_receive(&mut self) -> bool {
        self.poll_fill(None).is_ready()
    }

    pub(in crate::connection) fn unsent(&self) -> usize {
        self.socket.unsent()
    }

    /// Begins the end of the stream: close_notify, then FIN.
    pub(in crate::connection) fn shutdown_sending(&mut self) {
        if self.closing == Closing::No {
            self.session.send_close_notify();
            self.closing = Closing::Due;
        }
    }

    pub(in crate::connection) fn is_truncated(&self) -> bool {
        self.truncated
    }

    pub(in crate::connection) fn is_broken(&self) -> bool {
        self.broken.is_some()
    }
}

/// Why a handshake failed.
pub(super) enum HandshakeError {
    /// The client has closed the connection, or the connection is broken.
    ClientGone(io::Error),
    /// The session does not accept a message of the client.
    Refused(rustls::Error),
}

/// The socket as the session reads and writes it: without waiting.
struct Io<'a, 'b> {
    socket: &'a mut Socket,
    cx: Option<&'a mut Context<'b>>,
}

impl Read for Io<'_, '_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match &mut self.cx {
            Some(cx) => would_block(self.socket.poll_receive(cx, buf)),
            None => self.socket.try_receive(buf),
        }
    }
}

impl Write for Io<'_, '_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut self.cx {
            Some(cx) => would_block(self.socket.poll_send(cx, bytes)),
            None => Err(io::ErrorKind::WouldBlock.into()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn invalid_data(error: &rustls::Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("TLS: {error}"))
}

/// Turns pending into an error.
fn would_block<T>(polled: Poll<io::Result<T>>) -> io::Result<T> {
    match polled {
        Poll::Ready(result) => result,
        Poll::Pending => Err(io::ErrorKind::WouldBlock.into()),
    }
}

/// Turns the error back into pending.
fn pending<T>(result: io::Result<T>) -> Poll<io::Result<T>> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Poll::Pending,
        result => Poll::Ready(result),
    }
}
