//! Guests that compute without end, one for each core, and an innocent one beside them.

use std::io::Write;

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
        title: "Beside guests that compute without end",
        notes: vec![format!(
            "{QUESTIONS} questions one after the other, each on a connection of its own. The client \
             competes with the guests for the cores as well."
        )],
        tables: vec![Table {
            title: "From the connection to the answer".into(),
            columns: vec!["server", "spinning guests", "p50, ms", "p99, ms"],
            rows,
        }],
        charts: Vec::new(),
    })
}
