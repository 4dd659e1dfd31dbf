//! Sockets that whoever started this process has opened for it (systemd.socket(5), sd_listen_fds(3)).

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use sd_notify::listen_fds_with_names;
use wasinetd::Error;
use wasinetd::net::ListenAddress;

use super::internal;

/// What tells a process of them.
pub(super) const VARIABLES: [&str; 3] = ["LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"];

/// The sockets that were passed, and who has asked for them.
#[derive(Default)]
pub(super) struct PassedSockets {
    sockets: Vec<(String, OwnedFd)>,
    /// The names that there were.
    names: Vec<String>,
}

impl PassedSockets {
    /// Takes them. To be called once, first of all.
    pub(super) fn take() -> Result<Self, Error> {
        let stage = "taking over the sockets of LISTEN_FDS";
        let passed = listen_fds_with_names().map_err(internal(stage))?;
        let sockets: Vec<_> = passed
            .map(|(number, name)| {
                // SAFETY: whoever started us has opened it for us, the library has found it open, and
                // nothing else in this process, which has only begun, knows of it.
                (name, unsafe { OwnedFd::from_raw_fd(number) })
            })
            .collect();
        let mut names = Vec::new();
        for (name, _) in &sockets {
            if !names.contains(name) {
                names.push(name.clone());
            }
        }
        Ok(Self { sockets, names })
    }

    /// The addresses of all of them.
    pub(super) fn addresses(&self) -> Vec<ListenAddress> {
        let names = self.names.iter();
        names
            .map(|name| ListenAddress::Passed(name.clone()))
            .collect()
    }

    /// The sockets of this name, or number.
    pub(super) fn sockets(&mut self, name: &str) -> Result<Vec<OwnedFd>, Error> {
        let number = name.bytes().all(|byte| byte.is_ascii_digit());
        let is_asked = |(of, socket): &(String, OwnedFd)| match number {
            true => name.parse() == Ok(socket.as_raw_fd()),
            false => of == name,
        };
        let (asked, others) = self.sockets.drain(..).partition(is_asked);
        self.sockets = others;
        let asked: Vec<(String, OwnedFd)> = asked;
        if asked.is_empty() {
            return Err(Error::Passed {
                address: ListenAddress::Passed(name.into()),
                reason: self.missing(),
            });
        }
        Ok(asked.into_iter().map(|(_, socket)| socket).collect())
    }

    fn missing(&self) -> String {
        if self.names.is_empty() {
            return "no sockets were passed to this process (LISTEN_FDS is not set for it); start it by a unit with a socket unit, or name an address".into();
        }
        let left = self.rest();
        let left = match left.is_empty() {
            true => "asked for already".into(),
            false => format!("left of them: {}", left.join(", ")),
        };
        format!(
            "no socket of that name is there; passed are {} ({left}); see FileDescriptorName= of systemd.socket(5)",
            self.names.join(", ")
        )
    }

    /// The sockets that nobody has asked for, by name and number.
    pub(super) fn rest(&self) -> Vec<String> {
        let rest = self.sockets.iter();
        rest.map(|(name, socket)| format!("{name} ({})", socket.as_raw_fd()))
            .collect()
    }
}
