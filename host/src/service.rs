//! A service: what is listened for, and the versions of the guest that handle it.
//!
//! Connections begin with the current version and stay with it. A new one is made ready off their way
//! (`load.rs`) and takes its place by one exchange of a pointer; what it replaces drains.

mod metrics;
mod prepare;
mod probe;
mod sni_route;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use arc_swap::ArcSwap;
use bytes::Bytes;
use prometheus_client::registry::Registry;
use tokio::sync::{Notify, OwnedMutexGuard};
use tracing::{debug, info, warn};

use crate::connection::{
    ConnectionLimits, ConnectionRegistry, KillSwitch, OutcomeKind, ServiceStats, Version,
    VersionStats,
};
use crate::lifecycle::{Controller, Lifecycle};
use crate::sandbox::{self, Digest, Engine, Grants, Guest};
use crate::telemetry::spans::SpanSender;
pub use probe::Probe;
pub use sni_route::{NamedService, SniRoute};

/// What a service is, beside its guest.
pub struct ServiceSettings {
    /// What it is called.
    pub name: String,
    /// What a connection may take.
    pub limits: ConnectionLimits,
    /// What a guest may use.
    pub sandbox: sandbox::GuestLimits,
    /// What guests may see.
    pub grants: Grants,
    /// What a guest is asked before it is served.
    pub probe: Option<Probe>,
    /// How long connections may go on with a version after it was replaced. None is no limit.
    pub max_old_version_age: Option<Duration>,
    /// Where it is told how connections went, if anywhere.
    pub spans: Option<Arc<SpanSender>>,
}

/// The services of a server, which come and go. Clones share them.
#[derive(Clone, Default)]
pub struct Services(Arc<ArcSwap<Vec<Arc<Service>>>>);

impl Services {
    /// Those that there are, in their order.
    pub fn list(&self) -> Arc<Vec<Arc<Service>>> {
        self.0.load_full()
    }

    /// The one of this name.
    pub fn get(&self, name: &str) -> Option<Arc<Service>> {
        let list = self.list();
        list.iter().find(|service| service.name() == name).cloned()
    }

    /// From now on there are these.
    pub fn set(&self, services: Vec<Arc<Service>>) {
        self.0.store(Arc::new(services));
    }
}

/// A service with its versions.
pub struct Service {
    name: Arc<str>,
    engine: Engine,
    current: ArcSwap<Version>,
    versions: Mutex<Versions>,
    measures: Arc<ServiceStats>,
    open: Arc<ConnectionRegistry>,
    cutoff: Arc<KillSwitch>,
    /// One swap at a time.
    turn: Arc<tokio::sync::Mutex<()>>,
    swapped: Notify,
    swaps: [AtomicU64; SWAPS.len()],
}

/// What became of attempts to swap, by name.
const SWAPS: [&str; 4] = ["swapped", "unchanged", "refused", "rolled_back"];

/// The places of those names.
#[derive(Clone, Copy)]
enum SwapOutcome {
    Swapped,
    Unchanged,
    Refused,
    RolledBack,
}

/// A version, from when it is served until nobody is served with it any more.
struct InstalledVersion {
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
    counted_before: [u64; OutcomeKind::COUNT],
}

struct Versions {
    /// What new connections are served within.
    settings: Arc<ServiceSettings>,
    current: InstalledVersion,
    /// Kept for a rollback.
    previous: Option<InstalledVersion>,
    /// Those that still have connections, the latest first.
    older: Vec<InstalledVersion>,
    /// The connections of those that are gone, that ended while they were among the older ones.
    gone: [u64; OutcomeKind::COUNT],
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
    pub ended: [u64; OutcomeKind::COUNT],
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
pub struct SwapReport {
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

/// A version that is known to work, and that nobody is served with yet. There is no other swap of its
/// service until it is installed or dropped.
pub struct PreparedVersion {
    /// None: it is the one that is served already.
    change: Option<Change>,
    began: Instant,
    _turn: SwapLock,
}

/// The turn to swap the guest of a service. There is one at a time.
pub struct SwapLock(#[expect(dead_code, reason = "it is held")] OwnedMutexGuard<()>);

struct Change {
    guest: Arc<Guest>,
    component: Bytes,
    settings: Arc<ServiceSettings>,
}

/// Adds to `registry` what is counted of `services`.
pub fn register(services: Services, registry: &mut Registry) {
    metrics::register(services, registry);
}

impl Service {
    /// A service that begins with the guest made of `component`'s bytes.
    ///
    /// # Errors
    ///
    /// Says why the guest is refused.
    pub fn new(
        settings: ServiceSettings,
        engine: Engine,
        open: Arc<ConnectionRegistry>,
        component: Bytes,
    ) -> Result<Self, String> {
        let guest = prepare::load(&engine, &settings, &component, None)?;
        let name: Arc<str> = settings.name.as_str().into();
        let measures = Arc::new(ServiceStats::default());
        let cutoff = Arc::new(KillSwitch::default());
        let version = |controller: &Controller| Version {
            service: name.clone(),
            guest,
            limits: settings.limits,
            lifecycle: controller.lifecycle(),
            stats: VersionStats::default(),
            service_stats: measures.clone(),
            kill_switch: cutoff.clone(),
            spans: settings.spans.clone(),
        };
        let installed = InstalledVersion::new(component, version);
        Ok(Self {
            name,
            engine,
            current: ArcSwap::new(installed.version.clone()),
            versions: Mutex::new(Versions {
                settings: Arc::new(settings),
                current: installed,
                previous: None,
                older: Vec::new(),
                gone: Default::default(),
                draining: false,
            }),
            measures,
            open,
            cutoff,
            turn: Default::default(),
            swapped: Notify::new(),
            swaps: Default::default(),
        })
    }

    /// The same, off the way of connections.
    ///
    /// # Errors
    ///
    /// Says why there is none.
    pub async fn make(
        settings: ServiceSettings,
        engine: Engine,
        open: Arc<ConnectionRegistry>,
        component: Bytes,
    ) -> Result<Self, SwapError> {
        prepare::off_the_way(move || Self::new(settings, engine, open, component)).await
    }

    /// The connections that are open, whatever their version.
    pub fn open(&self) -> u64 {
        self.status().iter().map(|version| version.open).sum()
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

    /// Nothing is swapped while this is held, and nothing is being swapped when it is had.
    pub async fn lock_swaps(&self) -> SwapLock {
        SwapLock(self.turn.clone().lock_owned().await)
    }

    /// What its connections took.
    pub fn measures(&self) -> &ServiceStats {
        &self.measures
    }

    /// Serves new connections with the guest made of `component`'s bytes, once that is known to work.
    /// Those that are open go on with theirs.
    ///
    /// # Errors
    ///
    /// Says why nothing has changed.
    pub async fn swap(self: Arc<Self>, component: Bytes) -> Result<SwapReport, SwapError> {
        let prepared = self.prepare(component, None).await?;
        self.install(prepared)
    }

    /// Makes ready what [`Self::install`] has served: the guest made of `component`'s bytes, within other
    /// settings if some are given.
    ///
    /// # Errors
    ///
    /// Says why it is refused.
    pub async fn prepare(
        self: &Arc<Self>,
        component: Bytes,
        settings: Option<ServiceSettings>,
    ) -> Result<PreparedVersion, SwapError> {
        let began = Instant::now();
        let turn = self.lock_swaps().await;
        match self.make_ready(component, settings.map(Arc::new)).await {
            Ok(change) => Ok(PreparedVersion {
                change,
                began,
                _turn: turn,
            }),
            Err(error) => {
                self.note(SwapOutcome::Refused, &Err(&error));
                Err(error)
            }
        }
    }

    /// Serves new connections with what was prepared. Those that are open go on with theirs.
    ///
    /// Other settings are another matter than another guest: there is no way back to the version before
    /// by [`Self::roll_back`], which would bring back the settings as well.
    ///
    /// # Errors
    ///
    /// [`SwapError::Draining`] when it is too late.
    pub fn install(&self, prepared: PreparedVersion) -> Result<SwapReport, SwapError> {
        let began = prepared.began;
        let (attempt, swapped) = match prepared.change {
            Some(change) => (SwapOutcome::Swapped, self.exchange(change, began)),
            None => (SwapOutcome::Unchanged, Ok(self.unchanged(began))),
        };
        match &swapped {
            Ok(swapped) => self.note(attempt, &Ok(swapped)),
            Err(error) => self.note(SwapOutcome::Refused, &Err(error)),
        }
        swapped
    }

    /// Serves new connections with the version before this one.
    ///
    /// # Errors
    ///
    /// Says why nothing has changed.
    pub async fn roll_back(&self) -> Result<SwapReport, SwapError> {
        let began = Instant::now();
        let _turn = self.turn.lock().await;
        let previous = {
            let versions = self.versions();
            let previous = versions.previous.as_ref();
            previous.map(|previous| Change {
                guest: previous.guest(),
                component: previous.component.clone(),
                settings: versions.settings.clone(),
            })
        };
        let swapped = previous
            .ok_or(SwapError::NoPrevious)
            .and_then(|change| self.exchange(change, began));
        match &swapped {
            Ok(swapped) => self.note(SwapOutcome::RolledBack, &Ok(swapped)),
            Err(error) => self.note(SwapOutcome::Refused, &Err(error)),
        }
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
    /// connections whose version is too old, and has the versions drain and end when the service does.
    pub async fn watch_old_versions(&self, service: &Lifecycle) {
        /// How soon a version is freed. Arbitrary: it costs a look at some pointers.
        const OFTEN: Duration = Duration::from_millis(100);
        let looking_after = async {
            loop {
                match self.retire_old_versions() {
                    0 => self.swapped.notified().await,
                    _ => tokio::time::sleep(OFTEN).await,
                }
            }
        };
        let ending = async {
            service.draining().await;
            self.drain();
            service.ended().await;
            self.open.end_all(&self.cutoff);
        };
        tokio::select! {
            () = ending => {}
            () = looking_after => {}
        }
    }

    /// Returns how many there are to look after.
    fn retire_old_versions(&self) -> usize {
        let mut versions = self.versions();
        let versions = &mut *versions;
        let (free, busy) = std::mem::take(&mut versions.older)
            .into_iter()
            .partition(InstalledVersion::is_unused);
        versions.older = busy;
        for one in free {
            let digest = one.version.guest.digest().short();
            info!(service = %self.name, version = digest, "an old version is freed");
            let ended = one.ended_as_older();
            versions.gone = std::array::from_fn(|kind| versions.gone[kind] + ended[kind]);
        }
        if let Some(age) = versions.settings.max_old_version_age {
            let retired = versions.previous.iter().chain(&versions.older);
            retired
                .filter(|one| !one.is_unused() && one.retired.is_some_and(|at| at.elapsed() > age))
                .for_each(|one| self.open.end_old(&one.version));
        }
        let previous = versions.previous.iter().filter(|one| !one.is_unused());
        versions.older.len() + previous.count()
    }

    /// No other version is served from now on, and connections that are idle may end.
    pub fn drain(&self) {
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

    /// What changes by a guest of the component, within other settings if some are given. None if
    /// nothing does.
    async fn make_ready(
        self: &Arc<Self>,
        component: Bytes,
        other: Option<Arc<ServiceSettings>>,
    ) -> Result<Option<Change>, SwapError> {
        let (present, previous) = {
            let versions = self.versions();
            if versions.draining {
                return Err(SwapError::Draining);
            }
            let previous = versions.previous.as_ref().map(InstalledVersion::guest);
            (versions.settings.clone(), previous)
        };
        let this = self.clone();
        prepare::off_the_way(move || {
            let digest = Digest::of(&component);
            let known = [Some(this.current().guest.clone()), previous];
            let known = known.map(|guest| guest.filter(|guest| *guest.digest() == digest));
            let guest = match (known, &other) {
                ([Some(_), _], None) => return Ok(None),
                ([None, Some(previous)], None) => previous,
                ([current, previous], other) => {
                    let settings = other.as_ref().unwrap_or(&present);
                    let known = current.or(previous);
                    prepare::load(&this.engine, settings, &component, known.as_deref())?
                }
            };
            Ok(Some(Change {
                guest,
                component,
                settings: other.unwrap_or(present),
            }))
        })
        .await
    }

    /// Makes another version the current one.
    fn exchange(&self, change: Change, began: Instant) -> Result<SwapReport, SwapError> {
        let Change {
            guest,
            component,
            settings,
        } = change;
        let digest = guest.digest().clone();
        let installed = InstalledVersion::new(component, |controller| Version {
            service: self.name.clone(),
            guest,
            limits: settings.limits,
            lifecycle: controller.lifecycle(),
            stats: VersionStats::default(),
            service_stats: self.measures.clone(),
            kill_switch: self.cutoff.clone(),
            spans: settings.spans.clone(),
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
        let is_other = !Arc::ptr_eq(&versions.settings, &settings);
        versions.settings = settings;
        let older = match versions.previous.replace(before) {
            older if is_other => [versions.previous.take(), older],
            older => [older, None],
        };
        for mut older in older.into_iter().flatten().rev() {
            older.counted_before = older.version.stats.ended();
            versions.older.insert(0, older);
        }
        drop(versions);
        self.swapped.notify_one();
        Ok(SwapReport {
            digest,
            before: digest_before,
            took: began.elapsed(),
        })
    }

    fn unchanged(&self, began: Instant) -> SwapReport {
        let digest = self.current().guest.digest().clone();
        SwapReport {
            before: digest.clone(),
            digest,
            took: began.elapsed(),
        }
    }

    fn note(&self, attempt: SwapOutcome, swapped: &Result<&SwapReport, &SwapError>) {
        self.swaps[attempt as usize].fetch_add(1, Ordering::Relaxed);
        let service = &*self.name;
        match swapped {
            Ok(SwapReport { digest, .. }) if matches!(attempt, SwapOutcome::Unchanged) => {
                debug!(
                    service,
                    version = digest.short(),
                    "this version is served already"
                );
            }
            Ok(SwapReport {
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

impl InstalledVersion {
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
    fn ended_as_older(&self) -> [u64; OutcomeKind::COUNT] {
        let ended = self.version.stats.ended();
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
            open: self.version.stats.open(),
            ended: self.version.stats.ended(),
        }
    }
}
