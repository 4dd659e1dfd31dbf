//! Measures wasinetd against a native server with the very same handler and no sandbox.
//!
//! `bench [ROUNDS [SECONDS]]` puts the load of wrk on each server in turn, several times over, and
//! prints a Markdown table. Processor time is the server process's own. Machines are noisy, so
//! ratios are taken within a round, and the median of the rounds is what is printed.

mod server;
mod wrk;

use std::fmt::Write;
use std::path::Path;

use server::Server;
use wrk::{Load, Work};

/// Native first: the others are divided by it.
const SERVERS: [(&str, &[&str]); 3] = [
    ("native", &["target/release/native", "static"]),
    (
        "wasinetd, spawn",
        &[
            "target/release/wasinetd",
            "serve",
            "--dispatch",
            "spawn",
            "--listen",
            "127.0.0.1:0",
            "--dir",
            "static::/static",
            "target/guests/hello.wasm",
        ],
    ),
    (
        "wasinetd, concurrent",
        &[
            "target/release/wasinetd",
            "serve",
            "--dispatch",
            "concurrent",
            "--listen",
            "127.0.0.1:0",
            "--dir",
            "static::/static",
            "target/guests/hello.wasm",
        ],
    ),
];

/// One server's figures of one round.
struct Figures {
    load: Load,
    /// Processor time of the server for each request, in microseconds.
    cpu: f64,
}

fn main() -> Result<(), String> {
    let mut arguments = std::env::args().skip(1).map(|value| {
        value
            .parse::<u32>()
            .ok()
            .filter(|n| *n > 0)
            .ok_or(format!("not a number above zero: {value}"))
    });
    let rounds = arguments.next().transpose()?.unwrap_or(5);
    let seconds = arguments.next().transpose()?.unwrap_or(3);
    let servers = SERVERS
        .iter()
        .map(|(name, command)| Server::start(name, command))
        .collect::<Result<Vec<_>, _>>()?;
    let mut report = heading(rounds, seconds);
    for work in [Work::NewConnections, Work::KeptConnections] {
        for server in &servers {
            // Caches and pools fill up.
            wrk::run(server.address(), work, 1)?;
        }
        let mut rows: Vec<Vec<Figures>> = servers.iter().map(|_| Vec::new()).collect();
        for _ in 0..rounds {
            for (server, row) in servers.iter().zip(&mut rows) {
                row.push(measure(server, work, seconds)?);
            }
        }
        write_table(&mut report, work, &servers, &rows);
    }
    print!("{report}");
    let directory = Path::new("target/bench");
    std::fs::create_dir_all(directory)
        .and_then(|()| std::fs::write(directory.join("report.md"), report))
        .map_err(|error| format!("cannot write {}: {error}", directory.display()))
}

fn measure(server: &Server, work: Work, seconds: u32) -> Result<Figures, String> {
    let before = server.cpu_seconds()?;
    let load = wrk::run(server.address(), work, seconds)?;
    let cpu = (server.cpu_seconds()? - before) / load.requests * 1e6;
    Ok(Figures { load, cpu })
}

fn heading(rounds: u32, seconds: u32) -> String {
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    let cpuinfo = read("/proc/cpuinfo");
    let model = cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
        .map_or("unknown processor", |(_, model)| model);
    let kernel = read("/proc/sys/kernel/osrelease");
    format!(
        "{cores} cores ({model}), Linux {}; wrk on the same machine, {} connections; medians of {rounds} rounds of {seconds} s\n",
        kernel.trim(),
        wrk::CONNECTIONS
    )
}

fn write_table(report: &mut String, work: Work, servers: &[Server], rows: &[Vec<Figures>]) {
    let mut line = |text: std::fmt::Arguments<'_>| {
        writeln!(report, "{text}").expect("writing to memory does not fail");
    };
    line(format_args!("\n**{work}**\n"));
    line(format_args!(
        "| server | requests/s | p50 | p99 | server CPU per request | CPU, times native (least–most) |"
    ));
    line(format_args!("| --- | ---: | ---: | ---: | ---: | ---: |"));
    for (server, row) in servers.iter().zip(rows) {
        let of = |figure: fn(&Figures) -> f64| median(row.iter().map(figure).collect());
        let ratios: Vec<f64> = row
            .iter()
            .zip(&rows[0])
            .map(|(own, native)| own.cpu / native.cpu)
            .collect();
        let (least, most) = ratios
            .iter()
            .fold((f64::MAX, f64::MIN), |(least, most), ratio| {
                (least.min(*ratio), most.max(*ratio))
            });
        line(format_args!(
            "| {} | {:.0} | {:.0} µs | {:.0} µs | {:.1} µs | {:.2} ({least:.2}–{most:.2}) |",
            server.name(),
            of(|figures| figures.load.requests / figures.load.seconds),
            of(|figures| figures.load.p50),
            of(|figures| figures.load.p99),
            of(|figures| figures.cpu),
            median(ratios),
        ));
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
