//! Tests of the handler with a mock stream, as in the book.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::task::{Context, Poll};

use futures::FutureExt;
use futures::executor::block_on;

use super::*;

/// A stream that yields one packet per read, then its end.
struct MockStream {
    packets: VecDeque<Vec<u8>>,
    written: Vec<u8>,
    /// Whether a read after the last packet waits forever.
    stays_open: bool,
}

impl AsyncRead for MockStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        let Some(mut packet) = self.packets.pop_front() else {
            return if self.stays_open {
                Poll::Pending
            } else {
                Poll::Ready(Ok(0))
            };
        };
        let n = packet.len().min(buffer.len());
        buffer[..n].copy_from_slice(&packet[..n]);
        if n < packet.len() {
            self.packets.push_front(packet.split_off(n));
        }
        Poll::Ready(Ok(n))
    }
}

impl AsyncWrite for MockStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.written.extend_from_slice(bytes);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// A platform on which sleeping takes no time.
#[derive(Default)]
struct MockPlatform {
    slept: std::cell::Cell<Duration>,
    replaced: bool,
    draining: bool,
}

impl Platform for MockPlatform {
    async fn sleep(&self, duration: Duration) {
        self.slept.set(self.slept.get() + duration);
    }

    async fn replaced(&self) {
        if !self.replaced {
            std::future::pending().await
        }
    }

    async fn draining(&self) {
        if !self.draining {
            std::future::pending().await
        }
    }

    fn read_file(&self, path: &Path) -> io::Result<Vec<u8>> {
        std::fs::read(path)
    }
}

fn pages() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../static")
}

fn page(name: &str) -> String {
    std::fs::read_to_string(pages().join(name)).unwrap()
}

/// The answers to `packets`, and the time that the handler slept.
fn answers<P: AsRef<[u8]>>(packets: impl IntoIterator<Item = P>) -> (String, Duration) {
    let mut stream = MockStream {
        packets: packets
            .into_iter()
            .map(|packet| packet.as_ref().to_vec())
            .collect(),
        written: Vec::new(),
        stays_open: false,
    };
    let platform = MockPlatform::default();
    block_on(handle(&mut stream, &pages(), &platform)).unwrap();
    (
        String::from_utf8(stream.written).unwrap(),
        platform.slept.get(),
    )
}

fn answer(request: &str) -> String {
    answers([request]).0
}

/// Splits an answer into head and body.
fn split(answer: &str) -> (&str, &str) {
    answer.split_once("\r\n\r\n").unwrap()
}

#[test]
fn the_root_path_answers_with_hello() {
    let answer = answer("GET / HTTP/1.1\r\nHost: a\r\n\r\n");
    let (head, body) = split(&answer);
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    assert!(
        head.ends_with(&format!("\r\nContent-Length: {}", body.len())),
        "{head}"
    );
    assert!(
        head.contains("Content-Type: text/html; charset=utf-8"),
        "{head}"
    );
    assert_eq!(body, page("hello.html"));
}

#[test]
fn sleep_answers_with_hello_after_five_seconds() {
    let (answer, slept) = answers(["GET /sleep HTTP/1.1\r\nHost: a\r\n\r\n"]);
    assert_eq!(split(&answer).1, page("hello.html"));
    assert_eq!(slept, Duration::from_secs(5));
}

#[test]
fn other_paths_answer_with_404() {
    for target in [
        "/nope",
        "/hello.html",
        "/../Cargo.toml",
        "/%2e%2e/Cargo.toml",
        "//",
        "*",
    ] {
        let answer = answer(&format!("GET {target} HTTP/1.1\r\nHost: a\r\n\r\n"));
        let (head, body) = split(&answer);
        assert!(
            head.starts_with("HTTP/1.1 404 Not Found\r\n"),
            "{target}: {head}"
        );
        assert_eq!(body, page("404.html"));
    }
}

#[test]
fn head_answers_with_the_fields_of_get_and_no_body() {
    let get = answer("GET / HTTP/1.1\r\nHost: a\r\n\r\n");
    let head = answer("HEAD / HTTP/1.1\r\nHost: a\r\n\r\n");
    let fields = |answer: &str| {
        let (head, _) = split(answer);
        head.lines()
            .filter(|line| !line.starts_with("Date"))
            .map(String::from)
            .collect::<Vec<_>>()
    };
    assert_eq!(fields(&head), fields(&get));
    assert_eq!(split(&head).1, "");
}

#[test]
fn other_methods_are_refused_and_their_bodies_discarded() {
    let (answers, _) = answers([
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nGET /",
        " HTTPGET / HTTP/1.1\r\nHost: a\r\n\r\n",
    ]);
    let (first, second) = answers.split_at(answers.rfind("HTTP/1.1 ").unwrap());
    assert!(
        first.starts_with("HTTP/1.1 405 Method Not Allowed\r\n"),
        "{first}"
    );
    assert!(first.contains("Allow: GET, HEAD\r\n"), "{first}");
    assert!(second.starts_with("HTTP/1.1 200 OK\r\n"), "{second}");
}

#[test]
fn answers_do_not_depend_on_how_requests_are_split() {
    let requests = b"GET / HTTP/1.1\r\nHost: a\r\n\r\nGET /nope HTTP/1.1\r\nHost: a\r\n\r\n";
    let statuses = |answers: &str| {
        let lines = answers.lines().filter(|line| line.starts_with("HTTP/1.1 "));
        lines.map(String::from).collect::<Vec<_>>()
    };
    for size in [1, 2, 7, 27, requests.len()] {
        let (answers, _) = answers(requests.chunks(size));
        assert_eq!(
            statuses(&answers),
            ["HTTP/1.1 200 OK", "HTTP/1.1 404 Not Found"]
        );
        assert_eq!(
            answers.len() - answers.replace(&page("hello.html"), "").len(),
            page("hello.html").len()
        );
    }
}

#[test]
fn connection_close_is_obeyed_and_confirmed() {
    let (answers, _) =
        answers(["GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\nGET / HTTP/1.1\r\n"]);
    assert_eq!(answers.matches("HTTP/1.1 200 OK").count(), 1);
    assert!(answers.contains("Connection: close\r\n"));
}

#[test]
fn http_1_0_connections_close_unless_the_client_asks_for_keep_alive() {
    assert!(answer("GET / HTTP/1.0\r\n\r\n").contains("Connection: close\r\n"));
    let twice = "GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n".repeat(2);
    let twice = answer(&twice);
    assert_eq!(twice.matches("Connection: keep-alive\r\n").count(), 2);
}

#[test]
fn malformed_requests_are_refused_and_end_the_connection() {
    let too_long = format!(
        "GET / HTTP/1.1\r\nHost: a\r\nX: {}\r\n\r\n",
        "x".repeat(9000)
    );
    for (request, status) in [
        ("nonsense\r\n\r\n", "400 Bad Request"),
        ("GET / HTTP/1.1\r\nHost: a\r\n", "400 Bad Request"),
        (too_long.as_str(), "431 Request Header Fields Too Large"),
    ] {
        let answer = answer(request);
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status}\r\n")),
            "{answer}"
        );
        assert!(answer.contains("Connection: close\r\n"), "{answer}");
    }
}

#[test]
fn a_client_that_sends_nothing_gets_no_answer() {
    assert_eq!(answers([""; 0]).0, "");
}

#[test]
fn an_unreadable_page_is_an_internal_error() {
    let mut stream = MockStream {
        packets: [b"GET / HTTP/1.1\r\nHost: a\r\n\r\n".to_vec()].into(),
        written: Vec::new(),
        stays_open: false,
    };
    block_on(handle(
        &mut stream,
        "/nowhere".as_ref(),
        &MockPlatform::default(),
    ))
    .unwrap();
    assert!(
        stream
            .written
            .starts_with(b"HTTP/1.1 500 Internal Server Error\r\n")
    );
}

#[test]
fn empty_lines_between_requests_are_ignored() {
    let (answers, _) = answers(["\r\n\nGET / HTTP/1.1\r\nHost: a\r\n\r\n\r\n"]);
    assert_eq!(answers.matches("HTTP/1.1 ").count(), 1, "{answers}");
    assert_eq!(answers.matches("HTTP/1.1 200 OK").count(), 1, "{answers}");
}

/// The answers of a draining server to one packet from a client that stays connected.
fn draining_answers(packet: &str) -> (String, Duration) {
    let mut stream = MockStream {
        // An empty packet would be the end of the stream.
        packets: (!packet.is_empty())
            .then(|| packet.into())
            .into_iter()
            .collect(),
        written: Vec::new(),
        stays_open: true,
    };
    let platform = MockPlatform {
        replaced: true,
        draining: true,
        ..MockPlatform::default()
    };
    block_on(handle(&mut stream, &pages(), &platform)).unwrap();
    (
        String::from_utf8(stream.written).unwrap(),
        platform.slept.get(),
    )
}

#[test]
fn a_draining_server_answers_the_request_and_closes() {
    let (answer, _) = draining_answers("GET / HTTP/1.1\r\nHost: a\r\n\r\n");
    assert!(answer.contains("Connection: close\r\n"), "{answer}");
}

#[test]
fn a_replaced_version_closes_after_its_next_answer() {
    let answers = |packet: &str| {
        let mut stream = MockStream {
            packets: [packet.into()].into(),
            written: Vec::new(),
            stays_open: true,
        };
        let platform = MockPlatform {
            replaced: true,
            ..MockPlatform::default()
        };
        let pages = pages();
        let handled = handle(&mut stream, &pages, &platform).now_or_never();
        (
            handled.is_some(),
            String::from_utf8(stream.written).unwrap(),
        )
    };
    let (closed, answer) = answers("GET / HTTP/1.1\r\nHost: a\r\n\r\n");
    assert!(
        closed && answer.contains("Connection: close\r\n"),
        "{answer}"
    );
    assert_eq!(answers("\r\n"), (false, String::new()));
}

#[test]
fn a_draining_server_answers_all_pipelined_requests() {
    let three = "POST /nope HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n\r\n".repeat(3);
    let (answers, _) = draining_answers(&three);
    assert_eq!(
        answers.matches("HTTP/1.1 404 Not Found").count(),
        3,
        "{answers}"
    );
    assert_eq!(
        answers.matches("Connection: close\r\n").count(),
        1,
        "{answers}"
    );
}

#[test]
fn a_draining_server_closes_idle_connections_after_a_grace_time() {
    for idle in ["", "\r\n"] {
        assert_eq!(draining_answers(idle), (String::new(), DRAIN_GRACE));
    }
}
