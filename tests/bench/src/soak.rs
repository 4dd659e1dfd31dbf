//! Good clients beside hostile ones, and good guests beside hostile ones: what the good ones feel of
//! it, and whether the server is as before when it is over.

mod hostile;
mod innocent;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use crate::report::{Section, Table};
use crate::server::{Address, Server, wasinetd};
use crate::{client, machine};
use hostile::{FAULTS, Fault, MANY};
use innocent::{Felt, Innocents};

/// How long the server may take to be done with what is left of a fault.
const PATIENCE: Duration = Duration::from_secs(60);

/// Connections at once. All places are filled at the end, to see that none was lost.
const PLACES: usize = 400;

/// What one source may have of them. All hostile clients are one.
const PLACES_PER_SOURCE: usize = 200;

/// What may be resident at the end beyond what was after the first time that all faults were there,
/// in MiB.
const GROWTH_MIB: f64 = 16.0;

/// The most that the p99 beside a fault should be of the quiet one.
const FELT_AT_MOST: f64 = 3.0;

/// Lets all faults loose, one after the other and then all at once, for so many minutes in all.
///
/// # Errors
///
/// Says which promise was not kept.
pub(crate) fn run(minutes: u32) -> Result<(), String> {
    machine::allow_open_files();
    let modes = ["concurrent", "spawn"];
    // Twice, to see whether anything grows, and each mode has a quiet time and a mixed one.
    let phases = modes.len() * 2 * (FAULTS.len() + 2);
    let phase = Duration::from_secs(u64::from(minutes) * 60) / phases as u32;
    let mut broken = Vec::new();
    for dispatch in modes {
        let (section, promises) = one_mode(dispatch, phase)?;
        println!("{section}");
        broken.extend(promises);
    }
    match broken.is_empty() {
        true => Ok(()),
        false => Err(format!("broken promises:\n{}", broken.join("\n"))),
    }
}

/// Returns what was felt, and the promises that were broken.
fn one_mode(dispatch: &str, phase: Duration) -> Result<(Section, Vec<String>), String> {
    let directory = std::env::temp_dir().join(format!("wasinetd-soak-{}", std::process::id()));
    std::fs::create_dir_all(&directory).map_err(|error| error.to_string())?;
    let admin = Admin(directory.join("admin.sock"));
    let server = Server::start(dispatch, &command(dispatch, &admin.0), Address::Printed)?;
    warm_up(&server, &admin)?;
    let mut broken = Vec::new();
    let mut rounds: [Vec<(&str, Felt)>; 2] = Default::default();
    let mut after_first = None;
    for round in &mut rounds {
        let quiet = beside(&server, &[], phase)?;
        quiet.check("nothing", &mut broken);
        round.push(("nothing", quiet));
        let mut faults: Vec<(&str, &[Fault])> = FAULTS
            .iter()
            .map(|fault| (fault.name, std::slice::from_ref(fault)))
            .collect();
        faults.push(("all of these", &FAULTS));
        for (name, faults) in faults {
            let felt = beside(&server, faults, phase)?;
            felt.check(name, &mut broken);
            round.push((name, felt));
            if let Err(reason) = admin.wait_for_no_connections() {
                broken.push(format!("{dispatch}, after {name}: {reason}"));
            }
        }
        let state = State::of(&server);
        match &after_first {
            None => after_first = Some(state),
            Some(first) => broken.extend(state.beyond(first, dispatch)),
        }
    }
    let all_places = (0..PLACES)
        .map(|n| client::connect_from(source(n), server.address()))
        .collect::<Result<Vec<_>, _>>();
    let answered =
        all_places.and_then(|mut clients| clients.iter_mut().try_for_each(innocent::ask));
    if let Err(error) = answered {
        broken.push(format!("{dispatch}: a place was lost: {error}"));
    }
    admin.wait_for_no_connections()?;
    let met = admin.figures("wasinetd_limits_met_total")?;
    drop(server);
    let _ = std::fs::remove_dir_all(&directory);
    let state = after_first.map(|state| state.to_string());
    let section = Section {
        title: "Soak",
        notes: vec![
            format!(
                "{dispatch}. Of each fault {MANY} are there at once for {:.1} s, and replaced as they \
                 end. Beside them one client connects anew for each question, and one keeps its \
                 connection. Hostile clients are one source, which has {PLACES_PER_SOURCE} of {PLACES} \
                 places. Clients and server share the cores.",
                phase.as_secs_f64()
            ),
            format!("After the first round: {}.", state.unwrap_or_default()),
            format!("Limits met: {}.", met.join(", ")),
        ],
        tables: vec![Table {
            title: "What the good ones felt".into(),
            columns: vec![
                "beside",
                "answered",
                "failed",
                "new, p50 ms",
                "new, p99 ms",
                "kept, p99 ms",
                "p99 over quiet",
            ],
            rows: rows(&rounds),
        }],
        charts: Vec::new(),
    };
    Ok((section, broken))
}

/// Has each place be used for as much memory and stack as may stay with it, so that what grows later
/// is lost.
fn warm_up(server: &Server, admin: &Admin) -> Result<(), String> {
    for harm in ["many small grows\n", "recurse\n"] {
        let filled: Result<Vec<_>, _> = (0..PLACES)
            .map(|n| {
                let mut client = client::connect_from(source(n), server.address())?;
                client.write_all(harm.as_bytes())?;
                Ok(client)
            })
            .collect();
        let mut filled = filled.map_err(|error: std::io::Error| error.to_string())?;
        for client in &mut filled {
            // The server ends it, for a limit.
            let _ = client.read_to_end(&mut Vec::new());
        }
        admin.wait_for_no_connections()?;
    }
    Ok(())
}

fn command(dispatch: &str, admin: &Path) -> Vec<String> {
    let places = PLACES.to_string();
    let per_source = PLACES_PER_SOURCE.to_string();
    let admin = format!("unix:{}", admin.display());
    let flags = [
        ["--max-connections", &places],
        ["--max-connections-per-source", &per_source],
        ["--admin", &admin],
        ["--log-level", "error"],
        // So short that each is met many times in a minute.
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

/// What innocent clients feel beside some faults.
fn beside(server: &Server, faults: &[Fault], phase: Duration) -> Result<Felt, String> {
    let end = Instant::now() + phase;
    thread::scope(|scope| {
        let hostile: Vec<_> = faults
            .iter()
            .map(|fault| {
                let many = MANY / faults.len();
                scope.spawn(move || fault.go_on(server.address(), many, end))
            })
            .collect();
        let felt = Innocents::new(server.address()).until(end);
        for fault in hostile {
            fault
                .join()
                .map_err(|_| "a hostile client has panicked".to_string())?
                .map_err(|error| format!("a hostile client failed: {error}"))?;
        }
        Ok(felt)
    })
}

/// A row for each fault, with the times of both rounds.
fn rows([first, second]: &[Vec<(&str, Felt)>; 2]) -> Vec<Vec<String>> {
    let over_quiet = |felt: &Felt, quiet: &Felt| {
        (felt.new.p99 / quiet.new.p99).max(felt.kept.p99 / quiet.kept.p99)
    };
    let both = |one: f64, other: f64| format!("{one:.2} / {other:.2}");
    let beside = |((name, first_felt), (_, second_felt)): (&(&str, Felt), &(&str, Felt))| {
        let ratios = [
            over_quiet(first_felt, &first[0].1),
            over_quiet(second_felt, &second[0].1),
        ];
        let mark = |ratio: f64| if ratio > FELT_AT_MOST { " !" } else { "" };
        vec![
            name.to_string(),
            (first_felt.answered + second_felt.answered).to_string(),
            (first_felt.failed.len() + second_felt.failed.len()).to_string(),
            both(first_felt.new.p50, second_felt.new.p50),
            both(first_felt.new.p99, second_felt.new.p99),
            both(first_felt.kept.p99, second_felt.kept.p99),
            ratios
                .map(|ratio| format!("{ratio:.1}{}", mark(ratio)))
                .join(" / "),
        ]
    };
    first.iter().zip(second).map(beside).collect()
}

/// Sources of good clients, so that none has too many places.
fn source(n: usize) -> std::net::Ipv4Addr {
    std::net::Ipv4Addr::new(127, 0, 1, (n % 200) as u8)
}

/// What a server has of the machine.
struct State {
    resident_mib: f64,
    files: usize,
    threads: usize,
    mappings: f64,
}

impl State {
    fn of(server: &Server) -> Self {
        Self {
            resident_mib: server.resident_bytes() / (1 << 20) as f64,
            files: server.entries("fd"),
            threads: server.entries("task"),
            mappings: server.mappings(),
        }
    }

    /// What there is more of than there was.
    fn beyond(&self, first: &Self, dispatch: &str) -> Vec<String> {
        let mut more = Vec::new();
        let mut check = |what: &str, now: f64, before: f64, allowed: f64| {
            // Not a number is a server that is gone.
            if now.is_nan() || now > before + allowed {
                more.push(format!(
                    "{dispatch}: {what} grew from {before:.0} to {now:.0}"
                ));
            }
        };
        check(
            "resident MiB",
            self.resident_mib,
            first.resident_mib,
            GROWTH_MIB,
        );
        check("open files", self.files as f64, first.files as f64, 0.0);
        check("threads", self.threads as f64, first.threads as f64, 0.0);
        check(
            "mappings",
            self.mappings,
            first.mappings,
            first.mappings / 10.0,
        );
        more
    }
}

impl std::fmt::Display for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{:.0} MiB resident, {} open files, {} threads, {} mappings",
            self.resident_mib, self.files, self.threads, self.mappings
        )
    }
}

/// The server's own figures.
struct Admin(PathBuf);

impl Admin {
    /// The samples of a metric, each as `LABELS VALUE`, without those of zero.
    fn figures(&self, name: &str) -> Result<Vec<String>, String> {
        let failed = |error: std::io::Error| format!("the server tells no figures: {error}");
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

    /// Waits until the server says that none is open.
    fn wait_for_no_connections(&self) -> Result<(), String> {
        let started = Instant::now();
        loop {
            let open = self.figures("wasinetd_connections_open")?;
            if open.is_empty() {
                return Ok(());
            }
            if started.elapsed() > PATIENCE {
                return Err(format!("connections are left open: {}", open.join(" ")));
            }
            thread::sleep(Duration::from_millis(50));
        }
    }
}
