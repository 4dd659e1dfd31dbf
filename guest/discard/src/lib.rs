//! The discard protocol (RFC 863).
//!
//! The guest reads and discards bytes until the client closes its side. It never answers.

use std::io;

use futures::io::{AsyncBufRead, copy_buf, sink};
use wasinetd_guest::TcpStream;

wasinetd_guest::export!(handle_connection);

async fn handle_connection(stream: TcpStream) -> io::Result<()> {
    discard(stream).await.map(drop)
}

/// Reads to the end of the stream and returns the number of bytes.
///
/// # Errors
///
/// Fails when `reader` fails.
pub async fn discard(reader: impl AsyncBufRead) -> io::Result<u64> {
    copy_buf(reader, &mut sink()).await
}

#[cfg(test)]
mod tests {
    use futures::executor::block_on;
    use futures::io::BufReader;
    use futures_test::io::AsyncReadTestExt;

    use super::*;

    #[test]
    fn all_bytes_are_read_for_any_read_size() {
        let bytes = vec![b'x'; 100_000];
        for step in [997, 4096, 1 << 20] {
            let reader = bytes.as_slice().limited(step).interleave_pending();
            assert_eq!(block_on(discard(BufReader::new(reader))).unwrap(), 100_000);
        }
    }
}
