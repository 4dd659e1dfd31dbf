//! Starts servers and talks to them. Asserts nothing about what they answer.

use std::fmt;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Output, Stdio};
use std::sync::{Arc, Condvar, Mutex, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use socket2::{Domain, Socket, Type};

/// How long anything may take that should happen at once, on a machine that is busy.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// Both ways of dispatch: whatever a test shows, it shows for both.
pub(crate) const MODES: [&str; 2] = ["spawn", "concurrent"];

/// The top of the workspace.
pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("tests/ is in the workspace")
        .into()
}

/// A guest by name, from `target/guests`.
pub(crate) fn guest(name: &str) -> PathBuf {
    let path = root()
        .join("target/guests")
        .join(name)
        .with_extension("wasm");
    assert!(
        path.exists(),
        "{} is missing: run `make build` first",
        path.display()
    );
    path
}

/// A guest made for tests, by name.
pub(crate) fn fixture(name: &str) -> PathBuf {
    guest(&format!("fixtures/{name}"))
}

/// A guest made for tests that is written as text, by name.
pub(crate) fn text_fixture(name: &str) -> PathBuf {
    let text = root().join("guest/fixtures/src").join(name);
    let component = wat::parse_file(text.with_extension("wat"))
        .unwrap_or_else(|error| panic!("{name} is no component: {error}"));
    let path = root().join("target/guests/fixtures").join(name);
    // Other tests may want it at the same time.
    let mut file = tempfile::NamedTempFile::new_in(root().join("target")).expect("there is room");
    file.write_all(&component).expect("there is room");
    let path = path.with_extension("wasm");
    file.persist(&path).expect("it is in the same file system");
    path
}

/// The content of a page that the server serves.
pub(crate) fn page(name: &str) -> String {
    std::fs::read_to_string(root().join("static").join(name)).expect("the pages are in static/")
}

/// The command under test, at the top of the workspace.
pub(crate) fn wasinetd() -> Command {
    let path = root().join("target/release/wasinetd");
    assert!(
        path.exists(),
        "{} is missing: run `make build` first",
        path.display()
    );
    at_top(&path)
}

fn at_top(program: &Path) -> Command {
    let mut command = Command::new(program);
    command.current_dir(root());
    // Not in the home of whoever runs the tests.
    command.env("XDG_CACHE_HOME", root().join("target/test-cache"));
    command
}

/// Runs a command to its end, while no test runs that wants to be alone. Not for a test that has a
/// server.
pub(crate) fn run(command: &mut Command) -> Output {
    let _turn = ALONE
        .read()
        .unwrap_or_else(|poisoned| poisoned.into_inner());
    output(command)
}

pub(crate) fn output(command: &mut Command) -> Output {
    command
        .stdin(Stdio::null())
        .output()
        .expect("the command starts")
}

/// Whether a program is there. If not it says which package has it: a test is left out for it.
pub(crate) fn has_program(name: &str, package: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let is = std::env::split_paths(&path).any(|directory| directory.join(name).is_file());
    if !is {
        eprintln!("left out: there is no {name} here; apt-get install {package}");
    }
    is
}

/// Runs curl against a server and returns all that it prints.
pub(crate) fn curl(server: &Server, path: &str, arguments: &[&str]) -> String {
    let mut command = Command::new("curl");
    command
        .args(["--silent", "--show-error", "--max-time", "60"])
        .args(arguments);
    let output = output(command.arg(format!("http://{}{path}", server.address())));
    assert!(
        output.status.success(),
        "{command:?} failed with {}\n{}\n{server:?}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).expect("pages are text")
}

/// A server's admin socket, in a directory that is gone with it.
pub(crate) struct AdminSocket {
    directory: tempfile::TempDir,
    /// As `--admin` wants it.
    pub(crate) flag: String,
}

impl AdminSocket {
    pub(crate) fn new() -> Self {
        let directory = tempfile::tempdir().expect("there is room");
        let path = directory.path().join("admin.sock");
        Self {
            directory,
            flag: format!("unix:{}", path.display()),
        }
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.directory.path().join("admin.sock")
    }

    /// A path beside it.
    pub(crate) fn beside(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// What `wasinetd ctl` says.
    pub(crate) fn ctl(&self, arguments: &[&str]) -> Output {
        output(
            wasinetd()
                .args(["ctl", "--admin", &self.flag])
                .args(arguments),
        )
    }

    /// The same, of one that succeeds.
    pub(crate) fn ctl_text(&self, arguments: &[&str]) -> String {
        let output = self.ctl(arguments);
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        String::from_utf8(output.stdout).expect("it is text")
    }

    /// How many versions there are of the one service.
    pub(crate) fn versions(&self) -> usize {
        let status = self.ctl_json(&["status"]);
        let versions = status["services"][0]["versions"].as_array();
        versions.expect("they are listed").len()
    }

    /// Waits until no connection is open.
    pub(crate) fn wait_for_none_open(&self) {
        let deadline = Instant::now() + PATIENCE;
        while self.ctl_json(&["status"])["open"] != 0 {
            assert!(Instant::now() < deadline, "some stay open");
        }
    }

    /// All figures.
    pub(crate) fn metrics(&self) -> String {
        let mut curl = Command::new("curl");
        curl.args([
            "--silent",
            "--show-error",
            "--max-time",
            "60",
            "--unix-socket",
        ]);
        let output = output(curl.arg(self.path()).arg("http://localhost/metrics"));
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).expect("they are text")
    }

    /// What it says as JSON.
    pub(crate) fn ctl_json(&self, arguments: &[&str]) -> serde_json::Value {
        let text = self.ctl_text(&[&["--json"], arguments].concat());
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error} in {text}"))
    }
}

/// Writes a version of the guest `named_version` with this name to `path`.
pub(crate) fn write_version(path: &Path, name: &str) {
    let mut component = std::fs::read(fixture("named_version")).expect("it is there");
    let place = component
        .windows(16)
        .position(|bytes| bytes == b"NAME-OF-VERSION-")
        .expect("the guest has its name");
    component[place..place + 16].copy_from_slice(format!("{name:_<16}").as_bytes());
    std::fs::write(path, component).expect("there is room");
}

/// Tests with a load of their own, or with a time to keep, run alone.
static ALONE: RwLock<()> = RwLock::new(());

enum Turn {
    Shared(#[allow(dead_code, reason = "held")] RwLockReadGuard<'static, ()>),
    Alone(#[allow(dead_code, reason = "held")] RwLockWriteGuard<'static, ()>),
}

/// A running server. It is killed when this is dropped.
pub(crate) struct Server {
    command: String,
    child: Child,
    addresses: Vec<SocketAddr>,
    /// Of Unix sockets.
    paths: Vec<PathBuf>,
    log: Arc<Log>,
    reader: Option<JoinHandle<()>>,
    stdout: Option<BufReader<ChildStdout>>,
    _turn: Turn,
}

#[derive(Default)]
struct Log {
    lines: Mutex<(Vec<String>, bool)>,
    grown: Condvar,
}

impl Server {
    /// Serves `guest` on a free port, with further arguments.
    pub(crate) fn start(mode: &str, guest: &Path, arguments: &[&str]) -> Self {
        let turn = ALONE
            .read()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        Self::spawn(wasinetd(), mode, guest, arguments, Turn::Shared(turn))
    }

    /// The same, with the program at this path.
    pub(crate) fn start_program(
        program: &Path,
        mode: &str,
        guest: &Path,
        arguments: &[&str],
    ) -> Self {
        Self::start_in(program, &[], mode, guest, arguments)
    }

    /// The same, with these environment variables.
    pub(crate) fn start_in(
        program: &Path,
        environment: &[(&str, &str)],
        mode: &str,
        guest: &Path,
        arguments: &[&str],
    ) -> Self {
        let turn = ALONE
            .read()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        let mut command = at_top(program);
        command.envs(environment.iter().copied());
        Self::spawn(command, mode, guest, arguments, Turn::Shared(turn))
    }

    /// The same, by a command that runs one, with `serve` as its first argument. It is told where to listen
    /// by the arguments or otherwise, and listens at so many addresses.
    pub(crate) fn start_by(
        mut command: Command,
        listeners: usize,
        mode: &str,
        guest: &Path,
        arguments: &[&str],
    ) -> Self {
        let turn = ALONE
            .read()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        command.current_dir(root());
        command.env("XDG_CACHE_HOME", root().join("target/test-cache"));
        let turn = Turn::Shared(turn);
        Self::spawn_listening(command, listeners, mode, guest, arguments, turn)
    }

    /// The same, while no other test runs.
    pub(crate) fn start_alone(mode: &str, guest: &Path, arguments: &[&str]) -> Self {
        let turn = ALONE
            .write()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        Self::spawn(wasinetd(), mode, guest, arguments, Turn::Alone(turn))
    }

    fn spawn(command: Command, mode: &str, guest: &Path, arguments: &[&str], turn: Turn) -> Self {
        let listeners = arguments.iter().filter(|flag| **flag == "--listen").count();
        if listeners == 0 {
            let listen = [arguments, &["--listen", "127.0.0.1:0"]].concat();
            return Self::spawn_listening(command, 1, mode, guest, &listen, turn);
        }
        Self::spawn_listening(command, listeners, mode, guest, arguments, turn)
    }

    fn spawn_listening(
        mut command: Command,
        listeners: usize,
        mode: &str,
        guest: &Path,
        arguments: &[&str],
        turn: Turn,
    ) -> Self {
        command.args(["serve", "--dispatch", mode]);
        if !arguments.contains(&"--threads") {
            // More than one, on machines with few cores as well.
            command.args(["--threads", "2"]);
        }
        if !arguments
            .iter()
            .any(|flag| flag.starts_with("--max-connections"))
        {
            // All clients of a test are one source.
            command.args(["--max-connections-per-source", "off"]);
        }
        command.args(arguments).arg(guest);
        Self::begin(command, listeners, turn)
    }

    /// Serves what a config file says, which has so many addresses.
    pub(crate) fn start_config(config: &Path, listeners: usize) -> Self {
        Self::start_config_by(wasinetd(), config, listeners)
    }

    /// The same, by a command that runs one.
    pub(crate) fn start_config_by(mut command: Command, config: &Path, listeners: usize) -> Self {
        let turn = ALONE
            .read()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        command.args(["serve", "--config"]).arg(config);
        Self::begin(command, listeners, Turn::Shared(turn))
    }

    fn begin(mut command: Command, listeners: usize, turn: Turn) -> Self {
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().expect("the server starts");
        let log = Arc::new(Log::default());
        let stderr = BufReader::new(child.stderr.take().expect("it is piped"));
        let reader = thread::spawn({
            let log = log.clone();
            move || log.read(stderr)
        });
        let mut server = Self {
            command: format!("{command:?}"),
            addresses: Vec::new(),
            paths: Vec::new(),
            log,
            reader: Some(reader),
            stdout: None,
            _turn: turn,
            child,
        };
        let mut stdout = BufReader::new(server.child.stdout.take().expect("it is piped"));
        while server.addresses.len() + server.paths.len() < listeners {
            let mut line = String::new();
            let n = stdout
                .read_line(&mut line)
                .expect("standard output can be read");
            let address = line.trim_end().strip_prefix("listening on ");
            // Of a config file it says for whom.
            let address = address.and_then(|rest| rest.split(' ').next());
            let path = address.and_then(|address| address.strip_prefix("unix:"));
            match (path, address.map(str::parse)) {
                (Some(path), _) => server.paths.push(path.into()),
                (None, Some(Ok(address))) => server.addresses.push(address),
                _ => panic!(
                    "the server said {line:?} ({n} bytes) instead of where it listens\n{server:?}"
                ),
            }
        }
        server.stdout = Some(stdout);
        server
    }

    /// Where it listens first.
    pub(crate) fn address(&self) -> SocketAddr {
        self.addresses[0]
    }

    /// Where operators connect to it, of a server that was told to have some.
    pub(crate) fn operators(&mut self) -> String {
        let mut line = String::new();
        let stdout = self.stdout.as_mut().expect("it is read once");
        stdout.read_line(&mut line).expect("it is text");
        let address = line.trim_end().strip_prefix("operators connect to ");
        address
            .unwrap_or_else(|| panic!("the server said {line:?}\n{self:?}"))
            .into()
    }

    /// The Unix socket that it listens at first.
    pub(crate) fn path(&self) -> &Path {
        &self.paths[0]
    }

    /// A new connection to it.
    pub(crate) fn connect_unix(&self) -> Client<UnixStream> {
        Client::connect_unix(self.path()).unwrap_or_else(|error| panic!("{error}\n{self:?}"))
    }

    /// Where it listens.
    pub(crate) fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    pub(crate) fn pid(&self) -> rustix::process::Pid {
        rustix::process::Pid::from_child(&self.child)
    }

    /// A new connection to it.
    pub(crate) fn connect(&self) -> Client {
        Client::connect(self.address()).unwrap_or_else(|error| panic!("{error}\n{self:?}"))
    }

    /// A new connection to it from an address of this machine, if it is not refused.
    pub(crate) fn connect_from(&self, source: &str) -> io::Result<Client> {
        let source: IpAddr = source.parse().expect("it is an address");
        let domain = Domain::for_address(self.address());
        let socket = Socket::new(domain, Type::STREAM, None)?;
        socket.bind(&SocketAddr::new(source, 0).into())?;
        socket.connect(&self.address().into())?;
        Client::new(socket.into())
    }

    /// Waits for a line of the log that has all of `parts`.
    pub(crate) fn wait_for_log(&self, parts: &[&str]) -> String {
        let has_all = |line: &&String| parts.iter().all(|part| line.contains(part));
        let deadline = Instant::now() + PATIENCE;
        let mut lines = self.log.lines.lock().expect("no reader panics");
        loop {
            if let Some(line) = lines.0.iter().find(has_all) {
                return line.clone();
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || lines.1 {
                drop(lines);
                panic!("the log never said {parts:?}\n{self:?}");
            }
            lines = self
                .log
                .grown
                .wait_timeout(lines, left)
                .expect("no reader panics")
                .0;
        }
    }

    /// The lines of the log so far that have `part`.
    pub(crate) fn log_lines(&self, part: &str) -> Vec<String> {
        let lines = self.log.lines.lock().expect("no reader panics");
        lines
            .0
            .iter()
            .filter(|line| line.contains(part))
            .cloned()
            .collect()
    }

    /// What it printed to standard output after the lines that say where it listens. To be called
    /// when it has ended.
    pub(crate) fn rest_of_stdout(&mut self) -> String {
        let mut rest = String::new();
        if let Some(mut stdout) = self.stdout.take() {
            stdout
                .read_to_string(&mut rest)
                .expect("standard output is text");
        }
        rest
    }

    /// How many sockets it has open.
    pub(crate) fn sockets(&self) -> usize {
        let files = std::fs::read_dir(format!("/proc/{}/fd", self.child.id()));
        files
            .expect("the server runs")
            .filter_map(|file| std::fs::read_link(file.ok()?.path()).ok())
            .filter(|target| target.to_string_lossy().starts_with("socket:"))
            .count()
    }

    pub(crate) fn signal(&self, signal: rustix::process::Signal) {
        rustix::process::kill_process(self.pid(), signal).expect("the server runs");
    }

    /// Waits for its end; the log is complete then.
    pub(crate) fn wait(&mut self) -> ExitStatus {
        let status = self.wait_for_exit();
        if let Some(reader) = self.reader.take() {
            reader.join().expect("no reader panics");
        }
        status
    }

    /// Waits for its end. A successor may still write to the log.
    pub(crate) fn wait_for_exit(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        // There is no waiting for a child with a time limit but to ask again.
        loop {
            match self.child.try_wait().expect("it is our child") {
                Some(status) => return status,
                None if Instant::now() > deadline => panic!("it does not end\n{self:?}"),
                None => thread::sleep(Duration::from_millis(5)),
            }
        }
    }

    /// How many threads of this name have used a tenth of a second of processor time or more.
    pub(crate) fn busy_threads(&self, name: &str) -> usize {
        let tasks = format!("/proc/{}/task", self.child.id());
        std::fs::read_dir(tasks)
            .expect("the server runs")
            .flatten()
            .filter_map(|task| std::fs::read_to_string(task.path().join("stat")).ok())
            .filter_map(|stat| {
                let fields = stat.split_once(&format!("({name})"))?.1;
                // User time, in ticks of 10 ms (proc(5)).
                fields.split_whitespace().nth(11)?.parse().ok()
            })
            .filter(|ticks: &u64| *ticks >= 10)
            .count()
    }

    /// The processor time that it has used so far.
    pub(crate) fn processor_time(&self) -> Duration {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id()))
            .expect("the server runs");
        let (_, fields) = stat.rsplit_once(") ").expect("the name is in parentheses");
        // User and system time, in ticks of 10 ms (proc(5)).
        let ticks: u64 = fields
            .split_whitespace()
            .skip(11)
            .take(2)
            .map(|ticks| ticks.parse::<u64>().expect("it is a number"))
            .sum();
        Duration::from_millis(ticks * 10)
    }

    /// A figure of `/proc/PID/status` in KiB, such as `VmRSS`.
    pub(crate) fn memory(&self, name: &str) -> u64 {
        let path = format!("/proc/{}/status", self.child.id());
        let status = std::fs::read_to_string(path).expect("the server runs");
        status
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
            .and_then(|value| value.split_whitespace().next()?.parse().ok())
            .unwrap_or_else(|| panic!("no {name} in {status}"))
    }
}

impl Log {
    fn read(&self, stderr: impl BufRead) {
        for line in stderr.lines().map_while(Result::ok) {
            self.lines.lock().expect("no waiter panics").0.push(line);
            self.grown.notify_all();
        }
        self.lines.lock().expect("no waiter panics").1 = true;
        self.grown.notify_all();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}

/// What to show when a test fails: the command, and the end of the log.
impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "command: {}", self.command)?;
        let lines = self
            .log
            .lines
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        let skipped = lines.0.len().saturating_sub(50);
        writeln!(f, "standard error ({skipped} earlier lines left out):")?;
        lines.0[skipped..]
            .iter()
            .try_for_each(|line| writeln!(f, "  {line}"))
    }
}

/// A raw connection. Reads that get nothing for too long fail.
pub(crate) struct Client<S = TcpStream>(pub(crate) S);

/// What all stream sockets have.
pub(crate) trait Socketlike: Read + Write {
    fn finish(&self) -> io::Result<()>;
}

impl Socketlike for TcpStream {
    fn finish(&self) -> io::Result<()> {
        self.shutdown(Shutdown::Write)
    }
}

impl Socketlike for UnixStream {
    fn finish(&self) -> io::Result<()> {
        self.shutdown(Shutdown::Write)
    }
}

impl Client {
    pub(crate) fn connect(address: SocketAddr) -> io::Result<Self> {
        Self::new(TcpStream::connect(address)?)
    }

    fn new(stream: TcpStream) -> io::Result<Self> {
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_nodelay(true)?;
        Ok(Self(stream))
    }
}

impl Client<UnixStream> {
    pub(crate) fn connect_unix(path: &Path) -> io::Result<Self> {
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Self(stream))
    }
}

impl<S: Socketlike> Client<S> {
    pub(crate) fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.0
            .write_all(bytes.as_ref())
            .expect("the server takes it");
    }

    /// No more is sent.
    pub(crate) fn finish(&self) {
        self.0.finish().expect("the connection is open");
    }

    /// Everything up to the end of the stream, or the error that ended it instead.
    pub(crate) fn read_all(&mut self) -> (Vec<u8>, io::Result<()>) {
        let mut bytes = Vec::new();
        let end = self.0.read_to_end(&mut bytes).map(drop);
        (bytes, end)
    }

    /// Everything up to an orderly end, as text.
    pub(crate) fn read_to_end(&mut self) -> String {
        let (bytes, end) = self.read_all();
        let text = String::from_utf8_lossy(&bytes).into_owned();
        end.unwrap_or_else(|error| panic!("{error} after {text:?}"));
        text
    }

    /// The next `n` bytes.
    pub(crate) fn read(&mut self, n: usize) -> String {
        let mut bytes = vec![0; n];
        self.0.read_exact(&mut bytes).expect("so many bytes come");
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// One line, without its end.
    pub(crate) fn read_line(&mut self) -> String {
        self.read_until("\n").trim_end().into()
    }

    /// Up to and including `end`.
    pub(crate) fn read_until(&mut self, end: &str) -> String {
        let mut text = Vec::new();
        while !text.ends_with(end.as_bytes()) {
            let mut byte = [0];
            self.0.read_exact(&mut byte).unwrap_or_else(|error| {
                panic!("{error} after {:?}", String::from_utf8_lossy(&text))
            });
            text.push(byte[0]);
        }
        String::from_utf8(text).expect("it is text")
    }

    /// One HTTP response with a body, or the error that came instead.
    pub(crate) fn try_response(&mut self) -> io::Result<Response> {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            self.0.read_exact(&mut byte)?;
            head.push(byte[0]);
        }
        let head = String::from_utf8_lossy(&head).into_owned();
        let length = head
            .lines()
            .find_map(|line| line.strip_prefix("Content-Length: ")?.parse().ok())
            .unwrap_or_else(|| panic!("no length in {head:?}"));
        let mut body = vec![0; length];
        self.0.read_exact(&mut body)?;
        Ok(Response {
            head,
            body: String::from_utf8_lossy(&body).into_owned(),
        })
    }

    pub(crate) fn response(&mut self) -> Response {
        self.try_response().expect("a response comes")
    }

    /// Sends a request for `path` that keeps the connection, and waits for the response.
    pub(crate) fn get(&mut self, path: &str) -> Response {
        self.send(request(path));
        self.response()
    }
}

/// A request for `path` that keeps the connection.
pub(crate) fn request(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: test\r\n\r\n")
}

/// A response's head, with its last empty line, and body.
#[derive(Debug)]
pub(crate) struct Response {
    pub(crate) head: String,
    pub(crate) body: String,
}

impl Response {
    pub(crate) fn status(&self) -> &str {
        self.head
            .split("\r\n")
            .next()
            .and_then(|line| line.strip_prefix("HTTP/1.1 "))
            .unwrap_or("")
    }
}

/// Ends a server that was started by another one.
pub(crate) struct Successor(pub(crate) Pid);

impl Successor {
    /// The one that answers operators.
    pub(crate) fn of(admin: &AdminSocket) -> Self {
        let pid = admin.ctl_json(&["status"])["pid"].as_i64().unwrap();
        Self(Pid::from_raw(pid as i32).unwrap())
    }
}

impl Drop for Successor {
    fn drop(&mut self) {
        let _ = kill_process(self.0, Signal::KILL);
    }
}
