//! A running server.

mod launch;
mod log;
mod proc;

use std::fmt;
use std::io::{self, BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::client::Client;
use super::machine::{MachineUse, PATIENCE};
use super::tools::{program_in_root, wasinetd};
use launch::{Launch, ServerBuilder};
use log::LogReader;

/// Both dispatch modes: each test runs in both.
pub(crate) const MODES: [&str; 2] = ["spawn", "concurrent"];

/// A running server. Dropping this kills the server.
pub(crate) struct Server {
    command: String,
    child: Child,
    /// TCP addresses, in the order of the arguments.
    addresses: Vec<SocketAddr>,
    /// Unix socket paths, in the order of the arguments.
    paths: Vec<PathBuf>,
    log: LogReader,
    stdout: Option<BufReader<ChildStdout>>,
    _machine: MachineUse,
}

/// Ways to start a server.
impl Server {
    /// Serves `guest` on a free port. All clients together may use all connections.
    pub(crate) fn start(mode: &str, guest: &Path, arguments: &[&str]) -> Self {
        Self::spawn(ServerBuilder::new(wasinetd()).guest(mode, guest, arguments))
    }

    /// Like [`Server::start`], with the default limit on connections per source.
    pub(crate) fn start_with_source_limit(mode: &str, guest: &Path, arguments: &[&str]) -> Self {
        let builder = ServerBuilder::new(wasinetd()).default_source_limit();
        Self::spawn(builder.guest(mode, guest, arguments))
    }

    /// Like [`Server::start`], while no other test has a server.
    pub(crate) fn start_alone(mode: &str, guest: &Path, arguments: &[&str]) -> Self {
        let builder = ServerBuilder::new(wasinetd()).alone();
        Self::spawn(builder.guest(mode, guest, arguments))
    }

    /// Like [`Server::start`], with the executable at `program`.
    pub(crate) fn start_program(
        program: &Path,
        mode: &str,
        guest: &Path,
        arguments: &[&str],
    ) -> Self {
        let builder = ServerBuilder::new(program_in_root(program));
        Self::spawn(builder.guest(mode, guest, arguments))
    }

    /// Like [`Server::start_program`], with environment variables.
    pub(crate) fn start_with_env(
        program: &Path,
        environment: &[(&str, &str)],
        mode: &str,
        guest: &Path,
        arguments: &[&str],
    ) -> Self {
        let mut command = program_in_root(program);
        command.envs(environment.iter().copied());
        Self::spawn(ServerBuilder::new(command).guest(mode, guest, arguments))
    }

    /// Like [`Server::start`], with a command that executes `wasinetd`.
    ///
    /// The command or the arguments name the sockets: the server has `listeners` of them.
    pub(crate) fn start_with_command(
        command: Command,
        listeners: usize,
        mode: &str,
        guest: &Path,
        arguments: &[&str],
    ) -> Self {
        let builder = ServerBuilder::in_root(command).listeners(listeners);
        Self::spawn(builder.guest(mode, guest, arguments))
    }

    /// Serves a config file that names `listeners` addresses.
    pub(crate) fn start_config(config: &Path, listeners: usize) -> Self {
        Self::start_config_with_command(wasinetd(), config, listeners)
    }

    /// Like [`Server::start_config`], with a command that executes `wasinetd`.
    pub(crate) fn start_config_with_command(
        command: Command,
        config: &Path,
        listeners: usize,
    ) -> Self {
        let builder = ServerBuilder::new(command).listeners(listeners);
        Self::spawn(builder.config(config))
    }

    /// Starts the server and waits until it listens on all sockets.
    fn spawn(launch: Launch) -> Self {
        let Launch {
            mut command,
            listeners,
            machine,
        } = launch;
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().expect("the server starts");
        let stderr = child.stderr.take().expect("standard error is piped");
        let stdout = child.stdout.take().expect("standard output is piped");
        let mut server = Self {
            command: format!("{command:?}"),
            addresses: Vec::new(),
            paths: Vec::new(),
            log: LogReader::start(stderr),
            stdout: None,
            _machine: machine,
            child,
        };
        let mut stdout = BufReader::new(stdout);
        for _ in 0..listeners {
            server.read_listening_line(&mut stdout);
        }
        server.stdout = Some(stdout);
        server
    }

    fn read_listening_line(&mut self, stdout: &mut impl BufRead) {
        let mut line = String::new();
        let n = stdout
            .read_line(&mut line)
            .expect("standard output can be read");
        let address = line.trim_end().strip_prefix("listening on ");
        // With a config file, the name of the service follows.
        let address = address.and_then(|rest| rest.split(' ').next());
        let path = address.and_then(|address| address.strip_prefix("unix:"));
        match (path, address.map(str::parse)) {
            (Some(path), _) => self.paths.push(path.into()),
            (None, Some(Ok(address))) => self.addresses.push(address),
            _ => panic!("the server printed {line:?} ({n} bytes), not an address\n{self:?}"),
        }
    }
}

/// Addresses and connections.
impl Server {
    /// The first TCP address.
    pub(crate) fn address(&self) -> SocketAddr {
        self.addresses[0]
    }

    /// All TCP addresses.
    pub(crate) fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// The first Unix socket.
    pub(crate) fn path(&self) -> &Path {
        &self.paths[0]
    }

    /// The address of the admin API. The server prints it if it is TCP.
    pub(crate) fn admin_address(&mut self) -> String {
        let mut line = String::new();
        let stdout = self.stdout.as_mut().expect("standard output is open");
        stdout.read_line(&mut line).expect("the line is text");
        let address = line.trim_end().strip_prefix("operators connect to ");
        address
            .unwrap_or_else(|| panic!("the server printed {line:?}\n{self:?}"))
            .into()
    }

    /// Connects to the first TCP address.
    pub(crate) fn connect(&self) -> Client {
        Client::connect(self.address()).unwrap_or_else(|error| panic!("{error}\n{self:?}"))
    }

    /// Connects to the first TCP address from a local address, unless refused.
    pub(crate) fn connect_from(&self, source: &str) -> io::Result<Client> {
        Client::connect_from(source, self.address())
    }

    /// Connects to the first Unix socket.
    pub(crate) fn connect_unix(&self) -> Client<UnixStream> {
        Client::connect_unix(self.path()).unwrap_or_else(|error| panic!("{error}\n{self:?}"))
    }
}

/// Output.
impl Server {
    /// Waits for a log line that contains all of `parts`.
    pub(crate) fn wait_for_log(&self, parts: &[&str]) -> String {
        let line = self.log.wait_for(parts);
        line.unwrap_or_else(|| panic!("the log has no line with {parts:?}\n{self:?}"))
    }

    /// The log lines so far that contain `part`.
    pub(crate) fn log_lines(&self, part: &str) -> Vec<String> {
        self.log.lines_with(part)
    }

    /// Standard output after the lines with addresses, once the server has exited.
    pub(crate) fn rest_of_stdout(&mut self) -> String {
        let mut rest = String::new();
        if let Some(mut stdout) = self.stdout.take() {
            stdout
                .read_to_string(&mut rest)
                .expect("standard output is text");
        }
        rest
    }
}

/// The process.
impl Server {
    /// The number of open sockets.
    pub(crate) fn open_sockets(&self) -> usize {
        proc::open_sockets(self.child.id())
    }

    /// The number of threads with this name and 100 ms of CPU time.
    pub(crate) fn busy_threads(&self, name: &str) -> usize {
        proc::busy_threads(self.child.id(), name)
    }

    /// The CPU time so far, user and system.
    pub(crate) fn cpu_time(&self) -> Duration {
        proc::cpu_time(self.child.id())
    }

    /// A figure of `/proc/PID/status` in KiB, such as `VmRSS`.
    pub(crate) fn memory(&self, name: &str) -> u64 {
        proc::memory(self.child.id(), name)
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).expect("the server runs");
    }

    /// Waits until the server has exited and its log is complete.
    pub(crate) fn wait(&mut self) -> ExitStatus {
        let status = self.wait_for_exit();
        self.log.join();
        status
    }

    /// Waits until the server has exited. A successor may still write to the log.
    pub(crate) fn wait_for_exit(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        // The standard library has no wait with a timeout, so ask repeatedly.
        loop {
            match self.child.try_wait().expect("the server is a child") {
                Some(status) => return status,
                None if Instant::now() > deadline => panic!("the server does not exit\n{self:?}"),
                None => thread::sleep(Duration::from_millis(5)),
            }
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // The server may have exited already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        self.log.join();
    }
}

/// Shows the command and the end of the log.
impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "command: {}", self.command)?;
        let (skipped, lines) = self.log.last_lines(50);
        writeln!(f, "standard error ({skipped} earlier lines skipped):")?;
        lines.iter().try_for_each(|line| writeln!(f, "  {line}"))
    }
}
