//! Connections that are open and do little: what they hold, and what they cost those that do much.

use crate::report::{Section, Table};
use crate::samples::Samples;
use crate::server::{Address, QUIET_PAGES, Server, contenders};
use crate::wrk::{self, Work};
use crate::{Effort, client};

/// The connections that memory is measured with.
const HELD: usize = 2_000;

/// The connections that are open while few are active, and how many of them are.
const OPEN: usize = 10_000;
const ACTIVE: usize = OPEN / 100;

pub(crate) fn measure(effort: Effort) -> Result<Section, String> {
    Ok(Section {
        title: "Connections that are open",
        notes: vec![format!(
            "Each connection has been answered once and is kept. Memory: {HELD} connections, by \
             VmRSS and by lines of /proc/PID/maps, in a new process for each round."
        )],
        tables: vec![held(effort)?, mostly_idle(effort)?],
        charts: Vec::new(),
    })
}

fn held(effort: Effort) -> Result<Table, String> {
    let mut rows = Vec::new();
    for (name, command) in contenders("hello", &QUIET_PAGES) {
        let (mut memory, mut mappings) = (Samples::default(), Samples::default());
        for _ in 0..effort.rounds.min(3) {
            let server = Server::start(name, &command, Address::Printed)?;
            let idle = |n| client::idlers(server.address(), n).map_err(|e| format!("{name}: {e}"));
            drop(idle(10)?);
            let before = (server.resident_bytes(), server.mappings());
            let held = idle(HELD)?;
            let each = |after, before| (after - before) / held.len() as f64;
            memory.push(each(server.resident_bytes(), before.0) / 1024.0);
            mappings.push(each(server.mappings(), before.1));
        }
        rows.push(vec![
            name.to_string(),
            memory.with_spread(1),
            mappings.with_spread(2),
        ]);
    }
    Ok(Table {
        title: "What an idle connection holds".into(),
        columns: vec!["server", "resident memory, KiB", "memory mappings"],
        rows,
    })
}

fn mostly_idle(effort: Effort) -> Result<Table, String> {
    let mut rows: Vec<(String, Samples, Samples, Samples)> = contenders("hello", &QUIET_PAGES)
        .iter()
        .map(|(name, _)| {
            let none = Samples::default;
            (name.to_string(), none(), none(), none())
        })
        .collect();
    for _ in 0..effort.rounds {
        for ((name, command), row) in contenders("hello", &QUIET_PAGES).iter().zip(&mut rows) {
            let server = Server::start(name, command, Address::Printed)?;
            let idle = client::idlers(server.address(), OPEN - ACTIVE)
                .map_err(|error| format!("{name}, {OPEN} connections: {error}"))?;
            let (load, cpu) = wrk::measure(&server, Work::Kept, ACTIVE as u32, effort.seconds)?;
            row.1.push(load.p50);
            row.2.push(load.p99);
            row.3.push(cpu);
            drop(idle);
        }
    }
    let native = rows[0].clone();
    Ok(Table {
        title: format!("{OPEN} connections open, {ACTIVE} of them active"),
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
