//! A small protocol of lines over TCP: it asks who is there, answers each line, and ends at `bye`.
//!
//! wasinetd calls [`handle_connection`] in a fresh instance for each connection. Nothing is shared:
//! what a connection leaves in memory is gone with it, and no other can see it.

use std::io::{self, ErrorKind};

use futures::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use wasinetd_guest::TcpStream;

wasinetd_guest::export!(handle_connection);

/// The longest line, with its end. The client decides how much it sends: whatever is collected of
/// that needs a bound.
const LONGEST_LINE: u64 = 1024;

/// How it returns is how the connection ends: `Ok` delivers all that was written and closes it (FIN).
/// `Err` resets it, so that the client can tell a conversation that broke from one that is over, and
/// the error is in wasinetd's log.
async fn handle_connection(stream: TcpStream) -> io::Result<()> {
    // A line in wasinetd's log, under the number of this connection. `stream.peer_addr()` knows more.
    println!("connection {} begins", stream.id());
    let (reader, writer) = stream.into_split();
    converse(reader, writer).await
}

/// The conversation, over any two streams: the tests below have it with a client made of bytes.
async fn converse(
    mut reader: impl AsyncBufRead + Unpin,
    mut writer: impl AsyncWrite + Unpin,
) -> io::Result<()> {
    writer.write_all(b"Who is there?\n").await?;
    // State is in plain variables. While one connection waits here, others go on.
    let Some(name) = read_line(&mut reader).await? else {
        return Ok(());
    };
    let mut lines = 0_u64;
    writer
        .write_all(format!("Hello {name}! Say something, or bye.\n").as_bytes())
        .await?;
    while let Some(line) = read_line(&mut reader).await? {
        if line == "bye" {
            break;
        }
        lines += 1;
        // One write for each answer: what a write has accepted is on its way, nothing waits for more.
        writer
            .write_all(format!("{name}, line {lines}: {line}\n").as_bytes())
            .await?;
    }
    writer
        .write_all(format!("Goodbye after {lines} lines.\n").as_bytes())
        .await
}

/// The next line without its end, or `None` when the client has sent its last.
async fn read_line(reader: &mut (impl AsyncBufRead + Unpin)) -> io::Result<Option<String>> {
    let mut line = Vec::new();
    reader
        .take(LONGEST_LINE)
        .read_until(b'\n', &mut line)
        .await?;
    if line.is_empty() {
        return Ok(None);
    }
    let Some(text) = line.strip_suffix(b"\n") else {
        let (kind, what) = match line.len() as u64 {
            LONGEST_LINE => (ErrorKind::InvalidData, "a line of the client is too long"),
            _ => (
                ErrorKind::UnexpectedEof,
                "the client left in the middle of a line",
            ),
        };
        return Err(io::Error::new(kind, what));
    };
    let text = text.strip_suffix(b"\r").unwrap_or(text);
    String::from_utf8(text.to_vec())
        .map(Some)
        .map_err(|error| io::Error::new(ErrorKind::InvalidData, error))
}

#[cfg(test)]
mod tests {
    use futures::executor::block_on;

    use super::*;

    /// What a client that sends `input` and no more is answered, and how that ends.
    fn talk(input: &[u8]) -> (String, io::Result<()>) {
        let mut output = Vec::new();
        let result = block_on(converse(input, &mut output));
        (String::from_utf8(output).unwrap(), result)
    }

    #[test]
    fn each_line_is_answered() {
        let (answer, result) = talk(b"Ada\nOne\r\n\nbye\nnever read\n");
        result.unwrap();
        assert_eq!(
            answer,
            "Who is there?\n\
             Hello Ada! Say something, or bye.\n\
             Ada, line 1: One\n\
             Ada, line 2: \n\
             Goodbye after 2 lines.\n"
        );
    }

    #[test]
    fn a_client_may_leave_between_lines() {
        talk(b"").1.unwrap();
        talk(b"Ada\n").1.unwrap();
        let cut_off = talk(b"Ada\nOn").1.unwrap_err();
        assert_eq!(cut_off.kind(), ErrorKind::UnexpectedEof);
    }

    #[test]
    fn a_line_has_a_bound() {
        let line = |length: u64| {
            let mut line = vec![b'x'; length as usize - 1];
            line.push(b'\n');
            line
        };
        talk(&line(LONGEST_LINE)).1.unwrap();
        let too_long = talk(&line(LONGEST_LINE + 1)).1.unwrap_err();
        assert_eq!(too_long.kind(), ErrorKind::InvalidData);
    }
}
