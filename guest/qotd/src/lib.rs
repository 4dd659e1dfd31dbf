//! The quote of the day protocol (RFC 865).
//!
//! The guest sends one random quote of fewer than 512 characters and ignores all input.
//!
//! The quotes come from `quotes.txt` in the directory that the operator grants as `/quotes` (`--dir
//! HOST::/quotes`). The file has the format of `fortune`: a line of `%` separates two quotes.
//! Longer quotes are skipped. Without such a file, the guest uses built-in quotes.

use std::io;

use futures::{AsyncWrite, AsyncWriteExt};
use wasinetd_guest::TcpStream;

wasinetd_guest::export!(handle_connection);

const FILE: &str = "/quotes/quotes.txt";

/// A quote, with its line ends, is shorter than this (RFC 865).
const LIMIT: usize = 512;

async fn handle_connection(stream: TcpStream) -> io::Result<()> {
    let file = match wasinetd_guest::fs::read(FILE) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            include_bytes!("quotes.txt").into()
        }
        Err(error) => return Err(io::Error::other(format!("{FILE}: {error}"))),
    };
    let quotes = quotes(&file);
    let quote = fastrand::choice(&quotes).ok_or_else(|| {
        io::Error::other(format!("{FILE} has no quote shorter than {LIMIT} bytes"))
    })?;
    send(stream, quote).await
}

/// Sends one quote.
///
/// # Errors
///
/// Fails when `writer` fails.
pub async fn send(mut writer: impl AsyncWrite + Unpin, quote: &str) -> io::Result<()> {
    writer.write_all(quote.as_bytes()).await
}

/// The quotes in a file, without those that are too long. Line ends become CRLF.
pub fn quotes(file: &[u8]) -> Vec<String> {
    let text = String::from_utf8_lossy(file);
    let lines: Vec<_> = text.lines().map(str::trim_end).collect();
    lines
        .split(|line| *line == "%")
        .map(|quote| quote.join("\r\n").trim().to_owned() + "\r\n")
        .filter(|quote| (3..LIMIT).contains(&quote.len()))
        .collect()
}

#[cfg(test)]
mod tests {
    use futures::executor::block_on;

    use super::*;

    #[test]
    fn lines_of_percent_separate_quotes() {
        let file = b"one\n  -- me\n%\n\ntwo\r\n%\n\n%\n%%\n50 %\n%\n\xff";
        assert_eq!(
            quotes(file),
            [
                "one\r\n  -- me\r\n",
                "two\r\n",
                "%%\r\n50 %\r\n",
                "\u{fffd}\r\n"
            ]
        );
        assert!(quotes(b"").is_empty());
    }

    #[test]
    fn a_quote_has_fewer_than_512_characters() {
        let quote = |n| quotes("x".repeat(n).as_bytes());
        assert_eq!(quote(509)[0].len(), 511);
        assert!(quote(510).is_empty());
        // Each line end counts as the two bytes of CRLF.
        assert_eq!(quotes("\nx".repeat(171).as_bytes()), [""; 0]);
        assert_eq!(quotes("\nx".repeat(170).as_bytes())[0].len(), 510);
    }

    #[test]
    fn all_built_in_quotes_are_ascii_and_can_be_sent() {
        let file = include_str!("quotes.txt");
        let quotes = quotes(file.as_bytes());
        assert_eq!(quotes.len(), file.matches("\n%\n").count() + 1);
        for quote in quotes {
            assert!(quote.is_ascii());
            let mut written = Vec::new();
            block_on(send(&mut written, &quote)).unwrap();
            assert_eq!(written, quote.as_bytes());
        }
    }
}
