//! The only door to wasmtime.
//!
//! An [`Engine`] is made once, a [`Guest`] once for each version of a guest, and a store, an
//! instance and a call for each connection. Listeners, configuration and command line are unknown
//! here: a connection is a [`Transport`].

mod cache;
mod digest;
mod engine;
mod fairness;
mod grants;
mod host_network;
mod host_tcp;
mod host_wasi;
mod limits;
mod output;
mod requirements;
mod trap;

use std::fmt;
use std::future::poll_fn;
use std::io;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use wasmtime::component::{Accessor, ResourceTable};
use wasmtime::{Store, UpdateDeadline};

pub use cache::{Cache, CacheError};
pub use digest::Digest;
pub use engine::{Engine, HOST_STACK_BYTES, PoolSize};
use fairness::EpochClock;
pub use grants::{Access, DirGrant, Grants};
pub use host_network::{Destination, DestinationError};
use host_wasi::Wasi;
pub use limits::{FREE_MEMORY, GuestLimits, SharedLimits};
use output::OutputLimit;
pub use requirements::{Refusal, Report, Requirements};
pub use trap::Trap;

use crate::limit::Limit;
use crate::net::TransportAddress;
use host_tcp::bindings::wasinetd::tcp::types::ErrorCode;
use host_tcp::{Connection, PendingSend};
use limits::{LimitExceeded, MemoryLimiter};

/// A connection as the sandbox sees it: addresses, and two directions to be polled.
///
/// An error of either direction is final for that direction.
pub trait Transport: Send + 'static {
    /// A number that no other connection has.
    fn id(&self) -> u64;

    /// The address of the peer.
    fn remote_address(&self) -> TransportAddress;

    /// The address that the peer connected to.
    ///
    /// # Errors
    ///
    /// Fails when the system cannot tell any more.
    fn local_address(&self) -> io::Result<TransportAddress>;

    /// What is known of TLS, where it is spoken with the peer.
    fn tls(&self) -> Option<&TlsInfo> {
        None
    }

    /// Receives into `buf`, which is not empty. Zero bytes are the end of the stream.
    fn poll_receive(&mut self, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<io::Result<usize>>;

    /// Ready when [`Self::poll_receive`] is likely to be.
    fn poll_receivable(&mut self, cx: &mut Context<'_>) -> Poll<()>;

    /// Sends some of `bytes`, which is not empty.
    fn poll_send(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>>;

    /// Ready when [`Self::poll_send`] is likely to be.
    fn poll_sendable(&mut self, cx: &mut Context<'_>) -> Poll<()>;

    /// No more will be sent: the peer is to see the end of the stream.
    fn close_sending(&mut self);

    /// The guest has met this limit.
    fn limit_hit(&mut self, limit: Limit);

    /// The guest is gone, and its owner ends the connection. What is still called by what is left
    /// of the guest, [`Self::close_sending`], is to be ignored: it would tell the peer that all is
    /// well.
    fn release(&mut self);

    /// Whether the server waits for this connection to end.
    fn is_draining(&self) -> bool;

    /// Resolves when [`Self::is_draining`] is true.
    fn draining(&self) -> BoxFuture<'static, ()>;

    /// Whether new connections are not handled as this one is any more.
    fn is_replaced(&self) -> bool;

    /// Resolves when [`Self::is_replaced`] is true.
    fn replaced(&self) -> BoxFuture<'static, ()>;

    /// It took so long to make an instance.
    fn instantiated(&mut self, took: Duration) {
        let _ = took;
    }

    /// The guest has computed for so long by now.
    fn computed(&mut self, time: Duration) {
        let _ = time;
    }

    /// The guest has so much memory now, in bytes.
    fn has_memory(&mut self, bytes: usize) {
        let _ = bytes;
    }
}

/// What is known of TLS on a connection.
#[derive(Clone, Debug, PartialEq)]
pub struct TlsInfo {
    /// The name that the peer has asked for (SNI, RFC 6066).
    pub server_name: Option<String>,
    /// The protocol that was agreed on (ALPN, RFC 7301).
    pub alpn: Option<String>,
    /// The version: `TLSv1.2` or `TLSv1.3`.
    pub version: String,
    /// The certificate that the peer has shown, which was checked.
    pub client_certificate: Option<ClientCertificate>,
}

/// For the log: the version, and the name.
impl fmt::Display for TlsInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.version)?;
        match &self.server_name {
            Some(name) => write!(f, " {name}"),
            None => Ok(()),
        }
    }
}

/// A certificate that a peer has shown.
#[derive(Clone, Debug, PartialEq)]
pub struct ClientCertificate {
    /// Whom it is for, as RFC 4514 writes it. Empty where it is for nobody by name, or by one of more
    /// than 4 KiB.
    pub subject: String,
    /// The SHA-256 of the certificate, in hexadecimal digits.
    pub fingerprint: String,
}

/// A transport shared by the sandbox and by its owner, who ends it.
pub(crate) type SharedTransport = Arc<Mutex<dyn Transport>>;

/// Locks what a sandbox shares. A panic while it is held ends the connection; the fields are plain
/// data.
fn lock<T: ?Sized>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Why a call of a guest did not succeed.
#[derive(Debug, PartialEq)]
pub enum Failure {
    /// The guest returned an error.
    Guest(String),
    /// The guest did something that it cannot be let go on after.
    Trap(Trap),
    /// No instance could be made.
    NotStarted(String),
}

/// A guest that is compiled, checked and linked, ready to be instantiated for any connection.
pub struct Guest {
    engine: Engine,
    pre: host_tcp::bindings::GuestPre<StoreState>,
    grants: Grants,
    limits: GuestLimits,
    report: Report,
    digest: Digest,
    compiled: bool,
}

impl Guest {
    /// Makes a guest of the bytes of a component, each instance of which is within `limits`.
    ///
    /// # Errors
    ///
    /// Says what is wrong with the component, and the fix.
    pub fn new(
        engine: &Engine,
        component: &[u8],
        grants: Grants,
        limits: GuestLimits,
    ) -> Result<Self, Refusal> {
        let digest = Digest::of(component);
        let (component, report, compiled) =
            requirements::compile(engine, component, &digest, &grants, &limits)?;
        let pre = engine
            .linker()
            .instantiate_pre(&component)
            .map_err(Refusal::mismatch)?;
        let pre = host_tcp::bindings::GuestPre::new(pre).map_err(Refusal::mismatch)?;
        component
            .initialize_copy_on_write_image()
            .map_err(Refusal::mismatch)?;
        Ok(Self {
            engine: engine.clone(),
            pre,
            grants,
            limits,
            report,
            digest,
            compiled,
        })
    }

    /// The same guest, with other grants and limits.
    ///
    /// # Errors
    ///
    /// Says why it cannot be run within them.
    pub fn within(&self, grants: Grants, limits: GuestLimits) -> Result<Self, Refusal> {
        requirements::admit(&self.engine, &self.report, &grants, &limits)?;
        Ok(Self {
            engine: self.engine.clone(),
            pre: self.pre.clone(),
            grants,
            limits,
            report: self.report.clone(),
            digest: self.digest.clone(),
            compiled: false,
        })
    }

    /// What the bytes of the component are known by.
    pub fn digest(&self) -> &Digest {
        &self.digest
    }

    /// Whether it was compiled for this, and not found in the cache.
    pub fn was_compiled(&self) -> bool {
        self.compiled
    }

    /// What the guest imports, exports and needs.
    pub fn report(&self) -> &Report {
        &self.report
    }

    /// Handles one connection in an instance of its own, which is gone when this returns or is
    /// dropped.
    ///
    /// # Errors
    ///
    /// Says why the connection is to be reset.
    pub async fn handle<T: Transport>(&self, transport: Arc<Mutex<T>>) -> Result<(), Failure> {
        let transport: SharedTransport = transport;
        let mut store = self.store(transport.clone());
        // Dropped before the store is, whichever way this ends.
        let _release = ReleaseOnDrop(transport.clone());
        self.run_fairly(&transport, self.run(&mut store)).await
    }

    /// Makes an instance for a connection, and drops it without a call.
    ///
    /// # Errors
    ///
    /// [`Failure::NotStarted`] when the guest does not get as far as that.
    pub async fn try_out<T: Transport>(&self, transport: Arc<Mutex<T>>) -> Result<(), Failure> {
        let transport: SharedTransport = transport;
        let mut store = self.store(transport.clone());
        let instantiating = self.instantiate(&mut store);
        self.run_fairly(&transport, instantiating).await.map(drop)
    }

    /// Runs what computes in a sandbox, a turn for each poll.
    async fn run_fairly<T>(&self, transport: &SharedTransport, work: impl Future<Output = T>) -> T {
        let mut work = pin!(work);
        let clock = self.engine.clock();
        let mut computed = fairness::CpuTime::default();
        poll_fn(|cx| {
            let before = computed.time();
            fairness::begin(clock, computed);
            let polled = work.as_mut().poll(cx);
            computed = fairness::end(clock);
            // No tick falls into most turns.
            if computed.time() != before {
                lock(transport).computed(computed.time());
            }
            polled
        })
        .await
    }

    fn store(&self, transport: SharedTransport) -> Store<StoreState> {
        let limits = &self.limits;
        let id = lock(&transport).id();
        let mut table = ResourceTable::new();
        table.set_max_capacity(limits.open_files);
        let memory = MemoryLimiter::new(
            limits.memory,
            self.engine.budget().clone(),
            transport.clone(),
        );
        let output = OutputLimit::new(
            limits.output,
            self.engine.clock().clone(),
            transport.clone(),
        );
        let mut store = Store::new(
            self.engine.wasmtime(),
            StoreState {
                wasi: Wasi::new(&self.grants, id, output),
                table,
                memory,
                clock: self.engine.clock().clone(),
                transport,
                sending: PendingSend::default(),
            },
        );
        store.limiter(|state| &mut state.memory);
        store.set_hostcall_fuel(limits.call_size);
        store.set_max_component_handles(limits.handles);
        if let Some(table) = store.concurrent_resource_table() {
            table.set_max_capacity(limits.handles.saturating_mul(ENTRIES_PER_HANDLE));
        }
        self.limit_cpu_time(&mut store);
        store
    }

    /// Has the guest in `store` make way for others, and stops it when its time is up.
    fn limit_cpu_time(&self, store: &mut Store<StoreState>) {
        let most = self.limits.cpu_time.as_micros();
        let clock = self.engine.clock().clone();
        store.set_epoch_deadline(1);
        store.epoch_deadline_callback(move |_| {
            if u128::from(fairness::used(&clock)) > most {
                return Err(LimitExceeded(Limit::CpuTime).into());
            }
            Ok(if fairness::is_over(&clock) {
                UpdateDeadline::YieldCustom(1, Box::pin(fairness::yield_to_others(clock.clone())))
            } else {
                UpdateDeadline::Continue(1)
            })
        });
    }

    async fn instantiate(
        &self,
        store: &mut Store<StoreState>,
    ) -> Result<host_tcp::bindings::Guest, Failure> {
        let began = Instant::now();
        let instantiated = self.pre.instantiate_async(&mut *store).await;
        let instance = instantiated.map_err(|error| {
            note_limit(store, &error);
            Failure::NotStarted(trap::reason(&error))
        })?;
        lock(&store.data().transport).instantiated(began.elapsed());
        Ok(instance)
    }

    /// Makes an instance in `store` and calls it.
    async fn run(&self, store: &mut Store<StoreState>) -> Result<(), Failure> {
        let guest = self.instantiate(store).await?;
        let result = store
            .run_concurrent(async |accessor| call(&guest, accessor).await)
            .await
            .flatten();
        match result {
            Ok(Ok(())) => Ok(()),
            Ok(Err(code)) => Err(Failure::Guest(host_tcp::describe(&code))),
            Err(error) => {
                note_limit(store, &error);
                Err(Failure::Trap(trap::describe(&error)))
            }
        }
    }
}

/// What wasmtime has in its own table of a store for each handle of the guest, at most: the thing
/// itself, and those that wait for it. The handles are bounded first.
const ENTRIES_PER_HANDLE: usize = 4;

/// Tells the transport of the limit that a guest ended for, if it did.
fn note_limit(store: &Store<StoreState>, error: &wasmtime::Error) {
    if let Some(limit) = limits::of_error(error) {
        lock(&store.data().transport).limit_hit(limit);
    }
}

/// Releases a transport when it is dropped.
struct ReleaseOnDrop(SharedTransport);

impl Drop for ReleaseOnDrop {
    fn drop(&mut self) {
        lock(&self.0).release();
    }
}

/// Calls the guest's export, and lets the write that it may have left behind complete.
async fn call(
    guest: &host_tcp::bindings::Guest,
    accessor: &Accessor<StoreState>,
) -> wasmtime::Result<Result<(), ErrorCode>> {
    let connection =
        accessor.with(|mut store| store.data_mut().table.push(Connection::default()))?;
    let result = guest
        .wasinetd_tcp_handler()
        .call_handle_connection(accessor, connection)
        .await?;
    if result.is_ok() {
        poll_fn(|cx| accessor.with(|mut store| store.data_mut().sending.poll_settled(cx))).await;
    }
    Ok(result)
}

/// What a store holds beside the instance.
struct StoreState {
    wasi: Wasi,
    table: ResourceTable,
    memory: MemoryLimiter,
    clock: EpochClock,
    transport: SharedTransport,
    sending: PendingSend,
}
