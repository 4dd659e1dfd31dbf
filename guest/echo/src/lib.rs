//! The echo protocol (RFC 862).
//!
//! The guest sends every received byte back, in order, until the client closes its side.

use std::io;

use futures::io::{AsyncBufRead, AsyncWrite, copy_buf};
use wasinetd_guest::TcpStream;

wasinetd_guest::export!(handle_connection);

async fn handle_connection(stream: TcpStream) -> io::Result<()> {
    let (reader, writer) = stream.into_split();
    echo(reader, writer).await
}

/// Copies bytes from `reader` to `writer` until the end of the stream.
///
/// # Errors
///
/// Fails when `reader` or `writer` fails.
pub async fn echo(
    reader: impl AsyncBufRead,
    mut writer: impl AsyncWrite + Unpin,
) -> io::Result<()> {
    copy_buf(reader, &mut writer).await.map(drop)
}

#[cfg(test)]
mod tests {
    use futures::executor::block_on;
    use futures::io::BufReader;
    use futures_test::io::{AsyncReadTestExt, AsyncWriteTestExt};

    use super::*;

    #[test]
    fn every_byte_comes_back_in_order_for_any_read_size() {
        let bytes: Vec<u8> = (0..200_000_u32).map(|n| (n % 251) as u8).collect();
        for step in [997, 4096, 1 << 20] {
            let mut written = Vec::new();
            let reader = BufReader::new(bytes.as_slice().limited(step).interleave_pending());
            let writer = (&mut written)
                .limited_write(step)
                .interleave_pending_write();
            block_on(echo(reader, writer)).unwrap();
            assert!(written == bytes, "with steps of {step}");
        }
    }
}
