//! The identification protocol (RFC 1413), for a host that does not tell: whoever asks whose a
//! connection is learns that this is hidden. Servers that ask, such as those of IRC, are answered
//! at once instead of waiting for a timeout.
//!
//! A sandbox does not see the connections of its host. So it says `HIDDEN-USER` of each pair of
//! ports that a connection can have, which is a valid answer for those that there are and tells
//! nothing of which there are.

use std::io;

use futures::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use wasinetd_guest::TcpStream;

wasinetd_guest::export!(handle_connection);

/// The longest request, its end left out.
const MAX_LINE: usize = 1000;

async fn handle_connection(stream: TcpStream) -> io::Result<()> {
    let (reader, writer) = stream.into_split();
    identify(reader, writer).await
}

/// Answers the requests from `reader`, a line each, until there are no more. After a line that is too
/// long there are none.
///
/// # Errors
///
/// Fails when either does.
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
            // What was cut off could be a part of a port.
            None if line.len() <= MAX_LINE => return Ok(()),
            _ => return writer.write_all(answer(b"").as_bytes()).await,
        }
    }
}

/// The answer to a request. A pair of numbers is repeated in it if the syntax of an answer has them.
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

/// One to five digits, with white space around them.
fn number(text: &[u8]) -> Option<u32> {
    let is_space = |byte: &u8| matches!(byte, b' ' | b'\t');
    let start = text.iter().position(|byte| !is_space(byte))?;
    let end = text.iter().rposition(|byte| !is_space(byte))?;
    let digits = &text[start..=end];
    // `parse` alone would take a sign.
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
    fn who_has_a_pair_of_ports_is_hidden() {
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
    fn what_no_connection_has_is_an_invalid_port() {
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
    fn there_are_many_requests_and_none_that_is_cut_off() {
        let hidden = |n| format!("{n}, 23 : ERROR : HIDDEN-USER\r\n");
        let requests: String = (1..=100).map(|n| format!("{n}, 23\r\n")).collect();
        let expected: String = (1..=100).map(hidden).collect();
        assert_eq!(answers(requests + "101, 2"), expected);
        assert_eq!(answers("1, 23\n1, 23\r"), hidden(1));
    }

    #[test]
    fn a_line_has_a_thousand_characters_and_no_more() {
        for end in ["\r\n", "\n"] {
            let line = |n: usize| format!("6193,{}23{end}1, 1{end}", " ".repeat(n - 7));
            assert_eq!(
                answers(line(1000)),
                "6193, 23 : ERROR : HIDDEN-USER\r\n1, 1 : ERROR : HIDDEN-USER\r\n"
            );
            // Nothing is taken for a request after it.
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
