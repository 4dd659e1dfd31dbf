//! How cost grows: with the connections, with the threads, with the size of the guest.

use std::path::Path;

use crate::report::{Chart, Section, Table};
use crate::samples::Samples;
use crate::server::{Address, PAGES, QUIET_PAGES, Server, contenders, wasinetd};
use crate::wrk::{self, CONNECTIONS, Work};
use crate::{Effort, machine};

/// The data that the guests of growing size carry, in KiB: their names end with it.
const PADDING_KIB: [u32; 6] = [0, 64, 256, 1024, 4096, 16384];

pub(crate) fn measure(effort: Effort) -> Result<Section, String> {
    // Many short measurements: what counts is the shape.
    let effort = Effort {
        rounds: effort.rounds.min(3),
        seconds: effort.seconds.min(2),
    };
    let (kept, kept_chart) = by_connections(effort, Work::Kept)?;
    let (new, new_chart) = by_connections(effort, Work::New)?;
    let (size, size_chart) = by_guest_size(effort)?;
    Ok(Section {
        title: "How cost grows",
        notes: vec![format!(
            "Server CPU per request by wrk; medians of {} rounds of {} s.",
            effort.rounds, effort.seconds
        )],
        tables: vec![kept, new, by_threads(effort)?, size],
        charts: vec![kept_chart, new_chart, size_chart],
    })
}

fn by_connections(effort: Effort, work: Work) -> Result<(Table, Chart), String> {
    let (steps, title, name) = match work {
        Work::Kept => (
            [1, 10, 100, 1_000, 10_000].as_slice(),
            "Kept-alive requests by connections at once",
            "growth-kept",
        ),
        Work::New => (
            [1, 10, 100, 1_000].as_slice(),
            "New connections by connections at once",
            "growth-new",
        ),
    };
    let servers = contenders("hello", &QUIET_PAGES)
        .map(|(name, command)| Server::start(name, &command, Address::Printed))
        .into_iter()
        .collect::<Result<Vec<_>, _>>()?;
    let mut lines: Vec<(String, Vec<(f64, f64)>)> = servers
        .iter()
        .map(|server| (server.name().to_string(), Vec::new()))
        .collect();
    let mut rows = Vec::new();
    for connections in steps {
        let mut cpu: Vec<Samples> = servers.iter().map(|_| Samples::default()).collect();
        for server in &servers {
            // Slots of the pool that were never used before have to be mapped.
            wrk::run(server.address(), work, *connections, 1)?;
        }
        for _ in 0..effort.rounds {
            for (server, cpu) in servers.iter().zip(&mut cpu) {
                cpu.push(wrk::measure(server, work, *connections, effort.seconds)?.1);
            }
        }
        let mut row = vec![connections.to_string()];
        for (cpu_of_one, (_, line)) in cpu.iter().zip(&mut lines) {
            line.push((f64::from(*connections), cpu_of_one.median()));
            row.push(format!(
                "{:.1} ({:.2})",
                cpu_of_one.median(),
                cpu_of_one.over(&cpu[0]).median()
            ));
        }
        rows.push(row);
    }
    let table = Table {
        title: format!("{title}: server CPU per request, µs (times native)"),
        columns: vec!["connections", "native", "concurrent", "spawn"],
        rows,
    };
    let chart = Chart {
        name,
        title,
        x: "connections at once",
        y: "server CPU per request, µs",
        lines,
    };
    Ok((table, chart))
}

/// From one thread to one for each core.
fn by_threads(effort: Effort) -> Result<Table, String> {
    let mut rows = Vec::new();
    for threads in 1..=machine::cores() {
        let count = threads.to_string();
        let arguments = [PAGES.as_slice(), &["--threads", &count]].concat();
        let environment = [("TOKIO_WORKER_THREADS", count.as_str())];
        let servers = contenders("hello", &arguments)
            .map(|(name, command)| {
                Server::start_with(name, &command, Address::Printed, &environment)
            })
            .into_iter()
            .collect::<Result<Vec<_>, _>>()?;
        let mut cpu = vec![[Samples::default(), Samples::default()]; servers.len()];
        for _ in 0..effort.rounds {
            for (server, cpu) in servers.iter().zip(&mut cpu) {
                for (work, cpu) in [Work::New, Work::Kept].into_iter().zip(cpu) {
                    cpu.push(wrk::measure(server, work, CONNECTIONS, effort.seconds)?.1);
                }
            }
        }
        for (server, own) in servers.iter().zip(&cpu) {
            let [new, kept] = own.each_ref().map(|cpu| format!("{:.1}", cpu.median()));
            rows.push(vec![server.name().to_string(), count.clone(), new, kept]);
        }
    }
    Ok(Table {
        title: "By threads: server CPU, µs".into(),
        columns: vec![
            "server",
            "threads",
            "per new connection",
            "per kept request",
        ],
        rows,
    })
}

fn by_guest_size(effort: Effort) -> Result<(Table, Chart), String> {
    let mut servers = Vec::new();
    for padding in PADDING_KIB {
        let guest = format!("bench/padded_{padding}");
        let path = format!("target/guests/{guest}.wasm");
        let bytes = std::fs::metadata(Path::new(&path))
            .map_err(|error| format!("{path}: {error}; run `make bench`"))?
            .len();
        let command = wasinetd("concurrent", &guest, &["--log-level", "warn"]);
        let server = Server::start(&guest, &command, Address::Printed)?;
        servers.push((bytes as f64 / 1024.0, server, Samples::default()));
    }
    for _ in 0..effort.rounds {
        for (_, server, cpu) in &mut servers {
            cpu.push(wrk::measure(server, Work::New, CONNECTIONS, effort.seconds)?.1);
        }
    }
    let rows = servers
        .iter()
        .map(|(kib, _, cpu)| vec![format!("{kib:.0}"), cpu.with_spread(1)])
        .collect();
    let points = servers
        .iter()
        .map(|(kib, _, cpu)| (*kib, cpu.median()))
        .collect();
    let table = Table {
        title: "New connections by the size of the guest".into(),
        columns: vec!["guest, KiB", "server CPU per connection, µs"],
        rows,
    };
    let chart = Chart {
        name: "growth-size",
        title: "New connections by the size of the guest",
        x: "guest, KiB",
        y: "server CPU per connection, µs",
        lines: vec![("wasinetd, concurrent".into(), points)],
    };
    Ok((table, chart))
}
