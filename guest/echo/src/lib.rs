//! The echo protocol (RFC 862): every byte comes back, in order, until the client has sent its
//! last.

use std::io;

use futures::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use wasinetd_guest::TcpStream;

wasinetd_guest::export!(handle_connection);

async fn handle_connection(stream: TcpStream) -> io::Result<()> {
    echo(stream).await
}

/// Bytes moved at once: the most that one read of a [`TcpStream`] yields.
const BUFFER_BYTES: usize = 64 * 1024;

/// Sends back what `stream` receives, and returns when it has received its last byte and all has
/// been sent.
///
/// # Errors
///
/// Fails when the stream does.
pub async fn echo(mut stream: impl AsyncRead + AsyncWrite + Unpin) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        match stream.read(&mut buffer).await? {
            0 => return stream.flush().await,
            n => stream.write_all(&buffer[..n]).await?,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::pin::Pin;
    use std::task::{Context, Poll};

    use futures::executor::block_on;

    use super::*;

    /// Reads from one vector and writes to another, at most `step` bytes at a time, and is pending
    /// before each step.
    struct MockStream {
        unread: Vec<u8>,
        written: Vec<u8>,
        step: usize,
        ready: bool,
    }

    impl MockStream {
        fn poll_step(&mut self, cx: &mut Context<'_>) -> Poll<usize> {
            self.ready = !self.ready;
            if self.ready {
                return Poll::Ready(self.step);
            }
            cx.waker().wake_by_ref();
            Poll::Pending
        }
    }

    impl AsyncRead for MockStream {
        fn poll_read(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            buffer: &mut [u8],
        ) -> Poll<io::Result<usize>> {
            self.poll_step(cx).map(|step| {
                let n = step.min(buffer.len()).min(self.unread.len());
                let rest = self.unread.split_off(n);
                buffer[..n].copy_from_slice(&self.unread);
                self.unread = rest;
                Ok(n)
            })
        }
    }

    impl AsyncWrite for MockStream {
        fn poll_write(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            bytes: &[u8],
        ) -> Poll<io::Result<usize>> {
            self.poll_step(cx).map(|step| {
                let n = step.min(bytes.len());
                self.written.extend_from_slice(&bytes[..n]);
                Ok(n)
            })
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    #[test]
    fn every_byte_comes_back_in_order_whatever_the_steps() {
        let bytes: Vec<u8> = (0..200_000_u32).map(|n| (n % 251) as u8).collect();
        for step in [997, 4096, 1 << 20] {
            let mut stream = MockStream {
                unread: bytes.clone(),
                written: Vec::new(),
                step,
                ready: true,
            };
            block_on(echo(&mut stream)).unwrap();
            assert!(stream.written == bytes, "with steps of {step}");
        }
    }
}
