//! The log on standard error.

use std::cell::Cell;
use std::io::{self, IsTerminal, Write};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::{Event, Subscriber};
use tracing_subscriber::fmt;
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;
use wasinetd::admin::LogStream;

use crate::cli::{LogFormat, LogLevel};

/// How long a line may wait for others to be written together with it.
const GATHER: Duration = Duration::from_millis(20);

/// The most that is kept for a reader of the log that does not keep up, in bytes. When it is full,
/// further lines are dropped and counted: a stuck log must not stop the service.
const MAX_BUFFERED: usize = 8 << 20;

/// How long the last lines may take to be written when the server ends.
const LAST_LINES: Duration = Duration::from_secs(1);

/// Starts to log. What is logged is written out when the guard is dropped.
///
/// What is written is handed on to `logs` as well.
pub(crate) fn start(format: LogFormat, level: LogLevel, logs: LogStream) -> LogGuard {
    let shared = Arc::new(Shared {
        lines: Mutex::default(),
        filled: Condvar::new(),
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
            move || Gatherer(shared.clone())
        });
    // In this order: what an event is about is known when its line is written.
    let log = tracing_subscriber::registry().with(level).with(About);
    match format {
        LogFormat::Text => log.with(lines).init(),
        LogFormat::Json => log.with(lines.json().flatten_event(true)).init(),
    }
    let (done, written) = mpsc::channel();
    let writer = shared.clone();
    thread::spawn(move || {
        writer.write_out();
        // The guard may have given up on us.
        let _ = done.send(());
    });
    LogGuard { shared, written }
}

/// Keeps the log going; writes out the rest of it when dropped.
pub(crate) struct LogGuard {
    shared: Arc<Shared>,
    written: Receiver<()>,
}

impl Drop for LogGuard {
    fn drop(&mut self) {
        self.shared.lock().ended = true;
        self.shared.filled.notify_one();
        // The thread may be stuck in a write that nobody reads. The process ends with or without
        // its last lines.
        let _ = self.written.recv_timeout(LAST_LINES);
    }
}

/// Lines on their way from all threads to the one that writes them.
///
/// A system call for each line, or a wake-up of another thread, would be a good part of the cost of
/// a short connection. Here the writing thread is woken by the first line, waits a moment, and
/// writes all that has come together.
struct Shared {
    lines: Mutex<Lines>,
    filled: Condvar,
    logs: LogStream,
}

#[derive(Default)]
struct Lines {
    bytes: Vec<u8>,
    /// The connection that each line is of, and where it ends.
    ends: Vec<(Option<u64>, usize)>,
    dropped: u64,
    ended: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Lines> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, line: &[u8]) {
        let mut lines = self.lock();
        if lines.bytes.len() + line.len() > MAX_BUFFERED {
            lines.dropped += 1;
            return;
        }
        let first = lines.bytes.is_empty();
        lines.bytes.extend_from_slice(line);
        let end = lines.bytes.len();
        lines.ends.push((ABOUT.take(), end));
        drop(lines);
        if first {
            self.filled.notify_one();
        }
    }

    fn write_out(&self) {
        loop {
            let lines = self.lock();
            let empty = |lines: &mut Lines| lines.bytes.is_empty() && !lines.ended;
            let lines = self
                .filled
                .wait_while(lines, empty)
                .unwrap_or_else(PoisonError::into_inner);
            // The end cuts the wait short.
            let gather = self
                .filled
                .wait_timeout_while(lines, GATHER, |lines| !lines.ended);
            let (mut lines, _) = gather.unwrap_or_else(PoisonError::into_inner);
            let bytes = std::mem::take(&mut lines.bytes);
            let ends = std::mem::take(&mut lines.ends);
            let (dropped, ended) = (std::mem::take(&mut lines.dropped), lines.ended);
            drop(lines);
            // When standard error is closed the log has no reader, and the service goes on.
            let _ = io::stderr().write_all(&bytes);
            if !bytes.is_empty() {
                self.logs.publish(bytes.into(), &ends);
            }
            if dropped > 0 {
                tracing::warn!(
                    dropped,
                    "log lines were dropped: the log was not read fast enough"
                );
            } else if ended {
                return;
            }
        }
    }
}

thread_local! {
    /// The connection that the line which is being written on this thread is about.
    static ABOUT: Cell<Option<u64>> = const { Cell::new(None) };
}

/// Finds out which connection an event is about: the one of its field `id`. What a guest prints is no
/// field, and so cannot pass for one.
struct About;

impl<S: Subscriber> Layer<S> for About {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        ABOUT.set(None);
        event.record(&mut Id);
    }
}

struct Id;

impl Visit for Id {
    fn record_u64(&mut self, field: &Field, value: u64) {
        if field.name() == "id" {
            ABOUT.set(Some(value));
        }
    }

    fn record_debug(&mut self, _: &Field, _: &dyn std::fmt::Debug) {}
}

/// Where one line is put together.
struct Gatherer(Arc<Shared>);

impl Write for Gatherer {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.push(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
