//! A scratch store by the protocol of Redis (RESP2), with strings, lists, sets, hashes and times to
//! live.
//!
//! Each connection is a fresh sandbox, and so each has a store of its own, which is empty when it begins
//! and gone when it ends. Nobody else sees it: there is nothing to log in to and nothing to clean up.
//!
//! Commands on keys are answered as Redis 7.0 does, as far as they are there (`commands` lists them). There are no
//! sorted sets, streams, transactions, scripts, channels and cursors, and one database.
//!
//! `protocol` reads requests and writes answers, `store` has the keys, `commands` brings the two
//! together, and here is the connection. All that a client can make this keep is bounded, so that it reads of an
//! error where it asks for too much, and is not cut off.

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

/// So many bytes of answers are worth a write while there are more requests.
const WORTH_SENDING: usize = 64 * 1024;

/// With so many that the client does not take, no more requests are read. Those who send all of a long
/// pipeline before they read would wait for ever if it were less than what they are used to.
const MAX_UNSENT: usize = 1024 * 1024;

async fn handle_connection(stream: TcpStream) -> io::Result<()> {
    let id = stream.id();
    let drain = stream.drain();
    let (reader, writer) = stream.into_split();
    let now = || {
        UNIX_EPOCH
            .elapsed()
            .map_or(0, |since| since.as_millis() as i64)
    };
    serve(reader, writer, id, now, drain.begun()).await
}

/// Answers the requests from `reader` until it ends, the client quits or breaks the protocol, or,
/// between two requests, `draining` is done. `id` is what the client is told as its number, and `now` tells
/// the milliseconds since 1970.
///
/// # Errors
///
/// Fails when `reader` or `writer` does.
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
            // All that was received is answered before anything is sent, so that the answers to a
            // pipeline go out together.
            let worth_sending = conversation.unsent().len() + WORTH_SENDING;
            let input_waits = loop {
                if conversation.ended || conversation.is_full() {
                    break true;
                }
                if conversation.unsent().len() >= worth_sending {
                    break false;
                }
                match reader.as_mut().poll_fill_buf(cx)? {
                    Poll::Ready([]) => conversation.ended = true,
                    Poll::Ready(input) => {
                        let taken = conversation.answer(input, now());
                        reader.as_mut().consume(taken);
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
                Poll::Pending if input_waits => return Poll::Pending,
                // There is more to answer meanwhile.
                Poll::Pending => {}
            }
        }
    })
    .await
}

/// What was received and not answered, and what was answered and not sent.
struct Conversation {
    parser: Parser,
    session: Session,
    answers: Answers,
    /// How much of the answers was sent.
    sent: usize,
    /// Whether there are no more requests, or none that are worth reading.
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

    /// Answers the requests in `input`, unless there are too many answers already. Returns how much it
    /// has taken.
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
            // No byte is moved twice on the average.
            bytes.drain(..self.sent);
            self.sent = 0;
        }
    }
}

#[cfg(test)]
mod tests;
