//! Sockets that the service manager passes (systemd.socket(5), sd_listen_fds(3)).

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use sd_notify::listen_fds_with_names;

use crate::listener::BindError;
use crate::net::ListenAddress;

/// Environment variables that describe passed sockets.
pub const VARIABLES: [&str; 3] = ["LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"];

/// The passed sockets that no service has taken yet.
#[derive(Default)]
pub struct PassedSockets {
    sockets: Vec<(String, OwnedFd)>,
    /// Names of all passed sockets, taken or not.
    names: Vec<String>,
}

impl PassedSockets {
    /// Takes all sockets that were passed to this process.
    ///
    /// Call it once, first of all: before this process opens any file of its own.
    ///
    /// # Errors
    ///
    /// Fails if the variables are set and wrong.
    pub fn take() -> io::Result<Self> {
        let passed = listen_fds_with_names().map_err(io::Error::other)?;
        let sockets: Vec<_> = passed
            .map(|(fd, name)| {
                // SAFETY: the service manager opened it for this process, and the library found it
                // open. This process has only begun, so no other part of it owns the descriptor.
                (name, unsafe { OwnedFd::from_raw_fd(fd) })
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

    /// Addresses of all passed sockets.
    pub fn addresses(&self) -> Vec<ListenAddress> {
        let names = self.names.iter();
        names
            .map(|name| ListenAddress::Passed(name.clone()))
            .collect()
    }

    /// Takes the sockets with this name, or the socket with this number.
    ///
    /// # Errors
    ///
    /// [`BindError::Passed`] if there is none.
    pub fn take_sockets(&mut self, name: &str) -> Result<Vec<OwnedFd>, BindError> {
        let is_number = name.bytes().all(|byte| byte.is_ascii_digit());
        let taken = self.sockets.extract_if(.., |(of, socket)| match is_number {
            true => name.parse() == Ok(socket.as_raw_fd()),
            false => of == name,
        });
        let taken: Vec<_> = taken.map(|(_, socket)| socket).collect();
        if taken.is_empty() {
            return Err(BindError::Passed {
                address: ListenAddress::Passed(name.into()),
                reason: self.why_missing(),
            });
        }
        Ok(taken)
    }

    fn why_missing(&self) -> String {
        if self.names.is_empty() {
            return "no sockets were passed to this process (LISTEN_FDS is not set for it); start it by a unit with a socket unit, or name an address".into();
        }
        let unused = self.unused();
        let unused = match unused.is_empty() {
            true => "all in use".into(),
            false => format!("unused: {}", unused.join(", ")),
        };
        format!(
            "there is no socket with this name; the names of passed sockets are {} ({unused}); see FileDescriptorName= of systemd.socket(5)",
            self.names.join(", ")
        )
    }

    /// The sockets that no service has taken, by name and number.
    pub fn unused(&self) -> Vec<String> {
        let sockets = self.sockets.iter();
        sockets
            .map(|(name, socket)| format!("{name} ({})", socket.as_raw_fd()))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn passed(names: &[&str]) -> PassedSockets {
        let socket = || OwnedFd::from(std::net::TcpListener::bind("127.0.0.1:0").unwrap());
        let names: Vec<String> = names.iter().map(ToString::to_string).collect();
        PassedSockets {
            sockets: names.iter().map(|name| (name.clone(), socket())).collect(),
            names,
        }
    }

    #[test]
    fn sockets_are_taken_by_name_or_number_once() {
        let mut passed = passed(&["web", "web", "admin"]);
        assert_eq!(passed.take_sockets("web").unwrap().len(), 2);
        assert!(passed.take_sockets("web").is_err());
        let number = passed.sockets[0].1.as_raw_fd().to_string();
        assert_eq!(passed.take_sockets(&number).unwrap().len(), 1);
        assert!(passed.unused().is_empty());
    }

    #[test]
    fn a_missing_socket_is_explained() {
        let missing = |mut passed: PassedSockets| passed.take_sockets("x").unwrap_err().to_string();
        assert!(missing(passed(&[])).contains("LISTEN_FDS is not set"));
        let text = missing(passed(&["web"]));
        assert!(text.contains("are web (unused: web ("), "{text}");
    }
}
