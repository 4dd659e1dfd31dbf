//! A server process under measurement.

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::native;

/// How long a server may take until it can be connected to.
const PATIENCE: Duration = Duration::from_secs(30);

/// It is ended when this is dropped.
pub(crate) struct Server {
    name: String,
    child: Child,
    address: SocketAddr,
}

/// How a server is told, or tells, where it listens.
#[derive(Clone, Copy)]
pub(crate) enum Address {
    /// It prints `listening on ADDRESS` first.
    Printed,
    /// It is told: `{port}` in its arguments is replaced.
    Given,
}

impl Server {
    /// Runs a command.
    ///
    /// # Errors
    ///
    /// Says why there is no such server.
    pub(crate) fn start(name: &str, command: &[String], address: Address) -> Result<Self, String> {
        Self::start_with(name, command, address, &[])
    }

    /// Runs a command with more in its environment.
    ///
    /// # Errors
    ///
    /// Says why there is no such server.
    pub(crate) fn start_with(
        name: &str,
        command: &[String],
        address: Address,
        environment: &[(&str, &str)],
    ) -> Result<Self, String> {
        let port = free_port().map_err(|error| format!("no free port: {error}"))?;
        let mut arguments = command
            .iter()
            .map(|part| part.replace("{port}", &port.to_string()));
        let program = arguments.next().unwrap_or_default();
        let mut child = Command::new(&program)
            .args(arguments)
            .envs(environment.iter().copied())
            .stdout(Stdio::piped())
            // The log is written, and its cost counts.
            .stderr(Stdio::null())
            .spawn()
            .map_err(|error| format!("cannot run {program}: {error}; run `make bench`"))?;
        let address = match address {
            Address::Given => Some(SocketAddr::from(([127, 0, 0, 1], port))),
            Address::Printed => printed_address(&mut child),
        };
        let server = Self {
            name: name.into(),
            child,
            address: address.unwrap_or_else(|| ([0, 0, 0, 0], 0).into()),
        };
        let started = Instant::now();
        while address.is_some() && started.elapsed() < PATIENCE {
            if TcpStream::connect(server.address).is_ok() {
                return Ok(server);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Err(format!(
            "{name} does not listen: run {command:?} to see why"
        ))
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Processor time that the process and those it has started have used so far, in user and
    /// kernel mode (proc(5), `stat`), in microseconds.
    pub(crate) fn cpu_micros(&self) -> f64 {
        let ticks: u64 = self.family().iter().map(|process| process.ticks).sum();
        ticks as f64 * 1e6 / TICKS_PER_SECOND
    }

    /// Resident memory, in bytes.
    pub(crate) fn resident_bytes(&self) -> f64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id()));
        let status = status.unwrap_or_default();
        let kib = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB"))
            .and_then(|kib| kib.parse::<f64>().ok());
        kib.unwrap_or(f64::NAN) * 1024.0
    }

    /// Memory mappings.
    pub(crate) fn mappings(&self) -> f64 {
        let maps = fs::read_to_string(format!("/proc/{}/maps", self.child.id()));
        maps.unwrap_or_default().lines().count() as f64
    }

    /// How many entries a directory of its `/proc/PID` has, such as `fd` or `task`.
    pub(crate) fn entries(&self, directory: &str) -> usize {
        fs::read_dir(format!("/proc/{}/{directory}", self.child.id())).map_or(0, Iterator::count)
    }

    /// This process and all that descend from it.
    fn family(&self) -> Vec<Process> {
        let all: HashMap<u32, Process> = fs::read_dir("/proc")
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .filter_map(|id| Some((id, Process::read(id)?)))
            .collect();
        let own = self.child.id();
        let belongs = |mut id: u32| loop {
            if id == own {
                return true;
            }
            match all.get(&id) {
                Some(process) if process.parent != 0 => id = process.parent,
                _ => return false,
            }
        };
        all.iter()
            .filter(|(id, _)| belongs(**id))
            .map(|(_, process)| *process)
            .collect()
    }
}

#[derive(Clone, Copy)]
struct Process {
    parent: u32,
    /// Its own time, and that of its children that have ended.
    ticks: u64,
}

impl Process {
    fn read(id: u32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
        // The second field, a name in parentheses, may contain spaces.
        let (_, fields) = stat.rsplit_once(')')?;
        let fields: Vec<&str> = fields.split_whitespace().collect();
        let times = fields
            .get(11..15)?
            .iter()
            .flat_map(|ticks| ticks.parse::<u64>());
        Some(Self {
            parent: fields.get(1)?.parse().ok()?,
            ticks: times.sum(),
        })
    }
}

/// `USER_HZ`, which is part of Linux's interface to user space on all common architectures.
const TICKS_PER_SECOND: f64 = 100.0;

fn printed_address(child: &mut Child) -> Option<SocketAddr> {
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut()?)
        .read_line(&mut line)
        .ok()?;
    line.trim_end().strip_prefix("listening on ")?.parse().ok()
}

fn free_port() -> std::io::Result<u16> {
    Ok(TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}

impl Drop for Server {
    fn drop(&mut self) {
        // Asked to end, a server ends its own processes as well.
        if let Ok(id) = self.child.id().try_into()
            && let Some(id) = rustix::process::Pid::from_raw(id)
        {
            // It may have ended already.
            let _ = rustix::process::kill_process(id, rustix::process::Signal::TERM);
        }
        let asked = Instant::now();
        while asked.elapsed() < Duration::from_secs(2) {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A `wasinetd serve` of a guest on a free port. All load comes from one source, which may have all
/// places unless `arguments` say otherwise.
pub(crate) fn wasinetd(dispatch: &str, guest: &str, arguments: &[&str]) -> Vec<String> {
    let mut command: Vec<String> = [
        "target/release/wasinetd",
        "serve",
        "--listen",
        "127.0.0.1:0",
    ]
    .map(String::from)
    .into();
    if !arguments.contains(&"--max-connections-per-source") {
        command.extend(["--max-connections-per-source", "off"].map(String::from));
    }
    command.extend(["--dispatch", dispatch].map(String::from));
    command.extend(arguments.iter().map(ToString::to_string));
    command.push(format!("target/guests/{guest}.wasm"));
    command
}

/// The servers that a handler is compared on: native first, which the others are divided by.
pub(crate) fn contenders(handler: &str, arguments: &[&str]) -> [(&'static str, Vec<String>); 3] {
    [
        ("native, tokio", native::command(&[handler])),
        (
            "wasinetd, concurrent",
            wasinetd("concurrent", handler, arguments),
        ),
        ("wasinetd, spawn", wasinetd("spawn", handler, arguments)),
    ]
}

/// What `hello` is granted.
pub(crate) const PAGES: [&str; 2] = ["--dir", "static::/static"];

/// [`PAGES`], without a line in the log for each of many connections.
pub(crate) const QUIET_PAGES: [&str; 4] = ["--dir", "static::/static", "--log-level", "warn"];
