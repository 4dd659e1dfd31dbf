//! The two directions of a connection as poll functions over the owned-buffer streams of the
//! component model.
//!
//! A component-model read or write owns its buffer until it completes, while
//! [`AsyncRead`](futures::io::AsyncRead) and [`AsyncWrite`](futures::io::AsyncWrite) lend one for
//! the length of a poll. Each half therefore has a buffer of its own.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use wit_bindgen::rt::async_support::{FutureReader, StreamResult, StreamWriter};

use crate::rt::bindings::wit_stream;
use crate::rt::{Connection, ErrorCode, io_error};

/// The most that one host call moves. As large as the default socket buffers make worthwhile, and
/// small enough that two of them fit in the memory a guest starts with.
const BUFFER_BYTES: usize = 64 * 1024;

/// How much the first reads ask for; it grows with a stream that fills it. Most messages are
/// small, and what a sandbox has touched has to be cleared for the next connection.
const FIRST_BUFFER_BYTES: usize = 2 * 1024;

/// Moves bytes for one direction; resolves when the direction has ended.
type Pump = Pin<Box<dyn Future<Output = Result<(), ErrorCode>>>>;

/// Received bytes that the handler has not consumed yet.
#[derive(Default)]
struct Inbox {
    bytes: Vec<u8>,
    consumed: usize,
}

/// The receiving direction.
///
/// A future, boxed once per connection, fills the inbox whenever it is empty. It and `poll_read`
/// take turns: it runs only inside of a poll, so that the inbox is never borrowed twice.
pub(crate) struct ReadHalf {
    inbox: Rc<RefCell<Inbox>>,
    pump: Pump,
    ended: Option<Result<(), ErrorCode>>,
}

impl ReadHalf {
    pub(crate) fn new(connection: Rc<Connection>) -> Self {
        let inbox = Rc::new(RefCell::new(Inbox::default()));
        Self {
            pump: Box::pin(receive(connection, inbox.clone())),
            inbox,
            ended: None,
        }
    }

    /// Hands received bytes to `consume`, which says how many it took. None at the end of the
    /// stream.
    pub(crate) fn poll_read<T>(
        &mut self,
        cx: &mut Context<'_>,
        consume: impl FnOnce(&[u8]) -> (usize, T),
    ) -> Poll<io::Result<T>> {
        if self.inbox.borrow().is_empty() && self.ended.is_none() {
            if let Poll::Ready(result) = self.pump.as_mut().poll(cx) {
                self.ended = Some(result);
            } else if self.inbox.borrow().is_empty() {
                return Poll::Pending;
            }
        }
        let mut inbox = self.inbox.borrow_mut();
        if inbox.is_empty()
            && let Some(Err(code)) = &self.ended
        {
            return Poll::Ready(Err(io_error(code)));
        }
        let (taken, value) = consume(&inbox.bytes[inbox.consumed..]);
        inbox.consumed += taken;
        Poll::Ready(Ok(value))
    }
}

impl Inbox {
    fn is_empty(&self) -> bool {
        self.consumed == self.bytes.len()
    }
}

/// Fills the inbox each time that it is empty.
async fn receive(connection: Rc<Connection>, inbox: Rc<RefCell<Inbox>>) -> Result<(), ErrorCode> {
    let (mut stream, end) = connection.receive();
    let mut buffer = Vec::with_capacity(FIRST_BUFFER_BYTES);
    loop {
        let (result, filled) = stream.read(buffer).await;
        if result == StreamResult::Dropped {
            return end.await;
        }
        *inbox.borrow_mut() = Inbox {
            bytes: filled,
            consumed: 0,
        };
        buffer = poll_fn(|_| {
            let mut inbox = inbox.borrow_mut();
            if !inbox.is_empty() {
                // The next `poll_read` that finds the inbox empty polls this again.
                return Poll::Pending;
            }
            Poll::Ready(std::mem::take(&mut *inbox).bytes)
        })
        .await;
        let full = buffer.len() == buffer.capacity();
        buffer.clear();
        if full && buffer.capacity() < BUFFER_BYTES {
            buffer.reserve_exact(4 * buffer.capacity());
        }
    }
}

/// The sending direction.
///
/// It holds no bytes back: what a write has accepted, the host has taken. A write that the host
/// cannot take at once is cancelled, and a write of no bytes waits for its turn instead, so that
/// the bytes stay with the caller, who may drop the write or change its mind.
pub(crate) struct WriteHalf {
    state: Sending,
    /// Why the host took no more, once it does not.
    end: Option<FutureReader<Result<(), ErrorCode>>>,
    /// Reused for each write: the host takes bytes only from a buffer that it is handed.
    buffer: Vec<u8>,
}

enum Sending {
    Open(StreamWriter<u8>),
    /// Until the host can take more.
    Waiting(Pin<Box<dyn Future<Output = (StreamWriter<u8>, StreamResult)>>>),
    /// Until the host has said how it ended.
    Ending(Pin<Box<dyn Future<Output = Result<(), ErrorCode>>>>),
    Ended(Result<(), ErrorCode>),
}

impl WriteHalf {
    pub(crate) fn new(connection: &Connection) -> Self {
        let (writer, reader) = wit_stream::new();
        Self {
            state: Sending::Open(writer),
            end: Some(connection.send(reader)),
            buffer: Vec::new(),
        }
    }

    /// Sends some of `bytes`.
    pub(crate) fn poll_write(
        &mut self,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if bytes.is_empty() {
            return Poll::Ready(Ok(0));
        }
        loop {
            match &mut self.state {
                Sending::Open(writer) => match try_write(writer, &mut self.buffer, cx, bytes) {
                    StreamResult::Complete(n) => return Poll::Ready(Ok(n)),
                    StreamResult::Dropped => self.end(),
                    StreamResult::Cancelled => self.wait(),
                },
                Sending::Waiting(waiting) => match ready!(waiting.as_mut().poll(cx)) {
                    (_, StreamResult::Dropped) => self.end(),
                    (writer, _) => self.state = Sending::Open(writer),
                },
                Sending::Ending(_) => {
                    let _ = ready!(self.poll_end(cx));
                }
                Sending::Ended(Ok(())) => {
                    return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
                }
                Sending::Ended(Err(code)) => return Poll::Ready(Err(io_error(code))),
            }
        }
    }

    /// Closes this direction.
    pub(crate) fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if let Sending::Open(_) | Sending::Waiting(_) = self.state {
            self.end();
        }
        self.poll_end(cx)
    }

    /// Drops the writer, which ends the stream if the host has not, and asks how it ended.
    fn end(&mut self) {
        let end = self.end.take();
        self.state = Sending::Ending(Box::pin(async move {
            match end {
                Some(end) => end.await,
                None => Ok(()),
            }
        }));
    }

    /// Waits until the host can take more.
    fn wait(&mut self) {
        // The placeholder is replaced in the next line but one.
        let open = std::mem::replace(&mut self.state, Sending::Ended(Ok(())));
        if let Sending::Open(mut writer) = open {
            self.state = Sending::Waiting(Box::pin(async move {
                let (result, _) = writer.write(Vec::new()).await;
                (writer, result)
            }));
        }
    }

    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if let Sending::Ending(end) = &mut self.state {
            self.state = Sending::Ended(ready!(end.as_mut().poll(cx)));
        }
        match &self.state {
            Sending::Ended(Err(code)) => Poll::Ready(Err(io_error(code))),
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
