//! Binding of addresses, and adoption of sockets that other processes have bound.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd};

use socket2::{Domain, Protocol, Socket, Type};

use super::bind_error::BindError;
use super::listening::ListeningSockets;
use super::settings::SocketSettings;
use crate::net::unix_socket_file::{self, UnixSocketFile};
use crate::net::{FileIdentity, ListenAddress};

/// The bound sockets of an address. Clients are not answered before [`Self::listen`].
pub struct BoundSockets {
    /// The address, as the operator wrote it.
    requested: ListenAddress,
    sockets: Vec<Socket>,
    settings: SocketSettings,
    /// The file of a Unix socket, if this process may remove it.
    file: Option<UnixSocketFile>,
    /// A previous server process has bound the sockets, and they listen already.
    adopted: bool,
}

impl BoundSockets {
    /// Binds `address`.
    ///
    /// A TCP port gets one socket for each of `shards`, and the kernel spreads clients over them. A
    /// path gets one socket for all shards.
    ///
    /// # Errors
    ///
    /// [`BindError::Address`] if the system refuses, [`BindError::Passed`] for an address that only
    /// [`Self::passed`] can serve.
    pub fn new(
        address: &ListenAddress,
        shards: usize,
        settings: &SocketSettings,
    ) -> Result<Self, BindError> {
        let (sockets, file) = match address {
            ListenAddress::Ip(ip_address) => {
                let sockets = bind_all(*ip_address, shards, settings);
                (sockets.map_err(BindError::tcp(address))?, None)
            }
            ListenAddress::Unix(path) => {
                let bound = unix_socket_file::bind(path, settings.backlog());
                let (socket, file) = bound.map_err(BindError::socket_file(address))?;
                (vec![socket], Some(file))
            }
            ListenAddress::Passed(_) => {
                let reason = "no passed socket of this name is left, and sockets are passed only when a process starts; stop and start the unit";
                return Err(BindError::passed(address, reason));
            }
        };
        Ok(Self {
            requested: address.clone(),
            sockets,
            settings: *settings,
            file,
            adopted: false,
        })
    }

    /// Adopts `sockets` that a previous server process hands over.
    ///
    /// `file` is the file of a Unix socket.
    ///
    /// The settings take effect when the previous process has stopped accepting: see
    /// [`ListeningSockets::take_over`].
    ///
    /// # Errors
    ///
    /// [`BindError::Passed`] if one is not a listening stream socket.
    pub fn adopt(
        address: &ListenAddress,
        sockets: Vec<OwnedFd>,
        file: Option<FileIdentity>,
        settings: &SocketSettings,
    ) -> Result<Vec<Self>, BindError> {
        let mut all = group_by_address(address, sockets, settings)?;
        for bound in &mut all {
            bound.adopted = true;
            if let (ListenAddress::Unix(path), Some(file)) = (address, file) {
                // None if the file was replaced: nothing to remove in the end.
                bound.file = UnixSocketFile::adopt(path, file);
            }
        }
        Ok(all)
    }

    /// Takes `sockets` that the parent process has passed for `address`.
    ///
    /// The parent keeps them open, so they are shared and outlive this process.
    ///
    /// # Errors
    ///
    /// [`BindError::Passed`] if one is not a listening stream socket.
    pub fn passed(
        address: &ListenAddress,
        sockets: Vec<OwnedFd>,
        settings: &SocketSettings,
    ) -> Result<Vec<Self>, BindError> {
        group_by_address(address, sockets, settings)
    }

    /// Lets clients connect.
    ///
    /// # Errors
    ///
    /// [`BindError::Address`] if another server listens there.
    pub fn listen(self) -> Result<ListeningSockets, BindError> {
        let address = ListenAddress::of(&self.sockets[0]);
        let address = address.map_err(BindError::tcp(&self.requested))?;
        let adopted = self.adopted.then_some(self.settings);
        let listening =
            ListeningSockets::new(address, self.requested, self.sockets, self.file, adopted);
        if !self.adopted {
            listening.set_up(&self.settings)?;
        }
        Ok(listening)
    }
}

fn bind_all(
    address: SocketAddr,
    shards: usize,
    settings: &SocketSettings,
) -> io::Result<Vec<Socket>> {
    // With SO_REUSEPORT, a second server started by mistake would share the port in silence. The
    // first socket is bound without it, and so fails if any other server has the port.
    let first = bind(address, settings.reuse_port)?;
    if shards == 1 {
        return Ok(vec![first]);
    }
    let address = first.local_addr()?.as_socket().unwrap_or(address);
    (0..shards).map(|_| bind(address, true)).collect()
}

fn bind(address: SocketAddr, share_port: bool) -> io::Result<Socket> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM,
        Some(Protocol::TCP),
    )?;
    // A restart must not wait for connections of the previous process in TIME_WAIT.
    socket.set_reuse_address(true)?;
    if share_port {
        socket.set_reuse_port(true)?;
    }
    if address.is_ipv6() {
        // Otherwise [::] would take the IPv4 addresses too, and 0.0.0.0 beside it would be refused.
        socket.set_only_v6(true)?;
    }
    set_fixed_options(&socket)?;
    socket.bind(&address.into())?;
    Ok(socket)
}

/// Sets the options that no setting controls. Accepted sockets inherit them.
fn set_fixed_options(socket: &Socket) -> io::Result<()> {
    socket.set_nonblocking(true)?;
    match socket.domain()? {
        Domain::UNIX => Ok(()),
        // Guests write whole messages, and Nagle's algorithm (RFC 896) would only delay them.
        _ => socket.set_tcp_nodelay(true),
    }
}

/// Checks listening sockets, and groups those with the same local address.
fn group_by_address(
    requested: &ListenAddress,
    sockets: Vec<OwnedFd>,
    settings: &SocketSettings,
) -> Result<Vec<BoundSockets>, BindError> {
    let mut groups: Vec<(ListenAddress, BoundSockets)> = Vec::new();
    for descriptor in sockets {
        let number = descriptor.as_raw_fd();
        let unusable = |problem: &str| {
            let reason =
                format!("descriptor {number} {problem}; pass a stream socket that listens");
            BindError::passed(requested, reason)
        };
        let socket = Socket::from(descriptor);
        match socket.r#type() {
            Ok(Type::STREAM) => {}
            Ok(_) => return Err(unusable("is not a stream socket (systemd: ListenStream=)")),
            Err(_) => return Err(unusable("is not a socket")),
        }
        if !socket.is_listener().unwrap_or(false) {
            return Err(unusable("does not listen (systemd: Accept=no)"));
        }
        let Ok(address) = ListenAddress::of(&socket) else {
            return Err(unusable("has neither an IP address nor a path"));
        };
        set_fixed_options(&socket).map_err(|error| {
            let reason = format!("the options of descriptor {number} cannot be set: {error}");
            BindError::passed(requested, reason)
        })?;
        match groups.iter_mut().find(|(at, _)| *at == address) {
            Some((_, bound)) => bound.sockets.push(socket),
            None => {
                let bound = BoundSockets {
                    requested: requested.clone(),
                    sockets: vec![socket],
                    settings: *settings,
                    file: None,
                    adopted: false,
                };
                groups.push((address, bound));
            }
        }
    }
    Ok(groups.into_iter().map(|(_, bound)| bound).collect())
}
