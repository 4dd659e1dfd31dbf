//! The identification protocol (RFC 1413), without revealing any user.
//!
//! Servers such as those of IRC ask which user owns a connection. The guest answers at once, so
//! that they need not wait for a timeout.
//!
//! A sandbox does not see the connections of its host. The guest therefore answers `HIDDEN-USER`
//! for every valid pair of ports. That is a correct answer for an existing connection, and does not
//! reveal which connections exist.

use std::io;

use futures::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use wasinetd_guest::TcpStream;

wasinetd_guest::export!(handle_connection);

/// The longest request in bytes, without its line end.
const MAX_LINE: usize = 1000;

async fn handle_connection(stream: TcpStream) -> io::Result<()> {
    let (reader, writer) = stream.into_split();
    identify(reader, writer).await
}

/// Answers requests from `reader`, one per line, until the end of the stream.
///
/// A line that is too long gets an error and ends the conversation.
///
/// # Errors
///
/// Fails when `reader` or `writer` fails.
pub async fn identify(
    mut reader: impl AsyncBufRead + Unpin,
    mut writer: impl AsyncWrite + Unpin,
) -> io::Result<()> {
    let mut line = Vec::new();
    loop {
        line.clear();
        let mut bounded = (&mut reader).take(MAX_LINE as u64 + 2);
        bounded.read_until(b'\n', &mut line).await?;
        let request = line
            .strip_suffix(b"\n")
            .map(|line| line.strip_suffix(b"\r").unwrap_or(line));
        match request {
            Some(request) if request.len() <= MAX_LINE => {
                writer.write_all(answer(request).as_bytes()).await?;
            }
            // A request without line end is truncated, perhaps within a port number.
            None if line.len() <= MAX_LINE => return Ok(()),
            _ => return writer.write_all(answer(b"").as_bytes()).await,
        }
    }
}

/// The answer to a request. It repeats the two port numbers if they are well-formed.
fn answer(request: &[u8]) -> String {
    let pair = request
        .iter()
        .position(|byte| *byte == b',')
        .and_then(|comma| Some((number(&request[..comma])?, number(&request[comma + 1..])?)));
    let (server, client) = pair.unwrap_or_default();
    let ports = 1..=u32::from(u16::MAX);
    let error = match ports.contains(&server) && ports.contains(&client) {
        true => "HIDDEN-USER",
        false => "INVALID-PORT",
    };
    format!("{server}, {client} : ERROR : {error}\r\n")
}

/// Parses one to five digits with optional white space around them.
fn number(text: &[u8]) -> Option<u32> {
    let is_space = |byte: &u8| matches!(byte, b' ' | b'\t');
    let start = text.iter().position(|byte| !is_space(byte))?;
    let end = text.iter().rposition(|byte| !is_space(byte))?;
    let digits = &text[start..=end];
    // `parse` alone would accept a sign.
    let is_number = digits.len() <= 5 && digits.iter().all(u8::is_ascii_digit);
    std::str::from_utf8(digits)
        .ok()
        .filter(|_| is_number)?
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use futures::executor::block_on;
    use futures::io::BufReader;
    use futures_test::io::{AsyncReadTestExt, AsyncWriteTestExt};

    use super::*;

    fn answers(requests: impl AsRef<[u8]>) -> String {
        let mut written = Vec::new();
        let reader = requests.as_ref().limited(7).interleave_pending();
        let writer = (&mut written).limited_write(7).interleave_pending_write();
        block_on(identify(BufReader::new(reader), writer)).unwrap();
        String::from_utf8(written).unwrap()
    }

    #[test]
    fn users_of_valid_port_pairs_are_hidden() {
        for request in ["6193, 23", "6193,23", " \t6193\t , \t23 \t", "06193,00023"] {
            for end in ["\r\n", "\n"] {
                assert_eq!(
                    answers(format!("{request}{end}")),
                    "6193, 23 : ERROR : HIDDEN-USER\r\n",
                    "for {request:?}"
                );
            }
        }
        assert_eq!(answers("1,65535\r\n"), "1, 65535 : ERROR : HIDDEN-USER\r\n");
    }

    #[test]
    fn impossible_ports_are_invalid() {
        for (request, pair) in [
            ("0, 23", "0, 23"),
            ("6193, 65536", "6193, 65536"),
            ("99999, 23", "99999, 23"),
            ("6193, 100000", "0, 0"),
            ("99999999999999999999, 23", "0, 0"),
            ("-1, 23", "0, 0"),
            ("+1, 23", "0, 0"),
            ("1.5, 23", "0, 0"),
            ("0x17, 23", "0, 0"),
            ("6 193, 23", "0, 0"),
            ("6193, 23, 5", "0, 0"),
            ("6193 23", "0, 0"),
            (",", "0, 0"),
            ("6193,", "0, 0"),
            ("", "0, 0"),
            ("6193, 2\u{0663}", "0, 0"),
            ("6193, 23\0", "0, 0"),
        ] {
            assert_eq!(
                answers(format!("{request}\r\n")),
                format!("{pair} : ERROR : INVALID-PORT\r\n"),
                "for {request:?}"
            );
        }
    }

    #[test]
    fn every_request_is_answered_unless_it_is_truncated() {
        let hidden = |n| format!("{n}, 23 : ERROR : HIDDEN-USER\r\n");
        let requests: String = (1..=100).map(|n| format!("{n}, 23\r\n")).collect();
        let expected: String = (1..=100).map(hidden).collect();
        assert_eq!(answers(requests + "101, 2"), expected);
        assert_eq!(answers("1, 23\n1, 23\r"), hidden(1));
    }

    #[test]
    fn a_line_of_more_than_a_thousand_characters_is_refused() {
        for end in ["\r\n", "\n"] {
            let line = |n: usize| format!("6193,{}23{end}1, 1{end}", " ".repeat(n - 7));
            assert_eq!(
                answers(line(1000)),
                "6193, 23 : ERROR : HIDDEN-USER\r\n1, 1 : ERROR : HIDDEN-USER\r\n"
            );
            // The rest of the line and the next one get no answer.
            for n in [1001, 1002, 1003, 5000] {
                assert_eq!(
                    answers(line(n)),
                    "0, 0 : ERROR : INVALID-PORT\r\n",
                    "for {n}"
                );
            }
        }
    }
}
