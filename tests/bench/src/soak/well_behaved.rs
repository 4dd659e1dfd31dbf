//! Clients that send requests and expect answers.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use crate::client;
use crate::samples::quantile;

/// The pause between two requests, so that the clients measure latency and add no load.
const PAUSE: Duration = Duration::from_millis(1);

/// The number of requests per kept connection, well below the server's limit on its lifetime.
const REQUESTS_PER_CONNECTION: usize = 500;

/// The request. The guest `hostile` echoes it.
pub(super) const REQUEST: &[u8] = b"innocent\n";

/// The results of both clients during a phase.
pub(super) struct Results {
    /// The number of answered requests.
    pub(super) answered: usize,
    /// The errors of failed requests.
    pub(super) failures: Vec<String>,
    /// Latency of the client that connects for each request.
    pub(super) new: Latency,
    /// Latency of the client that keeps its connection.
    pub(super) kept: Latency,
}

/// Latency in milliseconds.
pub(super) struct Latency {
    pub(super) p50: f64,
    pub(super) p99: f64,
}

impl Results {
    /// Adds a problem for failed requests, and for a phase without answers.
    pub(super) fn check(&self, fault: &str, problems: &mut Vec<String>) {
        if let Some(first) = self.failures.first() {
            let count = self.failures.len();
            problems.push(format!("beside {fault}: {count} requests failed: {first}"));
        }
        if self.answered == 0 {
            problems.push(format!("beside {fault}: no request was answered"));
        }
    }
}

/// Runs a client that connects for each request and one that keeps its connection, until `end`.
pub(super) fn run(address: SocketAddr, end: Instant) -> Results {
    let (new, kept) = thread::scope(|scope| {
        let kept = scope.spawn(|| repeat(end, || ask_on_one_connection(address, end)));
        let connect_and_ask = || {
            let started = Instant::now();
            ask(&mut client::connect(address)?)?;
            Ok(vec![millis_since(started)])
        };
        let new = repeat(end, connect_and_ask);
        (new, kept.join().expect("the client does not panic"))
    });
    let latency = |mut times: Vec<f64>| Latency {
        p50: quantile(&mut times, 0.5),
        p99: quantile(&mut times, 0.99),
    };
    Results {
        answered: new.0.len() + kept.0.len(),
        failures: [new.1, kept.1].concat(),
        new: latency(new.0),
        kept: latency(kept.0),
    }
}

/// Sends requests on one connection. Returns their latencies in milliseconds.
fn ask_on_one_connection(address: SocketAddr, end: Instant) -> io::Result<Vec<f64>> {
    let mut stream = client::connect(address)?;
    let mut times = Vec::new();
    while times.len() < REQUESTS_PER_CONNECTION && Instant::now() < end {
        let started = Instant::now();
        ask(&mut stream)?;
        times.push(millis_since(started));
        thread::sleep(PAUSE);
    }
    Ok(times)
}

/// Repeats `ask` until `end`. Returns all latencies and all errors.
fn repeat(end: Instant, mut ask: impl FnMut() -> io::Result<Vec<f64>>) -> (Vec<f64>, Vec<String>) {
    let (mut times, mut failures) = (Vec::new(), Vec::new());
    while Instant::now() < end {
        match ask() {
            Ok(more) => times.extend(more),
            Err(error) => failures.push(error.to_string()),
        }
        thread::sleep(PAUSE);
    }
    (times, failures)
}

/// Sends one request and checks the answer.
pub(super) fn ask(stream: &mut TcpStream) -> io::Result<()> {
    stream.write_all(REQUEST)?;
    let mut answer = [0; REQUEST.len()];
    stream.read_exact(&mut answer)?;
    if answer != REQUEST {
        return Err(io::Error::other("the answer is wrong"));
    }
    Ok(())
}

fn millis_since(start: Instant) -> f64 {
    start.elapsed().as_secs_f64() * 1e3
}
