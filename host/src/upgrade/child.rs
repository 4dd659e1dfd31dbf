//! The child's side of an upgrade: the descriptors that it inherits.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::path::PathBuf;

use rustix::io::{FdFlags, fcntl_setfd};

use super::message::{self, Description, Line, Ready};
use crate::net::{FileIdentity, ListenAddress};

/// Descriptors that this process inherited from the one it replaces. Empty for any other process.
#[derive(Default)]
pub struct InheritedFds {
    listeners: Vec<InheritedListener>,
    admin: Option<(RawFd, OwnedFd, Option<FileIdentity>)>,
    guests: Vec<((String, PathBuf), OwnedFd)>,
    ready: Option<OwnedFd>,
    /// Sockets that this process does not use.
    unused: Vec<RawFd>,
}

struct InheritedListener {
    /// Number of the descriptor in the parent.
    fd: RawFd,
    service: String,
    /// The address as the service asked for it. `None` if this release does not understand it.
    asked: Option<ListenAddress>,
    /// The address of the socket.
    address: ListenAddress,
    file: Option<FileIdentity>,
    socket: OwnedFd,
}

impl InheritedFds {
    /// Takes the descriptors that `text`, the value of [`message::VARIABLE`], describes.
    ///
    /// Call it once, first of all: before this process opens any file of its own.
    pub fn take(text: &str) -> Self {
        let mut inherited = Self::default();
        for Line { fd, description } in message::decode(text) {
            if let Some(descriptor) = own(fd) {
                inherited.add(fd, descriptor, description);
            }
        }
        inherited
    }

    fn add(&mut self, fd: RawFd, descriptor: OwnedFd, description: Description) {
        match description {
            Description::Listener {
                service,
                file,
                asked,
            } => {
                if let Ok(address) = ListenAddress::of(&descriptor) {
                    self.listeners.push(InheritedListener {
                        fd,
                        service,
                        asked,
                        address,
                        file,
                        socket: descriptor,
                    });
                }
            }
            Description::Guest { service, path } => self.guests.push(((service, path), descriptor)),
            Description::Admin { file } => self.admin = Some((fd, descriptor, file)),
            Description::Ready => self.ready = Some(descriptor),
        }
    }

    /// Addresses of all sockets that a service manager once passed to the first process.
    pub fn passed_addresses(&self) -> Vec<ListenAddress> {
        let mut passed = Vec::new();
        for address in self
            .listeners
            .iter()
            .filter_map(|listener| listener.asked.as_ref())
        {
            if matches!(address, ListenAddress::Passed(_)) && !passed.contains(address) {
                passed.push(address.clone());
            }
        }
        passed
    }

    /// Takes the sockets for `address` of `service`, and the file of a Unix socket.
    pub fn take_sockets(
        &mut self,
        service: &str,
        address: &ListenAddress,
    ) -> (Vec<OwnedFd>, Option<FileIdentity>) {
        let asked_for_it = |listener: &InheritedListener| {
            let asked = listener.asked.as_ref();
            asked.is_some_and(|asked| address.takes_over(service, asked, &listener.service))
        };
        // The parent asked for any port, and this process asks for the one that it got.
        let got_its_port = |listener: &InheritedListener| {
            let asked = listener.asked.as_ref();
            listener.address == *address && asked.is_some_and(ListenAddress::takes_any_port)
        };
        let mut listeners = self.listeners.iter();
        let found = listeners.clone().find(|listener| asked_for_it(listener));
        let Some(found) = found.or_else(|| listeners.find(|listener| got_its_port(listener)))
        else {
            return (Vec::new(), None);
        };
        let (bound_to, file) = (found.address.clone(), found.file);
        let taken = self.listeners.extract_if(.., |listener| match address {
            ListenAddress::Passed(_) => asked_for_it(listener),
            _ => listener.address == bound_to && (asked_for_it(listener) || got_its_port(listener)),
        });
        (taken.map(|listener| listener.socket).collect(), file)
    }

    /// Offers the socket of the admin API, and its file, to `adopt`.
    pub fn take_admin<T>(
        &mut self,
        adopt: impl FnOnce(OwnedFd, Option<FileIdentity>) -> Option<T>,
    ) -> Option<T> {
        let (fd, socket, file) = self.admin.take()?;
        let adopted = adopt(socket, file);
        if adopted.is_none() {
            self.unused.push(fd);
        }
        adopted
    }

    /// Takes the components that the parent serves, by service and path.
    ///
    /// # Errors
    ///
    /// Fails if a file in memory cannot be read.
    pub fn take_components(&mut self) -> io::Result<HashMap<(String, PathBuf), Vec<u8>>> {
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

    /// Tells the parent that this process serves.
    ///
    /// Unused sockets are closed first: the parent accepts their last clients.
    pub fn report_ready(&mut self) {
        let listeners = std::mem::take(&mut self.listeners);
        self.unused
            .extend(listeners.iter().map(|listener| listener.fd));
        self.unused.extend(self.admin.take().map(|(fd, ..)| fd));
        drop(listeners);
        let ready = Ready {
            unused: std::mem::take(&mut self.unused),
        };
        if let Some(pipe) = self.ready.take() {
            // It fails if the parent has given up on this process.
            let _ = File::from(pipe).write_all(ready.to_string().as_bytes());
        }
    }
}

/// Takes ownership of an inherited descriptor. `None` if it is not open.
fn own(fd: RawFd) -> Option<OwnedFd> {
    if fd < 3 {
        return None;
    }
    // SAFETY: the parent opened it for this process and names it once. This process has only begun,
    // so no other part of it owns the descriptor.
    let descriptor = unsafe { OwnedFd::from_raw_fd(fd) };
    match fcntl_setfd(&descriptor, FdFlags::CLOEXEC) {
        Ok(()) => Some(descriptor),
        Err(_) => {
            // It is not open. Closing it could close a file that reuses the number later.
            std::mem::forget(descriptor);
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::os::fd::IntoRawFd;

    use super::*;

    /// A process that inherited one listener per pair of service and requested address.
    fn inherited(listeners: &[(&str, &str)]) -> (InheritedFds, Vec<ListenAddress>) {
        let mut addresses = Vec::new();
        let lines = listeners.iter().map(|(service, asked)| {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            addresses.push(ListenAddress::of(&listener).unwrap());
            Line {
                fd: listener.into_raw_fd(),
                description: Description::Listener {
                    service: service.to_string(),
                    file: None,
                    asked: Some(asked.parse().unwrap()),
                },
            }
        });
        let lines: Vec<_> = lines.collect();
        (InheritedFds::take(&message::encode(&lines)), addresses)
    }

    #[test]
    fn a_service_gets_its_sockets_back() {
        let (mut inherited, _) = inherited(&[("a", "127.0.0.1:0"), ("b", "127.0.0.1:0")]);
        let any: ListenAddress = "127.0.0.1:0".parse().unwrap();
        assert_eq!(inherited.take_sockets("c", &any).0.len(), 0);
        assert_eq!(inherited.take_sockets("b", &any).0.len(), 1);
        assert_eq!(inherited.take_sockets("b", &any).0.len(), 0);
        assert_eq!(inherited.take_sockets("a", &any).0.len(), 1);
    }

    #[test]
    fn a_port_that_was_assigned_can_be_asked_for_by_number() {
        let (mut inherited, addresses) = inherited(&[("a", "127.0.0.1:0")]);
        assert_eq!(inherited.take_sockets("other", &addresses[0]).0.len(), 1);
    }

    #[test]
    fn all_sockets_of_a_passed_name_are_taken_together() {
        let (mut inherited, _) = inherited(&[("a", "fd:web"), ("a", "fd:web"), ("a", "fd:admin")]);
        let web: ListenAddress = "fd:web".parse().unwrap();
        assert_eq!(inherited.passed_addresses().len(), 2);
        assert_eq!(inherited.take_sockets("b", &web).0.len(), 2);
        assert_eq!(inherited.passed_addresses().len(), 1);
    }

    #[test]
    fn unused_sockets_are_reported() {
        let (mut inherited, _) = inherited(&[("a", "fd:web"), ("a", "fd:admin")]);
        let (reader, writer) = io::pipe().unwrap();
        inherited.ready = Some(writer.into());
        let used = inherited.take_sockets("a", &"fd:web".parse().unwrap());
        let unused = inherited.listeners[0].fd;
        inherited.report_ready();
        let mut text = String::new();
        File::from(OwnedFd::from(reader))
            .read_to_string(&mut text)
            .unwrap();
        assert_eq!(Ready::parse(&text).unwrap().unused, [unused]);
        drop(used);
    }

    #[test]
    fn descriptors_that_are_not_open_are_skipped() {
        let inherited = InheritedFds::take("listen=999999:a - 127.0.0.1:1\nready=1:");
        assert!(inherited.listeners.is_empty() && inherited.ready.is_none());
    }
}
