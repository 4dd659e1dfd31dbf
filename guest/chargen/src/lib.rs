//! The character generator protocol (RFC 864): lines of 72 characters, each beginning with the next
//! of the 95 that can be printed, until the client closes its side or is gone. What it sends is
//! thrown away.

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

/// Sends lines to `writer` until `reader` is at its end.
///
/// # Errors
///
/// Fails when either does.
pub async fn generate(reader: impl AsyncBufRead, writer: impl AsyncWrite) -> io::Result<()> {
    let (mut reader, mut writer) = (pin!(reader), pin!(writer));
    let pattern = pattern();
    let mut at = 0;
    // Each has its turn in each round: neither a client that takes all there is nor one that sends
    // without end keeps the other direction from going on.
    poll_fn(|cx| {
        loop {
            let received = match reader.as_mut().poll_fill_buf(cx)? {
                Poll::Ready([]) => return Poll::Ready(Ok(())),
                Poll::Ready(bytes) => bytes.len(),
                Poll::Pending => 0,
            };
            reader.as_mut().consume(received);
            match writer.as_mut().poll_write(cx, &pattern[at..])? {
                Poll::Ready(0) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Poll::Ready(written) => at = (at + written) % pattern.len(),
                Poll::Pending if received > 0 => {}
                Poll::Pending => return Poll::Pending,
            }
        }
    })
    .await
}

/// The characters that can be printed.
const PRINTABLE: std::ops::RangeInclusive<u8> = b' '..=b'~';

/// The lines, up to where they begin again.
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
    fn the_lines_are_those_of_the_rfc() {
        let pattern = String::from_utf8(pattern()).unwrap();
        let lines: Vec<_> = pattern.split_terminator("\r\n").collect();
        assert_eq!(lines.len(), 95);
        assert!(lines.iter().all(|line| line.len() == 72));
        // As in its example, which begins with the second.
        assert_eq!(
            lines[1],
            r##"!"#$%&'()*+,-./0123456789:;<=>?@ABCDEFGHIJKLMNOPQRSTUVWXYZ[\]^_`abcdefgh"##
        );
        assert_eq!(
            lines[94],
            r##"~ !"#$%&'()*+,-./0123456789:;<=>?@ABCDEFGHIJKLMNOPQRSTUVWXYZ[\]^_`abcdef"##
        );
    }

    /// Takes `left` bytes, then nothing for ever.
    struct Taking<'a>(&'a RefCell<Vec<u8>>, usize);

    impl AsyncWrite for Taking<'_> {
        fn poll_write(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
            bytes: &[u8],
        ) -> Poll<io::Result<usize>> {
            let mut taken = self.0.borrow_mut();
            match bytes.len().min(self.1 - taken.len()) {
                0 => Poll::Pending,
                n => {
                    taken.extend_from_slice(&bytes[..n]);
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

    /// A client that sends nothing and stays.
    struct Silent;

    impl AsyncRead for Silent {
        fn poll_read(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
            _: &mut [u8],
        ) -> Poll<io::Result<usize>> {
            Poll::Pending
        }
    }

    #[test]
    fn it_goes_on_where_the_client_has_stopped_taking() {
        for step in [1, 73, 5_000] {
            let taken = RefCell::default();
            let writer = Taking(&taken, 20_000).limited_write(step);
            let future = pin!(generate(BufReader::new(Silent), writer));
            // It waits for the client.
            assert!(future.poll(&mut noop_context()).is_pending());
            let expected: Vec<u8> = pattern().into_iter().cycle().take(20_000).collect();
            assert!(*taken.borrow() == expected, "with steps of {step}");
        }
    }

    #[test]
    fn it_ends_with_the_clients_side_whether_that_reads_or_not() {
        let sent = [b'x'; 1_000];
        let reader = || BufReader::new(sent.as_slice().limited(10).interleave_pending());
        let mut all = Vec::new();
        let writer = (&mut all).interleave_pending_write();
        block_on(generate(reader(), writer)).unwrap();
        let taken = RefCell::default();
        block_on(generate(reader(), Taking(&taken, 0))).unwrap();
    }

    #[test]
    fn who_sends_without_end_is_sent_to_as_well() {
        let taken = RefCell::default();
        let reader = BufReader::new(repeat(b'x').take(100_000));
        let writer = Taking(&taken, 1_000);
        block_on(generate(reader, writer)).unwrap();
        assert_eq!(taken.borrow().len(), 1_000);
    }
}
