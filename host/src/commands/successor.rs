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
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::process::{Child, Command};
use std::time::Duration;

use bytes::Bytes;
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::pipe::{PipeFlags, pipe_with};

/// What a successor is told of: `tcp=5,tcp=6,admin=7,guest:NAME=8,ready=9`.
const INHERITED: &str = "WASINETD_INHERITED";

/// How long a successor may take until it serves. It may have to compile its guest.
const READY: Duration = Duration::from_secs(120);

/// What this process was handed over by another one.
#[derive(Default)]
pub(super) struct Inherited {
    tcp: Vec<(SocketAddr, OwnedFd)>,
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
        for (kind, number) in told.split(',').filter_map(|part| part.split_once('=')) {
            let Some(descriptor) = number.parse().ok().and_then(own) else {
                continue;
            };
            match kind {
                "tcp" => inherited.tcp.extend(listening(descriptor)),
                "admin" => inherited.admin = Some(descriptor),
                "ready" => inherited.ready = Some(descriptor),
                _ => {
                    if let Some(name) = kind.strip_prefix("guest:") {
                        inherited.guests.push((name.into(), descriptor));
                    }
                }
            }
        }
        inherited
    }

    /// The sockets that listen at `address`.
    pub(super) fn sockets(&mut self, address: SocketAddr) -> Vec<OwnedFd> {
        // Where any port was asked for, it is the one that was found.
        let is_at = |at: &SocketAddr| {
            at.ip() == address.ip() && (address.port() == 0 || at.port() == address.port())
        };
        let Some(found) = self.tcp.iter().map(|(at, _)| *at).find(is_at) else {
            return Vec::new();
        };
        let (these, others) = self.tcp.drain(..).partition(|(at, _)| *at == found);
        self.tcp = others;
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

fn listening(descriptor: OwnedFd) -> Option<(SocketAddr, OwnedFd)> {
    let listener = TcpListener::from(descriptor);
    let address = listener.local_addr().ok()?;
    Some((address, listener.into()))
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
    pub(super) sockets: Vec<OwnedFd>,
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
            .map(|(name, component)| Ok((format!("guest:{name}"), in_memory(component)?)))
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
        sockets: &[OwnedFd],
        guests: &[(String, OwnedFd)],
        ready: &OwnedFd,
    ) -> io::Result<Child> {
        let tcp = sockets.iter().map(|socket| ("tcp", socket));
        let admin = self.admin.iter().map(|socket| ("admin", socket));
        let guests = guests.iter().map(|(name, guest)| (&**name, guest));
        let all: Vec<_> = tcp
            .chain(admin)
            .chain(guests)
            .chain([("ready", ready)])
            .collect();
        let told: Vec<_> = all
            .iter()
            .map(|(kind, descriptor)| format!("{kind}={}", descriptor.as_raw_fd()))
            .collect();
        // They are inherited for the moment of the start only: nothing else is started.
        for (_, descriptor) in &all {
            fcntl_setfd(descriptor.as_fd(), FdFlags::empty())?;
        }
        let child = Command::new(&self.program)
            .args(&self.arguments)
            .env(INHERITED, told.join(","))
            // Its supervisor's watchdog is ours until it takes over.
            .env_remove("WATCHDOG_PID")
            .spawn();
        for (_, descriptor) in &all {
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
