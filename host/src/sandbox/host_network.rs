//! The network as guests see it: `wasi:sockets@0.2`, for TCP connections to granted destinations.
//!
//! Sockets are wasmtime-wasi's, with a check of each address. Names are looked up here: it depends on
//! the name where it may lead, and a guest may connect to what it was told, and nowhere else.

mod destination;

use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures::future::{BoxFuture, FutureExt, Shared};
use tracing::{debug, warn};
use wasmtime::StoreContextMut;
use wasmtime::component::{Linker, Resource, ResourceType};
use wasmtime_wasi::WasiCtx;
use wasmtime_wasi::p2::bindings::sockets::network::{ErrorCode, IpAddress};
use wasmtime_wasi::p2::{self, DynPollable, Pollable};
use wasmtime_wasi::sockets::{
    SocketAddrUse, WasiSockets, WasiSocketsCtx, WasiSocketsCtxView, WasiSocketsView,
};

pub use destination::{Destination, DestinationError};

use super::{SharedTransport, StoreState, lock};
use crate::limit::Limit;

/// How long it is believed where a name leads. Arbitrary: what the system's resolver says has no
/// time to live with it. Long enough that a crowd of guests costs one question.
const BELIEVED: Duration = Duration::from_secs(10);

/// How many addresses of a name are looked at.
const MAX_ADDRESSES: usize = 64;

/// How many destinations a guest is told of and may connect to, at once: of several names.
const MAX_TOLD: usize = 256;

/// Where guests may connect to, and where the names among that lead.
#[derive(Default)]
pub(super) struct Destinations {
    all: Vec<Destination>,
    names: Vec<Name>,
}

impl Destinations {
    pub(super) fn new(destinations: Vec<Destination>) -> Self {
        let mut names: Vec<Name> = Vec::new();
        for destination in &destinations {
            let Some(name) = destination.name() else {
                continue;
            };
            match names.iter_mut().find(|known| known.name == name) {
                Some(known) => known.destinations.push(destination.clone()),
                None => names.push(Name {
                    name: name.into(),
                    destinations: vec![destination.clone()],
                    last: Mutex::default(),
                }),
            }
        }
        Self {
            all: destinations,
            names,
        }
    }

    /// Whether there is nowhere to connect to.
    pub(super) fn is_empty(&self) -> bool {
        self.all.is_empty()
    }
}

/// Where the addresses of a name may be connected to, or why there are none.
type Found = Result<Arc<[SocketAddr]>, LookupError>;

#[derive(Clone, Copy, Debug, PartialEq)]
enum LookupError {
    /// The name was not granted, or leads where it must not.
    Denied,
    /// The system does not know it, or not now.
    Unknown,
}

/// A name that guests may ask for.
struct Name {
    name: String,
    destinations: Vec<Destination>,
    last: Mutex<Option<Lookup>>,
}

/// A question to the system's resolver, which holds up a thread until it is answered. There is one
/// at a time for a name, however many guests ask, and whatever becomes of them meanwhile.
struct Lookup {
    begun: Instant,
    found: Shared<BoxFuture<'static, Found>>,
}

impl Name {
    fn look_up(&self) -> Shared<BoxFuture<'static, Found>> {
        let mut last = lock(&self.last);
        if let Some(Lookup { begun, found }) = &*last {
            // It does not know that it has been answered before someone asks.
            let is_answered = found.clone().now_or_never().is_some();
            if !is_answered || begun.elapsed() < BELIEVED {
                return found.clone();
            }
        }
        let work = tokio::spawn(look_up(self.name.clone(), self.destinations.clone()));
        let found = async { work.await.unwrap_or(Err(LookupError::Unknown)) };
        let found = found.boxed().shared();
        *last = Some(Lookup {
            begun: Instant::now(),
            found: found.clone(),
        });
        found
    }
}

async fn look_up(name: String, destinations: Vec<Destination>) -> Found {
    let addresses: Vec<IpAddr> = match tokio::net::lookup_host((name.as_str(), 0)).await {
        Ok(addresses) => addresses
            .map(|address| address.ip())
            .take(MAX_ADDRESSES)
            .collect(),
        Err(error) => {
            debug!(name, %error, "a name that guests may connect to is not known");
            return Err(LookupError::Unknown);
        }
    };
    let found = permitted(&destinations, &addresses);
    if found.is_empty() {
        warn!(
            name,
            ?addresses,
            fix = "--allow-connect NAME:PORT/CIDR, if it may lead there",
            "a name that guests may connect to leads to no public address, or not into its network"
        );
        return Err(LookupError::Denied);
    }
    Ok(found.into())
}

/// What of `addresses`, with the ports of `destinations`, may be connected to.
fn permitted(destinations: &[Destination], addresses: &[IpAddr]) -> Vec<SocketAddr> {
    let at = |address: &IpAddr| {
        let address = *address;
        destinations.iter().filter_map(move |to| to.at(address))
    };
    addresses.iter().flat_map(at).collect()
}

/// The network of one connection's guest.
#[derive(Clone)]
pub(super) struct Outbound {
    destinations: Arc<Destinations>,
    /// What this guest was told of names.
    told: Arc<Mutex<Vec<SocketAddr>>>,
    transport: SharedTransport,
}

impl Outbound {
    pub(super) fn new(destinations: Arc<Destinations>, transport: SharedTransport) -> Self {
        Self {
            destinations,
            told: Arc::default(),
            transport,
        }
    }

    /// What `wasi:sockets` is made with.
    fn context(&self) -> WasiSocketsCtx {
        let this = self.clone();
        let mut context = WasiCtx::builder()
            .allow_tcp(!self.destinations.is_empty())
            .allow_udp(false)
            .allow_ip_name_lookup(false)
            .socket_addr_check(move |address, to| {
                let allowed = this.allows(address, to);
                Box::pin(std::future::ready(allowed))
            })
            .build();
        std::mem::take(context.sockets())
    }

    fn allows(&self, address: SocketAddr, to: SocketAddrUse) -> bool {
        match to {
            // Any port of any address, as the kernel chooses: what each socket has that connects. Guests
            // do not bind by themselves.
            SocketAddrUse::TcpBind => address.ip().is_unspecified() && address.port() == 0,
            SocketAddrUse::TcpConnect => {
                let allowed = self.may_connect(address);
                if !allowed {
                    self.refused();
                }
                allowed
            }
            _ => false,
        }
    }

    fn may_connect(&self, address: SocketAddr) -> bool {
        let granted = &self.destinations.all;
        let canonical = SocketAddr::new(address.ip().to_canonical(), address.port());
        granted.iter().any(|destination| destination.is(canonical))
            || lock(&self.told).contains(&canonical)
    }

    /// Finds out where `name` leads, for as far as the guest may go there.
    fn look_up(
        &self,
        name: &str,
    ) -> impl Future<Output = Result<Vec<IpAddr>, LookupError>> + use<> {
        // Nothing is looked up for an address, and nothing is learned that would allow it.
        let address = name.parse::<IpAddr>().ok();
        let found = match address {
            Some(_) => None,
            None => destination::normal(name)
                .and_then(|name| {
                    let names = &self.destinations.names;
                    names.iter().find(|known| known.name == name)
                })
                .map(Name::look_up),
        };
        let this = self.clone();
        async move {
            if let Some(address) = address {
                return Ok(vec![address]);
            }
            let found = match found {
                Some(found) => found.await,
                None => Err(LookupError::Denied),
            };
            if found == Err(LookupError::Denied) {
                this.refused();
            }
            Ok(this.tell(&found?))
        }
    }

    /// Tells the guest, and remembers that it was told.
    fn tell(&self, found: &[SocketAddr]) -> Vec<IpAddr> {
        let mut told = lock(&self.told);
        // What it was told long ago goes first.
        let surplus = (told.len() + found.len()).saturating_sub(MAX_TOLD);
        let surplus = surplus.min(told.len());
        told.drain(..surplus);
        let mut addresses = Vec::new();
        for address in found {
            if !told.contains(address) {
                told.push(*address);
            }
            if !addresses.contains(&address.ip()) {
                addresses.push(address.ip());
            }
        }
        addresses
    }

    fn refused(&self) {
        lock(&self.transport).limit_hit(Limit::AllowConnect);
    }
}

impl WasiSocketsView for StoreState {
    fn sockets(&mut self) -> WasiSocketsCtxView<'_> {
        let transport = &self.transport;
        let (outbound, sockets) = self.wasi.network(transport);
        WasiSocketsCtxView {
            ctx: sockets.get_or_insert_with(|| outbound.context()),
            table: &mut self.table,
        }
    }
}

impl StoreState {
    fn outbound(&mut self) -> &Outbound {
        self.wasi.network(&self.transport).0
    }
}

/// Links `wasi:sockets`. A guest that imports it without anything granted is refused before.
pub(super) fn add_to_linker(linker: &mut Linker<StoreState>) -> wasmtime::Result<()> {
    use p2::bindings::sockets as s2;

    let options = s2::network::LinkOptions::default();
    s2::network::add_to_linker::<StoreState, WasiSockets>(linker, &options, StoreState::sockets)?;
    s2::instance_network::add_to_linker::<StoreState, WasiSockets>(linker, StoreState::sockets)?;
    s2::tcp::add_to_linker::<StoreState, WasiSockets>(linker, StoreState::sockets)?;
    s2::tcp_create_socket::add_to_linker::<StoreState, WasiSockets>(linker, StoreState::sockets)?;
    s2::udp::add_to_linker::<StoreState, WasiSockets>(linker, StoreState::sockets)?;
    s2::udp_create_socket::add_to_linker::<StoreState, WasiSockets>(linker, StoreState::sockets)?;
    link_lookups(linker)?;
    linker.allow_shadowing(true);
    refuse_to_bind(linker)?;
    linker.allow_shadowing(false);
    Ok(())
}

/// Keeps guests from binding sockets themselves. Those that connect are bound by the kernel, which
/// for a connection elsewhere takes a port again; a port that was bound is taken for everyone.
fn refuse_to_bind(linker: &mut Linker<StoreState>) -> wasmtime::Result<()> {
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
            state.outbound().refused();
            Ok((Err::<(), _>(ErrorCode::AccessDenied),))
        },
    )
}

/// `resolve-address-stream` of `wasi:sockets/ip-name-lookup@0.2`: addresses, to be asked for one by
/// one.
enum Addresses {
    Looking(Pin<Box<dyn Future<Output = Result<Vec<IpAddr>, LookupError>> + Send>>),
    Found(Result<std::vec::IntoIter<IpAddr>, LookupError>),
}

impl Addresses {
    fn next(&mut self) -> Result<Option<IpAddress>, ErrorCode> {
        if let Self::Looking(looking) = self
            && let Some(found) = looking.as_mut().now_or_never()
        {
            *self = Self::Found(found.map(Vec::into_iter));
        }
        match self {
            Self::Looking(_) => Err(ErrorCode::WouldBlock),
            Self::Found(Ok(addresses)) => Ok(addresses.next().map(Into::into)),
            Self::Found(Err(LookupError::Denied)) => Err(ErrorCode::AccessDenied),
            Self::Found(Err(LookupError::Unknown)) => Err(ErrorCode::NameUnresolvable),
        }
    }
}

#[wasmtime_wasi::async_trait]
impl Pollable for Addresses {
    async fn ready(&mut self) {
        if let Self::Looking(looking) = self {
            let found = looking.await;
            *self = Self::Found(found.map(Vec::into_iter));
        }
    }
}

/// Links `wasi:sockets/ip-name-lookup@0.2` function by function: the resource in wasmtime-wasi's own
/// bindings is of a type that only it can make.
fn link_lookups(linker: &mut Linker<StoreState>) -> wasmtime::Result<()> {
    let mut instance = linker.instance("wasi:sockets/ip-name-lookup@0.2.12")?;
    instance.resource(
        "resolve-address-stream",
        ResourceType::host::<Addresses>(),
        |mut store: StoreContextMut<'_, StoreState>, rep| {
            store
                .data_mut()
                .table
                .delete(Resource::<Addresses>::new_own(rep))?;
            Ok(())
        },
    )?;
    instance.func_wrap(
        "resolve-addresses",
        |mut store: StoreContextMut<'_, StoreState>,
         (network, name): (Resource<p2::Network>, String)| {
            let state = store.data_mut();
            state.table.get(&network)?;
            let looking = Box::pin(state.outbound().look_up(&name));
            let addresses = state.table.push(Addresses::Looking(looking))?;
            Ok((Ok::<_, ErrorCode>(addresses),))
        },
    )?;
    instance.func_wrap(
        "[method]resolve-address-stream.resolve-next-address",
        |mut store: StoreContextMut<'_, StoreState>, (addresses,): (Resource<Addresses>,)| {
            Ok((store.data_mut().table.get_mut(&addresses)?.next(),))
        },
    )?;
    instance.func_wrap(
        "[method]resolve-address-stream.subscribe",
        |mut store: StoreContextMut<'_, StoreState>, (addresses,): (Resource<Addresses>,)| {
            let pollable: Resource<DynPollable> =
                p2::subscribe(&mut store.data_mut().table, addresses)?;
            Ok((pollable,))
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn destinations(texts: &[&str]) -> Vec<Destination> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn addresses(texts: &[&str]) -> Vec<IpAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    /// What may be connected to after a resolver has answered a name so, as text.
    fn after(destinations_of_name: &[&str], answer: &[&str]) -> Vec<String> {
        permitted(&destinations(destinations_of_name), &addresses(answer))
            .iter()
            .map(ToString::to_string)
            .collect()
    }

    #[test]
    fn who_answers_for_a_name_does_not_let_guests_in() {
        // First the real one, then what whoever owns the name would have liked to reach.
        assert_eq!(after(&["db.example.com:80"], &["8.8.8.8"]), ["8.8.8.8:80"]);
        let inside = ["127.0.0.1", "10.0.0.1", "169.254.169.254", "::1", "fd00::1"];
        assert!(after(&["db.example.com:80"], &inside).is_empty());
        assert_eq!(
            after(&["db.example.com:80"], &["10.0.0.1", "8.8.8.8"]),
            ["8.8.8.8:80"]
        );
        assert_eq!(
            after(&["db:80/10.0.0.0/8", "db:81"], &["10.0.0.1", "8.8.8.8"]),
            ["10.0.0.1:80", "8.8.8.8:81"]
        );
    }

    #[tokio::test]
    async fn a_crowd_asks_once() {
        let known = Destinations::new(destinations(&["localhost:80/127.0.0.0/8"]));
        let first = known.names[0].look_up();
        let second = known.names[0].look_up();
        assert!(first.ptr_eq(&second));
        let found = first.await.unwrap();
        assert_eq!(*found, ["127.0.0.1:80".parse().unwrap()]);
        assert!(known.names[0].look_up().ptr_eq(&second));
    }
}
