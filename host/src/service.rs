//! A service: what is listened for, and the versions of the guest that handle it.
//!
//! Connections begin with the current version and stay with it. A new one is made ready off their way
//! (`load.rs`) and takes its place by one exchange of a pointer; what it replaces drains.

mod figures;
mod load;
mod probe;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use arc_swap::ArcSwap;
use bytes::Bytes;
use prometheus_client::registry::Registry;
use tokio::sync::Notify;
use tracing::{info, warn};

use crate::connection::{Counts, KINDS, Limits, Measures, Open, Version};
use crate::lifecycle::{Controller, Lifecycle};
use crate::sandbox::{Digest, Engine, Grants, Guest};
use crate::spans::Spans;
pub use probe::Probe;

/// What a service is, beside its guest.
pub struct Settings {
    /// What it is called.
    pub name: String,
    /// What a connection may take.
    pub limits: Limits,
    /// What guests may see.
    pub grants: Grants,
    /// What a guest is asked before it is served.
    pub probe: Option<Probe>,
    /// How long connections may go on with a version after it was replaced. None is no limit.
    pub max_old_version_age: Option<Duration>,
    /// Where it is told how connections went, if anywhere.
    pub spans: Option<Arc<Spans>>,
}

/// A service with its versions.
pub struct Service {
    settings: Settings,
    name: Arc<str>,
    engine: Engine,
    current: ArcSwap<Version>,
    versions: Mutex<Versions>,
    measures: Arc<Measures>,
    open: Arc<Open>,
    /// One swap at a time.
    turn: tokio::sync::Mutex<()>,
    swapped: Notify,
    swaps: [AtomicU64; SWAPS.len()],
}

/// What became of attempts to swap, by name.
const SWAPS: [&str; 4] = ["swapped", "unchanged", "refused", "rolled_back"];

/// The places of those names.
#[derive(Clone, Copy)]
enum Attempt {
    Swapped,
    Unchanged,
    Refused,
    RolledBack,
}

/// A version, from when it is served until nobody is served with it any more.
struct Installed {
    version: Arc<Version>,
    /// Tells its connections that they are waited for, and how urgently.
    controller: Controller,
    since: SystemTime,
    /// When it was replaced.
    retired: Option<Instant>,
    /// What it is made of, for a successor of this process.
    component: Bytes,
    /// The connections that had ended when it became one of the older ones: those are not counted
    /// among these.
    counted_before: [u64; KINDS.len()],
}

struct Versions {
    current: Installed,
    /// Kept for a rollback.
    previous: Option<Installed>,
    /// Those that still have connections, the latest first.
    older: Vec<Installed>,
    /// The connections of those that are gone, that ended while they were among the older ones.
    gone: [u64; KINDS.len()],
    /// The server ends: there is to be no other version.
    draining: bool,
}

/// A version, for people to see.
#[derive(Debug)]
pub struct VersionStatus {
    /// What its component is known by.
    pub digest: Digest,
    /// When it was first served.
    pub since: SystemTime,
    /// Its place among the others.
    pub state: VersionState,
    /// The connections that are open.
    pub open: u64,
    /// The connections that have ended, as [`KINDS`] has them.
    pub ended: [u64; KINDS.len()],
}

/// A version's place among the others.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum VersionState {
    /// New connections are served with it.
    Current,
    /// It was before, and can be again.
    Previous,
    /// It goes when its connections have ended.
    Old,
}

/// What came of a swap that did not fail.
#[derive(Debug)]
pub struct Swapped {
    /// What is served now.
    pub digest: Digest,
    /// What was served before. The same: nothing has changed.
    pub before: Digest,
    /// How long it took to make it ready and to exchange them.
    pub took: Duration,
}

/// Why nothing was swapped.
#[derive(Debug, thiserror::Error)]
pub enum SwapError {
    /// The new version is not one that can be run.
    #[error("the new version is refused, and nothing has changed: {0}")]
    Refused(String),
    /// There is only one version.
    #[error("there is no previous version to return to; swap to one first")]
    NoPrevious,
    /// There will be no new connections.
    #[error("the server is draining, and nothing has changed; swap the guest of its successor")]
    Draining,
    /// It could not be tried.
    #[error("the new version could not be made ready, and nothing has changed: {0}")]
    Internal(String),
}

/// Adds to `registry` what is counted of `services`.
pub fn register(services: Vec<Arc<Service>>, registry: &mut Registry) {
    figures::register(services, registry);
}

impl Service {
    /// A service that begins with the guest made of `component`'s bytes.
    ///
    /// # Errors
    ///
    /// Says why the guest is refused.
    pub fn new(
        settings: Settings,
        engine: Engine,
        open: Arc<Open>,
        component: Bytes,
    ) -> Result<Self, String> {
        let guest = load::load(&engine, &settings, &component)?;
        let name: Arc<str> = settings.name.as_str().into();
        let measures = Arc::new(Measures::default());
        let version = |controller: &Controller| Version {
            service: name.clone(),
            guest,
            limits: settings.limits,
            lifecycle: controller.lifecycle(),
            counts: Counts::default(),
            measures: measures.clone(),
            open: open.clone(),
            spans: settings.spans.clone(),
        };
        let installed = Installed::new(component, version);
        Ok(Self {
            name,
            engine,
            current: ArcSwap::new(installed.version.clone()),
            versions: Mutex::new(Versions {
                current: installed,
                previous: None,
                older: Vec::new(),
                gone: Default::default(),
                draining: false,
            }),
            measures,
            open,
            turn: Default::default(),
            swapped: Notify::new(),
            swaps: Default::default(),
            settings,
        })
    }

    /// What it is called.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The version that a new connection is to be served with.
    pub fn current(&self) -> Arc<Version> {
        self.current.load_full()
    }

    /// The bytes of the component that is served.
    pub fn component(&self) -> Bytes {
        self.versions().current.component.clone()
    }

    /// What its connections took.
    pub fn measures(&self) -> &Measures {
        &self.measures
    }

    /// Serves new connections with the guest made of `component`'s bytes, once that is known to work.
    /// Those that are open go on with theirs.
    ///
    /// # Errors
    ///
    /// Says why nothing has changed.
    pub async fn swap(self: Arc<Self>, component: Bytes) -> Result<Swapped, SwapError> {
        let began = Instant::now();
        let _turn = self.turn.lock().await;
        let loaded = self.make_ready(component.clone()).await;
        let swapped = loaded.and_then(|guest| match guest {
            Some(guest) => self.exchange(guest, component, began),
            None => Ok(self.unchanged(began)),
        });
        let attempt = match &swapped {
            Ok(swapped) if swapped.digest == swapped.before => Attempt::Unchanged,
            Ok(_) => Attempt::Swapped,
            Err(_) => Attempt::Refused,
        };
        self.note(attempt, &swapped);
        swapped
    }

    /// Serves new connections with the version before this one.
    ///
    /// # Errors
    ///
    /// Says why nothing has changed.
    pub async fn roll_back(&self) -> Result<Swapped, SwapError> {
        let began = Instant::now();
        let _turn = self.turn.lock().await;
        let previous = match &self.versions().previous {
            Some(previous) => Ok((previous.guest(), previous.component.clone())),
            None => Err(SwapError::NoPrevious),
        };
        let swapped =
            previous.and_then(|(guest, component)| self.exchange(guest, component, began));
        let attempt = match swapped {
            Ok(_) => Attempt::RolledBack,
            Err(_) => Attempt::Refused,
        };
        self.note(attempt, &swapped);
        swapped
    }

    /// The versions that there are, the latest first.
    pub fn status(&self) -> Vec<VersionStatus> {
        let versions = self.versions();
        let mut all = vec![versions.current.status(VersionState::Current)];
        let previous = versions.previous.iter();
        all.extend(previous.map(|one| one.status(VersionState::Previous)));
        let older = versions.older.iter();
        all.extend(older.map(|one| one.status(VersionState::Old)));
        all
    }

    /// Does what is due without anybody's asking: frees versions that nobody is served with, ends
    /// connections whose version is too old, and has the versions drain and end when the server does.
    pub async fn tend(&self, server: &Lifecycle) {
        /// How soon a version is freed. Arbitrary: it costs a look at some pointers.
        const OFTEN: Duration = Duration::from_millis(100);
        let looking_after = async {
            loop {
                match self.look_after_old_versions() {
                    0 => self.swapped.notified().await,
                    _ => tokio::time::sleep(OFTEN).await,
                }
            }
        };
        let ending = async {
            server.draining().await;
            self.drain();
            server.ended().await;
            self.open.end_all();
        };
        tokio::select! {
            () = ending => {}
            () = looking_after => {}
        }
    }

    /// Returns how many there are to look after.
    fn look_after_old_versions(&self) -> usize {
        let mut versions = self.versions();
        let versions = &mut *versions;
        let (free, busy) = std::mem::take(&mut versions.older)
            .into_iter()
            .partition(Installed::is_unused);
        versions.older = busy;
        for one in free {
            let digest = one.version.guest.digest().short();
            info!(service = %self.name, version = digest, "an old version is freed");
            let ended = one.ended_as_older();
            versions.gone = std::array::from_fn(|kind| versions.gone[kind] + ended[kind]);
        }
        if let Some(age) = self.settings.max_old_version_age {
            let retired = versions.previous.iter().chain(&versions.older);
            retired
                .filter(|one| !one.is_unused() && one.retired.is_some_and(|at| at.elapsed() > age))
                .for_each(|one| self.open.end_old(&one.version));
        }
        let previous = versions.previous.iter().filter(|one| !one.is_unused());
        versions.older.len() + previous.count()
    }

    fn drain(&self) {
        let mut versions = self.versions();
        versions.draining = true;
        let versions = &*versions;
        let replaced = versions.previous.iter().chain(&versions.older);
        for one in [&versions.current].into_iter().chain(replaced) {
            one.controller.drain();
        }
    }

    fn versions(&self) -> MutexGuard<'_, Versions> {
        self.versions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A guest of the component, or None if it is the current one.
    async fn make_ready(
        self: &Arc<Self>,
        component: Bytes,
    ) -> Result<Option<Arc<Guest>>, SwapError> {
        if self.versions().draining {
            return Err(SwapError::Draining);
        }
        let this = self.clone();
        load::off_the_way(move || {
            let digest = Digest::of(&component);
            if *this.current().guest.digest() == digest {
                return Ok(None);
            }
            let previous = this.versions().previous.as_ref().map(Installed::guest);
            if let Some(known) = previous.filter(|guest| *guest.digest() == digest) {
                return Ok(Some(known));
            }
            load::load(&this.engine, &this.settings, &component).map(Some)
        })
        .await
    }

    /// Makes `guest` the current version.
    fn exchange(
        &self,
        guest: Arc<Guest>,
        component: Bytes,
        began: Instant,
    ) -> Result<Swapped, SwapError> {
        let digest = guest.digest().clone();
        let installed = Installed::new(component, |controller| Version {
            service: self.name.clone(),
            guest,
            limits: self.settings.limits,
            lifecycle: controller.lifecycle(),
            counts: Counts::default(),
            measures: self.measures.clone(),
            open: self.open.clone(),
            spans: self.settings.spans.clone(),
        });
        let mut versions = self.versions();
        if versions.draining {
            return Err(SwapError::Draining);
        }
        self.current.store(installed.version.clone());
        let mut before = std::mem::replace(&mut versions.current, installed);
        before.controller.replace();
        before.retired = Some(Instant::now());
        let digest_before = before.version.guest.digest().clone();
        if let Some(mut older) = versions.previous.replace(before) {
            older.counted_before = older.version.counts.ended();
            versions.older.insert(0, older);
        }
        drop(versions);
        self.swapped.notify_one();
        Ok(Swapped {
            digest,
            before: digest_before,
            took: began.elapsed(),
        })
    }

    fn unchanged(&self, began: Instant) -> Swapped {
        let digest = self.current().guest.digest().clone();
        Swapped {
            before: digest.clone(),
            digest,
            took: began.elapsed(),
        }
    }

    fn note(&self, attempt: Attempt, swapped: &Result<Swapped, SwapError>) {
        self.swaps[attempt as usize].fetch_add(1, Ordering::Relaxed);
        let service = &*self.name;
        match swapped {
            Ok(Swapped {
                digest,
                before,
                took,
            }) => info!(
                service,
                version = digest.short(),
                before = before.short(),
                ?took,
                outcome = SWAPS[attempt as usize],
                "a new version was given"
            ),
            Err(error) => warn!(service, %error, "a swap failed"),
        }
    }
}

impl Installed {
    fn new(component: Bytes, version: impl FnOnce(&Controller) -> Version) -> Self {
        let controller = Controller::default();
        Self {
            version: Arc::new(version(&controller)),
            controller,
            since: SystemTime::now(),
            retired: None,
            component,
            counted_before: Default::default(),
        }
    }

    /// The connections that have ended since it is one of the older ones.
    fn ended_as_older(&self) -> [u64; KINDS.len()] {
        let ended = self.version.counts.ended();
        std::array::from_fn(|kind| ended[kind] - self.counted_before[kind])
    }

    fn guest(&self) -> Arc<Guest> {
        self.version.guest.clone()
    }

    /// Whether nobody but us has it, now that no connection begins with it.
    fn is_unused(&self) -> bool {
        Arc::strong_count(&self.version) == 1
    }

    fn status(&self, state: VersionState) -> VersionStatus {
        VersionStatus {
            digest: self.version.guest.digest().clone(),
            since: self.since,
            state,
            open: self.version.counts.open(),
            ended: self.version.counts.ended(),
        }
    }
}
