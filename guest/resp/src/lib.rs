//! A scratch store with the protocol of Redis (RESP2): strings, lists, sets, hashes and expiry.
//!
//! Each connection has a sandbox of its own and thus a private store. The store is empty at first
//! and disappears with the connection, so clients need no login and leave nothing to clean up.
//!
//! The supported commands answer as Redis 7.0 does; `commands` lists them. Sorted sets, streams,
//! transactions, scripts, channels, cursors and further databases are not supported.
//!
//! `protocol` parses requests and writes answers, `store` holds the keys, and `commands` executes
//! requests on the store. This file serves the connection. All memory that a client can make the
//! guest use is bounded: a client that asks for too much gets an error and keeps its connection.

mod commands;
mod glob;
mod protocol;
mod store;

use std::future::poll_fn;
use std::io;
use std::pin::pin;
use std::task::Poll;
use std::time::UNIX_EPOCH;

use futures::FutureExt;
use futures::io::{AsyncBufRead, AsyncWrite};
use wasinetd_guest::TcpStream;

use commands::Session;
use protocol::{Answers, Parser};
use store::Time;

wasinetd_guest::export!(handle_connection);

/// Bytes of answers that are sent even if there are more requests to answer.
const WORTH_SENDING: usize = 64 * 1024;

/// Bytes of unsent answers at which the guest stops reading requests.
///
/// Some clients send a long pipeline before they read any answer. A much lower limit would make
/// such clients wait forever.
const MAX_UNSENT: usize = 1024 * 1024;

async fn handle_connection(stream: TcpStream) -> io::Result<()> {
    let id = stream.id();
    let drain = stream.drain();
    let (reader, writer) = stream.into_split();
    let now = || {
        UNIX_EPOCH
            .elapsed()
            .map_or(0, |elapsed| elapsed.as_millis() as i64)
    };
    serve(reader, writer, id, now, drain.begun()).await
}

/// Answers the requests from `reader` until the conversation ends.
///
/// The conversation ends when `reader` ends, the client quits or violates the protocol, or
/// `draining` resolves between two requests. `id` is the client number that `CLIENT ID` returns.
/// `now` returns the milliseconds since 1970.
///
/// # Errors
///
/// Fails when `reader` or `writer` fails.
pub async fn serve(
    reader: impl AsyncBufRead,
    writer: impl AsyncWrite,
    id: u64,
    now: impl Fn() -> i64,
    draining: impl Future<Output = ()>,
) -> io::Result<()> {
    let (mut reader, mut writer) = (pin!(reader), pin!(writer));
    let (mut draining, mut drains) = (pin!(draining.fuse()), false);
    let mut conversation = Conversation::new(id);
    poll_fn(|cx| {
        loop {
            // All received requests are answered before any answer is sent, so that the answers to
            // a pipeline need few writes.
            let worth_sending = conversation.unsent().len() + WORTH_SENDING;
            let input_blocked = loop {
                if conversation.ended || conversation.is_full() {
                    break true;
                }
                if conversation.unsent().len() >= worth_sending {
                    break false;
                }
                match reader.as_mut().poll_fill_buf(cx)? {
                    Poll::Ready([]) => conversation.ended = true,
                    Poll::Ready(input) => {
                        let consumed = conversation.answer(input, now());
                        reader.as_mut().consume(consumed);
                    }
                    Poll::Pending => {
                        drains |= draining.as_mut().poll(cx).is_ready();
                        conversation.ended = drains && conversation.parser.is_between_requests();
                        break true;
                    }
                }
            };
            if conversation.unsent().is_empty() {
                match conversation.ended {
                    true => return Poll::Ready(Ok(())),
                    false => return Poll::Pending,
                }
            }
            match writer.as_mut().poll_write(cx, conversation.unsent())? {
                Poll::Ready(0) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Poll::Ready(sent) => conversation.sent(sent),
                Poll::Pending if input_blocked => return Poll::Pending,
                // There are more requests to answer meanwhile.
                Poll::Pending => {}
            }
        }
    })
    .await
}

/// The state of a conversation: a partial request, the session and unsent answers.
struct Conversation {
    parser: Parser,
    session: Session,
    answers: Answers,
    /// The number of sent bytes at the start of `answers`.
    sent: usize,
    /// Whether no more requests are read.
    ended: bool,
}

impl Conversation {
    fn new(id: u64) -> Self {
        Self {
            parser: Parser::default(),
            session: Session::new(id),
            answers: Answers::default(),
            sent: 0,
            ended: false,
        }
    }

    /// Answers the requests in `input` until there are too many unsent answers. Returns the number
    /// of consumed bytes.
    fn answer(&mut self, input: &[u8], now: Time) -> usize {
        let mut rest = input;
        self.session.store.set_now(now);
        while !self.ended && !self.is_full() {
            match self.parser.parse(&mut rest) {
                Ok(true) => {
                    self.session
                        .execute(self.parser.request(), &mut self.answers);
                    self.ended = self.session.quit;
                }
                Ok(false) => break,
                Err(error) => {
                    self.answers.error(&format!("ERR Protocol error: {error}"));
                    self.ended = true;
                }
            }
        }
        input.len() - rest.len()
    }

    fn is_full(&self) -> bool {
        self.unsent().len() >= MAX_UNSENT
    }

    fn unsent(&self) -> &[u8] {
        &self.answers.bytes[self.sent..]
    }

    fn sent(&mut self, n: usize) {
        self.sent += n;
        let bytes = &mut self.answers.bytes;
        if self.sent == bytes.len() {
            protocol::clear(bytes);
            self.sent = 0;
        } else if self.sent >= bytes.len() / 2 {
            // On average, this moves each byte at most once.
            bytes.drain(..self.sent);
            self.sent = 0;
        }
    }
}

#[cfg(test)]
mod tests;
