//! Sockets that listen, of all kinds, and the clients that they accept.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{SocketFlags, accept_with, acceptfrom_with};
use socket2::{Domain, Protocol, Socket, TcpKeepalive, Type};

use crate::Error;
use crate::net::unix_socket_file::{self, SocketFileError, UnixSocketFile};
use crate::net::{FileIdentity, ListenAddress, Peer, SocketPermissions, StreamSocket};

/// How sockets are to listen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SocketSettings {
    /// The clients that the kernel keeps for us while we are full or busy, at each socket. It lowers this
    /// to `net.core.somaxconn`.
    pub backlog: u32,
    /// Other processes of this user may listen at the same TCP ports: the kernel spreads clients over them.
    pub reuse_port: bool,
    /// TCP clients from whom nothing comes for this long are asked by the kernel whether they are still
    /// there. One that is gone has its connection ended in twice that.
    pub keepalive: Option<Duration>,
    /// Who may connect to Unix sockets.
    pub permissions: SocketPermissions,
}

impl Default for SocketSettings {
    /// The backlog is the default of `net.core.somaxconn`.
    fn default() -> Self {
        Self {
            backlog: 4096,
            reuse_port: false,
            keepalive: None,
            permissions: SocketPermissions::default(),
        }
    }
}

/// An address that is ours. Clients are not answered before [`Bound::listen`].
pub struct BoundSockets {
    asked: ListenAddress,
    sockets: Vec<Socket>,
    settings: SocketSettings,
    /// Of a Unix socket that is ours.
    file: Option<UnixSocketFile>,
    /// It listens already, as another process has set it up.
    adopted: bool,
}

impl BoundSockets {
    /// Takes an address. A TCP port has a socket for each of `shards`: the kernel spreads clients over
    /// them. A path has one, for all.
    ///
    /// # Errors
    ///
    /// [`Error::Listen`] when it cannot be had, [`Error::Passed`] for sockets that only
    /// [`Bound::passed`] can take.
    pub fn new(
        address: &ListenAddress,
        shards: usize,
        settings: &SocketSettings,
    ) -> Result<Self, Error> {
        let (sockets, file) = match address {
            ListenAddress::Ip(at) => bind_all(*at, shards, settings)
                .map(|sockets| (sockets, None))
                .map_err(with_fix),
            ListenAddress::Unix(path) => unix_socket_file::bind(path, backlog(settings))
                .map(|(socket, file)| (vec![socket], Some(file))),
            ListenAddress::Passed(_) => {
                let reason = "sockets are passed when a process starts, and it has none of that name left; stop and start the unit";
                return Err(Error::passed(address, reason));
            }
        }
        .map_err(cannot_listen(address))?;
        Ok(Self {
            asked: address.clone(),
            sockets,
            settings: *settings,
            file,
            adopted: false,
        })
    }

    /// Goes on with `sockets` that another process of ours has handed over, at `address` as it was asked
    /// for, with the file that a Unix socket has. How they listen is for that process to say until this
    /// one has taken over: see [`Listening::take_over`].
    ///
    /// # Errors
    ///
    /// [`Error::Passed`] when they are not what they were.
    pub fn adopt(
        address: &ListenAddress,
        sockets: Vec<OwnedFd>,
        file: Option<FileIdentity>,
        settings: &SocketSettings,
    ) -> Result<Vec<Self>, Error> {
        let mut bound = group(address, sockets, settings)?;
        for one in &mut bound {
            one.adopted = true;
            if let (ListenAddress::Unix(path), Some(file)) = (address, file) {
                // Where it is gone there is nothing to remove.
                one.file = UnixSocketFile::adopt(path, file);
            }
        }
        Ok(bound)
    }

    /// Goes on with `sockets` that whoever started this process has passed to it, for `address`. They
    /// are not ours alone: whoever passed them has them open, and they go on when we are gone.
    ///
    /// # Errors
    ///
    /// [`Error::Passed`] when one is not a stream socket that listens.
    pub fn passed(
        address: &ListenAddress,
        sockets: Vec<OwnedFd>,
        settings: &SocketSettings,
    ) -> Result<Vec<Self>, Error> {
        group(address, sockets, settings)
    }

    /// Lets clients connect.
    ///
    /// # Errors
    ///
    /// [`Error::Listen`] when another server listens there.
    pub fn listen(self) -> Result<ListeningSockets, Error> {
        let address = ListenAddress::of(&self.sockets[0]).map_err(with_fix);
        let address = address.map_err(cannot_listen(&self.asked))?;
        let listening = ListeningSockets {
            address,
            shared: matches!(self.asked, ListenAddress::Passed(_)),
            asked: self.asked,
            sockets: self.sockets,
            file: self.file.map(Arc::new),
            adopted: self.adopted.then_some(self.settings),
        };
        if !self.adopted {
            listening.set_up(&self.settings)?;
        }
        Ok(listening)
    }
}

/// An address that clients can connect to.
pub struct ListeningSockets {
    /// With the port that was found where any was asked for, and where a socket is that was passed.
    pub address: ListenAddress,
    asked: ListenAddress,
    /// One for each shard, or fewer.
    sockets: Vec<Socket>,
    shared: bool,
    file: Option<Arc<UnixSocketFile>>,
    /// How it is to listen once it is taken over from another process.
    adopted: Option<SocketSettings>,
}

impl ListeningSockets {
    /// Has what was adopted listen as was asked for. To be called when the other process does not go on
    /// with it any more.
    ///
    /// # Errors
    ///
    /// As for [`Self::set_up`].
    pub fn take_over(&self) -> Result<(), Error> {
        match &self.adopted {
            Some(settings) => self.set_up(settings),
            None => Ok(()),
        }
    }

    /// The file of a Unix socket that is ours.
    pub fn file(&self) -> Option<FileIdentity> {
        self.file.as_ref().map(|file| file.identity())
    }

    /// Has the sockets listen as `settings` say: those, too, that did so in another way. Whether a port is
    /// shared stays as it was.
    ///
    /// # Errors
    ///
    /// [`Error::Listen`] when another server listens there, or when an owner cannot be given.
    pub fn set_up(&self, settings: &SocketSettings) -> Result<(), Error> {
        let set_up = |socket: &Socket| {
            set_keepalive(socket, settings.keepalive)?;
            match self.shared {
                // How many wait there is for whoever has opened it to say.
                true => Ok(()),
                // With another backlog it goes on to listen, with that one.
                false => socket.listen(backlog(settings)),
            }
        };
        let done = self.sockets.iter().try_for_each(set_up).map_err(with_fix);
        let done = done.and_then(|()| match &self.file {
            Some(file) => file.set_permissions(&settings.permissions),
            None => Ok(()),
        });
        done.map_err(cannot_listen(&self.asked))
    }

    /// The sockets once more, spread over `shards` so that each has one. Where there are fewer, as of a path,
    /// several shards ask the same one: each client wakes those that are idle, and the first gets it.
    ///
    /// # Errors
    ///
    /// [`Error::Internal`] when the process has no more files.
    pub fn by_shard(&self, shards: usize) -> Result<Vec<Vec<Listener>>, Error> {
        let mut spread: Vec<Vec<Listener>> = (0..shards).map(|_| Vec::new()).collect();
        let port = match &self.address {
            ListenAddress::Ip(address) => Some(address.port()),
            _ => None,
        };
        for n in 0..self.sockets.len().max(shards) {
            let socket = self.sockets[n % self.sockets.len()].try_clone();
            let socket = socket.map_err(|error| Error::internal("sharing a listener", error))?;
            spread[n % shards].push(Listener {
                socket: socket.into(),
                port,
                shared: self.shared,
                file: self.file.clone(),
            });
        }
        Ok(spread)
    }

    /// The same sockets once more, to be handed over.
    ///
    /// # Errors
    ///
    /// Fails when the process has no more files.
    pub fn try_clone_sockets(&self) -> io::Result<Vec<OwnedFd>> {
        let sockets = self.sockets.iter();
        sockets
            .map(|socket| Ok(socket.try_clone()?.into()))
            .collect()
    }
}

/// A socket that listens, for one shard.
pub struct Listener {
    socket: OwnedFd,
    /// None at a Unix socket.
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
    /// The TCP port, if it is no Unix socket.
    pub(super) fn port(&self) -> Option<u16> {
        self.port
    }

    /// Whether others have it open, and go on with it when we end.
    pub(super) fn is_shared(&self) -> bool {
        self.shared
    }

    /// Its file, if it has one that may be ours.
    pub(super) fn file(&self) -> Option<Arc<UnixSocketFile>> {
        self.file.clone()
    }

    /// Accepts a client that waits. Pending, without a waker, when there is none.
    pub(super) fn accept(&self) -> Poll<io::Result<(StreamSocket, Peer)>> {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        if self.port.is_none() {
            return match accept_with(self, flags) {
                Ok(socket) => Poll::Ready(of_user(UnixStream::from(socket))),
                Err(Errno::WOULDBLOCK) => Poll::Pending,
                Err(error) => Poll::Ready(Err(error.into())),
            };
        }
        match acceptfrom_with(self, flags) {
            Ok((socket, peer)) => {
                let peer = peer.and_then(|peer| Peer::try_from(peer).ok());
                Poll::Ready(match peer {
                    Some(peer) => Ok((StreamSocket::Tcp(socket.into()), peer)),
                    None => Err(io::ErrorKind::ConnectionAborted.into()),
                })
            }
            Err(Errno::WOULDBLOCK) => Poll::Pending,
            Err(error) => Poll::Ready(Err(error.into())),
        }
    }
}

/// With the user that the client was when it connected.
fn of_user(socket: UnixStream) -> io::Result<(StreamSocket, Peer)> {
    let peer = Peer::of_unix_socket(&socket)?;
    Ok((StreamSocket::Unix(socket), peer))
}

fn backlog(settings: &SocketSettings) -> i32 {
    i32::try_from(settings.backlog).unwrap_or(i32::MAX)
}

fn bind_all(
    address: SocketAddr,
    shards: usize,
    settings: &SocketSettings,
) -> io::Result<Vec<Socket>> {
    // Sockets that share a port by SO_REUSEPORT would share it with those of another server of ours
    // that was started by mistake. The first one is bound without, and so meets any other.
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
    // A restart must not wait for the connections of its predecessor to be forgotten.
    socket.set_reuse_address(true)?;
    if share_port {
        socket.set_reuse_port(true)?;
    }
    if address.is_ipv6() {
        // Otherwise [::] would take the IPv4 addresses too, and 0.0.0.0 beside it would be refused.
        socket.set_only_v6(true)?;
    }
    prepare(&socket)?;
    socket.bind(&address.into())?;
    Ok(socket)
}

/// How often a client that does not answer is asked whether it is there.
const KEEPALIVE_PROBES: u32 = 4;

/// Sets what Linux hands down to accepted sockets, and no setting is about.
fn prepare(socket: &Socket) -> io::Result<()> {
    socket.set_nonblocking(true)?;
    match socket.domain()? {
        Domain::UNIX => Ok(()),
        // Guests write whole messages; waiting for more (Nagle, RFC 896) only delays them.
        _ => socket.set_tcp_nodelay(true),
    }
}

/// The same for keepalive, which a setting is about.
fn set_keepalive(socket: &Socket, keepalive: Option<Duration>) -> io::Result<()> {
    if socket.domain()? == Domain::UNIX {
        return Ok(());
    }
    let Some(time) = keepalive else {
        return socket.set_keepalive(false);
    };
    // The kernel counts in whole seconds (tcp(7)).
    let pause = Duration::from_secs((time / KEEPALIVE_PROBES).as_secs().max(1));
    let keepalive = TcpKeepalive::new()
        .with_time(time)
        .with_interval(pause)
        .with_retries(KEEPALIVE_PROBES);
    socket.set_tcp_keepalive(&keepalive)
}

/// Sockets that listen already, those with the same address together.
fn group(
    asked: &ListenAddress,
    sockets: Vec<OwnedFd>,
    settings: &SocketSettings,
) -> Result<Vec<BoundSockets>, Error> {
    let mut groups: Vec<(ListenAddress, BoundSockets)> = Vec::new();
    for socket in sockets {
        let number = socket.as_raw_fd();
        let wrong = |what: &str| {
            Error::passed(
                asked,
                format!("descriptor {number} {what}; pass a stream socket that listens"),
            )
        };
        let socket = Socket::from(socket);
        match socket.r#type() {
            Ok(Type::STREAM) => {}
            Ok(_) => return Err(wrong("is not a stream socket (systemd: ListenStream=)")),
            Err(_) => return Err(wrong("is not a socket")),
        }
        if !socket.is_listener().unwrap_or(false) {
            return Err(wrong("does not listen (systemd: Accept=no)"));
        }
        let Ok(address) = ListenAddress::of(&socket) else {
            return Err(wrong("has neither an IP address nor a path"));
        };
        prepare(&socket)
            .map_err(|error| Error::passed(asked, format!("it cannot be set up: {error}")))?;
        match groups.iter_mut().find(|(at, _)| *at == address) {
            Some((_, bound)) => bound.sockets.push(socket),
            None => {
                let bound = BoundSockets {
                    asked: asked.clone(),
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

fn with_fix(source: io::Error) -> SocketFileError {
    let fix = match source.kind() {
        io::ErrorKind::AddrInUse => {
            "stop the server that holds the port, or choose another one (port 0 takes any that is free)"
        }
        io::ErrorKind::PermissionDenied => {
            "choose a port above 1023, or grant CAP_NET_BIND_SERVICE"
        }
        io::ErrorKind::AddrNotAvailable => {
            "use an address of this machine, or 0.0.0.0 or [::] for all"
        }
        _ => "choose another address",
    };
    SocketFileError { source, fix }
}

fn cannot_listen(address: &ListenAddress) -> impl Fn(SocketFileError) -> Error {
    |SocketFileError { source, fix }| Error::Listen {
        address: address.clone(),
        source,
        fix,
    }
}
