//! The byte streams between a transport and a guest.
//!
//! Bytes move between the transport and the memory of the guest without a buffer in between: the
//! host holds nothing on behalf of a guest.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::sync::oneshot;
use wasmtime::component::{
    Destination, DirectSource, Source, StreamConsumer, StreamProducer, StreamResult,
};
use wasmtime::{AsContextMut, StoreContextMut};

use super::bindings::types::ErrorCode;
use crate::sandbox::fairness;
use crate::sandbox::store::StoreState;
use crate::sandbox::transport::SharedTransport;
use crate::sync::lock;

/// The bytes moved at once between two streams of the host.
///
/// A guest can pass a stream of the host back to the host, such as to `send`.
const SPLICE_BYTES: usize = 16 * 1024;

/// The future that tells the guest how a direction ended.
type EndSender = oneshot::Sender<Result<(), ErrorCode>>;

/// Produces the bytes that the transport receives.
pub(super) struct Receiver(Direction);

impl Receiver {
    pub(super) fn new(transport: SharedTransport, end: EndSender) -> Self {
        Self(Direction::new(transport, end))
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        let _ = self.0.end(Ok(()));
    }
}

impl StreamProducer<StoreState> for Receiver {
    type Item = u8;
    type Buffer = Option<u8>;

    fn poll_produce<'a>(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        mut store: StoreContextMut<'a, StoreState>,
        destination: Destination<'a, u8, Option<u8>>,
        finish: bool,
    ) -> Poll<wasmtime::Result<StreamResult>> {
        if fairness::poll_turn(&store.data().clock, cx).is_pending() {
            return pending(finish);
        }
        if destination.remaining(&mut store) == Some(0) {
            return match lock(&self.0.transport).poll_receivable(cx) {
                Poll::Ready(()) => Poll::Ready(Ok(StreamResult::Completed)),
                Poll::Pending => pending(finish),
            };
        }
        // A guest reads into a buffer of its own. The capacity is for a guest that passes the
        // stream back to the host, such as to `send`.
        let mut destination = destination.as_direct(store, SPLICE_BYTES);
        let received = lock(&self.0.transport).poll_receive(cx, destination.remaining());
        match received {
            Poll::Ready(Ok(0)) => self.0.end(Ok(())),
            Poll::Ready(Ok(n)) => {
                destination.mark_written(n);
                Poll::Ready(Ok(StreamResult::Completed))
            }
            Poll::Ready(Err(error)) => self.0.end(Err(error)),
            Poll::Pending => pending(finish),
        }
    }
}

/// Consumes the bytes that the transport sends.
pub(super) struct Sender {
    direction: Direction,
    /// Whether a part of the current write has been sent.
    is_partly_sent: bool,
}

impl Sender {
    pub(super) fn new(transport: SharedTransport, end: EndSender) -> Self {
        Self {
            direction: Direction::new(transport, end),
            is_partly_sent: false,
        }
    }

    /// Sends the current write of the guest to its last byte.
    ///
    /// A write that has begun is delivered even if the guest returns meanwhile.
    fn send_all<D>(
        &mut self,
        cx: &mut Context<'_>,
        source: &mut DirectSource<'_, D>,
        finish: bool,
    ) -> Poll<wasmtime::Result<StreamResult>> {
        while !source.remaining().is_empty() {
            let sent = lock(&self.direction.transport).poll_send(cx, source.remaining());
            match sent {
                Poll::Ready(Ok(n)) => {
                    source.mark_read(n);
                    self.is_partly_sent = true;
                }
                Poll::Ready(Err(error)) => return self.direction.end(Err(error)),
                Poll::Pending if self.is_partly_sent && finish => break,
                Poll::Pending => return pending(finish),
            }
        }
        Poll::Ready(Ok(StreamResult::Completed))
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        lock(&self.direction.transport).close_sending();
        let _ = self.direction.end(Ok(()));
    }
}

impl StreamConsumer<StoreState> for Sender {
    type Item = u8;

    fn poll_consume(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        mut store: StoreContextMut<'_, StoreState>,
        source: Source<'_, u8>,
        finish: bool,
    ) -> Poll<wasmtime::Result<StreamResult>> {
        let turn_is_over = fairness::poll_turn(&store.data().clock, cx).is_pending();
        let mut source = source.as_direct(store.as_context_mut());
        // A write of no bytes asks whether the transport would accept more.
        let is_query = source.remaining().is_empty() && !self.is_partly_sent;
        let result = if turn_is_over && !self.is_partly_sent {
            pending(finish)
        } else if is_query {
            match lock(&self.direction.transport).poll_sendable(cx) {
                Poll::Ready(()) => Poll::Ready(Ok(StreamResult::Completed)),
                Poll::Pending => pending(finish),
            }
        } else {
            self.send_all(cx, &mut source, finish)
        };
        self.is_partly_sent &= result.is_pending();
        // A guest may return before its query is answered.
        store
            .data_mut()
            .sending
            .write_polled(result.is_pending() && !is_query);
        result
    }
}

/// One direction of a transport.
struct Direction {
    transport: SharedTransport,
    /// None once the guest was told how the direction ended.
    end: Option<EndSender>,
}

impl Direction {
    fn new(transport: SharedTransport, end: EndSender) -> Self {
        Self {
            transport,
            end: Some(end),
        }
    }

    /// Ends the direction, and tells the guest how. The first call decides.
    fn end(&mut self, result: Result<(), io::Error>) -> Poll<wasmtime::Result<StreamResult>> {
        if let Some(end) = self.end.take() {
            // The guest may have dropped its future.
            let _ = end.send(result.map_err(ErrorCode::from));
        }
        Poll::Ready(Ok(StreamResult::Dropped))
    }
}

/// The result of an operation that cannot complete now. `finish` means that the guest cancels it.
fn pending(finish: bool) -> Poll<wasmtime::Result<StreamResult>> {
    if finish {
        Poll::Ready(Ok(StreamResult::Cancelled))
    } else {
        Poll::Pending
    }
}
