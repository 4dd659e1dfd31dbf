//! The echo protocol (RFC 862): every byte comes back, in order, until the client has sent its
//! last.

use std::io;

use futures::io::{AsyncBufRead, AsyncWrite, copy_buf};
use wasinetd_guest::TcpStream;

wasinetd_guest::export!(handle_connection);

async fn handle_connection(stream: TcpStream) -> io::Result<()> {
    let (reader, writer) = stream.into_split();
    echo(reader, writer).await
}

/// Sends to `writer` what `reader` receives, and returns when it has received its last byte and all
/// has been sent.
///
/// # Errors
///
/// Fails when either does.
pub async fn echo(
    reader: impl AsyncBufRead,
    mut writer: impl AsyncWrite + Unpin,
) -> io::Result<()> {
    copy_buf(reader, &mut writer).await.map(drop)
}

#[cfg(test)]
mod tests {
    use std::pin::Pin;
    use std::task::{Context, Poll, ready};

    use futures::AsyncRead;
    use futures::executor::block_on;
    use futures::io::BufReader;

    use super::*;

    /// Moves at most `step` bytes at a time, and is pending before each step.
    struct Steps<T> {
        inner: T,
        step: usize,
        ready: bool,
    }

    impl<T> Steps<T> {
        fn new(inner: T, step: usize) -> Self {
            Self {
                inner,
                step,
                ready: true,
            }
        }

        fn poll_step(&mut self, cx: &mut Context<'_>) -> Poll<usize> {
            self.ready = !self.ready;
            if self.ready {
                return Poll::Ready(self.step);
            }
            cx.waker().wake_by_ref();
            Poll::Pending
        }
    }

    impl AsyncRead for Steps<&[u8]> {
        fn poll_read(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            buffer: &mut [u8],
        ) -> Poll<io::Result<usize>> {
            let step = ready!(self.poll_step(cx)).min(buffer.len());
            Pin::new(&mut self.inner).poll_read(cx, &mut buffer[..step])
        }
    }

    impl AsyncWrite for Steps<&mut Vec<u8>> {
        fn poll_write(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            bytes: &[u8],
        ) -> Poll<io::Result<usize>> {
            let step = ready!(self.poll_step(cx)).min(bytes.len());
            Pin::new(&mut self.inner).poll_write(cx, &bytes[..step])
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
            let mut written = Vec::new();
            let reader = BufReader::new(Steps::new(bytes.as_slice(), step));
            block_on(echo(reader, Steps::new(&mut written, step))).unwrap();
            assert!(written == bytes, "with steps of {step}");
        }
    }
}
