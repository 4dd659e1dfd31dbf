//! A server process that is measured.

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::{build, native};

/// The time until a started server has to accept connections.
const START_TIMEOUT: Duration = Duration::from_secs(30);

/// A running server. Dropping it ends the process.
pub(crate) struct Server {
    name: String,
    child: Child,
    address: SocketAddr,
}

/// How the benchmark learns the address of a server.
#[derive(Clone, Copy)]
pub(crate) enum Address {
    /// The server prints `listening on ADDRESS` first.
    Printed,
    /// The benchmark chooses a port and replaces `{port}` in the arguments.
    Given,
}

impl Server {
    /// Starts a server and waits until it accepts connections.
    ///
    /// # Errors
    ///
    /// Fails if the program does not start or does not listen in time.
    pub(crate) fn start(name: &str, command: &[String], address: Address) -> Result<Self, String> {
        Self::start_with(name, command, address, &[])
    }

    /// Like [`Self::start`], with additional environment variables.
    ///
    /// # Errors
    ///
    /// Fails if the program does not start or does not listen in time.
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
            // The server writes its log all the same, so the cost of logging is measured.
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
        while address.is_some() && started.elapsed() < START_TIMEOUT {
            if TcpStream::connect(server.address).is_ok() {
                return Ok(server);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Err(format!(
            "{name} does not listen; run {command:?} to see why"
        ))
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// The CPU time of the process and its descendants, in microseconds.
    ///
    /// User and kernel time together (proc(5), `stat`).
    pub(crate) fn cpu_micros(&self) -> f64 {
        let ticks: u64 = self
            .process_tree()
            .iter()
            .map(|process| process.ticks)
            .sum();
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

    /// The number of memory mappings.
    pub(crate) fn mappings(&self) -> f64 {
        let maps = fs::read_to_string(format!("/proc/{}/maps", self.child.id()));
        maps.unwrap_or_default().lines().count() as f64
    }

    /// The number of entries of a directory in `/proc/PID`, such as `fd` or `task`.
    pub(crate) fn proc_entries(&self, directory: &str) -> usize {
        fs::read_dir(format!("/proc/{}/{directory}", self.child.id())).map_or(0, Iterator::count)
    }

    /// The process and all its descendants.
    fn process_tree(&self) -> Vec<Process> {
        let all: HashMap<u32, Process> = fs::read_dir("/proc")
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .filter_map(|id| Some((id, Process::read(id)?)))
            .collect();
        let own = self.child.id();
        let is_descendant = |mut id: u32| loop {
            if id == own {
                return true;
            }
            match all.get(&id) {
                Some(process) if process.parent != 0 => id = process.parent,
                _ => return false,
            }
        };
        all.iter()
            .filter(|(id, _)| is_descendant(**id))
            .map(|(_, process)| *process)
            .collect()
    }
}

#[derive(Clone, Copy)]
struct Process {
    parent: u32,
    /// The CPU time of the process and its ended children.
    ticks: u64,
}

impl Process {
    fn read(id: u32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
        // The second field, the name in parentheses, may contain spaces.
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

/// `USER_HZ`. Linux fixes it at 100 on all common architectures.
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
        // On SIGTERM a server also ends its child processes.
        if let Ok(id) = self.child.id().try_into()
            && let Some(id) = rustix::process::Pid::from_raw(id)
        {
            // The process may have ended already.
            let _ = rustix::process::kill_process(id, rustix::process::Signal::TERM);
        }
        let signalled = Instant::now();
        while signalled.elapsed() < Duration::from_secs(2) {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The command that serves a guest with wasinetd on a free port.
///
/// All load comes from one source address, so the limit per source is off unless `arguments` set
/// it.
pub(crate) fn wasinetd(dispatch: &str, guest: &str, arguments: &[&str]) -> Vec<String> {
    let mut command = vec![build::wasinetd().display().to_string()];
    command.extend(["serve", "--listen", "127.0.0.1:0"].map(String::from));
    if !arguments.contains(&"--max-connections-per-source") {
        command.extend(["--max-connections-per-source", "off"].map(String::from));
    }
    command.extend(["--dispatch", dispatch].map(String::from));
    command.extend(arguments.iter().map(ToString::to_string));
    command.push(format!("target/guests/{guest}.wasm"));
    command
}

/// The servers that run the same handler. The first one, native, is the baseline of all ratios.
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

/// The flags that grant `hello` its pages.
pub(crate) const PAGES: [&str; 2] = ["--dir", "static::/static"];

/// [`PAGES`], without a log line per connection.
pub(crate) const QUIET_PAGES: [&str; 4] = ["--dir", "static::/static", "--log-level", "warn"];
