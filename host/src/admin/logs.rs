//! The log, for those who follow it from elsewhere.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use hyper::body::Bytes;
use tokio::sync::broadcast;

/// How much of the log is kept for those who ask later, in bytes.
const KEPT: usize = 256 << 10;

/// How many pieces of the log may be on their way to a follower. Who does not keep up loses some.
const ON_THE_WAY: usize = 256;

/// Some lines of the log.
#[derive(Clone)]
pub struct Piece {
    text: Bytes,
    /// The connection that each line is of, and where it ends.
    lines: Arc<[(Option<u64>, usize)]>,
}

impl Piece {
    /// Lines with the numbers of their connections, each with where it ends in `text`.
    pub fn new(text: Bytes, lines: Arc<[(Option<u64>, usize)]>) -> Self {
        Self { text, lines }
    }

    /// All of it, or what is of one connection.
    pub(super) fn of(&self, id: Option<u64>) -> Bytes {
        if id.is_none() {
            return self.text.clone();
        }
        let mut from = 0;
        let mut text = Vec::new();
        for (of, end) in self.lines.iter() {
            if *of == id {
                text.extend_from_slice(&self.text[from..*end]);
            }
            from = *end;
        }
        text.into()
    }
}

/// Hands on what is logged.
#[derive(Clone)]
pub struct Logs(Arc<Shared>);

struct Shared {
    kept: Mutex<VecDeque<Piece>>,
    followers: broadcast::Sender<Piece>,
}

impl Default for Logs {
    fn default() -> Self {
        Self(Arc::new(Shared {
            kept: Mutex::default(),
            followers: broadcast::Sender::new(ON_THE_WAY),
        }))
    }
}

impl Logs {
    /// Hands on some lines.
    pub fn hand_on(&self, piece: Piece) {
        let mut kept = self.0.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.push_back(piece.clone());
        let mut bytes: usize = kept.iter().map(|piece| piece.text.len()).sum();
        while bytes > KEPT && kept.len() > 1 {
            bytes -= kept.pop_front().map_or(0, |piece| piece.text.len());
        }
        // It fails where nobody follows.
        let _ = self.0.followers.send(piece);
    }

    /// What was logged last, and what follows. Nothing is in both or in neither.
    pub(super) fn follow(&self) -> (Vec<Piece>, broadcast::Receiver<Piece>) {
        let kept = self.0.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let follows = self.0.followers.subscribe();
        (kept.iter().cloned().collect(), follows)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lines_of_one_connection_are_told_from_others() {
        let text = "one\ntwo\nother\n";
        let lines = [(Some(1), 4), (None, 8), (Some(2), 14)];
        let piece = Piece::new(text.into(), lines.into());
        assert_eq!(piece.of(None), text);
        assert_eq!(piece.of(Some(1)), "one\n");
        assert_eq!(piece.of(Some(2)), "other\n");
        assert_eq!(piece.of(Some(3)), "");
    }

    #[test]
    fn so_much_is_kept_and_no_more() {
        let logs = Logs::default();
        let line = "x".repeat(1023) + "\n";
        for _ in 0..1000 {
            logs.hand_on(Piece::new(line.clone().into(), [(None, 1024)].into()));
        }
        let (kept, _) = logs.follow();
        assert_eq!(kept.len(), KEPT / 1024);
    }
}
