//! What an operator can ask a running server, by HTTP on a Unix socket or a loopback address.

mod api;
mod log_stream;
pub mod model;

use std::convert::Infallible;
use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Semaphore;
use tracing::{debug, warn};

use crate::Error;
use crate::net::unix_socket_file::{self, SocketFileError, UnixSocketFile};
use crate::net::{FileIdentity, SocketMode, SocketPermissions};
use api::Api;
pub use api::{AdminState, LimitsSet, ReloadResult, RestartResult};
pub use log_stream::LogStream;

/// Connections of operators at once. More wait. Many times what operators need: any user of the machine
/// can hold some of a loopback address.
const CLIENTS: usize = 256;

/// How long one may take for a request's head, and how long to wait after a failed `accept`.
const PATIENCE: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(1));

/// How long the last answers may take when the process ends.
const LAST_ANSWERS: Duration = Duration::from_secs(1);

/// How long one may take for a request and its answer together.
const ANSWERED: Duration = Duration::from_secs(30);

/// Where operators connect to.
#[derive(Clone, Debug, PartialEq)]
pub enum AdminAddress {
    /// A Unix socket, which only the user of this process can connect to.
    Unix(PathBuf),
    /// A loopback address, which any user of this machine can connect to: they show a token.
    Loopback(SocketAddr),
}

impl fmt::Display for AdminAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Loopback(address) => address.fmt(f),
        }
    }
}

impl FromStr for AdminAddress {
    type Err = &'static str;

    fn from_str(value: &str) -> Result<Self, Self::Err> {
        if let Some(path) = value.strip_prefix("unix:").filter(|path| !path.is_empty()) {
            return Ok(Self::Unix(path.into()));
        }
        match value.parse::<SocketAddr>() {
            Ok(address) if address.ip().is_loopback() => Ok(Self::Loopback(address)),
            Ok(_) => Err(
                "not a loopback address: what operators send is not encrypted; use 127.0.0.1 or [::1], or unix:PATH",
            ),
            Err(_) => Err(
                "not unix: and a path, such as unix:/run/wasinetd/admin.sock, nor a loopback address and a port, such as 127.0.0.1:7879",
            ),
        }
    }
}

/// The socket that operators connect to. A Unix socket's file is removed when this is dropped.
pub struct Admin {
    listener: Listener,
    token: Option<String>,
    /// A permit for each request that is being answered.
    answering: Arc<Semaphore>,
}

enum Listener {
    Unix {
        listener: UnixListener,
        /// Removed with it. It is not ours before we have taken over from another process, and not
        /// after another one has.
        file: UnixSocketFile,
    },
    Tcp(TcpListener),
}

impl Admin {
    /// Listens at `address`. What a server that is no more has left at the path of a Unix socket is
    /// replaced.
    ///
    /// Whoever connects to a loopback address has to show `token`.
    ///
    /// # Errors
    ///
    /// [`Error::Admin`] when something else is there, or nothing can be.
    pub fn bind(address: &AdminAddress, token: Option<String>) -> Result<Self, Error> {
        let listener = match address {
            AdminAddress::Unix(path) => bind_unix(path),
            AdminAddress::Loopback(address) => bind_tcp(*address),
        };
        let token = token.filter(|_| matches!(address, AdminAddress::Loopback(_)));
        let failed = |SocketFileError { source, fix }| Error::Admin {
            address: address.clone(),
            source,
            fix,
        };
        listener
            .map(|listener| Self {
                listener,
                token,
                answering: Arc::new(Semaphore::new(CLIENTS)),
            })
            .map_err(failed)
    }

    /// Goes on with a socket that another process has handed over, with its file if it has one, once it is
    /// told that it has taken over. None if it listens elsewhere than at `address`.
    pub fn adopt(
        address: &AdminAddress,
        token: Option<String>,
        socket: OwnedFd,
        file: Option<FileIdentity>,
    ) -> Option<Self> {
        let at = SockRef::from(&socket).local_addr().ok()?;
        let listener = match address {
            AdminAddress::Loopback(address) => {
                let at = at.as_socket()?;
                let is_there = match address.port() {
                    0 => at.ip() == address.ip(),
                    _ => at == *address,
                };
                is_there.then(|| Listener::Tcp(socket.into()))?
            }
            AdminAddress::Unix(path) if at.as_pathname() == Some(path) => Listener::Unix {
                listener: socket.into(),
                file: UnixSocketFile::adopt(path, file?)?,
            },
            AdminAddress::Unix(_) => return None,
        };
        Some(Self {
            token: token.filter(|_| matches!(listener, Listener::Tcp(_))),
            listener,
            answering: Arc::new(Semaphore::new(CLIENTS)),
        })
    }

    /// The same socket once more, with its file, to be handed over.
    ///
    /// # Errors
    ///
    /// Fails when the process has no more files.
    pub fn try_clone_socket(&self) -> io::Result<(OwnedFd, Option<FileIdentity>)> {
        Ok(match &self.listener {
            Listener::Unix { listener, file } => {
                (listener.try_clone()?.into(), Some(file.identity()))
            }
            Listener::Tcp(listener) => (listener.try_clone()?.into(), None),
        })
    }

    /// Waits until those who have asked are answered, before the process ends: who has it drain is to be
    /// told that it does.
    pub async fn last_answers(&self) {
        let all = self.answering.acquire_many(CLIENTS as u32);
        // Some do not take their answer.
        let _ = tokio::time::timeout(LAST_ANSWERS, all).await;
    }

    /// The process that it was adopted from leaves it to this one.
    pub fn take_over(&self) {
        if let Listener::Unix { file, .. } = &self.listener {
            file.take_over();
        }
    }

    /// Leaves it to the process that has adopted it.
    pub fn hand_over(&self) {
        if let Listener::Unix { file, .. } = &self.listener {
            file.hand_over();
        }
    }

    /// Where operators connect to, with the port that was found where any was asked for.
    pub fn address(&self) -> AdminAddress {
        match &self.listener {
            Listener::Unix { file, .. } => AdminAddress::Unix(file.path().into()),
            Listener::Tcp(listener) => {
                let unknown = (std::net::Ipv4Addr::LOCALHOST, 0).into();
                AdminAddress::Loopback(listener.local_addr().unwrap_or(unknown))
            }
        }
    }

    /// Answers operators about what is `operated`, without end. To be called within a tokio runtime.
    ///
    /// # Errors
    ///
    /// Fails when the runtime will not have the socket.
    pub async fn serve(&self, operated: AdminState) -> io::Result<Infallible> {
        let api = Arc::new(Api::new(operated, self.token.as_deref()));
        match &self.listener {
            Listener::Unix { listener, .. } => {
                let listener = tokio::net::UnixListener::from_std(listener.try_clone()?)?;
                accept(api, &self.answering, async || {
                    Ok(listener.accept().await?.0)
                })
                .await
            }
            Listener::Tcp(listener) => {
                let listener = tokio::net::TcpListener::from_std(listener.try_clone()?)?;
                accept(api, &self.answering, async || {
                    Ok(listener.accept().await?.0)
                })
                .await
            }
        }
    }
}

/// Answers whom `accept` accepts.
async fn accept<S>(
    api: Arc<Api>,
    answering: &Arc<Semaphore>,
    accept: impl AsyncFn() -> io::Result<S>,
) -> io::Result<Infallible>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let places = Arc::new(Semaphore::new(CLIENTS));
    loop {
        let place = places.clone().acquire_owned().await;
        let place = place.expect("it is never closed");
        match accept().await {
            Ok(stream) => {
                let (api, answering) = (api.clone(), answering.clone());
                tokio::spawn(async move {
                    answer(api, answering, stream).await;
                    drop(place);
                });
            }
            Err(error) => {
                warn!(%error, "cannot accept an operator");
                tokio::time::sleep(PATIENCE.1).await;
            }
        }
    }
}

async fn answer(
    api: Arc<Api>,
    answering: Arc<Semaphore>,
    stream: impl AsyncRead + AsyncWrite + Unpin,
) {
    let takes_long = &AtomicBool::new(false);
    // There is one request to a connection, and one that follows the log has no last answer.
    let permit = &Mutex::new(None);
    let (api, answering) = (&*api, &answering);
    let answer = service_fn(|request| async move {
        let one = answering.clone().try_acquire_owned().ok();
        *permit.lock().unwrap_or_else(PoisonError::into_inner) = one;
        let answer = api.answer(request, takes_long).await;
        if takes_long.load(Ordering::Relaxed) {
            *permit.lock().unwrap_or_else(PoisonError::into_inner) = None;
        }
        Ok::<_, Infallible>(answer)
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(PATIENCE.0)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), answer);
    let mut connection = pin!(connection);
    loop {
        match tokio::time::timeout(ANSWERED, connection.as_mut()).await {
            Ok(Ok(())) => return,
            Ok(Err(error)) => return debug!(%error, "an operator's connection failed"),
            Err(_) if takes_long.load(Ordering::Relaxed) => {}
            Err(_) => return debug!("an operator did not take the answer"),
        }
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
            fix: "stop the server that holds the port, or choose another one",
        })
}

/// What clients of a Unix socket may wait in the kernel for.
const BACKLOG: i32 = 128;

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
