//! Latency beside guests that compute without end.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use crate::effort::Effort;
use crate::report::{Section, Table};
use crate::samples::{Samples, quantile};
use crate::server::{Address, Server, wasinetd};
use crate::{client, machine};

/// The number of measured requests per round.
const REQUESTS: usize = 300;

pub(crate) fn measure(effort: Effort) -> Result<Section, String> {
    let mut rows = Vec::new();
    for dispatch in ["concurrent", "spawn"] {
        let command = wasinetd(dispatch, "fixtures/spin_or_sleep", &[]);
        for spinning in [0, machine::cores()] {
            let (mut p50, mut p99) = (Samples::default(), Samples::default());
            for _ in 0..effort.rounds {
                let failed = |error| format!("{dispatch}, {spinning} spinning guests: {error}");
                let server = Server::start(dispatch, &command, Address::Printed)?;
                let spin = |_| {
                    let mut stream = client::connect(server.address())?;
                    stream.write_all(b"spin\n")?;
                    // An answered request proves that the server has started the spinning guest.
                    client::ask(server.address(), "hello\n", 1)?;
                    Ok(stream)
                };
                let spinners: Vec<_> = (0..spinning)
                    .map(spin)
                    .collect::<Result<_, _>>()
                    .map_err(failed)?;
                let mut times =
                    client::ask(server.address(), "hello\n", REQUESTS).map_err(failed)?;
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
        title: "Latency beside guests that compute",
        notes: vec![format!(
            "{REQUESTS} requests, one after another, each on a new connection. The client competes \
             with the guests for the cores."
        )],
        tables: vec![
            Table {
                title: "Time from connecting to the answer".into(),
                columns: vec!["server", "spinning guests", "p50, ms", "p99, ms"],
                rows,
            },
            crowds(effort)?,
        ],
        charts: Vec::new(),
    })
}

/// A number of connections that load the server beside the measured one.
#[derive(Clone, Copy)]
struct Crowd {
    name: &'static str,
    size: usize,
    /// The request of each connection, sent again after each answer.
    request: &'static str,
}

const CROWDS: [Crowd; 3] = [
    Crowd {
        name: "no other connection",
        size: 0,
        request: "",
    },
    Crowd {
        name: "100 connections that compute without end",
        size: 100,
        request: "compute 1000000000\n",
    },
    Crowd {
        name: "100 connections that compute 4 ms over and over",
        size: 100,
        request: "compute 4\n",
    },
];

/// The interval at which the crowd checks for answers.
const POLL_INTERVAL: Duration = Duration::from_millis(1);

fn crowds(effort: Effort) -> Result<Table, String> {
    let mut rows = Vec::new();
    for dispatch in ["concurrent", "spawn"] {
        let command = wasinetd(
            dispatch,
            "fixtures/uses_resources",
            &["--log-level", "error"],
        );
        for crowd in CROWDS {
            let mut columns: [Samples; 4] = Default::default();
            for _ in 0..effort.rounds {
                let failed = |error| format!("{dispatch}, beside {}: {error}", crowd.name);
                let server = Server::start(dispatch, &command, Address::Printed)?;
                let latencies = crowd.measure_beside(server.address()).map_err(failed)?;
                columns
                    .iter_mut()
                    .zip(latencies)
                    .for_each(|(column, latency)| column.push(latency));
            }
            let mut row = vec![format!("wasinetd, {dispatch}"), crowd.name.into()];
            row.extend(columns.iter().map(|column| column.with_spread(2)));
            rows.push(row);
        }
    }
    Ok(Table {
        title: "Requests that compute 0 or 3 ms, beside connections that compute".into(),
        columns: vec![
            "server",
            "beside",
            "0 ms: p50, ms",
            "p99, ms",
            "3 ms: p50, ms",
            "p99, ms",
        ],
        rows,
    })
}

impl Crowd {
    /// Measures another client beside the crowd.
    ///
    /// Returns the p50 and p99 of requests that compute 0 ms and of requests that compute 3 ms, in
    /// milliseconds.
    fn measure_beside(self, address: SocketAddr) -> io::Result<[f64; 4]> {
        let ended = AtomicBool::new(false);
        thread::scope(|scope| {
            let streams = (0..self.size).map(|_| self.connect(address));
            let streams = streams.collect::<io::Result<Vec<_>>>()?;
            let crowd = scope.spawn(|| self.repeat_requests(streams, &ended));
            let times = ["compute 0\n", "compute 3\n"]
                .map(|request| client::ask(address, request, REQUESTS / 3));
            ended.store(true, Ordering::Relaxed);
            crowd.join().expect("the crowd does not panic")?;
            let milliseconds =
                |mut times: Vec<f64>| [0.5, 0.99].map(|share| quantile(&mut times, share) / 1e3);
            let [idle, computing] = times.map(|times| times.map(milliseconds));
            let ([idle_p50, idle_p99], [computing_p50, computing_p99]) = (idle?, computing?);
            Ok([idle_p50, idle_p99, computing_p50, computing_p99])
        })
    }

    fn connect(self, address: SocketAddr) -> io::Result<TcpStream> {
        let mut stream = client::connect(address)?;
        stream.write_all(self.request.as_bytes())?;
        stream.set_nonblocking(true)?;
        Ok(stream)
    }

    /// Sends the request again on each connection that was answered.
    fn repeat_requests(self, mut streams: Vec<TcpStream>, ended: &AtomicBool) -> io::Result<()> {
        while !ended.load(Ordering::Relaxed) {
            for stream in &mut streams {
                if stream.read(&mut [0; 64]).is_ok_and(|n| n > 0) {
                    stream.write_all(self.request.as_bytes())?;
                }
            }
            thread::sleep(POLL_INTERVAL);
        }
        Ok(())
    }
}
