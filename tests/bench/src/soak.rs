//! The soak test: well-behaved clients beside hostile clients and guests.
//!
//! Every request of a well-behaved client has to be answered, and the server must not leak memory,
//! files, threads or connection permits.

mod hostile;
mod well_behaved;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use crate::report::{Section, Table};
use crate::server::{Address, Server, wasinetd};
use crate::{build, client, machine};
use hostile::{CONNECTIONS, FAULTS, Fault};
use well_behaved::Results;

/// The time in which the server has to close all connections after a fault.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(60);

/// The server's limit of connections. The test opens as many at the end to find lost permits.
const MAX_CONNECTIONS: usize = 400;

/// The server's limit of connections per source. All hostile clients share one source.
const MAX_PER_SOURCE: usize = 200;

/// The allowed growth of resident memory in the second round, in MiB.
const MAX_GROWTH_MIB: f64 = 16.0;

/// The ratio of p99 beside a fault to p99 without faults above which the report marks a row.
const MARKED_RATIO: f64 = 3.0;

/// Runs all faults, first one by one and then together, for `minutes` in total.
///
/// # Errors
///
/// Lists the failed requests and leaks.
pub(crate) fn run(minutes: u32) -> Result<(), String> {
    machine::raise_open_file_limit();
    println!("{}\n", build::describe());
    let modes = ["concurrent", "spawn"];
    // Two rounds show growth. A round has a phase without faults, one per fault, and one with all.
    let phases = modes.len() * 2 * (FAULTS.len() + 2);
    let phase = Duration::from_secs(u64::from(minutes) * 60) / phases as u32;
    let mut problems = Vec::new();
    for dispatch in modes {
        println!("{}", soak(dispatch, phase, &mut problems)?);
    }
    if problems.is_empty() {
        return Ok(());
    }
    Err(format!("the soak test failed:\n{}", problems.join("\n")))
}

/// Tests one dispatch mode and adds the problems found to `problems`.
fn soak(dispatch: &str, phase: Duration, problems: &mut Vec<String>) -> Result<Section, String> {
    let directory = std::env::temp_dir().join(format!("wasinetd-soak-{}", std::process::id()));
    std::fs::create_dir_all(&directory).map_err(|error| error.to_string())?;
    let admin = Admin(directory.join("admin.sock"));
    let server = Server::start(dispatch, &command(dispatch, &admin.0), Address::Printed)?;
    warm_up(&server, &admin)?;
    let first_round = run_round(&server, &admin, phase, problems)?;
    let after_first = ProcessUsage::of(&server);
    let second_round = run_round(&server, &admin, phase, problems)?;
    problems.extend(ProcessUsage::of(&server).growth_since(&after_first, dispatch));
    if let Err(error) = use_all_permits(&server) {
        problems.push(format!("{dispatch}: a connection permit was lost: {error}"));
    }
    admin.wait_for_no_connections()?;
    let limits_hit = admin.metric("wasinetd_limits_met_total")?;
    drop(server);
    let _ = std::fs::remove_dir_all(&directory);
    Ok(Section {
        title: "Soak",
        notes: vec![
            format!(
                "Dispatch: {dispatch}. Each fault has {CONNECTIONS} concurrent connections for \
                 {:.1} s; connections that end are replaced. Meanwhile one well-behaved client connects \
                 for each request, and another one keeps its connection. All hostile clients share \
                 one source address, which is limited to {MAX_PER_SOURCE} of {MAX_CONNECTIONS} \
                 connections. Clients and server share the cores.",
                phase.as_secs_f64()
            ),
            format!("Usage after the first round: {after_first}."),
            format!("Limits hit: {}.", limits_hit.join(", ")),
        ],
        tables: vec![Table {
            title: "Latency of well-behaved clients (first round / second round)".into(),
            columns: vec![
                "beside",
                "answered",
                "failed",
                "new, p50 ms",
                "new, p99 ms",
                "kept, p99 ms",
                "p99, times no fault",
            ],
            rows: rows(&first_round, &second_round),
        }],
        charts: Vec::new(),
    })
}

/// The results beside each fault. The first entry is without faults.
type Round = Vec<(&'static str, Results)>;

/// Runs the phase without faults, each fault, and all faults together.
fn run_round(
    server: &Server,
    admin: &Admin,
    phase: Duration,
    problems: &mut Vec<String>,
) -> Result<Round, String> {
    let mut phases: Vec<(&'static str, &[Fault])> = vec![("no fault", &[])];
    phases.extend(
        FAULTS
            .iter()
            .map(|fault| (fault.name, std::slice::from_ref(fault))),
    );
    phases.push(("all faults together", &FAULTS));
    let mut round = Round::new();
    for (name, faults) in phases {
        let results = run_beside(server, faults, phase)?;
        results.check(name, problems);
        round.push((name, results));
        if faults.is_empty() {
            continue;
        }
        if let Err(reason) = admin.wait_for_no_connections() {
            problems.push(format!("{}, after {name}: {reason}", server.name()));
        }
    }
    Ok(round)
}

/// Opens as many connections as the server allows, and sends a request on each.
fn use_all_permits(server: &Server) -> std::io::Result<()> {
    let clients = (0..MAX_CONNECTIONS)
        .map(|n| client::connect_from(source(n), server.address()))
        .collect::<Result<Vec<_>, _>>();
    clients?.iter_mut().try_for_each(well_behaved::ask)
}

/// Makes every pool slot use the memory and stack that may stay resident, so that later growth is a
/// leak.
fn warm_up(server: &Server, admin: &Admin) -> Result<(), String> {
    for harm in ["many small grows\n", "recurse\n"] {
        let clients: Result<Vec<_>, _> = (0..MAX_CONNECTIONS)
            .map(|n| {
                let mut client = client::connect_from(source(n), server.address())?;
                client.write_all(harm.as_bytes())?;
                Ok(client)
            })
            .collect();
        let mut clients = clients.map_err(|error: std::io::Error| error.to_string())?;
        for client in &mut clients {
            // The server ends the connection when the guest hits a limit.
            let _ = client.read_to_end(&mut Vec::new());
        }
        admin.wait_for_no_connections()?;
    }
    Ok(())
}

fn command(dispatch: &str, admin: &Path) -> Vec<String> {
    let max_connections = MAX_CONNECTIONS.to_string();
    let per_source = MAX_PER_SOURCE.to_string();
    let admin = format!("unix:{}", admin.display());
    let flags = [
        ["--max-connections", &max_connections],
        ["--max-connections-per-source", &per_source],
        ["--admin", &admin],
        ["--log-level", "error"],
        // Short limits, so that each is hit many times per minute.
        ["--cpu-time", "500ms"],
        ["--max-memory", "16MiB"],
        ["--idle-timeout", "3s"],
        ["--first-byte-timeout", "1s"],
        ["--write-timeout", "1s"],
        ["--max-lifetime", "5s"],
        ["--keepalive", "1s"],
    ];
    wasinetd(dispatch, "fixtures/hostile", flags.as_flattened())
}

/// Runs the well-behaved clients beside some faults for one phase.
fn run_beside(server: &Server, faults: &[Fault], phase: Duration) -> Result<Results, String> {
    let end = Instant::now() + phase;
    thread::scope(|scope| {
        let hostile: Vec<_> = faults
            .iter()
            .map(|fault| {
                let count = CONNECTIONS / faults.len();
                scope.spawn(move || fault.run(server.address(), count, end))
            })
            .collect();
        let results = well_behaved::run(server.address(), end);
        for fault in hostile {
            fault
                .join()
                .map_err(|_| "a hostile client has panicked".to_string())?
                .map_err(|error| format!("a hostile client failed: {error}"))?;
        }
        Ok(results)
    })
}

/// One table row per fault, with the results of both rounds.
fn rows(first_round: &Round, second_round: &Round) -> Vec<Vec<String>> {
    let p99_ratio = |results: &Results, without_faults: &Results| {
        let new = results.new.p99 / without_faults.new.p99;
        new.max(results.kept.p99 / without_faults.kept.p99)
    };
    let both = |first: f64, second: f64| format!("{first:.2} / {second:.2}");
    let mark = |ratio: f64| if ratio > MARKED_RATIO { " !" } else { "" };
    let pairs = first_round.iter().zip(second_round);
    pairs
        .map(|((name, first), (_, second))| {
            let ratios = [
                p99_ratio(first, &first_round[0].1),
                p99_ratio(second, &second_round[0].1),
            ];
            vec![
                name.to_string(),
                (first.answered + second.answered).to_string(),
                (first.failures.len() + second.failures.len()).to_string(),
                both(first.new.p50, second.new.p50),
                both(first.new.p99, second.new.p99),
                both(first.kept.p99, second.kept.p99),
                ratios
                    .map(|ratio| format!("{ratio:.1}{}", mark(ratio)))
                    .join(" / "),
            ]
        })
        .collect()
}

/// The source address of the nth well-behaved client. Many addresses avoid the limit per source.
fn source(n: usize) -> std::net::Ipv4Addr {
    std::net::Ipv4Addr::new(127, 0, 1, (n % 200) as u8)
}

/// The resources that a server process uses.
struct ProcessUsage {
    resident_mib: f64,
    files: usize,
    threads: usize,
    mappings: f64,
}

impl ProcessUsage {
    fn of(server: &Server) -> Self {
        Self {
            resident_mib: server.resident_bytes() / (1 << 20) as f64,
            files: server.proc_entries("fd"),
            threads: server.proc_entries("task"),
            mappings: server.mappings(),
        }
    }

    /// A message for each resource that grew beyond its allowance.
    fn growth_since(&self, first: &Self, dispatch: &str) -> Vec<String> {
        let mut messages = Vec::new();
        let mut check = |resource: &str, now: f64, before: f64, allowed: f64| {
            // NaN means that the server is gone.
            if now.is_nan() || now > before + allowed {
                messages.push(format!(
                    "{dispatch}: {resource} grew from {before:.0} to {now:.0}"
                ));
            }
        };
        check(
            "resident MiB",
            self.resident_mib,
            first.resident_mib,
            MAX_GROWTH_MIB,
        );
        check("open files", self.files as f64, first.files as f64, 0.0);
        check("threads", self.threads as f64, first.threads as f64, 0.0);
        check(
            "mappings",
            self.mappings,
            first.mappings,
            first.mappings / 10.0,
        );
        messages
    }
}

impl std::fmt::Display for ProcessUsage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{:.0} MiB resident, {} open files, {} threads, {} mappings",
            self.resident_mib, self.files, self.threads, self.mappings
        )
    }
}

/// The admin socket of the server.
struct Admin(PathBuf);

impl Admin {
    /// The samples of a metric that are not zero, each as `LABELS VALUE`.
    fn metric(&self, name: &str) -> Result<Vec<String>, String> {
        let failed = |error: std::io::Error| format!("cannot read metrics: {error}");
        let mut stream = UnixStream::connect(&self.0).map_err(failed)?;
        let request = "GET /metrics HTTP/1.1\r\nHost: soak\r\nConnection: close\r\n\r\n";
        stream.write_all(request.as_bytes()).map_err(failed)?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).map_err(failed)?;
        Ok(answer
            .lines()
            .filter_map(|line| line.strip_prefix(name))
            .filter(|line| !line.ends_with(" 0"))
            .map(|line| line.trim().to_string())
            .collect())
    }

    /// Waits until the server has no open connections.
    fn wait_for_no_connections(&self) -> Result<(), String> {
        let started = Instant::now();
        loop {
            let open = self.metric("wasinetd_connections_open")?;
            if open.is_empty() {
                return Ok(());
            }
            if started.elapsed() > CLOSE_TIMEOUT {
                return Err(format!("connections stay open: {}", open.join(" ")));
            }
            thread::sleep(Duration::from_millis(50));
        }
    }
}
