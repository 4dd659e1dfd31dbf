//! A new process takes over the sockets that this one listens at.
//!
//! It is started with the sockets open, and told their numbers by an environment variable. When it
//! serves it says so on a pipe, and only then does this one drain. The sockets are the very same: whoever
//! waits in their queues is accepted by whichever asks next, and nobody is refused in between.
//!
//! It serves the very guest that this one serves, which need not be in a file any more.

use std::collections::HashMap;
use std::env;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::process::{Child, Command};
use std::time::Duration;

use bytes::Bytes;
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::pipe::{PipeFlags, pipe_with};
use socket2::SockRef;
use wasinetd::listener::Address;

use super::activation;

/// What a successor is told of, a line for each: `tcp=5:`, `unix=6:`, `fd=7:name`, `admin=8:`,
/// `guest=9:service`, `ready=10:`; where there is no name nothing comes after the colon. A name has no
/// line end.
const INHERITED: &str = "WASINETD_INHERITED";

/// How long a successor may take until it serves. It may have to compile its guest.
const READY: Duration = Duration::from_secs(120);

/// What this process was handed over by another one.
#[derive(Default)]
pub(super) struct Inherited {
    /// By what a server is told to listen at, with the port that was found.
    listening: Vec<(Address, OwnedFd)>,
    admin: Option<OwnedFd>,
    guests: Vec<(String, OwnedFd)>,
    ready: Option<OwnedFd>,
}

impl Inherited {
    /// Takes it. To be called once, first of all.
    pub(super) fn take() -> Self {
        let mut inherited = Self::default();
        let Ok(told) = env::var(INHERITED) else {
            return inherited;
        };
        for (kind, number) in told.lines().filter_map(|line| line.split_once('=')) {
            let (number, name) = number.split_once(':').unwrap_or((number, ""));
            let Some(descriptor) = number.parse().ok().and_then(own) else {
                continue;
            };
            match kind {
                "tcp" | "unix" => inherited.listening.extend(listening(descriptor)),
                "fd" => inherited
                    .listening
                    .push((Address::Passed(name.into()), descriptor)),
                "guest" => inherited.guests.push((name.into(), descriptor)),
                "admin" => inherited.admin = Some(descriptor),
                "ready" => inherited.ready = Some(descriptor),
                _ => {}
            }
        }
        inherited
    }

    /// The addresses of all sockets that were passed to the first process of this server.
    pub(super) fn passed(&self) -> Vec<Address> {
        let mut passed = Vec::new();
        for (address, _) in &self.listening {
            if matches!(address, Address::Passed(_)) && !passed.contains(address) {
                passed.push(address.clone());
            }
        }
        passed
    }

    /// The sockets that listen at `address`.
    pub(super) fn sockets(&mut self, address: &Address) -> Vec<OwnedFd> {
        // Where any port was asked for, it is the one that was found.
        let is_at = |at: &Address| match (at, address) {
            (Address::Ip(at), Address::Ip(address)) if address.port() == 0 => {
                at.ip() == address.ip()
            }
            _ => at == address,
        };
        let at = self.listening.iter().map(|(at, _)| at);
        let Some(found) = at.clone().find(|at| is_at(at)).cloned() else {
            return Vec::new();
        };
        let (these, others) = self.listening.drain(..).partition(|(at, _)| *at == found);
        self.listening = others;
        these
            .into_iter()
            .map(|(_, socket): (_, OwnedFd)| socket)
            .collect()
    }

    /// The socket that operators connect to.
    pub(super) fn admin(&mut self) -> Option<OwnedFd> {
        self.admin.take()
    }

    /// The components that are served, by their service.
    pub(super) fn guests(&mut self) -> io::Result<HashMap<String, Vec<u8>>> {
        let guests = std::mem::take(&mut self.guests).into_iter();
        guests
            .map(|(name, file)| {
                let mut file = File::from(file);
                let mut component = Vec::new();
                file.seek(SeekFrom::Start(0))?;
                file.read_to_end(&mut component)?;
                Ok((name, component))
            })
            .collect()
    }

    /// Tells the other one that this one serves.
    pub(super) fn ready(&mut self) {
        if let Some(pipe) = self.ready.take() {
            // It may have given up.
            let _ = File::from(pipe).write_all(b"1");
        }
    }
}

/// Takes a descriptor that is ours from the start. None if it is not open.
fn own(number: RawFd) -> Option<OwnedFd> {
    if number < 3 {
        return None;
    }
    // SAFETY: our predecessor has opened it for us and names it once; nothing else in this process,
    // which has only begun, knows of it.
    let descriptor = unsafe { OwnedFd::from_raw_fd(number) };
    match fcntl_setfd(&descriptor, FdFlags::CLOEXEC) {
        Ok(()) => Some(descriptor),
        Err(_) => {
            // It is not open: closing it could close what is opened under its number meanwhile.
            std::mem::forget(descriptor);
            None
        }
    }
}

fn listening(descriptor: OwnedFd) -> Option<(Address, OwnedFd)> {
    let address = SockRef::from(&descriptor).local_addr().ok()?;
    let ip = address.as_socket().map(Address::Ip);
    let path = || address.as_pathname().map(|path| Address::Unix(path.into()));
    Some((ip.or_else(path)?, descriptor))
}

/// What a successor is started with.
pub(super) struct Handover {
    program: PathBuf,
    arguments: Vec<OsString>,
    admin: Option<OwnedFd>,
}

/// What is served when it is handed over.
pub(super) struct Served {
    /// Where it is listened.
    pub(super) sockets: Vec<(Address, OwnedFd)>,
    /// The components, by their service.
    pub(super) guests: Vec<(String, Bytes)>,
}

impl Handover {
    /// Of the program that is installed where this one was, with the arguments of this one.
    pub(super) fn new(admin: Option<OwnedFd>, program: PathBuf) -> Self {
        Self {
            program,
            arguments: env::args_os().skip(1).collect(),
            admin,
        }
    }

    /// Starts a successor that serves what is `served`, and waits until it does.
    ///
    /// # Errors
    ///
    /// Says why it does not. It is gone then, as it is when the wait is given up.
    pub(super) async fn start(&self, served: &Served) -> Result<Successor, String> {
        let failed = |error: io::Error| format!("{:?} cannot be started: {error}", self.program);
        if std::process::id() == 1 {
            return Err("this is the first process of its container, which ends with it; start a new container instead".into());
        }
        let (ready, tell) = pipe_with(PipeFlags::CLOEXEC).map_err(|error| failed(error.into()))?;
        let guests = served.guests.iter();
        let guests = guests
            .map(|(name, component)| Ok((name.clone(), in_memory(component)?)))
            .collect::<io::Result<Vec<_>>>()
            .map_err(failed)?;
        let spawned = self.spawn(&served.sockets, &guests, &tell);
        let mut successor = Successor(Some(spawned.map_err(failed)?));
        // Its end of the pipe is closed when it ends.
        drop(tell);
        let waiting = tokio::task::spawn_blocking(move || File::from(ready).read_exact(&mut [0]));
        match tokio::time::timeout(READY, waiting).await {
            Ok(Ok(Ok(()))) => Ok(successor),
            Ok(_) => Err(format!(
                "{:?} ended before it served ({}); see the log, nothing has changed",
                self.program,
                successor.reap()
            )),
            Err(_) => Err(format!(
                "{:?} did not serve within {READY:?}; nothing has changed",
                self.program
            )),
        }
    }

    fn spawn(
        &self,
        sockets: &[(Address, OwnedFd)],
        guests: &[(String, OwnedFd)],
        ready: &OwnedFd,
    ) -> io::Result<Child> {
        let listening = sockets.iter().map(|(address, socket)| match address {
            Address::Ip(_) => ("tcp", "", socket),
            Address::Unix(_) => ("unix", "", socket),
            Address::Passed(name) => ("fd", &**name, socket),
        });
        let guests = guests
            .iter()
            .map(|(service, guest)| ("guest", &**service, guest));
        let admin = self.admin.iter().map(|socket| ("admin", "", socket));
        let ready = [("ready", "", ready)];
        let all: Vec<_> = listening.chain(guests).chain(admin).chain(ready).collect();
        let told: Vec<_> = all
            .iter()
            .map(|(kind, name, descriptor)| format!("{kind}={}:{name}", descriptor.as_raw_fd()))
            .collect();
        // They are inherited for the moment of the start only: nothing else is started.
        for (_, _, descriptor) in &all {
            fcntl_setfd(descriptor.as_fd(), FdFlags::empty())?;
        }
        let mut command = Command::new(&self.program);
        for variable in activation::VARIABLES {
            command.env_remove(variable);
        }
        let child = command
            .args(&self.arguments)
            .env(INHERITED, told.join("\n"))
            // Its supervisor's watchdog is ours until it takes over.
            .env_remove("WATCHDOG_PID")
            .spawn();
        for (_, _, descriptor) in &all {
            fcntl_setfd(descriptor.as_fd(), FdFlags::CLOEXEC)?;
        }
        child
    }
}

/// A file that has no name, and is gone with the last process that has it open.
fn in_memory(component: &[u8]) -> io::Result<OwnedFd> {
    let mut file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC)?);
    file.write_all(component)?;
    Ok(file.into())
}

/// A process that is to take over. It is ended when this is dropped, unless it has.
pub(super) struct Successor(Option<Child>);

impl Successor {
    /// Its number.
    pub(super) fn pid(&self) -> u32 {
        self.0.as_ref().map_or(0, Child::id)
    }

    /// Lets it go on without us.
    pub(super) fn takes_over(mut self) {
        self.0 = None;
    }

    /// How it ended.
    fn reap(&mut self) -> String {
        match self.0.take().map(|mut child| child.wait()) {
            Some(Ok(status)) => status.to_string(),
            Some(Err(error)) => error.to_string(),
            None => "it is gone".into(),
        }
    }
}

impl Drop for Successor {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            // It may have ended by itself.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// The program that was started: by the name that it was started with, not by the file that this has
/// led to, for a link may lead to another one by now.
pub(super) fn program() -> io::Result<PathBuf> {
    let name = env::args_os().next().map(PathBuf::from);
    let named = name.and_then(|name| match name.components().count() {
        0 => None,
        1 => env::split_paths(&env::var_os("PATH")?)
            .map(|directory| directory.join(&name))
            .find(|path| path.is_file()),
        _ => Some(name),
    });
    match named.map(std::path::absolute) {
        Some(Ok(path)) if path.is_file() => Ok(path),
        _ => env::current_exe(),
    }
}
