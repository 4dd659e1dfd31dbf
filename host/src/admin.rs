//! What an operator can ask a running server, by HTTP on a Unix socket.

use std::convert::Infallible;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;
use rustix::fs::Mode;
use rustix::process::umask;
use socket2::{Domain, SockAddr, Socket, Type};
use tokio::sync::Semaphore;
use tracing::{debug, warn};

use crate::Error;
use crate::lifecycle::Lifecycle;

/// Operators at once. More wait.
const CLIENTS: usize = 16;

/// How long one may take for a request, and how long to wait after a failed `accept`.
const PATIENCE: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(1));

/// How long one may take for a request and its answer together.
const ANSWERED: Duration = Duration::from_secs(30);

/// The media type of OpenMetrics' text.
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The socket that operators connect to. Its file is removed when this is dropped.
pub struct Admin {
    listener: UnixListener,
    path: PathBuf,
    /// What is at the path, as long as it is ours.
    file: (u64, u64),
}

impl Admin {
    /// Listens at `path`, for the user of this process alone. What a server that is no more has left
    /// there is replaced. To be called before there are other threads: what they create meanwhile
    /// would be as private.
    ///
    /// # Errors
    ///
    /// [`Error::Admin`] when something else is there, or nothing can be.
    pub fn bind(path: &Path) -> Result<Self, Error> {
        let failed = |source: io::Error, fix| Error::Admin {
            path: path.into(),
            source,
            fix,
        };
        match std::fs::symlink_metadata(path) {
            Ok(found) if !found.file_type().is_socket() => {
                let error = io::Error::new(io::ErrorKind::AlreadyExists, "it is not a socket");
                return Err(failed(error, "name a path where nothing is"));
            }
            Ok(_) => remove_stale(path).map_err(|error| {
                failed(
                    error,
                    "stop the server that listens there, or name another path",
                )
            })?,
            Err(_) => {}
        }
        listen(path)
            .and_then(|listener| {
                Ok(Self {
                    listener,
                    file: identity(path)?,
                    path: path.into(),
                })
            })
            .map_err(|error| failed(error, "name a path in a directory of your own"))
    }

    /// Answers operators with the figures of `registry` and the phase of `lifecycle`, without end. To
    /// be called within a tokio runtime.
    ///
    /// # Errors
    ///
    /// Fails when the runtime will not have the socket.
    pub async fn serve(&self, registry: Registry, lifecycle: Lifecycle) -> io::Result<Infallible> {
        let listener = tokio::net::UnixListener::from_std(self.listener.try_clone()?)?;
        let view = Arc::new(View {
            registry,
            lifecycle,
        });
        let places = Arc::new(Semaphore::new(CLIENTS));
        loop {
            let place = places.clone().acquire_owned().await;
            let place = place.expect("it is never closed");
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    warn!(%error, "cannot accept an operator");
                    tokio::time::sleep(PATIENCE.1).await;
                    continue;
                }
            };
            let view = view.clone();
            tokio::spawn(async move {
                let answer = service_fn(|request| {
                    std::future::ready(Ok::<_, Infallible>(view.answer(&request)))
                });
                let connection = hyper::server::conn::http1::Builder::new()
                    .timer(TokioTimer::new())
                    .header_read_timeout(PATIENCE.0)
                    .keep_alive(false)
                    .serve_connection(TokioIo::new(stream), answer);
                match tokio::time::timeout(ANSWERED, connection).await {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => debug!(%error, "an operator's connection failed"),
                    Err(_) => debug!("an operator did not take the answer"),
                }
                drop(place);
            });
        }
    }
}

impl Drop for Admin {
    fn drop(&mut self) {
        // It may be gone already, and another one's be there: that is theirs to see to.
        if identity(&self.path).is_ok_and(|file| file == self.file) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Device and inode.
fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = std::fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

/// Removes a socket that nobody listens at any more: one that refuses, and no other.
fn remove_stale(path: &Path) -> io::Result<()> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    // A server with a full backlog is there all the same, and not to be waited for.
    socket.set_nonblocking(true)?;
    match socket.connect(&SockAddr::unix(path)?) {
        Ok(()) => Err(io::ErrorKind::AddrInUse.into()),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path)
        }
        Err(error) => Err(error),
    }
}

/// Listens at a path where nothing is.
fn listen(path: &Path) -> io::Result<UnixListener> {
    // The mode is that of the process when the socket is made: whoever connected before it was set
    // afterwards would be let in.
    let before = umask(Mode::from_raw_mode(0o177));
    let listener = UnixListener::bind(path);
    umask(before);
    let listener = listener?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// What there is to see.
struct View {
    registry: Registry,
    lifecycle: Lifecycle,
}

impl View {
    fn answer(&self, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            let mut answer = text(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD\n");
            let allowed = HeaderValue::from_static("GET, HEAD");
            answer.headers_mut().insert(ALLOW, allowed);
            return answer;
        }
        match request.uri().path() {
            "/healthz" => text(StatusCode::OK, "ok\n"),
            "/readyz" if self.lifecycle.is_draining() => {
                text(StatusCode::SERVICE_UNAVAILABLE, "draining\n")
            }
            "/readyz" => text(StatusCode::OK, "ready\n"),
            "/metrics" => self.metrics(),
            _ => text(
                StatusCode::NOT_FOUND,
                "there are /healthz, /readyz and /metrics\n",
            ),
        }
    }

    fn metrics(&self) -> Response<Full<Bytes>> {
        let mut figures = String::new();
        // A string takes everything.
        if encode(&mut figures, &self.registry).is_err() {
            return text(
                StatusCode::INTERNAL_SERVER_ERROR,
                "the figures are not text\n",
            );
        }
        let mut answer = text(StatusCode::OK, figures);
        let media_type = HeaderValue::from_static(OPEN_METRICS);
        answer.headers_mut().insert(CONTENT_TYPE, media_type);
        answer
    }
}

fn text(status: StatusCode, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut answer = Response::new(Full::new(body.into()));
    *answer.status_mut() = status;
    let media_type = HeaderValue::from_static("text/plain; charset=utf-8");
    answer.headers_mut().insert(CONTENT_TYPE, media_type);
    answer
}
