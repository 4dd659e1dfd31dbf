//! The parent's side of an upgrade: starts the child and waits until it serves.

use std::env;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::process::{Child, Command};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::pipe::{PipeFlags, pipe_with};

use super::message::{self, Description, Line, Ready};
use crate::listener::ListeningSockets;
use crate::net::{FileIdentity, ListenAddress};
use crate::systemd::activation;

/// Time for a child until it serves. It may have to compile its guests.
const START_TIMEOUT: Duration = Duration::from_secs(120);

/// The program to start for an upgrade, and the admin socket that it inherits.
pub struct Upgrade {
    program: PathBuf,
    arguments: Vec<OsString>,
    admin: Option<(OwnedFd, Option<FileIdentity>)>,
}

/// Sockets and guests of a server at the moment of an upgrade.
pub struct HandedOver<L> {
    /// All listening sockets.
    pub sockets: Vec<HandedOverSocket>,
    /// Service, file and component of each guest.
    pub guests: Vec<(String, PathBuf, Bytes)>,
    /// Locks that keep the guests from being swapped meanwhile.
    pub locks: Vec<L>,
}

/// A listening socket of a service.
pub struct HandedOverSocket {
    /// Name of the service.
    pub service: String,
    /// The address as the service asked for it.
    pub asked: ListenAddress,
    /// All sockets of that address, `socket` among them.
    pub listening: Arc<ListeningSockets>,
    /// A duplicate of the socket.
    pub socket: OwnedFd,
}

/// The upgrade failed. The old process goes on as before.
#[derive(Debug, thiserror::Error)]
pub enum UpgradeError {
    /// The first process of a container cannot be replaced.
    #[error(
        "this is the first process of its container, which ends with it; start a new container instead"
    )]
    FirstProcess,

    /// The program did not start.
    #[error("cannot start {program:?}: {source}")]
    Start {
        /// The program.
        program: PathBuf,
        /// Why.
        source: io::Error,
    },

    /// The new process ended before it served.
    #[error("{program:?} ended before it served ({status}); see the log, nothing has changed")]
    Ended {
        /// The program.
        program: PathBuf,
        /// How it ended.
        status: String,
    },

    /// The new process did not serve in time.
    #[error("{program:?} did not serve within {START_TIMEOUT:?}; nothing has changed")]
    Timeout {
        /// The program.
        program: PathBuf,
    },

    /// The server drains already.
    #[error("the server drains")]
    Draining,
}

impl Upgrade {
    /// An upgrade to the program installed as `program`.
    ///
    /// The child gets `arguments`, and the socket of the admin API.
    pub fn new(
        program: PathBuf,
        arguments: Vec<OsString>,
        admin: Option<(OwnedFd, Option<FileIdentity>)>,
    ) -> Self {
        Self {
            program,
            arguments,
            admin,
        }
    }

    /// Starts a child that takes over everything in `served`, and waits until it serves.
    ///
    /// Dropping the future kills the child.
    ///
    /// # Errors
    ///
    /// Fails if the child does not serve. It is gone then.
    pub async fn start<L>(&self, served: &HandedOver<L>) -> Result<NewProcess, UpgradeError> {
        if std::process::id() == 1 {
            return Err(UpgradeError::FirstProcess);
        }
        let failed = |source: io::Error| UpgradeError::Start {
            program: self.program.clone(),
            source,
        };
        let (reader, writer) =
            pipe_with(PipeFlags::CLOEXEC).map_err(|error| failed(error.into()))?;
        let child = self.spawn(served, &writer).map_err(failed)?;
        let mut process = NewProcess {
            child: Some(child),
            unused: Vec::new(),
            has_admin_socket: true,
        };
        // Only the child holds the pipe open now: reading ends when it writes or exits.
        drop(writer);
        let answer = tokio::task::spawn_blocking(move || {
            let mut text = String::new();
            File::from(reader).read_to_string(&mut text)?;
            Ok::<_, io::Error>(Ready::parse(&text))
        });
        match tokio::time::timeout(START_TIMEOUT, answer).await {
            Ok(Ok(Ok(Some(ready)))) => {
                let is_unused = |socket: &OwnedFd| ready.unused.contains(&socket.as_raw_fd());
                let admin = self.admin.as_ref();
                process.has_admin_socket = !admin.is_some_and(|(socket, _)| is_unused(socket));
                let unused = served.sockets.iter().filter(|one| is_unused(&one.socket));
                process.unused = unused.map(|one| one.listening.clone()).collect();
                Ok(process)
            }
            Ok(_) => Err(UpgradeError::Ended {
                program: self.program.clone(),
                status: process.exit_status(),
            }),
            Err(_) => Err(UpgradeError::Timeout {
                program: self.program.clone(),
            }),
        }
    }

    fn spawn<L>(&self, served: &HandedOver<L>, ready: &OwnedFd) -> io::Result<Child> {
        let mut memory_files = Vec::new();
        for (_, _, component) in &served.guests {
            memory_files.push(memory_file(component)?);
        }
        let described = self.describe(served, &memory_files, ready);
        let lines: Vec<Line> = described
            .iter()
            .map(|(descriptor, description)| Line {
                fd: descriptor.as_raw_fd(),
                description: description.clone(),
            })
            .collect();
        // Inheritable only while the child starts. This process starts no others.
        for (descriptor, _) in &described {
            fcntl_setfd(descriptor.as_fd(), FdFlags::empty())?;
        }
        let mut command = Command::new(&self.program);
        for variable in activation::VARIABLES {
            command.env_remove(variable);
        }
        let child = command
            .args(&self.arguments)
            .env(message::VARIABLE, message::encode(&lines))
            // Until the child takes over, this process answers the service manager's watchdog.
            .env_remove("WATCHDOG_PID")
            .spawn();
        for (descriptor, _) in &described {
            fcntl_setfd(descriptor.as_fd(), FdFlags::CLOEXEC)?;
        }
        child
    }

    /// All descriptors for the child, with their descriptions.
    fn describe<'a, L>(
        &'a self,
        served: &'a HandedOver<L>,
        memory_files: &'a [OwnedFd],
        ready: &'a OwnedFd,
    ) -> Vec<(&'a OwnedFd, Description)> {
        let listeners = served.sockets.iter().map(|one| {
            let description = Description::Listener {
                service: one.service.clone(),
                file: one.listening.file(),
                asked: Some(one.asked.clone()),
            };
            (&one.socket, description)
        });
        let guests = served.guests.iter().zip(memory_files);
        let guests = guests.map(|((service, path, _), file)| {
            let (service, path) = (service.clone(), path.clone());
            (file, Description::Guest { service, path })
        });
        let admin = self.admin.iter();
        let admin = admin.map(|(socket, file)| (socket, Description::Admin { file: *file }));
        let ready = [(ready, Description::Ready)];
        listeners.chain(guests).chain(admin).chain(ready).collect()
    }
}

/// A file without a name. It is gone once the last process closes it.
fn memory_file(component: &[u8]) -> io::Result<OwnedFd> {
    let mut file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC)?);
    file.write_all(component)?;
    Ok(file.into())
}

/// A child that serves. It is killed when this is dropped, unless it has taken over.
pub struct NewProcess {
    child: Option<Child>,
    unused: Vec<Arc<ListeningSockets>>,
    has_admin_socket: bool,
}

impl NewProcess {
    /// Process ID.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().map_or(0, Child::id)
    }

    /// Whether it serves the admin API on the socket of this process.
    pub fn has_admin_socket(&self) -> bool {
        self.has_admin_socket
    }

    /// Whether it listens on these sockets.
    pub fn listens_on(&self, listening: &Arc<ListeningSockets>) -> bool {
        let mut unused = self.unused.iter();
        !unused.any(|unused| Arc::ptr_eq(unused, listening))
    }

    /// Leaves everything to it: from now on it runs without this process.
    pub fn take_over(mut self) {
        self.child = None;
    }

    fn exit_status(&mut self) -> String {
        match self.child.take().map(|mut child| child.wait()) {
            Some(Ok(status)) => status.to_string(),
            Some(Err(error)) => error.to_string(),
            None => "it is gone".into(),
        }
    }
}

impl Drop for NewProcess {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            // It may have exited by itself.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// The program that is installed where this one was started from, whose first argument is `name`.
///
/// By that name, not by the file that this process runs: a link may lead to a newer file by now.
///
/// # Errors
///
/// Fails if neither the name nor the running file can be found.
pub fn installed_program(name: Option<OsString>) -> io::Result<PathBuf> {
    let name = name.map(PathBuf::from);
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
