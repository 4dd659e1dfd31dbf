//! A new process takes over the sockets that this one listens at.
//!
//! It is started with the sockets open, and told their numbers by an environment variable. When it
//! serves it says so on a pipe, and only then does this one drain. The sockets are the very same: whoever
//! waits in their queues is accepted by whichever asks next, and nobody is refused in between.

use std::env;
use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::process::{Child, Command};
use std::time::Duration;

use rustix::io::{FdFlags, fcntl_setfd};
use rustix::pipe::{PipeFlags, pipe_with};
use tracing::{info, warn};

/// What a successor is told of: `tcp=5,tcp=6,admin=7,ready=8`.
const INHERITED: &str = "WASINETD_INHERITED";

/// How long a successor may take until it serves. It may have to compile its guest.
const READY: Duration = Duration::from_secs(120);

/// What this process was handed over by another one.
#[derive(Default)]
pub(super) struct Inherited {
    tcp: Vec<(SocketAddr, OwnedFd)>,
    admin: Option<OwnedFd>,
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
                _ => {}
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

    /// Tells the other one that this one serves.
    pub(super) fn ready(&mut self) {
        if let Some(pipe) = self.ready.take() {
            // It may have given up.
            let _ = std::fs::File::from(pipe).write_all(b"1");
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
    tcp: Vec<OwnedFd>,
    admin: Option<OwnedFd>,
}

impl Handover {
    /// Of the program that is installed where this one was, with the arguments of this one.
    pub(super) fn new(tcp: Vec<OwnedFd>, admin: Option<OwnedFd>, program: PathBuf) -> Self {
        Self {
            program,
            arguments: env::args_os().skip(1).collect(),
            tcp,
            admin,
        }
    }

    /// Starts a successor, and returns its number when it serves.
    ///
    /// # Errors
    ///
    /// Says why it does not. It is gone then.
    pub(super) async fn start(&self) -> Result<u32, String> {
        let failed = |error: io::Error| format!("{:?} cannot be started: {error}", self.program);
        let (ready, tell) = pipe_with(PipeFlags::CLOEXEC).map_err(|error| failed(error.into()))?;
        let mut child = self.spawn(&tell).map_err(failed)?;
        // Its end of the pipe is closed when it ends.
        drop(tell);
        let waiting = tokio::task::spawn_blocking(move || {
            let mut said = [0];
            std::fs::File::from(ready).read_exact(&mut said)
        });
        match tokio::time::timeout(READY, waiting).await {
            Ok(Ok(Ok(()))) => Ok(child.id()),
            Ok(_) => Err(format!(
                "{:?} ended before it served ({}); see the log, nothing has changed",
                self.program,
                reap(&mut child)
            )),
            Err(_) => {
                let _ = child.kill();
                reap(&mut child);
                Err(format!(
                    "{:?} did not serve within {READY:?}; nothing has changed",
                    self.program
                ))
            }
        }
    }

    fn spawn(&self, ready: &OwnedFd) -> io::Result<Child> {
        let tcp = self.tcp.iter().map(|socket| ("tcp", socket));
        let admin = self.admin.iter().map(|socket| ("admin", socket));
        let all: Vec<_> = tcp.chain(admin).chain([("ready", ready)]).collect();
        let told: Vec<_> = all
            .iter()
            .map(|(kind, descriptor)| format!("{kind}={}", descriptor.as_raw_fd()))
            .collect();
        // They are this process's for the moment of the start only: nothing else is started.
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

/// How it ended.
fn reap(child: &mut Child) -> String {
    match child.wait() {
        Ok(status) => status.to_string(),
        Err(error) => error.to_string(),
    }
}

/// Says in the log what has become of it.
pub(super) fn note(outcome: &Result<u32, String>) {
    match outcome {
        Ok(pid) => info!(pid, "a new process has taken over"),
        Err(error) => warn!(%error, "no new process has taken over"),
    }
}
