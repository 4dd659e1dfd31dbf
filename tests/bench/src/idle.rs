//! Idle connections: memory, and the cost beside active ones.

use crate::client;
use crate::effort::Effort;
use crate::report::{Section, Table};
use crate::samples::Samples;
use crate::server::{Address, QUIET_PAGES, Server, contenders};
use crate::wrk::{self, Workload};

/// The number of idle connections for measuring memory.
const IDLE: usize = 2_000;

/// The number of open connections while few are active.
const OPEN: usize = 10_000;

/// The number of active connections among [`OPEN`].
const ACTIVE: usize = OPEN / 100;

pub(crate) fn measure(effort: Effort) -> Result<Section, String> {
    Ok(Section {
        title: "Idle connections",
        notes: vec![format!(
            "Each connection has been answered once and stays open. Memory is that of {IDLE} \
             connections, from VmRSS and the lines of /proc/PID/maps, in a new process for each \
             round."
        )],
        tables: vec![memory(effort)?, mostly_idle(effort)?],
        charts: Vec::new(),
    })
}

fn memory(effort: Effort) -> Result<Table, String> {
    let mut rows = Vec::new();
    for (name, command) in contenders("hello", &QUIET_PAGES) {
        let (mut memory, mut mappings) = (Samples::default(), Samples::default());
        for _ in 0..effort.rounds.min(3) {
            let server = Server::start(name, &command, Address::Printed)?;
            let open_idle =
                |n| client::open_idle(server.address(), n).map_err(|e| format!("{name}: {e}"));
            drop(open_idle(10)?);
            let before = (server.resident_bytes(), server.mappings());
            let connections = open_idle(IDLE)?;
            let per_connection = |after, before| (after - before) / connections.len() as f64;
            memory.push(per_connection(server.resident_bytes(), before.0) / 1024.0);
            mappings.push(per_connection(server.mappings(), before.1));
        }
        rows.push(vec![
            name.to_string(),
            memory.with_spread(1),
            mappings.with_spread(2),
        ]);
    }
    Ok(Table {
        title: "Memory per idle connection".into(),
        columns: vec!["server", "resident memory, KiB", "memory mappings"],
        rows,
    })
}

fn mostly_idle(effort: Effort) -> Result<Table, String> {
    let mut rows: Vec<(String, Samples, Samples, Samples)> = contenders("hello", &QUIET_PAGES)
        .iter()
        .map(|(name, _)| {
            let empty = Samples::default;
            (name.to_string(), empty(), empty(), empty())
        })
        .collect();
    for _ in 0..effort.rounds {
        for ((name, command), row) in contenders("hello", &QUIET_PAGES).iter().zip(&mut rows) {
            let server = Server::start(name, command, Address::Printed)?;
            let idle = client::open_idle(server.address(), OPEN - ACTIVE)
                .map_err(|error| format!("{name}, {OPEN} connections: {error}"))?;
            let workload = Workload::KeepAlive;
            let (result, cpu) = wrk::measure(&server, workload, ACTIVE as u32, effort.seconds)?;
            row.1.push(result.p50);
            row.2.push(result.p99);
            row.3.push(cpu);
            drop(idle);
        }
    }
    let native = rows[0].clone();
    Ok(Table {
        title: format!("{OPEN} open connections, {ACTIVE} of them active"),
        columns: vec![
            "server",
            "p50, µs",
            "p99, µs",
            "p99, times native",
            "server CPU per request, µs",
            "CPU, times native",
        ],
        rows: rows
            .iter()
            .map(|(name, p50, p99, cpu)| {
                vec![
                    name.clone(),
                    format!("{:.0}", p50.median()),
                    format!("{:.0}", p99.median()),
                    p99.over(&native.2).with_spread(2),
                    format!("{:.1}", cpu.median()),
                    cpu.over(&native.3).with_spread(2),
                ]
            })
            .collect(),
    })
}
