//! Output of guests, as lines of the host's log.

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
use super::transport::SharedTransport;
use crate::limit::Limit;
use crate::sync::lock;

/// The longest line of the log, in bytes. A longer line of a guest is split.
const MAX_LINE_BYTES: usize = 4 * 1024;

/// The size of a log line without its text, in bytes.
///
/// Roughly: time, target, connection.
const LINE_OVERHEAD: usize = 100;

/// The standard output or the standard error of one connection's guest.
///
/// Made for every connection, and used by few: nothing is allocated before the first use.
pub(super) struct GuestOutput {
    id: u64,
    name: &'static str,
    limit: OutputLimit,
    lines: OnceLock<Lines>,
}

/// The limit on each of the two output streams of one connection.
#[derive(Clone)]
pub(super) struct OutputLimit {
    bytes: usize,
    clock: EpochClock,
    /// Learns when the guest hits the limit.
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

impl GuestOutput {
    /// An output stream of the connection `id`. `name` is `stdout` or `stderr`.
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

/// A stream of bytes that become lines of the log.
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
                "the rest of this guest's output is not logged"
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
        ready!(fairness::poll_turn(&self.limit.clock, cx));
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
        // wasmtime buffers this much per write.
        Ok(MAX_LINE_BYTES)
    }
}

/// The line that the guest is writing.
struct Line {
    id: u64,
    name: &'static str,
    partial: Vec<u8>,
    /// The part of the limit that is left, in bytes.
    left: usize,
}

impl Line {
    /// Logs all complete lines. Returns the part of the limit that is left, in bytes.
    fn write(&mut self, mut bytes: &[u8]) -> usize {
        while !bytes.is_empty() && self.left > 0 {
            let room = (MAX_LINE_BYTES - self.partial.len()).min(self.left);
            let newline = bytes.iter().position(|&byte| byte == b'\n');
            let n = newline.unwrap_or(bytes.len()).min(room);
            self.partial.extend_from_slice(&bytes[..n]);
            let ends_here = newline == Some(n);
            bytes = &bytes[n + usize::from(ends_here)..];
            let is_complete = ends_here || self.partial.len() == MAX_LINE_BYTES;
            // The overhead bounds the number of empty lines too.
            let overhead = if is_complete { LINE_OVERHEAD } else { 0 };
            self.left = self.left.saturating_sub(n + overhead);
            if is_complete || self.left == 0 {
                self.flush();
            }
        }
        self.left
    }

    fn flush(&mut self) {
        let text = printable(&self.partial, MAX_LINE_BYTES);
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

/// Makes bytes of a guest safe for the log.
///
/// The text can neither forge nor garble a line. Escapes control characters and cuts the bytes to
/// `max`.
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
    fn control_characters_of_a_guest_are_escaped() {
        assert_eq!(
            printable(b"a\x1b[31m\r\nb\tc", 99),
            "a\\u{1b}[31m\\r\\nb\tc"
        );
        assert_eq!(printable("gr\u{fc}n".as_bytes(), 99), "gr\u{fc}n");
    }

    #[test]
    fn a_long_text_is_cut_and_marked() {
        assert_eq!(printable(b"four", 4), "four");
        assert_eq!(printable(b"fives", 4), "five\u{2026}");
    }

    #[test]
    fn any_bytes_become_one_line_of_bounded_length() {
        bolero::check!().for_each(|bytes: &[u8]| {
            let text = printable(bytes, 100);
            assert!(
                !text.chars().any(|c| c.is_control() && c != '\t'),
                "{text:?}"
            );
            // An escape has eight characters at most. A replacement character has three bytes.
            assert!(text.len() <= 8 * 100 + 3, "{}", text.len());
        });
    }

    #[test]
    fn the_logged_part_does_not_depend_on_how_output_is_split() {
        let writes = bolero::generator::produce::<(u16, Vec<Vec<u8>>)>();
        bolero::check!()
            .with_generator(writes)
            .for_each(|(limit, writes)| {
                let line = || Line {
                    id: 0,
                    name: "stdout",
                    partial: Vec::new(),
                    left: usize::from(*limit),
                };
                let (mut whole, mut split) = (line(), line());
                whole.write(&writes.concat());
                for bytes in writes {
                    let before = split.left;
                    assert!(split.write(bytes) <= before);
                    assert!(split.partial.len() < MAX_LINE_BYTES);
                }
                assert_eq!((whole.left, &whole.partial), (split.left, &split.partial));
            });
    }

    #[test]
    fn output_is_cut_exactly_at_its_limit() {
        let limit = 64 * 1024;
        let mut line = Line {
            id: 0,
            name: "stdout",
            partial: Vec::new(),
            left: limit,
        };
        assert_eq!(line.write(b"one\n"), limit - 3 - LINE_OVERHEAD);
        line.left = limit;
        let lines = limit / LINE_OVERHEAD;
        assert!(line.write(&vec![b'\n'; lines]) > 0);
        assert_eq!(line.write(b"\n"), 0);
        assert_eq!(line.write(b"z"), 0);
        assert!(line.partial.is_empty());
    }
}
