//! The socket of the admin API.

use std::convert::Infallible;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;

use socket2::SockRef;

use super::address::AdminAddress;
use super::api::Api;
use super::error::AdminError;
use super::http_server::{ResponsesInProgress, serve};
use super::state::AdminState;
use crate::net::unix_socket_file::{self, SocketFileError, UnixSocketFile};
use crate::net::{FileIdentity, SocketMode, SocketPermissions};

/// Length of the kernel's queue of clients of a Unix socket. Arbitrary: more than operators need.
const BACKLOG: i32 = 128;

/// The socket of the admin API. Dropping it removes the file of a Unix socket.
pub struct Admin {
    listener: Listener,
    token: Option<String>,
    in_progress: ResponsesInProgress,
}

enum Listener {
    Unix {
        listener: UnixListener,
        /// Removed on drop, if it belongs to this process. It does not before [`Admin::take_over`] of an
        /// adopted socket, nor after [`Admin::hand_over`].
        file: UnixSocketFile,
    },
    Tcp(TcpListener),
}

impl Admin {
    /// Listens on `address`. A Unix socket of a server that has exited is replaced.
    ///
    /// Requests to a loopback address have to carry `token`.
    ///
    /// # Errors
    ///
    /// [`AdminError::Bind`] if the address is in use or cannot be bound.
    pub fn bind(address: &AdminAddress, token: Option<String>) -> Result<Self, AdminError> {
        let listener = match address {
            AdminAddress::Unix(path) => bind_unix(path),
            AdminAddress::Loopback(address) => bind_tcp(*address),
        };
        listener.map(|listener| Self::new(listener, token)).map_err(
            |SocketFileError { source, fix }| AdminError::Bind {
                address: address.clone(),
                source,
                fix,
            },
        )
    }

    /// Adopts a listening socket from another process.
    ///
    /// `file` is that of a Unix socket. It belongs to the other process until [`Self::take_over`]. Returns `None` if the socket
    /// listens elsewhere than on `address`.
    pub fn adopt(
        address: &AdminAddress,
        token: Option<String>,
        socket: OwnedFd,
        file: Option<FileIdentity>,
    ) -> Option<Self> {
        let bound = SockRef::from(&socket).local_addr().ok()?;
        let listener = match address {
            AdminAddress::Loopback(address) => {
                let bound = bound.as_socket()?;
                let is_same = match address.port() {
                    0 => bound.ip() == address.ip(),
                    _ => bound == *address,
                };
                is_same.then(|| Listener::Tcp(socket.into()))?
            }
            AdminAddress::Unix(path) if bound.as_pathname() == Some(path) => Listener::Unix {
                listener: socket.into(),
                file: UnixSocketFile::adopt(path, file?)?,
            },
            AdminAddress::Unix(_) => return None,
        };
        Some(Self::new(listener, token))
    }

    fn new(listener: Listener, token: Option<String>) -> Self {
        Self {
            // The permissions of a Unix socket suffice.
            token: token.filter(|_| matches!(listener, Listener::Tcp(_))),
            listener,
            in_progress: ResponsesInProgress::default(),
        }
    }

    /// Duplicates the socket for another process. A Unix socket has a file, too.
    ///
    /// # Errors
    ///
    /// Fails if the process has no free file descriptor.
    pub fn try_clone_socket(&self) -> io::Result<(OwnedFd, Option<FileIdentity>)> {
        Ok(match &self.listener {
            Listener::Unix { listener, file } => {
                (listener.try_clone()?.into(), Some(file.identity()))
            }
            Listener::Tcp(listener) => (listener.try_clone()?.into(), None),
        })
    }

    /// Takes ownership of an adopted socket's file.
    pub fn take_over(&self) {
        if let Listener::Unix { file, .. } = &self.listener {
            file.take_over();
        }
    }

    /// Leaves the socket's file to the process that has adopted the socket.
    pub fn hand_over(&self) {
        if let Listener::Unix { file, .. } = &self.listener {
            file.hand_over();
        }
    }

    /// The address with the actual port, if any port was asked for.
    pub fn address(&self) -> AdminAddress {
        match &self.listener {
            Listener::Unix { file, .. } => AdminAddress::Unix(file.path().into()),
            Listener::Tcp(listener) => {
                let unknown = (Ipv4Addr::LOCALHOST, 0).into();
                AdminAddress::Loopback(listener.local_addr().unwrap_or(unknown))
            }
        }
    }

    /// Answers requests about `state`, without end. Call it within a tokio runtime.
    ///
    /// # Errors
    ///
    /// Fails if the runtime cannot register the socket.
    pub async fn serve(&self, state: AdminState) -> io::Result<Infallible> {
        let api = Arc::new(Api::new(state, self.token.as_deref()));
        match &self.listener {
            Listener::Unix { listener, .. } => {
                let listener = tokio::net::UnixListener::from_std(listener.try_clone()?)?;
                let accept = async || Ok(listener.accept().await?.0);
                serve(api, &self.in_progress, accept).await
            }
            Listener::Tcp(listener) => {
                let listener = tokio::net::TcpListener::from_std(listener.try_clone()?)?;
                let accept = async || Ok(listener.accept().await?.0);
                serve(api, &self.in_progress, accept).await
            }
        }
    }

    /// Waits until the responses in progress are sent. Gives up after a second.
    ///
    /// Call it before the process exits, for example so that `ctl drain` gets its response.
    pub async fn finish_responses(&self) {
        self.in_progress.finish().await;
    }
}

fn bind_tcp(address: SocketAddr) -> Result<Listener, SocketFileError> {
    TcpListener::bind(address)
        .and_then(|listener| {
            listener.set_nonblocking(true)?;
            Ok(Listener::Tcp(listener))
        })
        .map_err(|source| SocketFileError {
            source,
            fix: "stop the server that uses the port, or choose another port",
        })
}

fn bind_unix(path: &Path) -> Result<Listener, SocketFileError> {
    let private = SocketPermissions {
        mode: SocketMode::PRIVATE,
        ..SocketPermissions::default()
    };
    let (socket, file) = unix_socket_file::bind(path, BACKLOG)?;
    file.set_permissions(&private)?;
    Ok(Listener::Unix {
        listener: socket.into(),
        file,
    })
}
