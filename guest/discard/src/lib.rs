//! The discard protocol (RFC 863): what is received is thrown away, until the client has sent its
//! last.

use std::io;

use futures::io::{AsyncBufRead, copy_buf, sink};
use wasinetd_guest::TcpStream;

wasinetd_guest::export!(handle_connection);

async fn handle_connection(stream: TcpStream) -> io::Result<()> {
    discard(stream).await.map(drop)
}

/// Reads to the end of the stream, and returns how much there was.
///
/// # Errors
///
/// Fails when `reader` does.
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
    fn all_is_read_whatever_the_steps() {
        let bytes = vec![b'x'; 100_000];
        for step in [997, 4096, 1 << 20] {
            let reader = bytes.as_slice().limited(step).interleave_pending();
            assert_eq!(block_on(discard(BufReader::new(reader))).unwrap(), 100_000);
        }
    }
}
