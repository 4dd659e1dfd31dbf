//! The two halves of a connection, polled over component-model streams.
//!
//! A component-model read or write owns its buffer until it completes, whereas [`AsyncRead`] and
//! [`AsyncWrite`] borrow one for the duration of a poll. Each half therefore has its own buffer.

use std::cell::Cell;
use std::future::poll_fn;
use std::io;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use futures::io::{AsyncBufRead, AsyncRead, AsyncWrite};
use wit_bindgen::rt::async_support::{FutureReader, StreamResult, StreamWriter};

use crate::rt::bindings::wit_stream;
use crate::rt::{Connection, ErrorCode, io_error};

/// The most bytes that one host call moves.
///
/// Default socket buffers make larger transfers pointless, and two such buffers fit into the memory
/// that a guest starts with.
const BUFFER_BYTES: usize = 64 * 1024;

/// The size of the read buffer at first. It grows while the stream fills it.
///
/// Most messages are small, and the host has to clear all memory that a guest touched before the
/// next connection reuses it.
const FIRST_BUFFER_BYTES: usize = 2 * 1024;

/// The receiving half of a [`TcpStream`](crate::TcpStream).
///
/// Created by [`into_split`](crate::TcpStream::into_split). [`AsyncBufRead`] gives access to the
/// buffer that the host writes into, without a copy.
pub struct ReadHalf(&'static mut Receiver);

impl ReadHalf {
    pub(crate) fn new(connection: &'static Connection) -> Self {
        Self(Box::leak(Box::new(Receiver::new(connection))))
    }
}

impl AsyncBufRead for ReadHalf {
    fn poll_fill_buf(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<&[u8]>> {
        self.get_mut().0.poll_fill(cx)
    }

    fn consume(mut self: Pin<&mut Self>, n: usize) {
        self.0.consume(n);
    }
}

impl AsyncRead for ReadHalf {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        if buffer.is_empty() {
            return Poll::Ready(Ok(0));
        }
        let receiver = &mut *self.get_mut().0;
        let received = ready!(receiver.poll_fill(cx))?;
        let n = received.len().min(buffer.len());
        buffer[..n].copy_from_slice(&received[..n]);
        receiver.consume(n);
        Poll::Ready(Ok(n))
    }
}

/// A future that reads from the host. Resolves at the end of the stream.
type Pump = Pin<Box<dyn Future<Output = Result<(), ErrorCode>>>>;

/// The slot through which [`Receiver`] and its pump pass the buffer.
#[derive(Default)]
enum Inbox {
    /// The receiver or the pump holds the buffer.
    #[default]
    Lent,
    /// The buffer is consumed and waits for the pump.
    Empty(Vec<u8>),
    /// The buffer is filled and waits for the receiver.
    Filled(Vec<u8>),
}

/// The state of the receiving half.
///
/// The pump, a future boxed once per connection, refills the buffer whenever all of its bytes have
/// been consumed.
struct Receiver {
    pump: Pump,
    inbox: Rc<Cell<Inbox>>,
    bytes: Vec<u8>,
    consumed: usize,
    ended: Option<Result<(), ErrorCode>>,
}

impl Receiver {
    fn new(connection: &'static Connection) -> Self {
        let inbox = Rc::new(Cell::default());
        Self {
            pump: Box::pin(pump(connection, inbox.clone())),
            inbox,
            bytes: Vec::new(),
            consumed: 0,
            ended: None,
        }
    }

    /// Received bytes that were not consumed yet. Empty at the end of the stream.
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<&[u8]>> {
        if self.consumed == self.bytes.len() && self.ended.is_none() {
            if self.bytes.capacity() > 0 {
                self.inbox
                    .set(Inbox::Empty(std::mem::take(&mut self.bytes)));
                self.consumed = 0;
            }
            if let Poll::Ready(result) = self.pump.as_mut().poll(cx) {
                self.ended = Some(result);
            } else if let Inbox::Filled(bytes) = self.inbox.take() {
                self.bytes = bytes;
            } else {
                return Poll::Pending;
            }
        }
        match &self.ended {
            Some(Err(code)) => Poll::Ready(Err(io_error(code))),
            _ => Poll::Ready(Ok(&self.bytes[self.consumed..])),
        }
    }

    fn consume(&mut self, n: usize) {
        self.consumed = (self.consumed + n).min(self.bytes.len());
    }
}

/// Fills the buffer with received bytes each time the receiver returns it.
async fn pump(connection: &'static Connection, inbox: Rc<Cell<Inbox>>) -> Result<(), ErrorCode> {
    let (mut stream, end) = connection.receive();
    let mut buffer = Vec::with_capacity(FIRST_BUFFER_BYTES);
    loop {
        let (result, filled) = stream.read(buffer).await;
        if result == StreamResult::Dropped {
            return end.await;
        }
        if filled.is_empty() {
            // The receiver would take an empty buffer for the end of the stream.
            buffer = filled;
            continue;
        }
        inbox.set(Inbox::Filled(filled));
        buffer = poll_fn(|_| match inbox.take() {
            Inbox::Empty(buffer) => Poll::Ready(buffer),
            // No waker is needed: the receiver polls this future after it returns the buffer.
            other => {
                inbox.set(other);
                Poll::Pending
            }
        })
        .await;
        let full = buffer.len() == buffer.capacity();
        buffer.clear();
        if full && buffer.capacity() < BUFFER_BYTES {
            buffer.reserve_exact(BUFFER_BYTES.min(4 * buffer.capacity()));
        }
    }
}

/// The sending half of a [`TcpStream`](crate::TcpStream).
///
/// Created by [`into_split`](crate::TcpStream::into_split). Dropping this half does not close the
/// sending direction. [`futures::AsyncWriteExt::close`] does, and so does returning from the
/// handler.
pub struct WriteHalf(&'static mut Sender);

impl WriteHalf {
    pub(crate) fn new(connection: &'static Connection) -> Self {
        Self(Box::leak(Box::new(Sender {
            connection,
            state: State::Unused,
            end: None,
            buffer: Vec::new(),
        })))
    }
}

impl AsyncWrite for WriteHalf {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.0.poll_write(cx, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // `Sender` buffers no bytes.
        Poll::Ready(Ok(()))
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.0.poll_close(cx)
    }
}

/// The state of the sending half.
///
/// The sender buffers no bytes: the host has taken all bytes that a write reports as accepted. If
/// the host cannot take any at once, the sender cancels the write and waits with a write of no
/// bytes. The caller thus keeps its bytes, and may drop the write or send other bytes instead.
struct Sender {
    connection: &'static Connection,
    state: State,
    /// Resolves to the reason why the host takes no more bytes.
    end: Option<FutureReader<Result<(), ErrorCode>>>,
    /// The buffer passed to the host, which needs an owned one. Reused for each write.
    buffer: Vec<u8>,
}

enum State {
    /// The host was not given a stream yet, because nothing was written.
    Unused,
    Open(StreamWriter<u8>),
    /// Waits until the host can take more bytes.
    Waiting(Pin<Box<dyn Future<Output = (StreamWriter<u8>, StreamResult)>>>),
    /// Waits for the host's result.
    Ending(Pin<Box<dyn Future<Output = Result<(), ErrorCode>>>>),
    Ended(Result<(), ErrorCode>),
}

impl Sender {
    /// Gives the host the stream to send from.
    fn begin(&mut self) {
        let (writer, reader) = wit_stream::new();
        self.end = Some(self.connection.send(reader));
        self.state = State::Open(writer);
    }

    /// Sends a prefix of `bytes` and returns its length.
    fn poll_write(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if bytes.is_empty() {
            return Poll::Ready(Ok(0));
        }
        loop {
            match &mut self.state {
                State::Unused => self.begin(),
                State::Open(writer) => match try_write(writer, &mut self.buffer, cx, bytes) {
                    StreamResult::Complete(n) => return Poll::Ready(Ok(n)),
                    StreamResult::Dropped => self.end(),
                    StreamResult::Cancelled => self.wait(),
                },
                State::Waiting(waiting) => match ready!(waiting.as_mut().poll(cx)) {
                    (_, StreamResult::Dropped) => self.end(),
                    (writer, _) => self.state = State::Open(writer),
                },
                State::Ending(_) => {
                    let _ = ready!(self.poll_end(cx));
                }
                State::Ended(Ok(())) => {
                    return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
                }
                State::Ended(Err(code)) => return Poll::Ready(Err(io_error(code))),
            }
        }
    }

    /// Closes the sending direction and returns the host's result.
    fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if let State::Unused = self.state {
            self.begin();
        }
        if let State::Open(_) | State::Waiting(_) = self.state {
            self.end();
        }
        self.poll_end(cx)
    }

    /// Drops the writer, which closes the stream, and waits for the host's result.
    fn end(&mut self) {
        let end = self.end.take();
        self.state = State::Ending(Box::pin(async move {
            match end {
                Some(end) => end.await,
                None => Ok(()),
            }
        }));
    }

    /// Waits until the host can take more bytes.
    fn wait(&mut self) {
        // `Ended` is a placeholder: the next statement sets the state.
        let open = std::mem::replace(&mut self.state, State::Ended(Ok(())));
        if let State::Open(mut writer) = open {
            self.state = State::Waiting(Box::pin(async move {
                let (result, _) = writer.write(Vec::new()).await;
                (writer, result)
            }));
        }
    }

    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if let State::Ending(end) = &mut self.state {
            self.state = State::Ended(ready!(end.as_mut().poll(cx)));
        }
        match &self.state {
            State::Ended(Err(code)) => Poll::Ready(Err(io_error(code))),
            _ => Poll::Ready(Ok(())),
        }
    }
}

/// Writes as many of `bytes` as the host takes at once.
fn try_write(
    writer: &mut StreamWriter<u8>,
    buffer: &mut Vec<u8>,
    cx: &mut Context<'_>,
    bytes: &[u8],
) -> StreamResult {
    let mut owned = std::mem::take(buffer);
    owned.clear();
    owned.extend_from_slice(&bytes[..bytes.len().min(BUFFER_BYTES)]);
    let mut write = pin!(writer.write(owned));
    let (result, rest) = match write.as_mut().poll(cx) {
        Poll::Ready(done) => done,
        Poll::Pending => write.cancel(),
    };
    *buffer = rest.into_vec();
    result
}
