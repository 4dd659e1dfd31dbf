//! Guests that compute, and an innocent one beside them.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use crate::report::{Section, Table};
use crate::samples::{Samples, quantile};
use crate::server::{Address, Server, wasinetd};
use crate::{Effort, client, machine};

/// How often the innocent one is asked in a round.
const QUESTIONS: usize = 300;

pub(crate) fn measure(effort: Effort) -> Result<Section, String> {
    let mut rows = Vec::new();
    for dispatch in ["concurrent", "spawn"] {
        let command = wasinetd(dispatch, "fixtures/spin_or_sleep", &[]);
        for spinning in [0, machine::cores()] {
            let (mut p50, mut p99) = (Samples::default(), Samples::default());
            for _ in 0..effort.rounds {
                let failed = |error| format!("{dispatch}, {spinning} spinning: {error}");
                let server = Server::start(dispatch, &command, Address::Printed)?;
                let spin = |_| {
                    let mut stream = client::connect(server.address())?;
                    stream.write_all(b"spin\n")?;
                    // One that is answered begins after the one before has begun.
                    client::ask(server.address(), "hello\n", 1)?;
                    Ok(stream)
                };
                let spinners: Vec<_> = (0..spinning)
                    .map(spin)
                    .collect::<Result<_, _>>()
                    .map_err(failed)?;
                let mut times =
                    client::ask(server.address(), "hello\n", QUESTIONS).map_err(failed)?;
                p50.push(quantile(&mut times, 0.5) / 1e3);
                p99.push(quantile(&mut times, 0.99) / 1e3);
                drop(spinners);
            }
            rows.push(vec![
                format!("wasinetd, {dispatch}"),
                spinning.to_string(),
                p50.with_spread(2),
                p99.with_spread(2),
            ]);
        }
    }
    Ok(Section {
        title: "Beside guests that compute",
        notes: vec![format!(
            "{QUESTIONS} questions one after the other, each on a connection of its own. The client \
             competes with the guests for the cores as well."
        )],
        tables: vec![
            Table {
                title: "From the connection to the answer".into(),
                columns: vec!["server", "spinning guests", "p50, ms", "p99, ms"],
                rows,
            },
            crowds(effort)?,
        ],
        charts: Vec::new(),
    })
}

/// Those that are there beside an innocent one.
#[derive(Clone, Copy)]
struct Crowd {
    name: &'static str,
    size: usize,
    /// What each asks for, and again when it is answered.
    question: &'static str,
}

const CROWDS: [Crowd; 3] = [
    Crowd {
        name: "nobody",
        size: 0,
        question: "",
    },
    Crowd {
        name: "100 that compute without end",
        size: 100,
        question: "compute 1000000000\n",
    },
    Crowd {
        name: "100 that ask for 4 ms over and over",
        size: 100,
        question: "compute 4\n",
    },
];

/// How often an answer is looked for.
const SWEEP: Duration = Duration::from_millis(1);

fn crowds(effort: Effort) -> Result<Table, String> {
    let mut rows = Vec::new();
    for dispatch in ["concurrent", "spawn"] {
        let command = wasinetd(
            dispatch,
            "fixtures/uses_resources",
            &["--log-level", "error"],
        );
        for crowd in CROWDS {
            let mut figures: [Samples; 4] = Default::default();
            for _ in 0..effort.rounds {
                let failed = |error| format!("{dispatch}, beside {}: {error}", crowd.name);
                let server = Server::start(dispatch, &command, Address::Printed)?;
                let felt = crowd.beside(server.address()).map_err(failed)?;
                figures
                    .iter_mut()
                    .zip(felt)
                    .for_each(|(figure, felt)| figure.push(felt));
            }
            let mut row = vec![format!("wasinetd, {dispatch}"), crowd.name.into()];
            row.extend(figures.iter().map(|figure| figure.with_spread(2)));
            rows.push(row);
        }
    }
    Ok(Table {
        title: "A crowd that computes, and questions that cost nothing or 3 ms of time".into(),
        columns: vec![
            "server",
            "beside",
            "nothing: p50, ms",
            "p99, ms",
            "3 ms: p50, ms",
            "p99, ms",
        ],
        rows,
    })
}

impl Crowd {
    /// What an innocent one feels, in milliseconds: p50 and p99 of questions that cost nothing, and
    /// of those that cost something.
    fn beside(self, address: SocketAddr) -> io::Result<[f64; 4]> {
        let ended = AtomicBool::new(false);
        thread::scope(|scope| {
            let begun = (0..self.size).map(|_| self.join(address));
            let crowd = begun.collect::<io::Result<Vec<_>>>()?;
            let asking = scope.spawn(|| self.go_on(crowd, &ended));
            let felt = ["compute 0\n", "compute 3\n"]
                .map(|question| client::ask(address, question, QUESTIONS / 3));
            ended.store(true, Ordering::Relaxed);
            asking.join().expect("asking does not panic")?;
            let milliseconds =
                |mut times: Vec<f64>| [0.5, 0.99].map(|share| quantile(&mut times, share) / 1e3);
            let [nothing, something] = felt.map(|times| times.map(milliseconds));
            let ([p50, p99], [p50_of_3, p99_of_3]) = (nothing?, something?);
            Ok([p50, p99, p50_of_3, p99_of_3])
        })
    }

    fn join(self, address: SocketAddr) -> io::Result<TcpStream> {
        let mut stream = client::connect(address)?;
        stream.write_all(self.question.as_bytes())?;
        stream.set_nonblocking(true)?;
        Ok(stream)
    }

    /// Asks again whoever was answered.
    fn go_on(self, mut crowd: Vec<TcpStream>, ended: &AtomicBool) -> io::Result<()> {
        while !ended.load(Ordering::Relaxed) {
            for stream in &mut crowd {
                if stream.read(&mut [0; 64]).is_ok_and(|n| n > 0) {
                    stream.write_all(self.question.as_bytes())?;
                }
            }
            thread::sleep(SWEEP);
        }
        Ok(())
    }
}
