//! A guest: a component that is compiled, checked and linked.

use std::future::poll_fn;
use std::pin::pin;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use wasmtime::Store;
use wasmtime::component::Accessor;

use super::admission::{self, AdmittedComponent};
use super::digest::Digest;
use super::engine::Engine;
use super::fairness;
use super::grants::Grants;
use super::host_tcp::bindings::types::ErrorCode;
use super::host_tcp::bindings::{self, Connection, GuestInstance, GuestPre};
use super::imports::{Report, mismatch};
use super::limits::{self, GuestLimits};
use super::requirements::Refusal;
use super::store::StoreState;
use super::transport::{SharedTransport, Transport};
use super::trap::{self, Trap};
use crate::sync::lock;

/// A guest, ready to be instantiated for any connection.
pub struct Guest {
    engine: Engine,
    pre: GuestPre<StoreState>,
    grants: Grants,
    limits: GuestLimits,
    report: Report,
    digest: Digest,
    was_compiled: bool,
}

/// Why a call of a guest did not succeed.
#[derive(Debug, PartialEq)]
pub enum Failure {
    /// The guest returned an error.
    Guest(String),
    /// The guest trapped, and cannot go on.
    Trap(Trap),
    /// No instance could be made.
    NotStarted(String),
}

impl Guest {
    /// Makes a guest of the bytes of a component.
    ///
    /// Each instance has these grants and limits.
    ///
    /// # Errors
    ///
    /// Refuses a component that cannot run, with the reason and the fix.
    pub fn new(
        engine: &Engine,
        component: &[u8],
        grants: Grants,
        limits: GuestLimits,
    ) -> Result<Self, Refusal> {
        let digest = Digest::of(component);
        let AdmittedComponent {
            component,
            report,
            was_compiled,
        } = admission::admit(engine, component, &digest, &grants, &limits)?;
        let pre = engine
            .linker()
            .instantiate_pre(&component)
            .map_err(mismatch)?;
        let pre = GuestPre::new(pre).map_err(mismatch)?;
        component
            .initialize_copy_on_write_image()
            .map_err(mismatch)?;
        Ok(Self {
            engine: engine.clone(),
            pre,
            grants,
            limits,
            report,
            digest,
            was_compiled,
        })
    }

    /// Makes a guest of the same component, with other grants and limits.
    ///
    /// # Errors
    ///
    /// Refuses grants and limits that the component cannot run with.
    pub fn within(&self, grants: Grants, limits: GuestLimits) -> Result<Self, Refusal> {
        admission::check(&self.engine, &self.report, &grants, &limits)?;
        Ok(Self {
            engine: self.engine.clone(),
            pre: self.pre.clone(),
            grants,
            limits,
            report: self.report.clone(),
            digest: self.digest.clone(),
            was_compiled: false,
        })
    }

    /// The digest of the component.
    pub fn digest(&self) -> &Digest {
        &self.digest
    }

    /// Whether [`Self::new`] compiled the component. False if the cache had the code.
    pub fn was_compiled(&self) -> bool {
        self.was_compiled
    }

    /// The imports, exports and requirements of the guest.
    pub fn report(&self) -> &Report {
        &self.report
    }

    /// Handles one connection in a new instance.
    ///
    /// The instance is gone when this returns or is dropped.
    ///
    /// # Errors
    ///
    /// Returns the reason to reset the connection.
    pub async fn handle<T: Transport>(&self, transport: Arc<Mutex<T>>) -> Result<(), Failure> {
        let transport: SharedTransport = transport;
        let mut store = self.store(&transport);
        // Declared after the store, and so dropped before it, whichever way this function ends.
        let _release = ReleaseOnDrop(transport.clone());
        self.in_turns(&transport, self.run(&mut store)).await
    }

    /// Makes an instance, and drops it without a call.
    ///
    /// # Errors
    ///
    /// [`Failure::NotStarted`] if no instance can be made.
    pub async fn try_out<T: Transport>(&self, transport: Arc<Mutex<T>>) -> Result<(), Failure> {
        let transport: SharedTransport = transport;
        let mut store = self.store(&transport);
        let instantiating = self.instantiate(&mut store);
        self.in_turns(&transport, instantiating).await.map(drop)
    }

    fn store(&self, transport: &SharedTransport) -> Store<StoreState> {
        let stores = self.engine.stores();
        stores.store(&self.grants, &self.limits, transport.clone())
    }

    /// Drives `work`, which runs a guest, in turns.
    ///
    /// Each poll is a turn of the guest.
    async fn in_turns<T>(&self, transport: &SharedTransport, work: impl Future<Output = T>) -> T {
        let mut work = pin!(work);
        let clock = self.engine.clock();
        let mut cpu_time = fairness::CpuTime::default();
        poll_fn(|cx| {
            let before = cpu_time.total();
            fairness::begin_turn(clock, cpu_time);
            let poll = work.as_mut().poll(cx);
            cpu_time = fairness::end_turn(clock);
            // Most turns see no tick, and need no lock.
            if cpu_time.total() != before {
                lock(transport).computed(cpu_time.total());
            }
            poll
        })
        .await
    }

    /// Makes an instance in `store`, and calls its handler.
    async fn run(&self, store: &mut Store<StoreState>) -> Result<(), Failure> {
        let instance = self.instantiate(store).await?;
        let result = store
            .run_concurrent(async |accessor| call_handler(&instance, accessor).await)
            .await
            .flatten();
        match result {
            Ok(Ok(())) => Ok(()),
            Ok(Err(code)) => Err(Failure::Guest(bindings::describe(&code))),
            Err(error) => {
                report_limit(store, &error);
                Err(Failure::Trap(trap::describe(&error)))
            }
        }
    }

    async fn instantiate(&self, store: &mut Store<StoreState>) -> Result<GuestInstance, Failure> {
        let began = Instant::now();
        let instantiated = self.pre.instantiate_async(&mut *store).await;
        let instance = instantiated.map_err(|error| {
            report_limit(store, &error);
            Failure::NotStarted(trap::reason(&error))
        })?;
        lock(&store.data().transport).instantiated(began.elapsed());
        Ok(instance)
    }
}

/// Calls the guest's handler. If the guest succeeds, its last write is delivered too.
async fn call_handler(
    instance: &GuestInstance,
    accessor: &Accessor<StoreState>,
) -> wasmtime::Result<Result<(), ErrorCode>> {
    let connection =
        accessor.with(|mut store| store.data_mut().table.push(Connection::default()))?;
    let result = instance
        .wasinetd_tcp_handler()
        .call_handle_connection(accessor, connection)
        .await?;
    if result.is_ok() {
        poll_fn(|cx| accessor.with(|mut store| store.data_mut().sending.poll_delivered(cx))).await;
    }
    Ok(result)
}

/// Tells the transport if a limit caused the error.
fn report_limit(store: &Store<StoreState>, error: &wasmtime::Error) {
    if let Some(limit) = limits::limit_of_error(error) {
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
