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
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::pipe::{PipeFlags, pipe_with};
use wasinetd::listener::ListeningSockets;
use wasinetd::net::{FileIdentity, ListenAddress};
use wasinetd::service::SwapLock;

use super::{activation, is_kept};

/// What a successor is told of, a line for each: `listen=5:SERVICE SOCKET ADDRESS`, with the file that a Unix
/// socket has, and the address as the service has asked for it; `guest=6:SERVICE FILE`, `admin=7:SOCKET`
/// and `ready=8:`. No name of a service has a space.
///
/// On the pipe that is the last of them it says `1` when it serves, and then the numbers of the sockets that
/// it has no use for, with a space before each.
const INHERITED: &str = "WASINETD_INHERITED";

/// How long a successor may take until it serves. It may have to compile its guest.
const READY: Duration = Duration::from_secs(120);

/// What this process was handed over by another one.
#[derive(Default)]
pub(super) struct InheritedFds {
    listening: Vec<InheritedListener>,
    admin: Option<(RawFd, OwnedFd, Option<FileIdentity>)>,
    guests: Vec<(Guest, OwnedFd)>,
    ready: Option<OwnedFd>,
    /// The numbers of sockets that are of no use.
    left: Vec<RawFd>,
}

/// A service, and the file that its guest came from.
pub(super) type Guest = (String, PathBuf);

/// A socket that was handed over.
struct InheritedListener {
    /// As the other process knows it.
    number: RawFd,
    service: String,
    /// As it was asked for. None if it is no address to us.
    asked: Option<ListenAddress>,
    /// Where it is.
    at: ListenAddress,
    file: Option<FileIdentity>,
    socket: OwnedFd,
}

impl InheritedFds {
    /// Takes it. To be called once, first of all.
    pub(super) fn take() -> Self {
        let mut inherited = Self::default();
        let Ok(told) = env::var(INHERITED) else {
            return inherited;
        };
        for (kind, told) in told.lines().filter_map(|line| line.split_once('=')) {
            let (number, told) = told.split_once(':').unwrap_or((told, ""));
            let (service, of_it) = told.split_once(' ').unwrap_or((told, ""));
            let Some((number, descriptor)) = number.parse().ok().and_then(own) else {
                continue;
            };
            match kind {
                "listen" => {
                    let (file, asked) = of_it.split_once(' ').unwrap_or((of_it, ""));
                    let Ok(at) = ListenAddress::of(&descriptor) else {
                        continue;
                    };
                    inherited.listening.push(InheritedListener {
                        number,
                        service: service.into(),
                        asked: asked.parse().ok(),
                        at,
                        file: file.parse().ok(),
                        socket: descriptor,
                    });
                }
                "guest" => {
                    let guest = (service.into(), of_it.into());
                    inherited.guests.push((guest, descriptor));
                }
                "admin" => {
                    inherited.admin = Some((number, descriptor, told.parse().ok()));
                }
                "ready" => inherited.ready = Some(descriptor),
                _ => {}
            }
        }
        inherited
    }

    /// The addresses of all sockets that were passed to the first process of this server.
    pub(super) fn passed(&self) -> Vec<ListenAddress> {
        let mut passed = Vec::new();
        for address in self.listening.iter().filter_map(|one| one.asked.as_ref()) {
            if matches!(address, ListenAddress::Passed(_)) && !passed.contains(address) {
                passed.push(address.clone());
            }
        }
        passed
    }

    /// The sockets that listen at `address`, of those that are left, and the file that a Unix socket has.
    pub(super) fn sockets(
        &mut self,
        service: &str,
        address: &ListenAddress,
    ) -> (Vec<OwnedFd>, Option<FileIdentity>) {
        let is_asked = |one: &InheritedListener| {
            let asked = one.asked.as_ref();
            asked.is_some_and(|asked| is_kept((&one.service, asked), (service, address)))
        };
        // Any port was asked for before, and that one is now.
        let is_found = |one: &InheritedListener| {
            let asked = one.asked.as_ref();
            one.at == *address && asked.is_some_and(ListenAddress::takes_any_port)
        };
        let mut all = self.listening.iter();
        let found = all.clone().find(|one| is_asked(one));
        let Some(found) = found.or_else(|| all.find(|one| is_found(one))) else {
            return (Vec::new(), None);
        };
        let (at, file) = (found.at.clone(), found.file);
        let these = self.listening.extract_if(.., |one| match address {
            ListenAddress::Passed(_) => is_asked(one),
            _ => one.at == at && (is_asked(one) || is_found(one)),
        });
        (these.map(|one| one.socket).collect(), file)
    }

    /// The socket that operators connect to, with its file if it has one, for whoever may have use for it.
    pub(super) fn admin<T>(
        &mut self,
        adopt: impl FnOnce(OwnedFd, Option<FileIdentity>) -> Option<T>,
    ) -> Option<T> {
        let (number, socket, file) = self.admin.take()?;
        let adopted = adopt(socket, file);
        if adopted.is_none() {
            self.left.push(number);
        }
        adopted
    }

    /// The components that are served.
    pub(super) fn guests(&mut self) -> io::Result<HashMap<Guest, Vec<u8>>> {
        let guests = std::mem::take(&mut self.guests).into_iter();
        guests
            .map(|(guest, file)| {
                let mut file = File::from(file);
                let mut component = Vec::new();
                file.seek(SeekFrom::Start(0))?;
                file.read_to_end(&mut component)?;
                Ok((guest, component))
            })
            .collect()
    }

    /// Tells the other one that this one serves. What is left of the sockets is closed before: it is the
    /// other one that accepts the last clients there.
    pub(super) fn ready(&mut self) {
        let sockets = std::mem::take(&mut self.listening);
        self.left.extend(sockets.iter().map(|one| one.number));
        self.left
            .extend(self.admin.take().map(|(number, ..)| number));
        drop(sockets);
        let left = self.left.iter().map(|number| format!(" {number}"));
        let left: String = left.collect();
        if let Some(pipe) = self.ready.take() {
            // It may have given up.
            let _ = File::from(pipe).write_all(format!("1{left}").as_bytes());
        }
    }
}

/// Takes a descriptor that is ours from the start. None if it is not open.
fn own(number: RawFd) -> Option<(RawFd, OwnedFd)> {
    if number < 3 {
        return None;
    }
    // SAFETY: our predecessor has opened it for us and names it once; nothing else in this process,
    // which has only begun, knows of it.
    let descriptor = unsafe { OwnedFd::from_raw_fd(number) };
    match fcntl_setfd(&descriptor, FdFlags::CLOEXEC) {
        Ok(()) => Some((number, descriptor)),
        Err(_) => {
            // It is not open: closing it could close what is opened under its number meanwhile.
            std::mem::forget(descriptor);
            None
        }
    }
}

/// What a successor is started with.
pub(super) struct Upgrade {
    program: PathBuf,
    arguments: Vec<OsString>,
    admin: Option<(OwnedFd, Option<FileIdentity>)>,
}

/// What is served when it is handed over.
pub(super) struct HandedOver {
    pub(super) sockets: Vec<HandedOverSocket>,
    /// The guests, each with its service, its file and its component.
    pub(super) guests: Vec<(String, PathBuf, Bytes)>,
    /// Held so that it stays what is served.
    pub(super) _turns: Vec<SwapLock>,
}

/// A socket that a service listens at.
pub(super) struct HandedOverSocket {
    pub(super) service: String,
    pub(super) asked: ListenAddress,
    pub(super) listening: Arc<ListeningSockets>,
    pub(super) socket: OwnedFd,
}

impl Upgrade {
    /// Of the program that is installed where this one was, with the arguments of this one.
    pub(super) fn new(admin: Option<(OwnedFd, Option<FileIdentity>)>, program: PathBuf) -> Self {
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
    pub(super) async fn start(&self, served: &HandedOver) -> Result<NewProcess, String> {
        let failed = |error: io::Error| format!("{:?} cannot be started: {error}", self.program);
        if std::process::id() == 1 {
            return Err("this is the first process of its container, which ends with it; start a new container instead".into());
        }
        let (ready, tell) = pipe_with(PipeFlags::CLOEXEC).map_err(|error| failed(error.into()))?;
        let spawned = self.spawn(served, &tell);
        let mut successor = NewProcess {
            child: Some(spawned.map_err(failed)?),
            left: Vec::new(),
            answers_operators: true,
        };
        // Its end of the pipe is closed when it ends.
        drop(tell);
        let waiting = tokio::task::spawn_blocking(move || {
            let mut told = String::new();
            File::from(ready).read_to_string(&mut told)?;
            Ok::<_, io::Error>(told)
        });
        match tokio::time::timeout(READY, waiting).await {
            Ok(Ok(Ok(told))) if told.starts_with('1') => {
                let left: Vec<RawFd> = told
                    .split(' ')
                    .filter_map(|number| number.parse().ok())
                    .collect();
                let is_left = |(socket, _): &(OwnedFd, _)| left.contains(&socket.as_raw_fd());
                successor.answers_operators = !self.admin.as_ref().is_some_and(is_left);
                let sockets = served.sockets.iter();
                let left = sockets.filter(|one| left.contains(&one.socket.as_raw_fd()));
                successor.left = left.map(|one| one.listening.clone()).collect();
                Ok(successor)
            }
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

    fn spawn(&self, served: &HandedOver, ready: &OwnedFd) -> io::Result<Child> {
        let guests = served.guests.iter();
        let guests = guests
            .map(|(service, file, component)| {
                let name = format!("{service} {}", file.display());
                Ok((name, in_memory(component)?))
            })
            .collect::<io::Result<Vec<_>>>()?;
        let listening = served.sockets.iter().map(|one| {
            let file = text(one.listening.file());
            let name = format!("{} {file} {}", one.service, one.asked);
            ("listen", name, &one.socket)
        });
        let guests = guests
            .iter()
            .map(|(name, guest)| ("guest", name.clone(), guest));
        let admin = self.admin.iter();
        let admin = admin.map(|(socket, file)| ("admin", text(*file), socket));
        let ready = [("ready", String::new(), ready)];
        let mut all: Vec<_> = listening.chain(guests).chain(admin).chain(ready).collect();
        for (_, name, _) in &mut all {
            // What is told is lines. A file of another name is read again, and a path is where its socket is.
            *name = name.replace('\n', " ");
        }
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

fn text(file: Option<FileIdentity>) -> String {
    file.map_or_else(|| "-".into(), |file| file.to_string())
}

/// A file that has no name, and is gone with the last process that has it open.
fn in_memory(component: &[u8]) -> io::Result<OwnedFd> {
    let mut file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC)?);
    file.write_all(component)?;
    Ok(file.into())
}

/// A process that is to take over. It is ended when this is dropped, unless it has.
pub(super) struct NewProcess {
    child: Option<Child>,
    left: Vec<Arc<ListeningSockets>>,
    answers_operators: bool,
}

impl NewProcess {
    /// Its number.
    pub(super) fn pid(&self) -> u32 {
        self.child.as_ref().map_or(0, Child::id)
    }

    /// Whether it answers operators at the socket of this one.
    pub(super) fn answers_operators(&self) -> bool {
        self.answers_operators
    }

    /// Whether it listens there.
    pub(super) fn listens_at(&self, listening: &Arc<ListeningSockets>) -> bool {
        let mut left = self.left.iter();
        !left.any(|left| Arc::ptr_eq(left, listening))
    }

    /// Lets it go on without us.
    pub(super) fn takes_over(mut self) {
        self.child = None;
    }

    /// How it ended.
    fn reap(&mut self) -> String {
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
