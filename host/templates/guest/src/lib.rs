//! A line protocol over TCP: asks for a name, answers each line, and ends at `bye`.
//!
//! wasinetd calls [`handle_connection`] in a fresh instance for each connection. Connections share
//! nothing: the memory of an instance is gone when its connection has ended.

use std::io::{self, ErrorKind};

use futures::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use wasinetd_guest::TcpStream;

wasinetd_guest::export!(handle_connection);

/// Longest line, in bytes, with its line end. A line may never end, so a guest has to bound what it
/// collects of one.
const MAX_LINE: u64 = 1024;

/// Handles one connection. The result decides how the connection ends.
///
/// `Ok` delivers everything written and closes the connection (FIN). `Err` resets it, so that the
/// client can tell a broken conversation from a finished one, and wasinetd logs the error.
async fn handle_connection(stream: TcpStream) -> io::Result<()> {
    // Goes to wasinetd's log. `stream.peer_addr()` returns the client's address.
    println!("connection {} begins", stream.id());
    let (reader, writer) = stream.into_split();
    converse(reader, writer).await
}

/// Talks to a client over any two streams. The tests below use a client made of bytes.
async fn converse(
    mut reader: impl AsyncBufRead + Unpin,
    mut writer: impl AsyncWrite + Unpin,
) -> io::Result<()> {
    writer.write_all(b"Who is there?\n").await?;
    // Plain variables hold the state. While this connection waits for its client, others go on.
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
        // One write per answer: wasinetd sends each write at once.
        writer
            .write_all(format!("{name}, line {lines}: {line}\n").as_bytes())
            .await?;
    }
    writer
        .write_all(format!("Goodbye after {lines} lines.\n").as_bytes())
        .await
}

/// Reads the next line, without its line end. `None` after the client's last line.
async fn read_line(reader: &mut (impl AsyncBufRead + Unpin)) -> io::Result<Option<String>> {
    let mut line = Vec::new();
    reader.take(MAX_LINE).read_until(b'\n', &mut line).await?;
    if line.is_empty() {
        return Ok(None);
    }
    let Some(text) = line.strip_suffix(b"\n") else {
        let (kind, message) = match line.len() as u64 {
            MAX_LINE => (
                ErrorKind::InvalidData,
                "the client sent a line that is too long",
            ),
            _ => (
                ErrorKind::UnexpectedEof,
                "the client closed the connection in the middle of a line",
            ),
        };
        return Err(io::Error::new(kind, message));
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

    /// The output for a client that sends `input` and closes its side, and the result.
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
    fn a_client_may_close_between_lines_only() {
        talk(b"").1.unwrap();
        talk(b"Ada\n").1.unwrap();
        let cut_off = talk(b"Ada\nOn").1.unwrap_err();
        assert_eq!(cut_off.kind(), ErrorKind::UnexpectedEof);
    }

    #[test]
    fn a_line_has_a_maximum_length() {
        let line = |length: u64| {
            let mut line = vec![b'x'; length as usize - 1];
            line.push(b'\n');
            line
        };
        talk(&line(MAX_LINE)).1.unwrap();
        let too_long = talk(&line(MAX_LINE + 1)).1.unwrap_err();
        assert_eq!(too_long.kind(), ErrorKind::InvalidData);
    }
}
