//! Clients that ask and expect an answer.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use crate::client;
use crate::samples::quantile;

/// How long each waits between two questions, so that it measures waiting and makes no load.
const PAUSE: Duration = Duration::from_millis(1);

/// A connection is kept for as many questions, well within what the server lets one last.
const KEPT_FOR: usize = 500;

const QUESTION: &[u8] = b"innocent\n";

/// One that connects anew for each question, and one that keeps its connection.
pub(super) struct Innocents(SocketAddr);

/// What they felt.
pub(super) struct Felt {
    pub(super) answered: usize,
    pub(super) failed: Vec<String>,
    pub(super) new: Times,
    pub(super) kept: Times,
}

/// In milliseconds.
pub(super) struct Times {
    pub(super) p50: f64,
    pub(super) p99: f64,
}

impl Felt {
    /// Every good request is answered.
    pub(super) fn check(&self, beside: &str, broken: &mut Vec<String>) {
        if let Some(first) = self.failed.first() {
            let many = self.failed.len();
            broken.push(format!("beside {beside} {many} were not answered: {first}"));
        }
        if self.answered == 0 {
            broken.push(format!("beside {beside} nobody was answered"));
        }
    }
}

impl Innocents {
    pub(super) fn new(address: SocketAddr) -> Self {
        Self(address)
    }

    pub(super) fn until(&self, end: Instant) -> Felt {
        let (new, kept) = thread::scope(|scope| {
            let kept = scope.spawn(|| repeat(end, || self.keep(end)));
            let anew = || {
                let started = Instant::now();
                ask(&mut client::connect(self.0)?)?;
                Ok(vec![millis(started)])
            };
            let new = repeat(end, anew);
            (new, kept.join().expect("asking does not panic"))
        });
        let times = |mut times: Vec<f64>| Times {
            p50: quantile(&mut times, 0.5),
            p99: quantile(&mut times, 0.99),
        };
        Felt {
            answered: new.0.len() + kept.0.len(),
            failed: [new.1, kept.1].concat(),
            new: times(new.0),
            kept: times(kept.0),
        }
    }

    /// Asks on one connection, over and over.
    fn keep(&self, end: Instant) -> io::Result<Vec<f64>> {
        let mut stream = client::connect(self.0)?;
        let mut times = Vec::new();
        while times.len() < KEPT_FOR && Instant::now() < end {
            let started = Instant::now();
            ask(&mut stream)?;
            times.push(millis(started));
            thread::sleep(PAUSE);
        }
        Ok(times)
    }
}

/// The times of all that went well, and what did not.
fn repeat(end: Instant, mut once: impl FnMut() -> io::Result<Vec<f64>>) -> (Vec<f64>, Vec<String>) {
    let (mut times, mut failed) = (Vec::new(), Vec::new());
    while Instant::now() < end {
        match once() {
            Ok(more) => times.extend(more),
            Err(error) => failed.push(error.to_string()),
        }
        thread::sleep(PAUSE);
    }
    (times, failed)
}

/// Asks once.
pub(super) fn ask(stream: &mut TcpStream) -> io::Result<()> {
    stream.write_all(QUESTION)?;
    let mut answer = [0; QUESTION.len()];
    stream.read_exact(&mut answer)?;
    match answer == QUESTION {
        true => Ok(()),
        false => Err(io::Error::other("another answer than asked for")),
    }
}

fn millis(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}
