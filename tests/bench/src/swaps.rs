//! Guests that are swapped under load, and servers that are started again.

use std::cell::Cell;
use std::fs;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::report::{Section, Table};
use crate::samples::{Samples, quantile};
use crate::server::{Address, PAGES, QUIET_PAGES, Server, wasinetd};
use crate::wrk::{self, CONNECTIONS, Work};
use crate::{Effort, client};

/// How long from one swap to the next, under load: for an operator in a hurry, and for a machine.
const BETWEEN: [Duration; 2] = [Duration::from_secs(1), Duration::from_millis(100)];

/// The swaps that memory is measured over.
const SWAPS: usize = 1_000;

/// Where compiled versions are kept.
const CACHE: &str = "target/bench/swaps/cache";

/// How often a server is started in a round.
const STARTS: usize = 10;

pub(crate) fn measure(effort: Effort) -> Result<Section, String> {
    let directory = Path::new("target/bench/swaps");
    let failed = |error: std::io::Error| format!("{}: {error}", directory.display());
    fs::create_dir_all(directory).map_err(failed)?;
    let component = fs::read("target/guests/hello.wasm").map_err(failed)?;
    let versions = Versions {
        directory,
        component,
        next: Cell::new(0),
    };
    Ok(Section {
        title: "Swapping guests, and starting again",
        notes: vec![
            format!(
                "Versions of `hello` that differ in a custom section alone. Under load: {CONNECTIONS} \
                 connections of wrk, which leave neither core a moment, and swaps by the admin socket. \
                 Not one request failed, or there would be no figures."
            ),
            "How long a swap takes is from its bytes to the exchange: digest, compiling, an instance \
             and a probe are part of it."
                .into(),
        ],
        tables: vec![
            latency(effort, &versions)?,
            took(effort, &versions)?,
            memory(&versions)?,
            starts(effort)?,
        ],
        charts: Vec::new(),
    })
}

/// Components that do the same, and are not the same.
struct Versions<'a> {
    directory: &'a Path,
    component: Vec<u8>,
    next: Cell<u32>,
}

impl Versions<'_> {
    /// A version that there was not before, as a file of this name.
    fn new_one(&self, name: &str) -> Result<PathBuf, String> {
        let number = self.next.replace(self.next.get() + 1);
        let mut component = self.component.clone();
        // A custom section (component model, binary format): its kind, its length, the length of its
        // name, its name, and what is in it. By process and number no two are the same.
        component.extend([0, 10, 1, b'v']);
        component.extend(std::process::id().to_le_bytes());
        component.extend(number.to_le_bytes());
        let path = self.directory.join(name).with_extension("wasm");
        fs::write(&path, component).map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(path)
    }
}

/// A server that can be told.
struct Told {
    server: Server,
    admin: PathBuf,
}

impl Told {
    fn start(cache: &str) -> Result<Self, String> {
        let admin = PathBuf::from(format!("/tmp/wasinetd-bench-{}.sock", std::process::id()));
        let address = format!("unix:{}", admin.display());
        let arguments = [&["--admin", &address, "--cache", cache], &QUIET_PAGES[..]].concat();
        let command = wasinetd("concurrent", "hello", &arguments);
        let server = Server::start("wasinetd", &command, Address::Printed)?;
        Ok(Self { server, admin })
    }

    /// Swaps, and returns how long that took, in milliseconds.
    fn swap(&self, guest: &Path) -> Result<f64, String> {
        let component = fs::read(guest).map_err(|error| error.to_string())?;
        let answer = self.post("/v1/services/default/swap", &component)?;
        let took = answer["took"].as_f64().ok_or("it does not say how long")?;
        Ok(took * 1e3)
    }

    /// What the server answers. Asked from here: a process of its own for each would be load as well.
    fn post(&self, path: &str, body: &[u8]) -> Result<serde_json::Value, String> {
        let ask = || {
            let mut operator = UnixStream::connect(&self.admin)?;
            write!(
                operator,
                "POST {path} HTTP/1.1\r\nHost: wasinetd\r\nContent-Length: {}\r\n\r\n",
                body.len()
            )?;
            operator.write_all(body)?;
            std::io::read_to_string(operator)
        };
        let answer = ask().map_err(|error| format!("{path}: {error}"))?;
        let parts = answer.split_once("\r\n\r\n");
        let (_, json) = parts
            .filter(|_| answer.starts_with("HTTP/1.1 200 "))
            .ok_or_else(|| format!("{path}: {answer}"))?;
        serde_json::from_str(json).map_err(|error| format!("{path}: {error}: {json}"))
    }

    /// Swaps again and again while `load` lasts, and returns its result.
    fn swapping<T: Send>(
        &self,
        load: impl FnOnce() -> T + Send,
        between: Duration,
        next: impl Fn(usize) -> Result<PathBuf, String>,
    ) -> Result<T, String> {
        let ended = AtomicBool::new(false);
        thread::scope(|scope| {
            let load = scope.spawn(|| {
                let result = load();
                ended.store(true, Ordering::Relaxed);
                result
            });
            let mut swaps = 0;
            while !ended.load(Ordering::Relaxed) {
                self.swap(&next(swaps)?)?;
                swaps += 1;
                thread::sleep(between);
            }
            Ok(load.join().expect("it does not panic"))
        })
    }
}

/// The file with the version to swap to, the first, the second and so on.
type Next<'a> = &'a dyn Fn(usize) -> Result<PathBuf, String>;

/// What clients feel.
fn latency(effort: Effort, versions: &Versions) -> Result<Table, String> {
    let one = versions.new_one("one")?;
    let two = versions.new_one("two")?;
    let known = |n: usize| Ok([&one, &two][n % 2].clone());
    let new = |_| versions.new_one("next");
    let kinds: [(&str, Next); 2] = [("between two versions", &known), ("to ever new ones", &new)];
    let mut rows = Vec::new();
    for (work, requests) in [(Work::Kept, "kept-alive"), (Work::New, "new connection")] {
        for (kind, next) in kinds {
            for between in BETWEEN {
                let mut figures: [Samples; 3] = Default::default();
                for _ in 0..effort.rounds {
                    let told = Told::start(CACHE)?;
                    let address = told.server.address();
                    let load = || wrk::run(address, work, CONNECTIONS, effort.seconds);
                    load()?;
                    let quiet = load()?.p99;
                    let swapped = told.swapping(load, between, next)??.p99;
                    figures[0].push(quiet);
                    figures[1].push(swapped);
                    figures[2].push(swapped / quiet);
                }
                let mut row = vec![requests.into(), kind.into(), format!("{between:?}")];
                row.extend(figures[..2].iter().map(|figure| figure.with_spread(0)));
                row.push(figures[2].with_spread(2));
                rows.push(row);
            }
        }
    }
    Ok(Table {
        title: "What clients feel of swaps: p99, µs".into(),
        columns: vec![
            "requests",
            "swaps",
            "one each",
            "no swaps",
            "swaps",
            "times no swaps",
        ],
        rows,
    })
}

/// How long a swap takes of which nobody waits for anything.
fn took(effort: Effort, versions: &Versions) -> Result<Table, String> {
    let mut rows: [(&str, Vec<f64>); 3] = [
        ("compiled", Vec::new()),
        ("kept on disk", Vec::new()),
        ("the version before", Vec::new()),
    ];
    let told = Told::start(CACHE)?;
    for _ in 0..effort.rounds * 4 {
        let one = versions.new_one("one")?;
        let two = versions.new_one("two")?;
        rows[0].1.push(told.swap(&one)?);
        rows[0].1.push(told.swap(&two)?);
        rows[2].1.push(told.swap(&one)?);
        // Two others in between, and it is in memory no more.
        told.swap(&versions.new_one("three")?)?;
        told.swap(&versions.new_one("three")?)?;
        rows[1].1.push(told.swap(&two)?);
    }
    Ok(Table {
        title: "How long a swap takes, ms".into(),
        columns: vec!["the code of the new version", "p50", "p99"],
        rows: rows
            .map(|(name, mut times)| {
                let at = |share, times: &mut [f64]| format!("{:.2}", quantile(times, share));
                let (p50, p99) = (at(0.5, &mut times), at(0.99, &mut times));
                vec![name.into(), p50, p99]
            })
            .into(),
    })
}

/// What is left of versions that are gone.
fn memory(versions: &Versions) -> Result<Table, String> {
    let told = Told::start("off")?;
    let ended = AtomicBool::new(false);
    let mut rows = Vec::new();
    thread::scope(|scope| {
        let load = scope.spawn(|| {
            while !ended.load(Ordering::Relaxed) {
                client::idlers(told.server.address(), 8)?;
            }
            Ok(())
        });
        let mut swap_all = || {
            for n in 1..=SWAPS {
                told.swap(&versions.new_one("next")?)?;
                if [1, 10, 100, SWAPS / 2, SWAPS].contains(&n) {
                    rows.push(vec![
                        n.to_string(),
                        format!("{:.1}", told.server.resident_bytes() / 1048576.0),
                        format!("{:.0}", told.server.mappings()),
                        told.server.entries("fd").to_string(),
                    ]);
                }
            }
            Ok::<_, String>(())
        };
        let swapped = swap_all();
        ended.store(true, Ordering::Relaxed);
        let loaded: std::io::Result<()> = load.join().expect("it does not panic");
        swapped.and(loaded.map_err(|error| format!("while swapping: {error}")))
    })?;
    Ok(Table {
        title: format!("What is left of {SWAPS} versions, each compiled, under load"),
        columns: vec!["after swaps", "resident memory, MiB", "mappings", "files"],
        rows,
    })
}

/// From the start of the process to its first answer.
fn starts(effort: Effort) -> Result<Table, String> {
    let mut rows = Vec::new();
    for (name, cache) in [("compiled", "off"), ("kept on disk", CACHE)] {
        let mut listening = Vec::new();
        let arguments = [&PAGES[..], &["--cache", cache]].concat();
        let command = wasinetd("concurrent", "hello", &arguments);
        // What is kept is kept from here on.
        drop(Server::start(name, &command, Address::Printed)?);
        for _ in 0..effort.rounds as usize * STARTS {
            let began = Instant::now();
            let server = Server::start(name, &command, Address::Printed)?;
            listening.push(began.elapsed().as_secs_f64() * 1e3);
            drop(server);
        }
        rows.push(vec![
            name.to_string(),
            format!("{:.1}", quantile(&mut listening, 0.5)),
            format!("{:.1}", quantile(&mut listening, 0.99)),
        ]);
    }
    let mut restarts = Vec::new();
    let told = Told::start(CACHE)?;
    let mut successors = Vec::new();
    for _ in 0..effort.rounds {
        let began = Instant::now();
        let answer = told.post("/v1/restart", &[])?;
        restarts.push(began.elapsed().as_secs_f64() * 1e3);
        let pid = answer.as_i64().and_then(|pid| i32::try_from(pid).ok());
        successors.push(pid.ok_or_else(|| format!("not a process: {answer}"))?);
    }
    // The last one serves; those before have ended by themselves.
    if let Some(pid) = successors
        .last()
        .and_then(|pid| rustix::process::Pid::from_raw(*pid))
    {
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
    }
    rows.push(vec![
        "kept on disk, from a restart until the new process serves".into(),
        format!("{:.1}", quantile(&mut restarts, 0.5)),
        format!("{:.1}", quantile(&mut restarts, 0.99)),
    ]);
    Ok(Table {
        title: "From the start of the process until it accepts connections, ms".into(),
        columns: vec!["the code of the guest", "p50", "p99"],
        rows,
    })
}
