//! Requests in, pages out.

use std::io;
use std::path::Path;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use futures::future::{self, Either, Fuse, FusedFuture, FutureExt};
use futures::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::http::{self, Date, Method, Next, Request, Status};

/// What the handler asks of its surroundings.
#[allow(
    async_fn_in_trait,
    reason = "each connection is handled on one thread or task"
)]
pub trait Platform {
    /// Waits for `duration`.
    async fn sleep(&self, duration: Duration);

    /// Waits until new connections are not served as this one is: there is a newer version, or the
    /// server is going away.
    async fn replaced(&self);

    /// Waits until the server is going away.
    async fn draining(&self);

    /// Reads a whole file.
    fn read_file(&self, path: &Path) -> io::Result<Vec<u8>>;
}

/// How long `GET /sleep` takes to answer.
const SLEEP: Duration = Duration::from_secs(5);

/// How long a client that keeps its connection open may still send a request once the server has
/// begun to drain. A request that was sent before the client could know is nearly always there by
/// then, and an idle client does not hold up the drain for longer.
const DRAIN_GRACE: Duration = Duration::from_millis(500);

/// How long a page that was read is used again on the same connection. It spares a busy
/// connection most of the file system's work, and an edited page shows within a second.
const PAGE_AGE: Duration = Duration::from_secs(1);

/// How much is received at once. Most requests are smaller, and what a sandbox has touched has to
/// be cleared for the next connection.
const RECEIVE_BYTES: usize = 1024;

/// Serves HTTP/1.1 on `stream` with the pages in the directory `pages`, until the client or the
/// server has no more use for the connection.
///
/// # Errors
///
/// Fails when the stream does.
pub async fn handle<S, P>(stream: S, pages: &Path, platform: &P) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
    P: Platform,
{
    let replaced = AtomicBool::new(false);
    let mut connection = Connection {
        stream,
        platform,
        replaced: &replaced,
        idle_end: pin!(idle_end(platform, &replaced).fuse()),
        received: Vec::new(),
        response: Vec::new(),
        date: Date::default(),
        hello: Page::new("hello.html"),
        not_found: Page::new("404.html"),
        pages,
    };
    while connection.exchange().await? {}
    connection.stream.flush().await
}

struct Connection<'a, S, P, E> {
    stream: S,
    platform: &'a P,
    /// Resolves when the connection should be given up if no request has begun. One for all
    /// requests: to begin to wait for the host costs as much as a small answer.
    idle_end: Pin<&'a mut Fuse<E>>,
    /// Whether the next answer is to be the last, as far as `idle_end` has found out.
    replaced: &'a AtomicBool,
    pages: &'a Path,
    /// What was received and not yet understood.
    received: Vec<u8>,
    response: Vec<u8>,
    date: Date,
    hello: Page,
    not_found: Page,
}

impl<S, P, E> Connection<'_, S, P, E>
where
    S: AsyncRead + AsyncWrite + Unpin,
    P: Platform,
    E: Future<Output = ()>,
{
    /// Reads one request and answers it. False when it was the last.
    async fn exchange(&mut self) -> io::Result<bool> {
        let request = loop {
            self.skip_empty_lines();
            match http::parse(&self.received) {
                Ok(Some((request, length))) => {
                    self.received.drain(..length);
                    break request;
                }
                Ok(None) => {
                    if !self.receive().await? {
                        return self.cut_off().await;
                    }
                }
                Err(status) => return self.refuse(status).await,
            }
        };
        let keep_alive = self.answer(&request).await?;
        Ok(keep_alive && self.skip(request.body).await?)
    }

    /// Forgets line ends in front of a request, which old clients send after a body (RFC 9112,
    /// section 2.2). They do not make a request.
    fn skip_empty_lines(&mut self) {
        let empty = self
            .received
            .iter()
            .take_while(|byte| b"\r\n".contains(byte))
            .count();
        self.received.drain(..empty);
    }

    /// Receives more. False when no more will come that is worth waiting for.
    async fn receive(&mut self) -> io::Result<bool> {
        let old = self.received.len();
        self.received.resize(old + RECEIVE_BYTES, 0);
        let n = {
            let read = pin!(self.stream.read(&mut self.received[old..]));
            if old > 0 {
                // A request has begun: it is not cut off.
                read.await
            } else if self.idle_end.is_terminated() {
                Ok(0)
            } else {
                match future::select(read, self.idle_end.as_mut()).await {
                    Either::Left((n, _)) => n,
                    Either::Right(((), _)) => Ok(0),
                }
            }
        };
        self.received
            .truncate(old + n.as_ref().copied().unwrap_or(0));
        Ok(n? > 0)
    }

    /// The client has sent its last byte, perhaps in the middle of a request.
    async fn cut_off(&mut self) -> io::Result<bool> {
        if self.received.is_empty() {
            Ok(false)
        } else {
            self.refuse(Status::BadRequest).await
        }
    }

    /// Answers the request. False when the connection is to end with the answer.
    async fn answer(&mut self, request: &Request) -> io::Result<bool> {
        let found = matches!(request.path.as_str(), "/" | "/sleep");
        let allowed = matches!(request.method, Method::Get | Method::Head);
        if found && allowed && request.path == "/sleep" {
            self.platform.sleep(SLEEP).await;
        }
        // What has been sent behind this request was asked for before the client could know.
        let more = self.received.len() as u64 > request.body;
        let keep_alive = request.keep_alive && (more || !self.is_replaced().await);
        let next = match (keep_alive, request.says_keep_alive) {
            (true, false) => Next::Open,
            (true, true) => Next::OpenSaidSo,
            (false, _) => Next::Close,
        };
        // Asked for once: it is a call of the host.
        let now = SystemTime::now();
        let date = self.date.at(now);
        self.response.clear();
        let mut text = |status: Status| {
            let line = format!("{}\n", status.line());
            let with_body = request.method != Method::Head;
            http::respond(
                &mut self.response,
                status,
                date,
                TEXT,
                line.as_bytes(),
                with_body,
                next,
            );
        };
        if found && !allowed {
            text(Status::MethodNotAllowed);
        } else {
            let (status, page) = match found {
                true => (Status::Ok, &mut self.hello),
                false => (Status::NotFound, &mut self.not_found),
            };
            match page.read(self.pages, self.platform, now) {
                Ok(body) => {
                    let with_body = request.method != Method::Head;
                    http::respond(
                        &mut self.response,
                        status,
                        date,
                        HTML,
                        body,
                        with_body,
                        next,
                    );
                }
                Err(error) => {
                    eprintln!(
                        "cannot read {}: {error}",
                        self.pages.join(page.name).display()
                    );
                    text(Status::InternalServerError);
                }
            }
        }
        self.stream.write_all(&self.response).await?;
        Ok(keep_alive)
    }

    async fn is_replaced(&mut self) -> bool {
        // Once it has begun to wait, a look costs no call of the host.
        let _ = futures::poll!(self.idle_end.as_mut());
        self.replaced.load(Ordering::Relaxed)
    }

    /// Answers what is not a request. The connection ends with it.
    async fn refuse(&mut self, status: Status) -> io::Result<bool> {
        self.response.clear();
        let line = format!("{}\n", status.line());
        http::respond(
            &mut self.response,
            status,
            self.date.at(SystemTime::now()),
            TEXT,
            line.as_bytes(),
            true,
            Next::Close,
        );
        self.stream.write_all(&self.response).await?;
        Ok(false)
    }

    /// Reads past a request's body. False when the client ends before it does.
    async fn skip(&mut self, body: u64) -> io::Result<bool> {
        let mut left = body;
        loop {
            let here = usize::try_from(left)
                .unwrap_or(usize::MAX)
                .min(self.received.len());
            self.received.drain(..here);
            left -= here as u64;
            if left == 0 {
                return Ok(true);
            }
            if !self.receive().await? {
                return Ok(false);
            }
        }
    }
}

const HTML: &str = "text/html; charset=utf-8";
const TEXT: &str = "text/plain; charset=utf-8";

/// Resolves when a connection on which no request has begun should be given up.
///
/// That is not as soon as there is a newer version: its client may be sending a request, and is told
/// with the answer to that.
async fn idle_end(platform: &impl Platform, replaced: &AtomicBool) {
    platform.replaced().await;
    replaced.store(true, Ordering::Relaxed);
    platform.draining().await;
    platform.sleep(DRAIN_GRACE).await;
}

/// A file that was read, and when.
struct Page {
    name: &'static str,
    read: Option<(SystemTime, Vec<u8>)>,
}

impl Page {
    fn new(name: &'static str) -> Self {
        Self { name, read: None }
    }

    fn read(
        &mut self,
        directory: &Path,
        platform: &impl Platform,
        now: SystemTime,
    ) -> io::Result<&[u8]> {
        // A clock that was set back says nothing of the age.
        let is_young = |when| now.duration_since(when).is_ok_and(|age| age < PAGE_AGE);
        let fresh = matches!(&self.read, Some((when, _)) if is_young(*when));
        if !fresh {
            self.read = None;
        }
        let (_, bytes) = match &mut self.read {
            Some(page) => page,
            none => none.insert((now, platform.read_file(&directory.join(self.name))?)),
        };
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests;
