//! The log as a stream, for readers of the admin API.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use hyper::body::Bytes;
use tokio::sync::broadcast;

use crate::sync::lock;

/// Size of the history that later readers get, in bytes. Arbitrary: some two thousand lines.
const HISTORY_BYTES: usize = 256 << 10;

/// Largest number of chunks that wait for a follower. A follower that falls behind misses chunks.
const MAX_WAITING_CHUNKS: usize = 64;

/// Size of a chunk, in bytes, unless a single line is longer: bounds the memory of waiting chunks.
const CHUNK_BYTES: usize = 64 << 10;

/// Some successive lines of the log.
#[derive(Clone)]
pub(super) struct Chunk {
    text: Bytes,
    lines: Arc<[LogLine]>,
}

/// The connection that a line is about, if any. Then the end of the line in the text.
type LogLine = (Option<u64>, usize);

impl Chunk {
    /// The lines about the connection `id`, or all lines.
    pub(super) fn lines_of(&self, id: Option<u64>) -> Bytes {
        if id.is_none() {
            return self.text.clone();
        }
        let mut start = 0;
        let mut text = Vec::new();
        for (line_id, end) in self.lines.iter() {
            if *line_id == id {
                text.extend_from_slice(&self.text[start..*end]);
            }
            start = *end;
        }
        text.into()
    }
}

/// The log: a short history, and all followers. Clones share both.
#[derive(Clone)]
pub struct LogStream(Arc<Shared>);

struct Shared {
    history: Mutex<VecDeque<Chunk>>,
    followers: broadcast::Sender<Chunk>,
}

impl Default for LogStream {
    fn default() -> Self {
        Self(Arc::new(Shared {
            history: Mutex::default(),
            followers: broadcast::Sender::new(MAX_WAITING_CHUNKS),
        }))
    }
}

impl LogStream {
    /// Adds lines to the log.
    ///
    /// `lines` holds, for each line, the number of the connection that the line is about, if any, and
    /// the end of the line in `text`.
    pub fn publish(&self, text: Bytes, lines: &[(Option<u64>, usize)]) {
        let mut start = 0;
        let mut rest = lines;
        while !rest.is_empty() {
            let fitting = rest.partition_point(|(_, end)| end - start <= CHUNK_BYTES);
            let (chunk, later) = rest.split_at(fitting.max(1));
            let end = chunk[chunk.len() - 1].1;
            let lines = chunk.iter().map(|(id, end)| (*id, end - start)).collect();
            self.publish_chunk(Chunk {
                text: text.slice(start..end),
                lines,
            });
            (start, rest) = (end, later);
        }
    }

    fn publish_chunk(&self, chunk: Chunk) {
        let mut history = lock(&self.0.history);
        history.push_back(chunk.clone());
        let mut bytes: usize = history.iter().map(|chunk| chunk.text.len()).sum();
        while bytes > HISTORY_BYTES && history.len() > 1 {
            bytes -= history.pop_front().map_or(0, |chunk| chunk.text.len());
        }
        // Sending fails if there is no follower.
        let _ = self.0.followers.send(chunk);
    }

    /// The history, and a receiver of all later chunks.
    pub(super) fn follow(&self) -> (Vec<Chunk>, broadcast::Receiver<Chunk>) {
        // The lock keeps a chunk from being in both, or in neither.
        let history = lock(&self.0.history);
        let receiver = self.0.followers.subscribe();
        (history.iter().cloned().collect(), receiver)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_selected_by_connection() {
        let logs = LogStream::default();
        let text = "one\ntwo\nother\n";
        logs.publish(text.into(), &[(Some(1), 4), (None, 8), (Some(2), 14)]);
        let (history, _) = logs.follow();
        assert_eq!(history.len(), 1);
        assert_eq!(history[0].lines_of(None), text);
        assert_eq!(history[0].lines_of(Some(1)), "one\n");
        assert_eq!(history[0].lines_of(Some(2)), "other\n");
        assert_eq!(history[0].lines_of(Some(3)), "");
    }

    #[test]
    fn the_history_is_bounded_and_split_into_chunks() {
        let logs = LogStream::default();
        let line = "x".repeat(1023) + "\n";
        let lines: Vec<_> = (1..=1000).map(|n| (Some(n), n as usize * 1024)).collect();
        logs.publish(line.repeat(1000).into(), &lines);
        let (history, _) = logs.follow();
        assert!(history.iter().all(|chunk| chunk.text.len() <= CHUNK_BYTES));
        let bytes: usize = history.iter().map(|chunk| chunk.text.len()).sum();
        assert!(
            bytes <= HISTORY_BYTES && bytes > HISTORY_BYTES - CHUNK_BYTES,
            "{bytes}"
        );
        let last: Vec<_> = history
            .iter()
            .map(|chunk| chunk.lines_of(Some(1000)))
            .collect();
        assert_eq!(last.concat(), line.as_bytes());
    }
}
