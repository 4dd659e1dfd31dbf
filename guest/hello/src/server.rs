//! The HTTP server: reads requests and answers with pages.

use std::io;
use std::path::Path;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use futures::future::{self, Either, Fuse, FusedFuture, FutureExt};
use futures::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::http::{self, Date, Method, Next, Request, Status};

/// The clock, drain signals and files that the handler needs.
#[allow(
    async_fn_in_trait,
    reason = "each connection is handled on one thread or task"
)]
pub trait Platform {
    /// Waits for `duration`.
    async fn sleep(&self, duration: Duration);

    /// Waits until a newer version serves new connections, or the server drains.
    async fn replaced(&self);

    /// Waits until the server drains.
    async fn draining(&self);

    /// Reads a whole file.
    fn read_file(&self, path: &Path) -> io::Result<Vec<u8>>;
}

/// The delay of `GET /sleep`.
const SLEEP: Duration = Duration::from_secs(5);

/// The time that an idle connection stays open after the server has begun to drain.
///
/// A request that the client sent before the drain nearly always arrives within this time, and an
/// idle client delays the drain no longer.
const DRAIN_GRACE: Duration = Duration::from_millis(500);

/// The time that a connection reuses a page without reading the file again.
///
/// The cache saves a busy connection most file accesses. Edits of a page show within this time.
const PAGE_AGE: Duration = Duration::from_secs(1);

/// Bytes per read. Most requests are smaller, and the host has to clear all memory that a guest
/// touched before the next connection reuses it.
const RECEIVE_BYTES: usize = 1024;

/// Serves HTTP/1.1 on `stream` with the pages in the directory `pages`.
///
/// Returns when the client or the server ends the connection.
///
/// # Errors
///
/// Fails when the stream fails.
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
    /// Resolves when the connection should close if it is idle. All requests share this future,
    /// because starting to wait for the host costs as much as a small answer.
    idle_end: Pin<&'a mut Fuse<E>>,
    /// Whether the next answer is the last. Set by `idle_end`.
    replaced: &'a AtomicBool,
    pages: &'a Path,
    /// Received bytes that were not parsed yet.
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
    /// Reads one request and answers it. Returns false if it was the last.
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
                        return self.end_of_stream().await;
                    }
                }
                Err(status) => return self.refuse(status).await,
            }
        };
        let keep_alive = self.answer(&request).await?;
        Ok(keep_alive && self.skip(request.body).await?)
    }

    /// Discards line ends before a request, which old clients send after a body (RFC 9112, section
    /// 2.2).
    fn skip_empty_lines(&mut self) {
        let empty = self
            .received
            .iter()
            .take_while(|byte| b"\r\n".contains(byte))
            .count();
        self.received.drain(..empty);
    }

    /// Receives more bytes. Returns false at the end of the stream or of an idle connection.
    async fn receive(&mut self) -> io::Result<bool> {
        let old = self.received.len();
        self.received.resize(old + RECEIVE_BYTES, 0);
        let n = {
            let read = pin!(self.stream.read(&mut self.received[old..]));
            if old > 0 {
                // A request has begun, so a drain does not interrupt the connection.
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

    /// Ends the connection after the client's last byte. A truncated request gets an error.
    async fn end_of_stream(&mut self) -> io::Result<bool> {
        if self.received.is_empty() {
            Ok(false)
        } else {
            self.refuse(Status::BadRequest).await
        }
    }

    /// Answers the request. Returns false if the connection ends with this answer.
    async fn answer(&mut self, request: &Request) -> io::Result<bool> {
        let found = matches!(request.path.as_str(), "/" | "/sleep");
        let allowed = matches!(request.method, Method::Get | Method::Head);
        if found && allowed && request.path == "/sleep" {
            self.platform.sleep(SLEEP).await;
        }
        // The client sent pipelined requests before it could know of a new version.
        let pipelined = self.received.len() as u64 > request.body;
        let keep_alive = request.keep_alive && (pipelined || !self.is_replaced().await);
        let next = match (keep_alive, request.expects_close) {
            (true, false) => Next::KeepAlive,
            (true, true) => Next::AnnouncedKeepAlive,
            (false, _) => Next::Close,
        };
        // Read only once, because each reading is a host call.
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
        // Only the first poll makes a host call.
        let _ = futures::poll!(self.idle_end.as_mut());
        self.replaced.load(Ordering::Relaxed)
    }

    /// Answers a malformed request. The connection ends with this answer.
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

    /// Reads and discards a request body. Returns false if the body is truncated.
    async fn skip(&mut self, body: u64) -> io::Result<bool> {
        let mut remaining = body;
        loop {
            let received = usize::try_from(remaining)
                .unwrap_or(usize::MAX)
                .min(self.received.len());
            self.received.drain(..received);
            remaining -= received as u64;
            if remaining == 0 {
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

/// Resolves when an idle connection should close: some time after the drain has begun.
///
/// A newer version alone does not close idle connections. The client learns of it from the answer
/// to its next request, which it may be sending already.
async fn idle_end(platform: &impl Platform, replaced: &AtomicBool) {
    platform.replaced().await;
    replaced.store(true, Ordering::Relaxed);
    platform.draining().await;
    platform.sleep(DRAIN_GRACE).await;
}

/// A page file, with its cached content and the time of reading.
struct Page {
    name: &'static str,
    cached: Option<(SystemTime, Vec<u8>)>,
}

impl Page {
    fn new(name: &'static str) -> Self {
        Self { name, cached: None }
    }

    fn read(
        &mut self,
        directory: &Path,
        platform: &impl Platform,
        now: SystemTime,
    ) -> io::Result<&[u8]> {
        // If the clock was set back, the age is unknown and the page is read again.
        let is_recent = |time| now.duration_since(time).is_ok_and(|age| age < PAGE_AGE);
        let is_fresh = matches!(&self.cached, Some((time, _)) if is_recent(*time));
        if !is_fresh {
            self.cached = None;
        }
        let (_, bytes) = match &mut self.cached {
            Some(page) => page,
            empty => empty.insert((now, platform.read_file(&directory.join(self.name))?)),
        };
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests;
