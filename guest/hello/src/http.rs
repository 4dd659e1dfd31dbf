//! HTTP/1.1 message framing (RFC 9112), reduced to the needs of a two-page server.

use std::time::{SystemTime, UNIX_EPOCH};

/// The longest accepted request head: request line and fields. Common servers have this default.
const MAX_HEAD_BYTES: usize = 8 * 1024;

/// The most header fields accepted in a request.
const MAX_FIELDS: usize = 100;

/// The largest request body that the server discards to keep the connection open. Discarding a
/// larger body costs more than a new connection.
const MAX_SKIPPED_BODY: u64 = 64 * 1024;

/// The request methods that the server distinguishes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Method {
    Get,
    Head,
    Other,
}

/// The content of a request head.
#[derive(Debug, PartialEq)]
pub(crate) struct Request {
    pub(crate) method: Method,
    /// The path of the target, without its query.
    pub(crate) path: String,
    /// The length of the body that follows the head.
    pub(crate) body: u64,
    /// Whether the connection can carry another request after this one.
    pub(crate) keep_alive: bool,
    /// Whether the client (HTTP/1.0) expects the server to close the connection unless the response
    /// says otherwise.
    pub(crate) expects_close: bool,
}

/// The status of a response.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Status {
    Ok,
    BadRequest,
    NotFound,
    MethodNotAllowed,
    HeaderFieldsTooLarge,
    InternalServerError,
}

impl Status {
    /// The status code and reason phrase (RFC 9110, section 15; RFC 6585, section 5).
    pub(crate) fn line(self) -> &'static str {
        match self {
            Self::Ok => "200 OK",
            Self::BadRequest => "400 Bad Request",
            Self::NotFound => "404 Not Found",
            Self::MethodNotAllowed => "405 Method Not Allowed",
            Self::HeaderFieldsTooLarge => "431 Request Header Fields Too Large",
            Self::InternalServerError => "500 Internal Server Error",
        }
    }
}

/// Parses a request head from the start of `bytes`.
///
/// Returns the request and the length of its head, or none while the head is incomplete.
///
/// # Errors
///
/// Fails with the status of the error response. The connection has to close then, because the start
/// of the next request is unknown.
pub(crate) fn parse(bytes: &[u8]) -> Result<Option<(Request, usize)>, Status> {
    let mut fields = [httparse::EMPTY_HEADER; MAX_FIELDS];
    let mut head = httparse::Request::new(&mut fields);
    let length = match head.parse(bytes) {
        Ok(httparse::Status::Complete(length)) if length <= MAX_HEAD_BYTES => length,
        Ok(httparse::Status::Partial) if bytes.len() < MAX_HEAD_BYTES => return Ok(None),
        Ok(_) | Err(httparse::Error::TooManyHeaders) => return Err(Status::HeaderFieldsTooLarge),
        Err(_) => return Err(Status::BadRequest),
    };
    request(&head).map(|request| Some((request, length)))
}

/// Interprets a parsed head and checks that its fields are consistent.
fn request(head: &httparse::Request<'_, '_>) -> Result<Request, Status> {
    let http_1_1 = head.version == Some(1);
    let mut host = 0;
    let mut length: Option<u64> = None;
    let mut encoded = false;
    let mut chunked = false;
    let mut expects = false;
    let mut close = false;
    let mut keep_alive = false;
    for field in head.headers.iter() {
        let is = |name: &str| field.name.eq_ignore_ascii_case(name);
        if is("host") {
            host += 1;
            if !is_host(field.value) {
                return Err(Status::BadRequest);
            }
        } else if is("content-length") {
            let value = content_length(field.value)?;
            if length.is_some_and(|length| length != value) {
                // Two lengths allow request smuggling (RFC 9112, section 6.3).
                return Err(Status::BadRequest);
            }
            length = Some(value);
        } else if is("transfer-encoding") {
            // The last coding determines the end of the body (RFC 9112, section 6.3).
            encoded = true;
            chunked = last_token(field.value).eq_ignore_ascii_case(b"chunked");
        } else if is("expect") {
            expects = true;
        } else if is("connection") {
            close |= has_token(field.value, "close");
            keep_alive |= has_token(field.value, "keep-alive");
        }
    }
    let misframed = encoded && (length.is_some() || !http_1_1 || !chunked);
    if host > 1 || (http_1_1 && host == 0) || misframed {
        return Err(Status::BadRequest);
    }
    let body = length.unwrap_or(0);
    // A body that is not discarded would be parsed as the next request. A client that waits for 100
    // Continue may never send its body.
    let framed = !encoded && body <= MAX_SKIPPED_BODY && !(expects && body > 0);
    Ok(Request {
        method: match head.method {
            Some("GET") => Method::Get,
            Some("HEAD") => Method::Head,
            _ => Method::Other,
        },
        path: path(head.path.unwrap_or_default()),
        body,
        keep_alive: framed && !close && (http_1_1 || keep_alive),
        expects_close: !http_1_1,
    })
}

/// The path of an origin-form or absolute-form target (RFC 9112, section 3.2), without its query.
fn path(target: &str) -> String {
    let target = match target.split_once("://") {
        Some((scheme, rest)) if scheme.eq_ignore_ascii_case("http") => {
            let authority = rest.find(['/', '?', '#']).unwrap_or(rest.len());
            match &rest[authority..] {
                path if path.starts_with('/') => path,
                _ => "/",
            }
        }
        _ => target,
    };
    target.split(['?', '#']).next().unwrap_or_default().into()
}

/// Whether a value consists of the characters of a host and port (RFC 3986, section 3.2). It may be
/// empty.
fn is_host(value: &[u8]) -> bool {
    value
        .iter()
        .all(|byte| byte.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=%:[]".contains(byte))
}

fn last_token(value: &[u8]) -> &[u8] {
    value
        .rsplit(|byte| *byte == b',')
        .next()
        .unwrap_or_default()
        .trim_ascii()
}

fn content_length(value: &[u8]) -> Result<u64, Status> {
    // `parse` alone would accept a sign.
    if value.is_empty() || !value.iter().all(u8::is_ascii_digit) {
        return Err(Status::BadRequest);
    }
    std::str::from_utf8(value)
        .ok()
        .and_then(|digits| digits.parse().ok())
        .ok_or(Status::BadRequest)
}

fn has_token(value: &[u8], token: &str) -> bool {
    value
        .split(|byte| *byte == b',')
        .any(|item| item.trim_ascii().eq_ignore_ascii_case(token.as_bytes()))
}

/// The state of the connection after a response.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Next {
    /// Another request may follow.
    KeepAlive,
    /// Another request may follow, and the response has to say so.
    AnnouncedKeepAlive,
    /// The connection closes.
    Close,
}

/// Appends a response to `out`.
///
/// `with_body` is false for HEAD, whose response has the fields of the response to GET and no body.
pub(crate) fn respond(
    out: &mut Vec<u8>,
    status: Status,
    date: &str,
    content_type: &str,
    body: &[u8],
    with_body: bool,
    next: Next,
) {
    use std::io::Write;

    let allow = match status {
        Status::MethodNotAllowed => "Allow: GET, HEAD\r\n",
        _ => "",
    };
    let connection = match next {
        Next::KeepAlive => "",
        Next::AnnouncedKeepAlive => "Connection: keep-alive\r\n",
        Next::Close => "Connection: close\r\n",
    };
    write!(
        out,
        "HTTP/1.1 {}\r\nDate: {date}\r\nContent-Type: {content_type}\r\nContent-Length: {}\r\n{allow}{connection}\r\n",
        status.line(),
        body.len(),
    )
    .expect("writing to memory does not fail");
    if with_body {
        out.extend_from_slice(body);
    }
}

/// The value of the Date field, formatted once per second.
#[derive(Default)]
pub(crate) struct Date {
    second: u64,
    text: String,
}

impl Date {
    pub(crate) fn at(&mut self, now: SystemTime) -> &str {
        // A clock before 1970 has not been set, so any date will do.
        let since_epoch = now.duration_since(UNIX_EPOCH).unwrap_or_default();
        if self.text.is_empty() || self.second != since_epoch.as_secs() {
            self.second = since_epoch.as_secs();
            self.text = httpdate::fmt_http_date(UNIX_EPOCH + since_epoch);
        }
        &self.text
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_date_changes_every_second() {
        let mut date = Date::default();
        let mut at = |millis| {
            date.at(UNIX_EPOCH + Duration::from_millis(millis))
                .to_owned()
        };
        assert_eq!(at(784_111_777_000), "Sun, 06 Nov 1994 08:49:37 GMT");
        assert_eq!(at(784_111_777_999), "Sun, 06 Nov 1994 08:49:37 GMT");
        assert_eq!(at(784_111_778_000), "Sun, 06 Nov 1994 08:49:38 GMT");
        assert_eq!(at(0), "Thu, 01 Jan 1970 00:00:00 GMT");
    }

    fn parsed(head: &str) -> Request {
        parse(head.as_bytes()).unwrap().unwrap().0
    }

    fn refusal(head: &str) -> Status {
        parse(head.as_bytes()).unwrap_err()
    }

    #[test]
    fn every_proper_prefix_of_a_head_is_incomplete() {
        let head = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n";
        for split in 0..head.len() {
            assert_eq!(parse(&head[..split]), Ok(None), "at {split}");
        }
        assert_eq!(parse(head).unwrap().unwrap().1, head.len());
    }

    #[test]
    fn http_1_1_keeps_the_connection_unless_the_client_asks_to_close() {
        assert!(parsed("GET / HTTP/1.1\r\nHost: a\r\n\r\n").keep_alive);
        assert!(!parsed("GET / HTTP/1.1\r\nHost: a\r\nConnection: TE, Close\r\n\r\n").keep_alive);
    }

    #[test]
    fn http_1_0_closes_the_connection_unless_the_client_asks_to_keep_it() {
        assert!(!parsed("GET / HTTP/1.0\r\n\r\n").keep_alive);
        assert!(parsed("GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n").keep_alive);
    }

    #[test]
    fn the_path_is_taken_from_the_target() {
        for (target, path) in [
            ("/", "/"),
            ("/sleep?x=/y", "/sleep"),
            ("http://example.org", "/"),
            ("HTTP://example.org/sleep", "/sleep"),
            ("http://example.org?x=/sleep", "/"),
            ("*", "*"),
        ] {
            let head = format!("GET {target} HTTP/1.1\r\nHost: a\r\n\r\n");
            assert_eq!(parsed(&head).path, path, "for {target}");
        }
    }

    #[test]
    fn a_body_is_framed_by_exactly_one_length() {
        assert_eq!(
            parsed("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\n").body,
            3
        );
        for fields in [
            "Content-Length: 3\r\nContent-Length: 4",
            "Content-Length: +3",
            "Content-Length: 3, 3",
            "Content-Length: ",
            "Content-Length: 99999999999999999999",
            "Content-Length: 3\r\nTransfer-Encoding: chunked",
            "Transfer-Encoding: gzip",
            "Transfer-Encoding: chunked, identity",
        ] {
            let head = format!("POST / HTTP/1.1\r\nHost: a\r\n{fields}\r\n\r\n");
            assert_eq!(refusal(&head), Status::BadRequest, "for {fields}");
        }
    }

    #[test]
    fn a_body_that_is_not_discarded_ends_the_connection() {
        for fields in [
            "Transfer-Encoding: chunked",
            "Content-Length: 65537",
            "Content-Length: 1\r\nExpect: 100-continue",
        ] {
            let head = format!("POST / HTTP/1.1\r\nHost: a\r\n{fields}\r\n\r\n");
            assert!(!parsed(&head).keep_alive, "for {fields}");
        }
    }

    #[test]
    fn exactly_one_valid_host_field_is_required() {
        assert_eq!(refusal("GET / HTTP/1.1\r\n\r\n"), Status::BadRequest);
        assert_eq!(
            refusal("GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n"),
            Status::BadRequest
        );
        for value in ["a b", "a/b", "a@b", "a\tb"] {
            let head = format!("GET / HTTP/1.1\r\nHost: {value}\r\n\r\n");
            assert_eq!(refusal(&head), Status::BadRequest, "for {value:?}");
        }
        for value in ["", "a:80", "[::1]:80"] {
            assert_eq!(
                parsed(&format!("GET / HTTP/1.1\r\nHost: {value}\r\n\r\n")).path,
                "/"
            );
        }
    }

    #[test]
    fn a_head_of_more_than_8_kib_is_refused() {
        let start = "GET / HTTP/1.1\r\nHost: a\r\nX: ";
        let fits = format!(
            "{start}{}\r\n\r\n",
            "x".repeat(MAX_HEAD_BYTES - start.len() - 4)
        );
        assert_eq!(fits.len(), MAX_HEAD_BYTES);
        assert_eq!(parsed(&fits).path, "/");
        let too_long = format!(
            "{start}{}\r\n\r\n",
            "x".repeat(MAX_HEAD_BYTES - start.len() - 3)
        );
        assert_eq!(refusal(&too_long), Status::HeaderFieldsTooLarge);
        assert_eq!(
            refusal(&too_long[..MAX_HEAD_BYTES]),
            Status::HeaderFieldsTooLarge
        );
    }

    #[test]
    fn a_head_of_more_than_100_fields_is_refused() {
        let fields = |n| "a: b\r\n".repeat(n);
        let head = |n| format!("GET / HTTP/1.1\r\nHost: a\r\n{}\r\n", fields(n));
        assert!(parse(head(99).as_bytes()).is_ok());
        assert_eq!(refusal(&head(100)), Status::HeaderFieldsTooLarge);
    }

    #[test]
    fn other_protocols_are_refused_as_bad_requests() {
        for bytes in [
            "\x16\x03\x01\x02",
            "GET /\r\n\r\n",
            "GET / HTTP/2.0\r\n\r\n",
            "\0",
        ] {
            assert_eq!(refusal(bytes), Status::BadRequest, "for {bytes:?}");
        }
    }
}
