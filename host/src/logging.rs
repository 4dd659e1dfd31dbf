//! The log on standard error.

use std::cell::Cell;
use std::io::{self, IsTerminal, Write};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::{Event, Subscriber};
use tracing_subscriber::fmt;
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;
use wasinetd::admin::LogStream;
use wasinetd::config::model::{LogFormat, LogLevel};
use wasinetd::sync::lock;

/// Time that a line waits for others, to be written by the same system call.
const BATCH_DELAY: Duration = Duration::from_millis(20);

/// Size of the buffer, in bytes, for a slow reader of the log. When the buffer is full, further lines
/// are dropped and counted: a stuck log must not stop the service.
const MAX_BUFFERED: usize = 8 << 20;

/// Longest time for writing the last lines when the process exits.
const FINISH_TIMEOUT: Duration = Duration::from_secs(1);

/// Starts logging to standard error and to `logs`. Dropping the guard writes the last lines.
pub(crate) fn start(format: LogFormat, level: LogLevel, logs: LogStream) -> LogGuard {
    let shared = Arc::new(Shared {
        buffer: Mutex::default(),
        wake_writer: Condvar::new(),
        logs,
    });
    let level = match level {
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
    };
    let lines = fmt::layer()
        .with_ansi(io::stderr().is_terminal())
        .with_writer({
            let shared = shared.clone();
            move || LineWriter(shared.clone())
        });
    // In this order: the connection of an event is known when its line is written.
    let log = tracing_subscriber::registry()
        .with(level)
        .with(ConnectionIdLayer);
    match format {
        LogFormat::Text => log.with(lines).init(),
        LogFormat::Json => log.with(lines.json().flatten_event(true)).init(),
    }
    let (done, finished) = mpsc::channel();
    let writer = shared.clone();
    thread::spawn(move || {
        writer.write_lines();
        // The guard may have stopped waiting.
        let _ = done.send(());
    });
    LogGuard { shared, finished }
}

/// Keeps the log running. Dropping it writes the last lines.
pub(crate) struct LogGuard {
    shared: Arc<Shared>,
    finished: Receiver<()>,
}

impl Drop for LogGuard {
    fn drop(&mut self) {
        lock(&self.shared.buffer).ended = true;
        self.shared.wake_writer.notify_one();
        // The thread may be stuck in a write. The process exits anyway, without its last lines.
        let _ = self.finished.recv_timeout(FINISH_TIMEOUT);
    }
}

/// Lines from all threads on their way to the writing thread.
///
/// A system call per line, or a wake-up per line, would be a good part of the cost of a short
/// connection. So the first line wakes the writing thread, which waits a moment and writes all lines
/// together.
struct Shared {
    buffer: Mutex<Buffer>,
    wake_writer: Condvar,
    logs: LogStream,
}

#[derive(Default)]
struct Buffer {
    bytes: Vec<u8>,
    /// The connection that each line is about, if any. Then the end of the line in `bytes`.
    lines: Vec<(Option<u64>, usize)>,
    dropped: u64,
    ended: bool,
}

impl Shared {
    fn push(&self, line: &[u8]) {
        let mut buffer = lock(&self.buffer);
        if buffer.bytes.len() + line.len() > MAX_BUFFERED {
            buffer.dropped += 1;
            return;
        }
        let is_first = buffer.bytes.is_empty();
        buffer.bytes.extend_from_slice(line);
        let end = buffer.bytes.len();
        buffer.lines.push((CONNECTION_ID.take(), end));
        drop(buffer);
        if is_first {
            self.wake_writer.notify_one();
        }
    }

    /// Writes lines until the log ends.
    fn write_lines(&self) {
        loop {
            let buffer = self.next_batch();
            // A closed standard error must not stop the service.
            let _ = io::stderr().write_all(&buffer.bytes);
            if !buffer.bytes.is_empty() {
                self.logs.publish(buffer.bytes.into(), &buffer.lines);
            }
            if buffer.dropped > 0 {
                tracing::warn!(
                    dropped = buffer.dropped,
                    "log lines were dropped: the log was not read fast enough"
                );
            } else if buffer.ended {
                return;
            }
        }
    }

    /// Waits for a first line, and [`BATCH_DELAY`] for others. The end of the log cuts both short.
    fn next_batch(&self) -> Buffer {
        let is_empty = |buffer: &mut Buffer| buffer.bytes.is_empty() && !buffer.ended;
        let buffer = self
            .wake_writer
            .wait_while(lock(&self.buffer), is_empty)
            .unwrap_or_else(PoisonError::into_inner);
        let (mut buffer, _) = self
            .wake_writer
            .wait_timeout_while(buffer, BATCH_DELAY, |buffer| !buffer.ended)
            .unwrap_or_else(PoisonError::into_inner);
        let ended = buffer.ended;
        std::mem::replace(
            &mut *buffer,
            Buffer {
                ended,
                ..Buffer::default()
            },
        )
    }
}

thread_local! {
    /// The connection of the event that this thread is writing.
    static CONNECTION_ID: Cell<Option<u64>> = const { Cell::new(None) };
}

/// Remembers the field `id` of each event: the number of the connection that the event is about.
///
/// Output of guests is no field, so a guest cannot write lines for another connection.
struct ConnectionIdLayer;

impl<S: Subscriber> Layer<S> for ConnectionIdLayer {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        CONNECTION_ID.set(None);
        event.record(&mut IdVisitor);
    }
}

struct IdVisitor;

impl Visit for IdVisitor {
    fn record_u64(&mut self, field: &Field, value: u64) {
        if field.name() == "id" {
            CONNECTION_ID.set(Some(value));
        }
    }

    fn record_debug(&mut self, _: &Field, _: &dyn std::fmt::Debug) {}
}

/// Passes one formatted line to the writing thread.
struct LineWriter(Arc<Shared>);

impl Write for LineWriter {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.push(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
