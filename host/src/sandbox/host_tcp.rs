//! The host's side of `wasinetd:tcp`.

pub(super) mod bindings;
pub(super) mod pending_send;
mod streams;

use tokio::sync::oneshot;
use wasmtime::component::{
    Access, Accessor, FutureReader, HasSelf, Linker, Resource, StreamReader,
};

use super::store::StoreState;
use crate::sync::lock;
use bindings::Connection;
use bindings::types::{
    self, ErrorCode, Host, HostConnection, HostConnectionWithStore, SocketAddress,
};
use streams::{Receiver, Sender};

/// Adds `wasinetd:tcp/types` to `linker`.
pub(super) fn add_to_linker(linker: &mut Linker<StoreState>) -> wasmtime::Result<()> {
    types::add_to_linker::<_, HasSelf<StoreState>>(linker, |state| state)
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
        if std::mem::replace(&mut connection.is_receiving, true) {
            return Ok((
                StreamReader::new(&mut store, std::iter::empty())?,
                FutureReader::new(&mut store, async {
                    wasmtime::error::Ok(Err(ErrorCode::InvalidState))
                })?,
            ));
        }
        let (end, ended) = oneshot::channel();
        let receiver = Receiver::new(state.transport.clone(), end);
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
        if std::mem::replace(&mut connection.is_sending, true) {
            data.close(&mut store)?;
            return FutureReader::new(&mut store, async {
                wasmtime::error::Ok(Err(ErrorCode::InvalidState))
            });
        }
        let (end, ended) = oneshot::channel();
        let sender = Sender::new(state.transport.clone(), end);
        state.sending.stream_passed();
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
