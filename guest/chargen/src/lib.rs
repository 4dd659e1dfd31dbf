//! The character generator protocol (RFC 864).
//!
//! The guest sends lines of 72 characters. Each line begins with the next of the 95 printable ASCII
//! characters. The stream ends when the client closes its side or is gone. Bytes from the client
//! are discarded.

use std::future::poll_fn;
use std::io;
use std::pin::pin;
use std::task::Poll;

use futures::io::{AsyncBufRead, AsyncWrite};
use wasinetd_guest::TcpStream;

wasinetd_guest::export!(handle_connection);

async fn handle_connection(stream: TcpStream) -> io::Result<()> {
    let (reader, writer) = stream.into_split();
    generate(reader, writer).await
}

/// Sends lines to `writer` until `reader` reaches its end.
///
/// # Errors
///
/// Fails when `reader` or `writer` fails.
pub async fn generate(reader: impl AsyncBufRead, writer: impl AsyncWrite) -> io::Result<()> {
    let (mut reader, mut writer) = (pin!(reader), pin!(writer));
    let pattern = pattern();
    let mut offset = 0;
    // Each round polls both directions once, so that a client that only reads or only sends cannot
    // block the other direction.
    poll_fn(|cx| {
        loop {
            let received = match reader.as_mut().poll_fill_buf(cx)? {
                Poll::Ready([]) => return Poll::Ready(Ok(())),
                Poll::Ready(bytes) => bytes.len(),
                Poll::Pending => 0,
            };
            reader.as_mut().consume(received);
            match writer.as_mut().poll_write(cx, &pattern[offset..])? {
                Poll::Ready(0) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Poll::Ready(written) => offset = (offset + written) % pattern.len(),
                Poll::Pending if received > 0 => {}
                Poll::Pending => return Poll::Pending,
            }
        }
    })
    .await
}

/// The printable characters of ASCII.
const PRINTABLE: std::ops::RangeInclusive<u8> = b' '..=b'~';

/// One period of the output: 95 lines.
fn pattern() -> Vec<u8> {
    let line = |start| PRINTABLE.cycle().skip(start).take(72).chain(*b"\r\n");
    (0..PRINTABLE.len()).flat_map(line).collect()
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::pin::Pin;
    use std::task::Context;

    use futures::executor::block_on;
    use futures::io::{AsyncRead, AsyncReadExt, BufReader, repeat};
    use futures_test::io::{AsyncReadTestExt, AsyncWriteTestExt};
    use futures_test::task::noop_context;

    use super::*;

    #[test]
    fn lines_match_the_example_of_the_rfc() {
        let pattern = String::from_utf8(pattern()).unwrap();
        let lines: Vec<_> = pattern.split_terminator("\r\n").collect();
        assert_eq!(lines.len(), 95);
        assert!(lines.iter().all(|line| line.len() == 72));
        // The example in the RFC begins with the second line.
        assert_eq!(
            lines[1],
            r##"!"#$%&'()*+,-./0123456789:;<=>?@ABCDEFGHIJKLMNOPQRSTUVWXYZ[\]^_`abcdefgh"##
        );
        assert_eq!(
            lines[94],
            r##"~ !"#$%&'()*+,-./0123456789:;<=>?@ABCDEFGHIJKLMNOPQRSTUVWXYZ[\]^_`abcdef"##
        );
    }

    /// A writer that accepts a number of bytes and then blocks forever.
    struct LimitedWriter<'a> {
        written: &'a RefCell<Vec<u8>>,
        limit: usize,
    }

    impl AsyncWrite for LimitedWriter<'_> {
        fn poll_write(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
            bytes: &[u8],
        ) -> Poll<io::Result<usize>> {
            let mut written = self.written.borrow_mut();
            match bytes.len().min(self.limit - written.len()) {
                0 => Poll::Pending,
                n => {
                    written.extend_from_slice(&bytes[..n]);
                    Poll::Ready(Ok(n))
                }
            }
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    /// A client that sends nothing and stays connected.
    struct SilentClient;

    impl AsyncRead for SilentClient {
        fn poll_read(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
            _: &mut [u8],
        ) -> Poll<io::Result<usize>> {
            Poll::Pending
        }
    }

    #[test]
    fn output_continues_after_short_writes() {
        for step in [1, 73, 5_000] {
            let written = RefCell::default();
            let writer = LimitedWriter {
                written: &written,
                limit: 20_000,
            };
            let writer = writer.limited_write(step);
            let future = pin!(generate(BufReader::new(SilentClient), writer));
            // The writer accepts no more, so the guest waits.
            assert!(future.poll(&mut noop_context()).is_pending());
            let expected: Vec<u8> = pattern().into_iter().cycle().take(20_000).collect();
            assert!(*written.borrow() == expected, "with steps of {step}");
        }
    }

    #[test]
    fn output_ends_when_the_client_closes_whether_it_reads_or_not() {
        let sent = [b'x'; 1_000];
        let reader = || BufReader::new(sent.as_slice().limited(10).interleave_pending());
        let mut all = Vec::new();
        let writer = (&mut all).interleave_pending_write();
        block_on(generate(reader(), writer)).unwrap();
        let writer = LimitedWriter {
            written: &RefCell::default(),
            limit: 0,
        };
        block_on(generate(reader(), writer)).unwrap();
    }

    #[test]
    fn clients_that_never_stop_sending_get_output() {
        let written = RefCell::default();
        let reader = BufReader::new(repeat(b'x').take(100_000));
        let writer = LimitedWriter {
            written: &written,
            limit: 1_000,
        };
        block_on(generate(reader, writer)).unwrap();
        assert_eq!(written.borrow().len(), 1_000);
    }
}
