//! The quote of the day protocol (RFC 865): one quote, drawn by chance, of fewer than 512
//! characters, whatever the client sends.
//!
//! The quotes are those in the file `quotes.txt` of the directory that the operator grants as
//! `/quotes`, by `--dir HOST::/quotes`: in the format of `fortune`, with a line of `%` between two. Those that are too
//! long are left out. Without such a file there are some built in.

use std::io;

use futures::{AsyncWrite, AsyncWriteExt};
use wasinetd_guest::TcpStream;

wasinetd_guest::export!(handle_connection);

const FILE: &str = "/quotes/quotes.txt";

/// What a quote has to be shorter than, line ends included.
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
    tell(stream, quote).await
}

/// Sends one quote.
///
/// # Errors
///
/// Fails when `writer` does.
pub async fn tell(mut writer: impl AsyncWrite + Unpin, quote: &str) -> io::Result<()> {
    writer.write_all(quote.as_bytes()).await
}

/// The quotes in a file that are short enough, each with its line ends as they are sent.
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
    fn quotes_are_between_lines_of_percent() {
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
        // Line ends count as they are sent.
        assert_eq!(quotes("\nx".repeat(171).as_bytes()), [""; 0]);
        assert_eq!(quotes("\nx".repeat(170).as_bytes())[0].len(), 510);
    }

    #[test]
    fn some_are_built_in_and_all_of_them_can_be_told() {
        let file = include_str!("quotes.txt");
        let quotes = quotes(file.as_bytes());
        assert_eq!(quotes.len(), file.matches("\n%\n").count() + 1);
        for quote in quotes {
            assert!(quote.is_ascii());
            let mut written = Vec::new();
            block_on(tell(&mut written, &quote)).unwrap();
            assert_eq!(written, quote.as_bytes());
        }
    }
}
