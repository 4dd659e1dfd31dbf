//! The log of a server, read from its standard error.

use std::io::{BufRead, BufReader};
use std::process::ChildStderr;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use super::super::machine::PATIENCE;

/// Collects log lines in a thread of its own.
pub(super) struct LogReader {
    log: Arc<Log>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Log {
    content: Mutex<Content>,
    /// Notified when the content has changed.
    changed: Condvar,
}

#[derive(Default)]
struct Content {
    lines: Vec<String>,
    /// Standard error is closed: no line follows.
    complete: bool,
}

impl LogReader {
    pub(super) fn start(stderr: ChildStderr) -> Self {
        let log = Arc::new(Log::default());
        let thread = thread::spawn({
            let log = log.clone();
            move || log.read(BufReader::new(stderr))
        });
        Self {
            log,
            thread: Some(thread),
        }
    }

    /// Waits for a line that contains all of `parts`. None if no such line arrives in time.
    pub(super) fn wait_for(&self, parts: &[&str]) -> Option<String> {
        let matches = |line: &&String| parts.iter().all(|part| line.contains(part));
        let deadline = Instant::now() + PATIENCE;
        let mut content = self.log.content();
        loop {
            if let Some(line) = content.lines.iter().find(matches) {
                return Some(line.clone());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || content.complete {
                return None;
            }
            let waited = self.log.changed.wait_timeout(content, left);
            content = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The lines so far that contain `part`.
    pub(super) fn lines_with(&self, part: &str) -> Vec<String> {
        let content = self.log.content();
        let lines = content.lines.iter();
        lines.filter(|line| line.contains(part)).cloned().collect()
    }

    /// The last `n` lines, and the number of lines before them.
    pub(super) fn last_lines(&self, n: usize) -> (usize, Vec<String>) {
        let content = self.log.content();
        let skipped = content.lines.len().saturating_sub(n);
        (skipped, content.lines[skipped..].to_vec())
    }

    /// Waits until standard error is closed.
    pub(super) fn join(&mut self) {
        if let Some(thread) = self.thread.take() {
            // Also called while a failed test unwinds.
            let _ = thread.join();
        }
    }
}

impl Log {
    fn read(&self, stderr: impl BufRead) {
        for line in stderr.lines().map_while(Result::ok) {
            self.content().lines.push(line);
            self.changed.notify_all();
        }
        self.content().complete = true;
        self.changed.notify_all();
    }

    fn content(&self) -> MutexGuard<'_, Content> {
        // A test that panics with the lock held leaves the lines as they are.
        self.content.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
