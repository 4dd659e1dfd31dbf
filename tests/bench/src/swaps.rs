//! Swapping guests under load, and starting servers.

use std::cell::Cell;
use std::fs;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::client;
use crate::effort::Effort;
use crate::report::{Section, Table};
use crate::samples::{Samples, quantile};
use crate::server::{Address, PAGES, QUIET_PAGES, Server, wasinetd};
use crate::wrk::{self, CONNECTIONS, Workload};

/// The pauses between swaps under load: those of a hasty operator and those of a script.
const PAUSES: [Duration; 2] = [Duration::from_secs(1), Duration::from_millis(100)];

/// The number of swaps for measuring memory.
const SWAPS: usize = 1_000;

/// The cache directory for compiled versions.
const CACHE: &str = "target/bench/swaps/cache";

/// The number of server starts per round.
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
        title: "Swapping guests, and starting servers",
        notes: vec![
            format!(
                "The versions of `hello` differ only in a custom section. The load is \
                 {CONNECTIONS} connections of wrk, which keep all cores busy. Swaps go through the admin socket. \
                 No request failed; a failed request ends the benchmark."
            ),
            "The duration of a swap includes the digest, compilation, a first instance and the \
             probe."
                .into(),
        ],
        tables: vec![
            latency(effort, &versions)?,
            durations(effort, &versions)?,
            memory(&versions)?,
            starts(effort)?,
        ],
        charts: Vec::new(),
    })
}

/// A source of components that behave the same but differ in their bytes.
struct Versions<'a> {
    directory: &'a Path,
    component: Vec<u8>,
    next: Cell<u32>,
}

impl Versions<'_> {
    /// Writes a new version to the file `name`.
    fn create(&self, name: &str) -> Result<PathBuf, String> {
        let number = self.next.replace(self.next.get() + 1);
        let mut component = self.component.clone();
        // A custom section (component model, binary format): kind, length, length of the name, name
        // and content. Process id and number make the content unique.
        component.extend([0, 10, 1, b'v']);
        component.extend(std::process::id().to_le_bytes());
        component.extend(number.to_le_bytes());
        let path = self.directory.join(name).with_extension("wasm");
        fs::write(&path, component).map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(path)
    }
}

/// A server with an admin socket.
struct AdminServer {
    server: Server,
    admin: PathBuf,
}

impl AdminServer {
    fn start(cache: &str) -> Result<Self, String> {
        let admin = PathBuf::from(format!("/tmp/wasinetd-bench-{}.sock", std::process::id()));
        let address = format!("unix:{}", admin.display());
        let arguments = [&["--admin", &address, "--cache", cache], &QUIET_PAGES[..]].concat();
        let command = wasinetd("concurrent", "hello", &arguments);
        let server = Server::start("wasinetd", &command, Address::Printed)?;
        Ok(Self { server, admin })
    }

    /// Swaps the guest. Returns the duration that the server reports, in milliseconds.
    fn swap(&self, guest: &Path) -> Result<f64, String> {
        let component = fs::read(guest).map_err(|error| error.to_string())?;
        let answer = self.post("/v1/services/default/swap", &component)?;
        let seconds = answer["took"]
            .as_f64()
            .ok_or("the answer has no duration")?;
        Ok(seconds * 1e3)
    }

    /// Sends a request to the admin API and returns the answer.
    ///
    /// The benchmark sends it itself, because a `ctl` process per request would add load.
    fn post(&self, path: &str, body: &[u8]) -> Result<serde_json::Value, String> {
        let exchange = || {
            let mut stream = UnixStream::connect(&self.admin)?;
            write!(
                stream,
                "POST {path} HTTP/1.1\r\nHost: wasinetd\r\nContent-Length: {}\r\n\r\n",
                body.len()
            )?;
            stream.write_all(body)?;
            std::io::read_to_string(stream)
        };
        let answer = exchange().map_err(|error| format!("{path}: {error}"))?;
        let parts = answer.split_once("\r\n\r\n");
        let (_, json) = parts
            .filter(|_| answer.starts_with("HTTP/1.1 200 "))
            .ok_or_else(|| format!("{path}: {answer}"))?;
        serde_json::from_str(json).map_err(|error| format!("{path}: {error}: {json}"))
    }

    /// Swaps repeatedly while `load` runs, and returns the result of `load`.
    fn swap_during<T: Send>(
        &self,
        load: impl FnOnce() -> T + Send,
        pause: Duration,
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
                thread::sleep(pause);
            }
            Ok(load.join().expect("the load does not panic"))
        })
    }
}

/// Returns the file of the version for the nth swap.
type NextVersion<'a> = &'a dyn Fn(usize) -> Result<PathBuf, String>;

/// The latency of clients during swaps.
fn latency(effort: Effort, versions: &Versions) -> Result<Table, String> {
    let first = versions.create("first")?;
    let second = versions.create("second")?;
    let alternating = |n: usize| Ok([&first, &second][n % 2].clone());
    let new = |_| versions.create("next");
    let targets: [(&str, NextVersion); 2] = [
        ("between two versions", &alternating),
        ("to a new version each time", &new),
    ];
    let mut rows = Vec::new();
    for (workload, requests) in [
        (Workload::KeepAlive, "kept-alive"),
        (Workload::NewConnections, "new connection"),
    ] {
        for (target, next) in targets {
            for pause in PAUSES {
                let mut columns: [Samples; 3] = Default::default();
                for _ in 0..effort.rounds {
                    let server = AdminServer::start(CACHE)?;
                    let address = server.server.address();
                    let load = || wrk::run(address, workload, CONNECTIONS, effort.seconds);
                    load()?;
                    let quiet = load()?.p99;
                    let swapping = server.swap_during(load, pause, next)??.p99;
                    columns[0].push(quiet);
                    columns[1].push(swapping);
                    columns[2].push(swapping / quiet);
                }
                let mut row = vec![requests.into(), target.into(), format!("{pause:?}")];
                row.extend(columns[..2].iter().map(|column| column.with_spread(0)));
                row.push(columns[2].with_spread(2));
                rows.push(row);
            }
        }
    }
    Ok(Table {
        title: "Latency of clients during swaps: p99, µs".into(),
        columns: vec![
            "requests",
            "swaps",
            "pause between swaps",
            "no swaps",
            "swaps",
            "times no swaps",
        ],
        rows,
    })
}

/// The duration of swaps without load.
fn durations(effort: Effort, versions: &Versions) -> Result<Table, String> {
    let mut rows: [(&str, Vec<f64>); 3] = [
        ("compiled", Vec::new()),
        ("cached on disk", Vec::new()),
        ("in memory (the previous version)", Vec::new()),
    ];
    let server = AdminServer::start(CACHE)?;
    for _ in 0..effort.rounds * 4 {
        let first = versions.create("first")?;
        let second = versions.create("second")?;
        rows[0].1.push(server.swap(&first)?);
        rows[0].1.push(server.swap(&second)?);
        rows[2].1.push(server.swap(&first)?);
        // After two more swaps the server no longer has the second version in memory.
        server.swap(&versions.create("third")?)?;
        server.swap(&versions.create("third")?)?;
        rows[1].1.push(server.swap(&second)?);
    }
    Ok(Table {
        title: "Duration of a swap, ms".into(),
        columns: vec!["code of the new version", "p50", "p99"],
        rows: rows
            .map(|(name, mut times)| {
                let at = |share, times: &mut [f64]| format!("{:.2}", quantile(times, share));
                let (p50, p99) = (at(0.5, &mut times), at(0.99, &mut times));
                vec![name.into(), p50, p99]
            })
            .into(),
    })
}

/// The memory that replaced versions leave behind.
fn memory(versions: &Versions) -> Result<Table, String> {
    let server = AdminServer::start("off")?;
    let ended = AtomicBool::new(false);
    let mut rows = Vec::new();
    thread::scope(|scope| {
        let load = scope.spawn(|| {
            while !ended.load(Ordering::Relaxed) {
                client::open_idle(server.server.address(), 8)?;
            }
            Ok(())
        });
        let mut swap_all = || {
            for n in 1..=SWAPS {
                server.swap(&versions.create("next")?)?;
                if [1, 10, 100, SWAPS / 2, SWAPS].contains(&n) {
                    rows.push(vec![
                        n.to_string(),
                        format!("{:.1}", server.server.resident_bytes() / 1048576.0),
                        format!("{:.0}", server.server.mappings()),
                        server.server.proc_entries("fd").to_string(),
                    ]);
                }
            }
            Ok::<_, String>(())
        };
        let swapped = swap_all();
        ended.store(true, Ordering::Relaxed);
        let loaded: std::io::Result<()> = load.join().expect("the load does not panic");
        swapped.and(loaded.map_err(|error| format!("while swapping: {error}")))
    })?;
    Ok(Table {
        title: format!("Memory after up to {SWAPS} swaps under load, each version compiled"),
        columns: vec!["swaps", "resident memory, MiB", "mappings", "open files"],
        rows,
    })
}

/// The time from starting the process until it accepts connections.
fn starts(effort: Effort) -> Result<Table, String> {
    let mut rows = Vec::new();
    for (name, cache) in [("compiled", "off"), ("cached on disk", CACHE)] {
        let mut times = Vec::new();
        let arguments = [&PAGES[..], &["--cache", cache]].concat();
        let command = wasinetd("concurrent", "hello", &arguments);
        // The first start fills the cache.
        drop(Server::start(name, &command, Address::Printed)?);
        for _ in 0..effort.rounds as usize * STARTS {
            let started = Instant::now();
            let server = Server::start(name, &command, Address::Printed)?;
            times.push(started.elapsed().as_secs_f64() * 1e3);
            drop(server);
        }
        rows.push(vec![
            name.to_string(),
            format!("{:.1}", quantile(&mut times, 0.5)),
            format!("{:.1}", quantile(&mut times, 0.99)),
        ]);
    }
    let mut restarts = Vec::new();
    let server = AdminServer::start(CACHE)?;
    let mut pids = Vec::new();
    for _ in 0..effort.rounds {
        let started = Instant::now();
        let answer = server.post("/v1/restart", &[])?;
        restarts.push(started.elapsed().as_secs_f64() * 1e3);
        let pid = answer.as_i64().and_then(|pid| i32::try_from(pid).ok());
        pids.push(pid.ok_or_else(|| format!("not a process id: {answer}"))?);
    }
    // Only the last process still serves. Each restart has ended the process before it.
    if let Some(pid) = pids
        .last()
        .and_then(|pid| rustix::process::Pid::from_raw(*pid))
    {
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
    }
    rows.push(vec![
        "cached on disk, from `ctl restart` until the new process serves".into(),
        format!("{:.1}", quantile(&mut restarts, 0.5)),
        format!("{:.1}", quantile(&mut restarts, 0.99)),
    ]);
    Ok(Table {
        title: "Time from starting the process until it accepts connections, ms".into(),
        columns: vec!["code of the guest", "p50", "p99"],
        rows,
    })
}
