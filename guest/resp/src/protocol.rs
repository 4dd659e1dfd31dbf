//! The serialization protocol of Redis, version 2 (RESP2): parses requests and writes answers.
//!
//! Errors have the same text as those of Redis.

use std::io::Write;
use std::mem;
use std::ops::Index;

/// The longest argument of a request, in bytes.
pub(crate) const MAX_BULK: usize = 1024 * 1024;

/// The largest sum of the argument lengths of a request, in bytes.
pub(crate) const MAX_REQUEST: usize = 2 * MAX_BULK;

/// The most arguments of a request.
pub(crate) const MAX_ARGUMENTS: usize = 64 * 1024;

/// The longest line in bytes: an inline command or a length.
pub(crate) const MAX_LINE: usize = 64 * 1024;

/// The longest array answer in bytes. The answer needs memory beside the store, so it is smaller.
pub(crate) const MAX_ANSWER: usize = 8 * 1024 * 1024;

/// The capacity that a cleared buffer keeps, in bytes.
const KEPT: usize = 64 * 1024;

/// The name of a command and its arguments, in one buffer.
#[derive(Default)]
pub(crate) struct Request {
    bytes: Vec<u8>,
    ends: Vec<usize>,
}

impl Request {
    /// The number of arguments, including the name.
    pub(crate) fn len(&self) -> usize {
        self.ends.len()
    }

    /// The arguments from index `first`. The name has index 0.
    pub(crate) fn from(&self, first: usize) -> impl Iterator<Item = &[u8]> + Clone {
        (first..self.len()).map(|n| &self[n])
    }

    fn clear(&mut self) {
        self.ends.clear();
        clear(&mut self.bytes);
    }

    fn end_argument(&mut self) {
        self.ends.push(self.bytes.len());
    }
}

impl Index<usize> for Request {
    type Output = [u8];

    fn index(&self, n: usize) -> &[u8] {
        let start = if n == 0 { 0 } else { self.ends[n - 1] };
        &self.bytes[start..self.ends[n]]
    }
}

/// Clears a buffer and frees its memory beyond a usual size.
pub(crate) fn clear(buffer: &mut Vec<u8>) {
    buffer.clear();
    buffer.shrink_to(KEPT);
}

/// The reason why a request is malformed. The start of the next request is unknown after it.
pub(crate) type ProtocolError = Error;

/// Parses requests from received pieces of any size. Scans each byte once.
#[derive(Default)]
pub(crate) struct Parser {
    request: Request,
    state: State,
    /// The received part of an incomplete line, or the last line that arrived in several pieces.
    line: Vec<u8>,
}

#[derive(Clone, Copy, Default)]
enum State {
    /// Before a request, or in its first line.
    #[default]
    Begin,
    /// Before or in the line with the length of the next argument. `left` arguments are incomplete.
    Length { left: usize },
    /// In the next argument. `missing` counts its bytes to come, including the line end.
    Bulk { left: usize, missing: usize },
}

impl Parser {
    /// Parses from the front of `input` up to the end of a request.
    ///
    /// Returns whether the request is complete. [`request`](Self::request) returns it until the
    /// next call.
    pub(crate) fn parse(&mut self, input: &mut &[u8]) -> Result<bool, ProtocolError> {
        while !input.is_empty() {
            let complete = match self.state {
                State::Begin => self.parse_first_line(input)?,
                State::Length { left } => self.parse_length(input, left)?,
                State::Bulk { left, missing } => self.parse_bulk(input, left, missing)?,
            };
            if complete {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Parses the number of arguments, or an inline command. Returns whether the request is
    /// complete.
    fn parse_first_line(&mut self, input: &mut &[u8]) -> Result<bool, ProtocolError> {
        self.request.clear();
        let Some(line) = take_line(&mut self.line, input) else {
            return self.incomplete_line(match self.line.first() {
                Some(b'*') => "too big mbulk count string",
                _ => "too big inline request",
            });
        };
        let Some(count) = line.strip_prefix(b"*") else {
            if line.len() > MAX_LINE {
                return Err("too big inline request".into());
            }
            split(line, &mut self.request)?;
            return Ok(self.request.len() > 0);
        };
        let count = integer(count)
            .filter(|count| *count <= MAX_ARGUMENTS as i64)
            .ok_or("invalid multibulk length")?;
        // Redis ignores a request with no or a negative number of arguments.
        if count > 0 {
            let left = count as usize;
            self.state = State::Length { left };
        }
        Ok(false)
    }

    /// Parses the length of the next argument. The request is never complete after it.
    fn parse_length(&mut self, input: &mut &[u8], left: usize) -> Result<bool, ProtocolError> {
        let Some(line) = take_line(&mut self.line, input) else {
            return self.incomplete_line("too big bulk count string");
        };
        let length = line.strip_prefix(b"$").ok_or_else(|| {
            let other = char::from(*line.first().unwrap_or(&b' '));
            format!("expected '$', got '{other}'")
        })?;
        let length = integer(length)
            .and_then(|length| usize::try_from(length).ok())
            .filter(|length| *length <= MAX_BULK)
            .ok_or("invalid bulk length")?;
        if self.request.bytes.len() + length > MAX_REQUEST {
            return Err("too big request".into());
        }
        let missing = length + 2;
        self.state = State::Bulk { left, missing };
        Ok(false)
    }

    /// Parses bytes of the next argument. Returns whether the request is complete.
    fn parse_bulk(
        &mut self,
        input: &mut &[u8],
        left: usize,
        missing: usize,
    ) -> Result<bool, ProtocolError> {
        let (bytes, rest) = input.split_at(missing.min(input.len()));
        *input = rest;
        let request = &mut self.request;
        request.bytes.extend_from_slice(bytes);
        let missing = missing - bytes.len();
        if missing > 0 {
            self.state = State::Bulk { left, missing };
            return Ok(false);
        }
        if !request.bytes.ends_with(b"\r\n") {
            return Err("expected a line end after a bulk string".into());
        }
        request.bytes.truncate(request.bytes.len() - 2);
        request.end_argument();
        let complete = left == 1;
        self.state = if complete {
            State::Begin
        } else {
            State::Length { left: left - 1 }
        };
        Ok(complete)
    }

    /// The last request that [`parse`](Self::parse) completed.
    pub(crate) fn request(&self) -> &Request {
        &self.request
    }

    /// Whether no byte of the next request was received.
    pub(crate) fn is_between_requests(&self) -> bool {
        matches!(self.state, State::Begin) && (self.line.is_empty() || self.line.ends_with(b"\n"))
    }

    /// Waits for the rest of a line, or fails with `error` if the line is too long already.
    fn incomplete_line(&self, error: &'static str) -> Result<bool, ProtocolError> {
        if self.line.len() > MAX_LINE {
            return Err(error.into());
        }
        Ok(false)
    }
}

/// Takes a line from the front of `input` and returns it without its end.
///
/// `partial` holds the start of the line from earlier input. An incomplete line moves to `partial`.
fn take_line<'a, 'b: 'a>(partial: &'a mut Vec<u8>, input: &mut &'b [u8]) -> Option<&'a [u8]> {
    if partial.ends_with(b"\n") {
        clear(partial);
    }
    let Some(end) = input.iter().position(|byte| *byte == b'\n') else {
        partial.extend_from_slice(mem::take(input));
        return None;
    };
    let (line, rest) = input.split_at(end + 1);
    *input = rest;
    let line = if partial.is_empty() {
        line
    } else {
        partial.extend_from_slice(line);
        partial
    };
    let line = &line[..line.len() - 1];
    Some(line.strip_suffix(b"\r").unwrap_or(line))
}

/// Splits an inline command at spaces, with the quotes and escapes of `redis-cli`.
fn split(line: &[u8], request: &mut Request) -> Result<(), ProtocolError> {
    const UNBALANCED: ProtocolError = Error::Borrowed("unbalanced quotes in request");
    let mut rest = line.trim_ascii_start();
    while !rest.is_empty() {
        let mut quote = None;
        loop {
            let (byte, consumed) = match (quote, rest) {
                (None, []) => break,
                (None, [byte, ..]) if byte.is_ascii_whitespace() => break,
                (None, [b @ (b'"' | b'\''), ..]) => {
                    quote = Some(*b);
                    rest = &rest[1..];
                    continue;
                }
                (Some(_), []) => return Err(UNBALANCED),
                (Some(b'"'), [b'\\', b'x', high, low, ..])
                    if high.is_ascii_hexdigit() && low.is_ascii_hexdigit() =>
                {
                    let digit = |b: &u8| char::from(*b).to_digit(16).unwrap_or_default() as u8;
                    (digit(high) << 4 | digit(low), 4)
                }
                (Some(b'"'), [b'\\', escaped, ..]) => {
                    let byte = match escaped {
                        b'n' => b'\n',
                        b'r' => b'\r',
                        b't' => b'\t',
                        b'b' => 8,
                        b'a' => 7,
                        other => *other,
                    };
                    (byte, 2)
                }
                (Some(b'\''), [b'\\', b'\'', ..]) => (b'\'', 2),
                (Some(quote), [byte, after @ ..]) if *byte == quote => {
                    if after
                        .first()
                        .is_some_and(|byte| !byte.is_ascii_whitespace())
                    {
                        return Err(UNBALANCED);
                    }
                    rest = after;
                    break;
                }
                (_, [byte, ..]) => (*byte, 1),
            };
            request.bytes.push(byte);
            rest = &rest[consumed..];
        }
        request.end_argument();
        rest = rest.trim_ascii_start();
    }
    Ok(())
}

/// Parses an integer in Redis's form: no plus sign, no leading zeros, no spaces.
pub(crate) fn integer(text: &[u8]) -> Option<i64> {
    let digits = text.strip_prefix(b"-").unwrap_or(text);
    let canonical = match digits {
        [b'0'] => digits.len() == text.len(),
        [b'1'..=b'9', ..] => true,
        _ => false,
    };
    std::str::from_utf8(text)
        .ok()
        .filter(|_| canonical)?
        .parse()
        .ok()
}

/// The text of an error answer.
pub(crate) type Error = std::borrow::Cow<'static, str>;

/// A buffer of encoded answers.
#[derive(Default)]
pub(crate) struct Answers {
    pub(crate) bytes: Vec<u8>,
}

impl Answers {
    pub(crate) fn simple(&mut self, text: &str) {
        self.line('+', text);
    }

    pub(crate) fn ok(&mut self) {
        self.simple("OK");
    }

    pub(crate) fn error(&mut self, error: &str) {
        // An error may quote the request, but has to be one line.
        self.line('-', error.replace(['\r', '\n'], " "));
    }

    pub(crate) fn integer(&mut self, number: i64) {
        self.line(':', number);
    }

    pub(crate) fn count(&mut self, count: usize) {
        self.line(':', count);
    }

    pub(crate) fn bulk(&mut self, bytes: &[u8]) {
        self.line('$', bytes.len());
        self.bytes.extend_from_slice(bytes);
        self.bytes.extend_from_slice(b"\r\n");
    }

    pub(crate) fn bulk_or_null(&mut self, bytes: Option<&[u8]>) {
        match bytes {
            Some(bytes) => self.bulk(bytes),
            None => self.null(),
        }
    }

    pub(crate) fn null(&mut self) {
        self.bytes.extend_from_slice(b"$-1\r\n");
    }

    pub(crate) fn null_array(&mut self) {
        self.bytes.extend_from_slice(b"*-1\r\n");
    }

    /// Writes the header of an array. The caller writes its elements.
    pub(crate) fn array(&mut self, length: usize) {
        self.line('*', length);
    }

    /// Writes an array of bulk strings. Fails and writes nothing if the array is too long.
    pub(crate) fn bulks<'a>(
        &mut self,
        items: impl Iterator<Item = Option<&'a [u8]>> + Clone,
    ) -> Result<(), Error> {
        let (mut length, mut size) = (0, 0_usize);
        for item in items.clone() {
            length += 1;
            // Beside its bytes, a string has `$`, at most seven digits and two line ends.
            size = size.saturating_add(item.map_or(0, <[u8]>::len) + 12);
        }
        if size > MAX_ANSWER {
            return Err(format!("ERR answer exceeds {MAX_ANSWER} bytes").into());
        }
        if size > KEPT {
            // Growing step by step would briefly use up to three times the memory.
            self.bytes.reserve_exact(size + 16);
        }
        self.array(length);
        items.for_each(|item| self.bulk_or_null(item));
        Ok(())
    }

    fn line(&mut self, kind: char, value: impl std::fmt::Display) {
        write!(self.bytes, "{kind}{value}\r\n").expect("writing to memory does not fail");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Parses `input` in pieces of `step` bytes. Returns the requests and the error that followed.
    fn requests(input: &[u8], step: usize) -> (Vec<Vec<Vec<u8>>>, Option<ProtocolError>) {
        let mut parser = Parser::default();
        let mut requests = Vec::new();
        for mut piece in input.chunks(step) {
            loop {
                match parser.parse(&mut piece) {
                    Ok(true) => {
                        requests.push(parser.request().from(0).map(<[u8]>::to_vec).collect());
                    }
                    Ok(false) => break assert!(piece.is_empty()),
                    Err(error) => return (requests, Some(error)),
                }
            }
        }
        (requests, None)
    }

    fn error(input: impl AsRef<[u8]>) -> ProtocolError {
        let (whole, bytewise) = (
            requests(input.as_ref(), usize::MAX).1,
            requests(input.as_ref(), 1).1,
        );
        assert_eq!(whole, bytewise);
        whole.expect("the input is malformed")
    }

    #[test]
    fn requests_do_not_depend_on_the_size_of_pieces() {
        let input = b"*2\r\n$4\r\nECHO\r\n$6\r\na\r\nb\0c\r\n\r\nPING  x \n*0\r\n*-1\r\n*1\r\n$0\r\n\r\nPING\r\n";
        let expected: Vec<Vec<Vec<u8>>> = vec![
            vec![b"ECHO".into(), b"a\r\nb\0c".into()],
            vec![b"PING".into(), b"x".into()],
            vec![b"".into()],
            vec![b"PING".into()],
        ];
        for step in 1..=input.len() {
            assert_eq!(requests(input, step), (expected.clone(), None), "by {step}");
        }
    }

    #[test]
    fn the_parser_knows_whether_a_request_has_begun() {
        let mut parser = Parser::default();
        let request = b"*1\r\n$4\r\nPING\r\n";
        for (n, byte) in request.iter().enumerate() {
            assert_eq!(parser.is_between_requests(), n == 0, "at {n}");
            parser.parse(&mut &[*byte][..]).unwrap();
        }
        assert!(parser.is_between_requests());
        parser.parse(&mut &b"PI"[..]).unwrap();
        assert!(!parser.is_between_requests());
        parser.parse(&mut &b"NG\n"[..]).unwrap();
        assert!(parser.is_between_requests());
    }

    #[test]
    fn inline_commands_have_quotes_and_escapes() {
        let split = |line: &str| requests(format!("{line}\r\n").as_bytes(), 5).0.concat();
        assert_eq!(
            split(r#" a  "b c" 'd "e' "\x41\n\"\xZ" '\'\n' "" x"y" "#),
            [&b"a"[..], b"b c", b"d \"e", b"A\n\"xZ", b"'\\n", b"", b"xy"]
        );
        for line in [r#"a "b"#, "a 'b", r#"a "b"c"#, r#""\""#, "'\\'"] {
            assert_eq!(error(format!("{line}\r\n")), "unbalanced quotes in request");
        }
    }

    #[test]
    fn malformed_requests_are_refused() {
        for (input, expected) in [
            ("*x\r\n", "invalid multibulk length"),
            ("*\r\n", "invalid multibulk length"),
            ("* 1\r\n", "invalid multibulk length"),
            ("*65537\r\n", "invalid multibulk length"),
            ("*99999999999999999999\r\n", "invalid multibulk length"),
            ("*1\r\n+4\r\n", "expected '$', got '+'"),
            ("*1\r\n\r\n", "expected '$', got ' '"),
            ("*1\r\n$-1\r\n", "invalid bulk length"),
            ("*1\r\n$+1\r\n", "invalid bulk length"),
            ("*1\r\n$01\r\n", "invalid bulk length"),
            ("*1\r\n$1048577\r\n", "invalid bulk length"),
            ("*1\r\n$9223372036854775807\r\n", "invalid bulk length"),
            ("*1\r\n$1\r\nabc", "expected a line end after a bulk string"),
        ] {
            assert_eq!(error(input), expected, "for {input:?}");
        }
    }

    #[test]
    fn the_length_of_a_line_is_bounded() {
        let longest = [vec![b'x'; MAX_LINE], b"\r\n".to_vec()].concat();
        assert_eq!(requests(&longest, 1000).0[0][0].len(), MAX_LINE);
        assert_eq!(error(vec![b'x'; MAX_LINE + 1]), "too big inline request");
        let line = [vec![b'x'; MAX_LINE + 1], b"\r\n".to_vec()].concat();
        assert_eq!(error(line), "too big inline request");
        let zeros = "0".repeat(MAX_LINE);
        assert_eq!(error(format!("*{zeros}")), "too big mbulk count string");
        assert_eq!(
            error(format!("*1\r\n${zeros}")),
            "too big bulk count string"
        );
    }

    #[test]
    fn the_size_of_a_request_is_bounded() {
        let request = |arguments: &[usize]| {
            let mut input = format!("*{}\r\n", arguments.len()).into_bytes();
            for length in arguments {
                input.extend(format!("${length}\r\n").into_bytes());
                input.extend(vec![b'x'; *length]);
                input.extend(b"\r\n");
            }
            input
        };
        assert_eq!(
            requests(&request(&[MAX_BULK, MAX_BULK, 0]), 60_000).0.len(),
            1
        );
        let (_, error) = requests(&request(&[MAX_BULK, MAX_BULK, 1]), 60_000);
        assert_eq!(error.as_deref(), Some("too big request"));
        assert_eq!(requests(&request(&[1; MAX_ARGUMENTS]), 60_000).0.len(), 1);
    }

    #[test]
    fn integers_have_one_form_only() {
        for (text, number) in [("0", 0), ("-1", -1), ("10", 10)] {
            assert_eq!(integer(text.as_bytes()), Some(number));
        }
        assert_eq!(integer(i64::MIN.to_string().as_bytes()), Some(i64::MIN));
        for text in [
            "",
            "-",
            "-0",
            "+1",
            "01",
            " 1",
            "1 ",
            "1.0",
            "0x1",
            "9223372036854775808",
        ] {
            assert_eq!(integer(text.as_bytes()), None, "for {text:?}");
        }
    }

    #[test]
    fn an_answer_is_bounded_and_written_completely_or_not_at_all() {
        let item = vec![b'x'; MAX_BULK];
        let mut answers = Answers::default();
        answers.bulks(vec![Some(&item[..]); 7].into_iter()).unwrap();
        assert_eq!(answers.bytes.len(), 4 + 7 * (MAX_BULK + 12));
        answers.bytes.clear();
        answers
            .bulks(vec![Some(&item[..]); 8].into_iter())
            .unwrap_err();
        assert!(answers.bytes.is_empty());
        answers.bulks([Some(&b"a"[..]), None].into_iter()).unwrap();
        answers.error("ERR a\r\nb");
        assert_eq!(answers.bytes, b"*2\r\n$1\r\na\r\n$-1\r\n-ERR a  b\r\n");
    }
}
