//! The log, for those who follow it from elsewhere.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use hyper::body::Bytes;
use tokio::sync::broadcast;

/// How much of the log is kept for those who ask later, in bytes.
const KEPT: usize = 256 << 10;

/// How many pieces of the log may be on their way to a follower. Who does not keep up loses some.
const ON_THE_WAY: usize = 64;

/// How large such a piece is, about, in bytes: what is on the way is bounded.
const PIECE: usize = 64 << 10;

/// Some lines of the log.
#[derive(Clone)]
pub(super) struct Piece {
    text: Bytes,
    /// The connection that each line is of, and where it ends.
    lines: Arc<[(Option<u64>, usize)]>,
}

impl Piece {
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
pub struct LogStream(Arc<Shared>);

struct Shared {
    kept: Mutex<VecDeque<Piece>>,
    followers: broadcast::Sender<Piece>,
}

impl Default for LogStream {
    fn default() -> Self {
        Self(Arc::new(Shared {
            kept: Mutex::default(),
            followers: broadcast::Sender::new(ON_THE_WAY),
        }))
    }
}

impl LogStream {
    /// Hands on some lines: their numbers of connections, each with where it ends in `text`.
    pub fn hand_on(&self, text: Bytes, lines: &[(Option<u64>, usize)]) {
        let mut from = 0;
        // Where all of the piece is about as large as it is to be.
        let mut rest = lines;
        while !rest.is_empty() {
            let whole = rest.partition_point(|(_, end)| end - from <= PIECE).max(1);
            let (these, others) = rest.split_at(whole);
            let end = these[whole - 1].1;
            let lines = these.iter().map(|(id, end)| (*id, end - from)).collect();
            self.hand_on_piece(Piece {
                text: text.slice(from..end),
                lines,
            });
            (from, rest) = (end, others);
        }
    }

    fn hand_on_piece(&self, piece: Piece) {
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
        let logs = LogStream::default();
        let text = "one\ntwo\nother\n";
        logs.hand_on(text.into(), &[(Some(1), 4), (None, 8), (Some(2), 14)]);
        let (kept, _) = logs.follow();
        assert_eq!(kept.len(), 1);
        assert_eq!(kept[0].of(None), text);
        assert_eq!(kept[0].of(Some(1)), "one\n");
        assert_eq!(kept[0].of(Some(2)), "other\n");
        assert_eq!(kept[0].of(Some(3)), "");
    }

    #[test]
    fn so_much_is_kept_and_no_more_and_in_pieces() {
        let logs = LogStream::default();
        let line = "x".repeat(1023) + "\n";
        let lines: Vec<_> = (1..=1000).map(|n| (Some(n), n as usize * 1024)).collect();
        logs.hand_on(line.repeat(1000).into(), &lines);
        let (kept, _) = logs.follow();
        assert!(kept.iter().all(|piece| piece.text.len() <= PIECE));
        let bytes: usize = kept.iter().map(|piece| piece.text.len()).sum();
        assert!(bytes <= KEPT && bytes > KEPT - PIECE, "{bytes}");
        let last: Vec<_> = kept.iter().map(|piece| piece.of(Some(1000))).collect();
        assert_eq!(last.concat(), line.as_bytes());
    }
}
