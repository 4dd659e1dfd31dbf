//! What guests print, as lines of the host's log.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, OnceLock};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use tokio::io::AsyncWrite;
use tracing::{info, warn};
use wasmtime_wasi::cli::{IsTerminal, StdoutStream};
use wasmtime_wasi::p2::{OutputStream, Pollable, StreamResult};

use super::fairness::{self, EpochClock};
use super::{SharedTransport, lock};
use crate::limit::Limit;

/// The longest line that is logged as one, in bytes. A longer one is broken.
const MAX_LINE: usize = 4 * 1024;

/// What a line takes in the log beside what it says, in bytes, about: time, target, connection.
const LINE_OVERHEAD: usize = 100;

/// What may be logged of one connection's standard output, and as much of its standard error, and
/// who is to be told when that was reached.
#[derive(Clone)]
pub(super) struct OutputLimit {
    bytes: usize,
    clock: EpochClock,
    transport: SharedTransport,
}

impl OutputLimit {
    pub(super) fn new(bytes: usize, clock: EpochClock, transport: SharedTransport) -> Self {
        Self {
            bytes,
            clock,
            transport,
        }
    }
}

/// The standard output or the standard error of one connection's guest.
///
/// Made for every connection, and used by few: nothing is allocated before it is asked for.
pub(super) struct GuestOutput {
    id: u64,
    name: &'static str,
    limit: OutputLimit,
    lines: OnceLock<Lines>,
}

impl GuestOutput {
    /// For the connection `id`; `name` says which of its two streams it is.
    pub(super) fn new(id: u64, name: &'static str, limit: &OutputLimit) -> Self {
        Self {
            id,
            name,
            limit: limit.clone(),
            lines: OnceLock::new(),
        }
    }

    fn lines(&self) -> Lines {
        let new = || {
            let line = Line {
                id: self.id,
                name: self.name,
                partial: Vec::new(),
                left: self.limit.bytes,
            };
            Lines {
                line: Arc::new(Mutex::new(line)),
                limit: self.limit.clone(),
            }
        };
        self.lines.get_or_init(new).clone()
    }
}

impl IsTerminal for GuestOutput {
    fn is_terminal(&self) -> bool {
        false
    }
}

impl StdoutStream for GuestOutput {
    fn async_stream(&self) -> Box<dyn AsyncWrite + Send + Sync> {
        Box::new(self.lines())
    }

    fn p2_stream(&self) -> Box<dyn OutputStream> {
        Box::new(self.lines())
    }
}

/// Bytes in, lines out.
#[derive(Clone)]
struct Lines {
    line: Arc<Mutex<Line>>,
    limit: OutputLimit,
}

impl Lines {
    fn write(&self, bytes: &[u8]) {
        let mut line = lock(&self.line);
        if line.left > 0 && line.write(bytes) == 0 {
            warn!(
                id = line.id,
                stream = line.name,
                bytes = self.limit.bytes,
                limit = %Limit::MaxOutput,
                "no more of what this guest prints is logged"
            );
            lock(&self.limit.transport).limit_hit(Limit::MaxOutput);
        }
    }
}

impl AsyncWrite for Lines {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        ready!(fairness::poll_lasts(&self.limit.clock, cx));
        self.write(bytes);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[wasmtime_wasi::async_trait]
impl Pollable for Lines {
    async fn ready(&mut self) {}
}

impl OutputStream for Lines {
    fn write(&mut self, bytes: Bytes) -> StreamResult<()> {
        Lines::write(self, &bytes);
        Ok(())
    }

    fn flush(&mut self) -> StreamResult<()> {
        Ok(())
    }

    fn check_write(&mut self) -> StreamResult<usize> {
        // How much the guest may write at once, which wasmtime buffers.
        Ok(MAX_LINE)
    }
}

struct Line {
    id: u64,
    name: &'static str,
    partial: Vec<u8>,
    /// What may still be logged, in bytes.
    left: usize,
}

impl Line {
    /// Returns what may still be logged.
    fn write(&mut self, mut bytes: &[u8]) -> usize {
        while !bytes.is_empty() && self.left > 0 {
            let room = (MAX_LINE - self.partial.len()).min(self.left);
            let end = bytes.iter().position(|&byte| byte == b'\n');
            let n = end.unwrap_or(bytes.len()).min(room);
            self.partial.extend_from_slice(&bytes[..n]);
            let ends_here = end == Some(n);
            bytes = &bytes[n + usize::from(ends_here)..];
            let line = ends_here || self.partial.len() == MAX_LINE;
            // Lines without a word are bounded too.
            let overhead = if line { LINE_OVERHEAD } else { 0 };
            self.left = self.left.saturating_sub(n + overhead);
            if ends_here || self.partial.len() == MAX_LINE || self.left == 0 {
                self.flush();
            }
        }
        self.left
    }

    fn flush(&mut self) {
        let text = printable(&self.partial, MAX_LINE);
        info!(target: "guest", id = self.id, stream = self.name, "{text}");
        self.partial.clear();
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        if !self.partial.is_empty() {
            self.flush();
        }
    }
}

/// `bytes` from a guest as text that cannot forge or garble a line of the log: cut to `max` bytes,
/// with control characters escaped.
pub(super) fn printable(bytes: &[u8], max: usize) -> String {
    let mut text = String::new();
    for character in String::from_utf8_lossy(&bytes[..bytes.len().min(max)]).chars() {
        if character.is_control() && character != '\t' {
            text.extend(character.escape_default());
        } else {
            text.push(character);
        }
    }
    if bytes.len() > max {
        text.push('…');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_of_a_guest_do_not_reach_the_log() {
        assert_eq!(
            printable(b"a\x1b[31m\r\nb\tc", 99),
            "a\\u{1b}[31m\\r\\nb\tc"
        );
        assert_eq!(printable("gr\u{fc}n".as_bytes(), 99), "gr\u{fc}n");
    }

    #[test]
    fn a_text_is_cut_to_its_bound_and_says_so() {
        assert_eq!(printable(b"four", 4), "four");
        assert_eq!(printable(b"fives", 4), "five\u{2026}");
    }

    #[test]
    fn whatever_a_guest_prints_a_line_is_one_and_bounded() {
        bolero::check!().for_each(|bytes: &[u8]| {
            let text = printable(bytes, 100);
            assert!(
                !text.chars().any(|c| c.is_control() && c != '\t'),
                "{text:?}"
            );
            // An escape takes eight characters at most, as does what is no text.
            assert!(text.len() <= 8 * 100 + 3, "{}", text.len());
        });
    }

    #[test]
    fn however_output_is_split_as_much_of_it_is_logged() {
        let writes = bolero::generator::produce::<(u16, Vec<Vec<u8>>)>();
        bolero::check!()
            .with_generator(writes)
            .for_each(|(most, writes)| {
                let line = || Line {
                    id: 0,
                    name: "stdout",
                    partial: Vec::new(),
                    left: usize::from(*most),
                };
                let (mut whole, mut split) = (line(), line());
                whole.write(&writes.concat());
                for bytes in writes {
                    let before = split.left;
                    assert!(split.write(bytes) <= before);
                    assert!(split.partial.len() < MAX_LINE);
                }
                assert_eq!((whole.left, &whole.partial), (split.left, &split.partial));
            });
    }

    #[test]
    fn output_is_cut_at_its_limit_and_not_before() {
        let most = 64 * 1024;
        let mut line = Line {
            id: 0,
            name: "stdout",
            partial: Vec::new(),
            left: most,
        };
        assert_eq!(line.write(b"one\n"), most - 3 - LINE_OVERHEAD);
        line.left = most;
        let lines = most / LINE_OVERHEAD;
        assert!(line.write(&vec![b'\n'; lines]) > 0);
        assert_eq!(line.write(b"\n"), 0);
        assert_eq!(line.write(b"z"), 0);
        assert!(line.partial.is_empty());
    }
}
