//! The host's side of `wasinetd:tcp`.
//!
//! Bytes go from the transport into the memory of the guest, and back, without a buffer in
//! between: the host holds nothing on behalf of a guest.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use tokio::sync::oneshot;
use wasmtime::component::{
    Access, Accessor, Destination, DirectSource, FutureReader, HasSelf, Linker, Resource, Source,
    StreamConsumer, StreamProducer, StreamReader, StreamResult,
};
use wasmtime::{AsContextMut, StoreContextMut};

use super::{ClientCertificate, SharedTransport, StoreState, TlsInfo, fairness, lock};
use crate::net::TransportAddress;
use bindings::wasinetd::tcp::types::{
    self, ErrorCode, Host, HostConnection, HostConnectionWithStore, Ipv4SocketAddress,
    Ipv6SocketAddress, SocketAddress,
};

/// Generated from `wit/`, the same files that the guest SDK generates its side from.
#[allow(missing_docs, unreachable_pub)]
pub(super) mod bindings {
    wasmtime::component::bindgen!({
        path: "../wit",
        inline: "
            package wasinetd:host;

            /// The part of `wasinetd:tcp/connection-handler` that is wasinetd's own. WASI's part
            /// is linked from wasmtime-wasi.
            world guest {
                import wasinetd:tcp/types@0.1.0;
                export wasinetd:tcp/handler@0.1.0;
            }
        ",
        world: "wasinetd:host/guest",
        imports: {
            "wasinetd:tcp/types@0.1.0.[method]connection.receive": store | trappable,
            "wasinetd:tcp/types@0.1.0.[method]connection.send": store | trappable,
            default: trappable,
        },
        exports: { default: async | store },
        with: {
            "wasinetd:tcp/types@0.1.0.connection": super::Connection,
        },
    });
}

/// Adds `wasinetd:tcp/types` to `linker`.
pub(super) fn add_to_linker(linker: &mut Linker<StoreState>) -> wasmtime::Result<()> {
    bindings::wasinetd::tcp::types::add_to_linker::<_, HasSelf<StoreState>>(linker, |state| state)
}

/// What a guest's handle of its connection stands for. The transport itself is in the [`State`]:
/// there is one to a store.
#[derive(Default)]
#[allow(unreachable_pub, reason = "the generated code re-exports it")]
pub struct Connection {
    receiving: bool,
    sending: bool,
}

/// Whether the transport has yet to take what the guest has begun to write.
#[derive(Default)]
pub(super) struct PendingSend {
    /// The turns that the store still has to look for a write that was begun before `send` was
    /// called.
    turns: u8,
    pending: bool,
    waker: Option<Waker>,
}

/// How often a store is polled before what it was handed by `send` has been polled for sure: it takes
/// that over, and then polls it, with other work in between.
const TURNS: u8 = 8;

impl PendingSend {
    /// The guest has called `send`.
    fn begun(&mut self) {
        self.turns = TURNS;
    }

    /// A write was looked at, and is pending or not.
    fn polled(&mut self, pending: bool) {
        self.turns = 0;
        self.pending = pending;
        if !pending && let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    /// Ready when no write is under way.
    pub(super) fn poll_settled(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.turns > 0 {
            self.turns -= 1;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        if !self.pending {
            return Poll::Ready(());
        }
        self.waker = Some(cx.waker().clone());
        Poll::Pending
    }
}

impl Host for StoreState {}

impl HostConnection for StoreState {
    fn id(&mut self, _: Resource<Connection>) -> wasmtime::Result<u64> {
        Ok(lock(&self.transport).id())
    }

    fn remote_address(&mut self, _: Resource<Connection>) -> wasmtime::Result<SocketAddress> {
        Ok(lock(&self.transport).remote_address().into())
    }

    fn local_address(&mut self, _: Resource<Connection>) -> wasmtime::Result<SocketAddress> {
        Ok(lock(&self.transport).local_address()?.into())
    }

    fn tls(&mut self, _: Resource<Connection>) -> wasmtime::Result<Option<types::TlsInfo>> {
        Ok(lock(&self.transport).tls().cloned().map(Into::into))
    }

    fn is_draining(&mut self, _: Resource<Connection>) -> wasmtime::Result<bool> {
        Ok(lock(&self.transport).is_draining())
    }

    fn is_replaced(&mut self, _: Resource<Connection>) -> wasmtime::Result<bool> {
        Ok(lock(&self.transport).is_replaced())
    }

    fn drop(&mut self, connection: Resource<Connection>) -> wasmtime::Result<()> {
        self.table.delete(connection)?;
        Ok(())
    }
}

impl HostConnectionWithStore<StoreState> for HasSelf<StoreState> {
    fn receive(
        mut store: Access<'_, StoreState, Self>,
        connection: Resource<Connection>,
    ) -> wasmtime::Result<(StreamReader<u8>, FutureReader<Result<(), ErrorCode>>)> {
        let state = store.get();
        let connection = state.table.get_mut(&connection)?;
        if std::mem::replace(&mut connection.receiving, true) {
            return Ok((
                StreamReader::new(&mut store, std::iter::empty())?,
                FutureReader::new(&mut store, async {
                    wasmtime::error::Ok(Err(ErrorCode::InvalidState))
                })?,
            ));
        }
        let (end, ended) = oneshot::channel();
        let receiver = Receiver(Direction::new(state.transport.clone(), end));
        Ok((
            StreamReader::new(&mut store, receiver)?,
            FutureReader::new(&mut store, ended)?,
        ))
    }

    fn send(
        mut store: Access<'_, StoreState, Self>,
        connection: Resource<Connection>,
        mut data: StreamReader<u8>,
    ) -> wasmtime::Result<FutureReader<Result<(), ErrorCode>>> {
        let state = store.get();
        let connection = state.table.get_mut(&connection)?;
        if std::mem::replace(&mut connection.sending, true) {
            data.close(&mut store)?;
            return FutureReader::new(&mut store, async {
                wasmtime::error::Ok(Err(ErrorCode::InvalidState))
            });
        }
        let (end, ended) = oneshot::channel();
        let sender = Sender {
            direction: Direction::new(state.transport.clone(), end),
            taken: false,
        };
        state.sending.begun();
        data.pipe(&mut store, sender)?;
        FutureReader::new(&mut store, ended)
    }

    async fn draining(
        accessor: &Accessor<StoreState, Self>,
        _: Resource<Connection>,
    ) -> wasmtime::Result<()> {
        let draining = accessor.with(|mut store| lock(&store.get().transport).draining());
        draining.await;
        Ok(())
    }

    async fn replaced(
        accessor: &Accessor<StoreState, Self>,
        _: Resource<Connection>,
    ) -> wasmtime::Result<()> {
        let replaced = accessor.with(|mut store| lock(&store.get().transport).replaced());
        replaced.await;
        Ok(())
    }
}

/// One direction of a transport, and where to say how it ended.
struct Direction {
    transport: SharedTransport,
    end: Option<oneshot::Sender<Result<(), ErrorCode>>>,
}

impl Direction {
    fn new(transport: SharedTransport, end: oneshot::Sender<Result<(), ErrorCode>>) -> Self {
        Self {
            transport,
            end: Some(end),
        }
    }

    /// Says how the direction ended, unless that was said before.
    fn end(&mut self, result: Result<(), io::Error>) -> Poll<wasmtime::Result<StreamResult>> {
        if let Some(end) = self.end.take() {
            // The guest need not listen.
            let _ = end.send(result.map_err(ErrorCode::from));
        }
        Poll::Ready(Ok(StreamResult::Dropped))
    }
}

/// What a pending operation answers: the guest may ask for its end (`finish`).
fn pending(finish: bool) -> Poll<wasmtime::Result<StreamResult>> {
    if finish {
        Poll::Ready(Ok(StreamResult::Cancelled))
    } else {
        Poll::Pending
    }
}

/// What is moved at once when a guest connects a stream of the host to another, in bytes.
const SPLICE_BYTES: usize = 16 * 1024;

/// Produces what the transport receives.
struct Receiver(Direction);

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
        if fairness::poll_lasts(&store.data().clock, cx).is_pending() {
            return pending(finish);
        }
        if destination.remaining(&mut store) == Some(0) {
            return match lock(&self.0.transport).poll_receivable(cx) {
                Poll::Ready(()) => Poll::Ready(Ok(StreamResult::Completed)),
                Poll::Pending => pending(finish),
            };
        }
        // A guest reads into a buffer of its own. The capacity is for a guest that hands the stream
        // on to the host, such as to `send`.
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

/// Consumes what the transport is to send.
struct Sender {
    direction: Direction,
    /// Some of the present write has been sent.
    taken: bool,
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
        let over = fairness::poll_lasts(&store.data().clock, cx).is_pending();
        let mut source = source.as_direct(store.as_context_mut());
        let asks = source.remaining().is_empty() && !self.taken;
        let result = if over && !self.taken {
            pending(finish)
        } else if asks {
            // The guest asks whether it could write.
            match lock(&self.direction.transport).poll_sendable(cx) {
                Poll::Ready(()) => Poll::Ready(Ok(StreamResult::Completed)),
                Poll::Pending => pending(finish),
            }
        } else {
            self.send_all(cx, &mut source, finish)
        };
        self.taken &= result.is_pending();
        // A question need not be answered before the guest may return.
        store
            .data_mut()
            .sending
            .polled(result.is_pending() && !asks);
        result
    }
}

impl Sender {
    /// Sends what the guest writes to its last byte: a write that has begun is delivered even if
    /// the guest returns meanwhile.
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
                    self.taken = true;
                }
                Poll::Ready(Err(error)) => return self.direction.end(Err(error)),
                Poll::Pending if self.taken && finish => break,
                Poll::Pending => return pending(finish),
            }
        }
        Poll::Ready(Ok(StreamResult::Completed))
    }
}

impl From<io::Error> for ErrorCode {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::ConnectionReset => Self::ConnectionReset,
            io::ErrorKind::BrokenPipe => Self::ConnectionBroken,
            io::ErrorKind::ConnectionAborted => Self::ConnectionAborted,
            io::ErrorKind::TimedOut => Self::Timeout,
            _ => Self::Other(Some(error.to_string())),
        }
    }
}

impl From<TlsInfo> for types::TlsInfo {
    fn from(tls: TlsInfo) -> Self {
        let certificate = |shown: ClientCertificate| types::ClientCertificate {
            subject: shown.subject,
            fingerprint: shown.fingerprint,
        };
        Self {
            server_name: tls.server_name,
            alpn: tls.alpn,
            version: tls.version,
            client_certificate: tls.client_certificate.map(certificate),
        }
    }
}

impl From<TransportAddress> for SocketAddress {
    fn from(address: TransportAddress) -> Self {
        match address {
            TransportAddress::Ip(SocketAddr::V4(address)) => Self::Ipv4(Ipv4SocketAddress {
                port: address.port(),
                address: address.ip().octets().into(),
            }),
            TransportAddress::Ip(SocketAddr::V6(address)) => Self::Ipv6(Ipv6SocketAddress {
                port: address.port(),
                flow_info: address.flowinfo(),
                address: address.ip().segments().into(),
                scope_id: address.scope_id(),
            }),
            // WIT has no other text than Unicode.
            TransportAddress::Unix(path) => {
                Self::Unix(path.map(|path| path.to_string_lossy().into()))
            }
        }
    }
}

/// The longest text of a guest's error that is logged, in bytes.
const MAX_ERROR_TEXT: usize = 512;

/// A guest's error for the log, in one line of bounded length.
pub(super) fn describe(code: &ErrorCode) -> String {
    let text = match code {
        ErrorCode::ConnectionReset => "connection reset",
        ErrorCode::ConnectionBroken => "connection broken",
        ErrorCode::ConnectionAborted => "connection aborted",
        ErrorCode::Timeout => "timeout",
        ErrorCode::InvalidState => "invalid state",
        ErrorCode::Other(Some(text)) => text,
        ErrorCode::Other(None) => "unspecified",
    };
    super::output::printable(text.as_bytes(), MAX_ERROR_TEXT)
}
