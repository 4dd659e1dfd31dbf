//! Listening sockets, and the clients that they accept.

use std::io;
use std::net::TcpStream;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::task::Poll;

use rustix::net::{SocketFlags, accept_with, acceptfrom_with};
use socket2::Socket;

use super::bind_error::BindError;
use super::settings::SocketSettings;
use crate::net::unix_socket_file::UnixSocketFile;
use crate::net::{FileIdentity, ListenAddress, Peer, StreamSocket};

/// The listening sockets of an address.
pub struct ListeningSockets {
    /// The local address. Port 0 is replaced by the port that the kernel chose.
    pub address: ListenAddress,
    /// The address, as the operator wrote it.
    requested: ListenAddress,
    /// One socket for each shard, or fewer.
    sockets: Vec<Socket>,
    /// Whether the parent process has the sockets open too.
    shared: bool,
    file: Option<Arc<UnixSocketFile>>,
    /// Settings for adopted sockets, applied by [`Self::take_over`].
    adopted: Option<SocketSettings>,
}

impl ListeningSockets {
    pub(super) fn new(
        address: ListenAddress,
        requested: ListenAddress,
        sockets: Vec<Socket>,
        file: Option<UnixSocketFile>,
        adopted: Option<SocketSettings>,
    ) -> Self {
        Self {
            address,
            shared: matches!(requested, ListenAddress::Passed(_)),
            requested,
            sockets,
            file: file.map(Arc::new),
            adopted,
        }
    }

    /// Applies the settings to adopted sockets.
    ///
    /// Call this when the other process has stopped accepting.
    ///
    /// # Errors
    ///
    /// As for [`Self::set_up`].
    pub fn take_over(&self) -> Result<(), BindError> {
        match &self.adopted {
            Some(settings) => self.set_up(settings),
            None => Ok(()),
        }
    }

    /// The file of a Unix socket that this process may remove.
    pub fn file(&self) -> Option<FileIdentity> {
        self.file.as_ref().map(|file| file.identity())
    }

    /// Listens with `settings`, also on sockets that listen with other settings already.
    ///
    /// `reuse_port` has no effect on a bound socket.
    ///
    /// # Errors
    ///
    /// [`BindError::Address`] if another server listens there, or if the owner of a Unix socket
    /// cannot be changed.
    pub fn set_up(&self, settings: &SocketSettings) -> Result<(), BindError> {
        let set_up = |socket: &Socket| {
            settings.set_keepalive(socket)?;
            // The backlog of a shared socket is up to the process that opened it. listen(2) on a
            // listening socket changes only its backlog.
            if !self.shared {
                socket.listen(settings.backlog())?;
            }
            Ok(())
        };
        let result = self.sockets.iter().try_for_each(set_up);
        result.map_err(BindError::tcp(&self.requested))?;
        if let Some(file) = &self.file {
            let result = file.set_permissions(&settings.permissions);
            result.map_err(BindError::socket_file(&self.requested))?;
        }
        Ok(())
    }

    /// Duplicates of the sockets, at least one for each of `shards`.
    ///
    /// If there are fewer sockets than shards, several shards get the same one. Each client then
    /// wakes the idle ones of these shards, and the first accepts it.
    ///
    /// # Errors
    ///
    /// [`BindError::Resources`] if the process has no descriptors left.
    pub fn by_shard(&self, shards: usize) -> Result<Vec<Vec<Listener>>, BindError> {
        let mut by_shard: Vec<Vec<Listener>> = (0..shards).map(|_| Vec::new()).collect();
        let port = match &self.address {
            ListenAddress::Ip(address) => Some(address.port()),
            _ => None,
        };
        for n in 0..self.sockets.len().max(shards) {
            let socket = self.sockets[n % self.sockets.len()].try_clone();
            let socket = socket.map_err(|source| BindError::Resources {
                stage: "sharing a listener",
                source,
            })?;
            by_shard[n % shards].push(Listener {
                socket: socket.into(),
                port,
                shared: self.shared,
                file: self.file.clone(),
            });
        }
        Ok(by_shard)
    }

    /// Duplicates of the sockets, for another process.
    ///
    /// # Errors
    ///
    /// Fails if the process has no descriptors left.
    pub fn try_clone_sockets(&self) -> io::Result<Vec<OwnedFd>> {
        let sockets = self.sockets.iter();
        sockets
            .map(|socket| Ok(socket.try_clone()?.into()))
            .collect()
    }
}

/// A listening socket of one shard.
pub struct Listener {
    socket: OwnedFd,
    /// None for a Unix socket.
    port: Option<u16>,
    shared: bool,
    file: Option<Arc<UnixSocketFile>>,
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

impl Listener {
    /// The TCP port. None for a Unix socket.
    pub(super) fn port(&self) -> Option<u16> {
        self.port
    }

    /// Whether the parent process keeps the socket when this one ends.
    pub(super) fn is_shared(&self) -> bool {
        self.shared
    }

    /// The file of a Unix socket that this process may remove.
    pub(super) fn file(&self) -> Option<Arc<UnixSocketFile>> {
        self.file.clone()
    }

    /// Accepts a client from the backlog. Pending, without a waker, if the backlog is empty.
    pub(super) fn accept(&self) -> Poll<io::Result<(StreamSocket, Peer)>> {
        let accepted = match self.port {
            Some(_) => self.accept_tcp(),
            None => self.accept_unix(),
        };
        match accepted {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Poll::Pending,
            accepted => Poll::Ready(accepted),
        }
    }

    fn accept_tcp(&self) -> io::Result<(StreamSocket, Peer)> {
        let (socket, peer) = acceptfrom_with(self, ACCEPT_FLAGS)?;
        match peer.map(Peer::try_from) {
            Some(Ok(peer)) => Ok((TcpStream::from(socket).into(), peer)),
            _ => Err(io::ErrorKind::ConnectionAborted.into()),
        }
    }

    fn accept_unix(&self) -> io::Result<(StreamSocket, Peer)> {
        let socket = UnixStream::from(accept_with(self, ACCEPT_FLAGS)?);
        let peer = Peer::of_unix_socket(&socket)?;
        Ok((socket.into(), peer))
    }
}

const ACCEPT_FLAGS: SocketFlags = SocketFlags::NONBLOCK.union(SocketFlags::CLOEXEC);
