//! The two directions of a connection as poll functions over the owned-buffer streams of the
//! component model.
//!
//! A component-model read or write owns its buffer until it completes, while
//! [`AsyncRead`] and [`AsyncWrite`] lend one for the length of a poll. Each half therefore has a buffer of its own.

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

/// The most that one host call moves. As large as the default socket buffers make worthwhile, and
/// small enough that two of them fit in the memory a guest starts with.
const BUFFER_BYTES: usize = 64 * 1024;

/// How much the first reads ask for; it grows with a stream that fills it. Most messages are
/// small, and what a sandbox has touched has to be cleared for the next connection.
const FIRST_BUFFER_BYTES: usize = 2 * 1024;

/// The receiving direction of a [`TcpStream`](crate::TcpStream), by
/// [`into_split`](crate::TcpStream::into_split).
///
/// As an [`AsyncBufRead`] it lends what the host has written into its buffer, without a copy.
pub struct ReadHalf(&'static mut Receiving);

impl ReadHalf {
    pub(crate) fn new(connection: &'static Connection) -> Self {
        Self(Box::leak(Box::new(Receiving::new(connection))))
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
        let receiving = &mut *self.get_mut().0;
        let received = ready!(receiving.poll_fill(cx))?;
        let n = received.len().min(buffer.len());
        buffer[..n].copy_from_slice(&received[..n]);
        receiving.consume(n);
        Poll::Ready(Ok(n))
    }
}

/// Moves bytes for one direction; resolves when the direction has ended.
type Pump = Pin<Box<dyn Future<Output = Result<(), ErrorCode>>>>;

/// What the pump fills, and who has it.
#[derive(Default)]
enum Inbox {
    /// The reader, while there are bytes in it that were not consumed.
    #[default]
    Lent,
    /// The pump, which is to fill it.
    Empty(Vec<u8>),
    /// Nobody yet: the pump has filled it.
    Filled(Vec<u8>),
}

/// A future, boxed once per connection, fills the buffer whenever all of it has been consumed. The
/// two hand the buffer to each other by way of the inbox: whoever does not have it finds
/// [`Inbox::Lent`] there.
struct Receiving {
    pump: Pump,
    inbox: Rc<Cell<Inbox>>,
    bytes: Vec<u8>,
    consumed: usize,
    ended: Option<Result<(), ErrorCode>>,
}

impl Receiving {
    fn new(connection: &'static Connection) -> Self {
        let inbox = Rc::new(Cell::default());
        Self {
            pump: Box::pin(receive(connection, inbox.clone())),
            inbox,
            bytes: Vec::new(),
            consumed: 0,
            ended: None,
        }
    }

    /// Received bytes that were not consumed. None at the end of the stream.
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<&[u8]>> {
        if self.consumed == self.bytes.len() && self.ended.is_none() {
            if self.bytes.capacity() > 0 {
                // The pump has lent it: it gets it back.
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

/// Fills a buffer, and does so again each time that it comes back.
async fn receive(connection: &'static Connection, inbox: Rc<Cell<Inbox>>) -> Result<(), ErrorCode> {
    let (mut stream, end) = connection.receive();
    let mut buffer = Vec::with_capacity(FIRST_BUFFER_BYTES);
    loop {
        let (result, filled) = stream.read(buffer).await;
        if result == StreamResult::Dropped {
            return end.await;
        }
        if filled.is_empty() {
            // Nothing is lent that would look like the end.
            buffer = filled;
            continue;
        }
        inbox.set(Inbox::Filled(filled));
        buffer = poll_fn(|_| match inbox.take() {
            Inbox::Empty(buffer) => Poll::Ready(buffer),
            // `Receiving` polls again when it has put it there.
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

/// The sending direction of a [`TcpStream`](crate::TcpStream), by
/// [`into_split`](crate::TcpStream::into_split).
///
/// Dropping it does not close this direction: [`futures::AsyncWriteExt::close`] does, and returning
/// from the handler.
pub struct WriteHalf(&'static mut Sending);

impl WriteHalf {
    pub(crate) fn new(connection: &'static Connection) -> Self {
        Self(Box::leak(Box::new(Sending {
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
        // Nothing is held back.
        Poll::Ready(Ok(()))
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.0.poll_close(cx)
    }
}

/// It holds no bytes back: what a write has accepted, the host has taken. A write that the host
/// cannot take at once is cancelled, and a write of no bytes waits for its turn instead, so that
/// the bytes stay with the caller, who may drop the write or change its mind.
struct Sending {
    connection: &'static Connection,
    state: State,
    /// Why the host took no more, once it does not.
    end: Option<FutureReader<Result<(), ErrorCode>>>,
    /// Reused for each write: the host takes bytes only from a buffer that it is handed.
    buffer: Vec<u8>,
}

enum State {
    /// Nothing was written yet, and the host has no stream to take it from.
    Unused,
    Open(StreamWriter<u8>),
    /// Until the host can take more.
    Waiting(Pin<Box<dyn Future<Output = (StreamWriter<u8>, StreamResult)>>>),
    /// Until the host has said how it ended.
    Ending(Pin<Box<dyn Future<Output = Result<(), ErrorCode>>>>),
    Ended(Result<(), ErrorCode>),
}

impl Sending {
    fn begin(&mut self) {
        let (writer, reader) = wit_stream::new();
        self.end = Some(self.connection.send(reader));
        self.state = State::Open(writer);
    }

    /// Sends some of `bytes`.
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

    /// Closes this direction.
    fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if let State::Unused = self.state {
            self.begin();
        }
        if let State::Open(_) | State::Waiting(_) = self.state {
            self.end();
        }
        self.poll_end(cx)
    }

    /// Drops the writer, which ends the stream if the host has not, and asks how it ended.
    fn end(&mut self) {
        let end = self.end.take();
        self.state = State::Ending(Box::pin(async move {
            match end {
                Some(end) => end.await,
                None => Ok(()),
            }
        }));
    }

    /// Waits until the host can take more.
    fn wait(&mut self) {
        // The placeholder is replaced in the next line but one.
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

/// Writes what the host takes of `bytes` at once.
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
