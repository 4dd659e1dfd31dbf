//! Requests in, pages out.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::pin::pin;
use std::time::{Duration, Instant};

use futures::future::{self, Either};
use futures::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::http::{self, Method, Next, Request, Status};

/// What the handler asks of its surroundings.
#[allow(
    async_fn_in_trait,
    reason = "each connection is handled on one thread or task"
)]
pub trait Platform {
    /// Waits for `duration`.
    async fn sleep(&self, duration: Duration);

    /// Whether the server is going away.
    fn is_draining(&self) -> bool;

    /// Waits until the server is going away.
    async fn draining(&self);
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
const RECEIVE_BYTES: usize = 2048;

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
    let mut connection = Connection {
        stream,
        platform,
        received: Vec::new(),
        response: Vec::new(),
        hello: Page::new("hello.html"),
        not_found: Page::new("404.html"),
        pages,
    };
    while connection.exchange().await? {}
    connection.stream.flush().await
}

struct Connection<'a, S, P> {
    stream: S,
    platform: &'a P,
    pages: &'a Path,
    /// What was received and not yet understood.
    received: Vec<u8>,
    response: Vec<u8>,
    hello: Page,
    not_found: Page,
}

impl<S, P> Connection<'_, S, P>
where
    S: AsyncRead + AsyncWrite + Unpin,
    P: Platform,
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
            } else {
                match future::select(read, pin!(idle_end(self.platform))).await {
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
        let keep_alive = request.keep_alive && (more || !self.platform.is_draining());
        let next = match (keep_alive, request.says_keep_alive) {
            (true, false) => Next::Open,
            (true, true) => Next::OpenSaidSo,
            (false, _) => Next::Close,
        };
        self.response.clear();
        let mut text = |status: Status| {
            let line = format!("{}\n", status.line());
            let with_body = request.method != Method::Head;
            http::respond(
                &mut self.response,
                status,
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
            match page.read(self.pages) {
                Ok(body) => {
                    let with_body = request.method != Method::Head;
                    http::respond(&mut self.response, status, HTML, body, with_body, next);
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

    /// Answers what is not a request. The connection ends with it.
    async fn refuse(&mut self, status: Status) -> io::Result<bool> {
        self.response.clear();
        let line = format!("{}\n", status.line());
        http::respond(
            &mut self.response,
            status,
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
async fn idle_end(platform: &impl Platform) {
    platform.draining().await;
    platform.sleep(DRAIN_GRACE).await;
}

/// Reads a whole file. Unlike [`std::fs::read`] it asks neither for the file's size first nor for
/// what follows its last byte, which in a sandbox costs as much as reading a small file does.
fn read_file(path: &Path) -> io::Result<Vec<u8>> {
    const STEP: usize = 2048;
    let mut file = File::open(path)?;
    let mut bytes = Vec::new();
    loop {
        let old = bytes.len();
        bytes.resize(old + STEP, 0);
        let n = file.read(&mut bytes[old..])?;
        bytes.truncate(old + n);
        // A regular file yields less than was asked for only at its end (POSIX, read).
        if n < STEP {
            return Ok(bytes);
        }
    }
}

/// A file that was read, and when.
struct Page {
    name: &'static str,
    read: Option<(Instant, Vec<u8>)>,
}

impl Page {
    fn new(name: &'static str) -> Self {
        Self { name, read: None }
    }

    fn read(&mut self, directory: &Path) -> io::Result<&[u8]> {
        let fresh = matches!(&self.read, Some((when, _)) if when.elapsed() < PAGE_AGE);
        if !fresh {
            self.read = None;
        }
        let (_, bytes) = match &mut self.read {
            Some(page) => page,
            none => none.insert((Instant::now(), read_file(&directory.join(self.name))?)),
        };
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests;
