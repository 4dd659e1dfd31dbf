//! The network for guests: `wasi:sockets@0.2`, for TCP connections to granted destinations.
//!
//! The sockets are those of wasmtime-wasi, with a check of each address. Name lookups are ours: a
//! grant may name a host, and a guest may connect to the addresses that a lookup gave it, and to no
//! others.

pub(super) mod destination;
pub(super) mod outbound;

use std::net::IpAddr;
use std::pin::Pin;

use futures::future::FutureExt;
use wasmtime::StoreContextMut;
use wasmtime::component::{Linker, Resource, ResourceType};
use wasmtime_wasi::p2::bindings::sockets::network::{ErrorCode, IpAddress};
use wasmtime_wasi::p2::{self, DynPollable, Pollable};
use wasmtime_wasi::sockets::{WasiSockets, WasiSocketsCtxView, WasiSocketsView};

use super::store::StoreState;
use outbound::{LookupError, Outbound};

/// Adds `wasi:sockets` to `linker`. A guest without a grant is refused earlier, if it imports this.
pub(super) fn add_to_linker(linker: &mut Linker<StoreState>) -> wasmtime::Result<()> {
    use p2::bindings::sockets as s2;

    let options = s2::network::LinkOptions::default();
    s2::network::add_to_linker::<StoreState, WasiSockets>(linker, &options, StoreState::sockets)?;
    s2::instance_network::add_to_linker::<StoreState, WasiSockets>(linker, StoreState::sockets)?;
    s2::tcp::add_to_linker::<StoreState, WasiSockets>(linker, StoreState::sockets)?;
    s2::tcp_create_socket::add_to_linker::<StoreState, WasiSockets>(linker, StoreState::sockets)?;
    s2::udp::add_to_linker::<StoreState, WasiSockets>(linker, StoreState::sockets)?;
    s2::udp_create_socket::add_to_linker::<StoreState, WasiSockets>(linker, StoreState::sockets)?;
    add_lookups_to_linker(linker)?;
    linker.allow_shadowing(true);
    refuse_bind(linker)?;
    linker.allow_shadowing(false);
    Ok(())
}

impl WasiSocketsView for StoreState {
    fn sockets(&mut self) -> WasiSocketsCtxView<'_> {
        WasiSocketsCtxView {
            ctx: self.wasi.sockets(&self.transport),
            table: &mut self.table,
        }
    }
}

fn outbound(state: &mut StoreState) -> &Outbound {
    state.wasi.outbound(&state.transport)
}

/// Refuses explicit binds of guests.
///
/// A socket that connects without a bind gets a port from the kernel, which other sockets can share
/// if their destinations differ. A port that was bound explicitly is taken for all sockets.
fn refuse_bind(linker: &mut Linker<StoreState>) -> wasmtime::Result<()> {
    use p2::bindings::sockets::network::IpSocketAddress;

    linker.instance("wasi:sockets/tcp@0.2.12")?.func_wrap(
        "[method]tcp-socket.start-bind",
        |mut store: StoreContextMut<'_, StoreState>,
         (socket, network, _): (
            Resource<p2::TcpSocket>,
            Resource<p2::Network>,
            IpSocketAddress,
        )| {
            let state = store.data_mut();
            state.table.get(&socket)?;
            state.table.get(&network)?;
            outbound(state).note_refusal();
            Ok((Err::<(), _>(ErrorCode::AccessDenied),))
        },
    )
}

/// `resolve-address-stream` of `wasi:sockets/ip-name-lookup@0.2`: the addresses of a name.
enum AddressStream {
    Pending(Pin<Box<dyn Future<Output = Result<Vec<IpAddr>, LookupError>> + Send>>),
    Complete(Result<std::vec::IntoIter<IpAddr>, LookupError>),
}

impl AddressStream {
    fn next(&mut self) -> Result<Option<IpAddress>, ErrorCode> {
        if let Self::Pending(lookup) = self
            && let Some(addresses) = lookup.as_mut().now_or_never()
        {
            *self = Self::Complete(addresses.map(Vec::into_iter));
        }
        match self {
            Self::Pending(_) => Err(ErrorCode::WouldBlock),
            Self::Complete(Ok(addresses)) => Ok(addresses.next().map(Into::into)),
            Self::Complete(Err(LookupError::Denied)) => Err(ErrorCode::AccessDenied),
            Self::Complete(Err(LookupError::Unknown)) => Err(ErrorCode::NameUnresolvable),
        }
    }
}

#[wasmtime_wasi::async_trait]
impl Pollable for AddressStream {
    async fn ready(&mut self) {
        if let Self::Pending(lookup) = self {
            let addresses = lookup.await;
            *self = Self::Complete(addresses.map(Vec::into_iter));
        }
    }
}

/// Links `wasi:sockets/ip-name-lookup@0.2` function by function.
///
/// The bindings of wasmtime-wasi cannot be used: only wasmtime-wasi can make their resource type.
fn add_lookups_to_linker(linker: &mut Linker<StoreState>) -> wasmtime::Result<()> {
    let mut instance = linker.instance("wasi:sockets/ip-name-lookup@0.2.12")?;
    instance.resource(
        "resolve-address-stream",
        ResourceType::host::<AddressStream>(),
        |mut store: StoreContextMut<'_, StoreState>, rep| {
            store
                .data_mut()
                .table
                .delete(Resource::<AddressStream>::new_own(rep))?;
            Ok(())
        },
    )?;
    instance.func_wrap(
        "resolve-addresses",
        |mut store: StoreContextMut<'_, StoreState>,
         (network, name): (Resource<p2::Network>, String)| {
            let state = store.data_mut();
            state.table.get(&network)?;
            let lookup = Box::pin(outbound(state).look_up(&name));
            let addresses = state.table.push(AddressStream::Pending(lookup))?;
            Ok((Ok::<_, ErrorCode>(addresses),))
        },
    )?;
    instance.func_wrap(
        "[method]resolve-address-stream.resolve-next-address",
        |mut store: StoreContextMut<'_, StoreState>, (addresses,): (Resource<AddressStream>,)| {
            Ok((store.data_mut().table.get_mut(&addresses)?.next(),))
        },
    )?;
    instance.func_wrap(
        "[method]resolve-address-stream.subscribe",
        |mut store: StoreContextMut<'_, StoreState>, (addresses,): (Resource<AddressStream>,)| {
            let pollable: Resource<DynPollable> =
                p2::subscribe(&mut store.data_mut().table, addresses)?;
            Ok((pollable,))
        },
    )
}
