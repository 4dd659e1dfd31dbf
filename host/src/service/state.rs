//! A service and its versions.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use arc_swap::ArcSwap;
use bytes::Bytes;
use tokio::sync::Notify;
use tracing::info;

use super::prepare;
use super::settings::ServiceSettings;
use super::swap_outcome::{SwapError, SwapOutcome};
use super::versions::{SharedParts, VersionStatus, Versions};
use crate::connection::{ConnectionRegistry, KillSwitch, ServiceStats, Version};
use crate::lifecycle::Lifecycle;
use crate::sandbox::Engine;
use crate::sync::lock;
use crate::telemetry::counters::Counters;

/// A service with the versions of its guest.
pub struct Service {
    pub(super) engine: Engine,
    pub(super) shared: SharedParts,
    /// The current version, for new connections. Unlike `versions`, it needs no lock.
    pub(super) current: ArcSwap<Version>,
    pub(super) versions: Mutex<Versions>,
    /// Held during a swap, from preparing a version to its exchange.
    pub(super) swap_lock: Arc<tokio::sync::Mutex<()>>,
    /// Notified after each swap.
    pub(super) swapped: Notify,
    pub(super) swaps: Counters<SwapOutcome, { SwapOutcome::COUNT }>,
}

impl Service {
    /// Creates a service whose first version is `component`.
    ///
    /// Blocks while the component is compiled and probed.
    ///
    /// # Errors
    ///
    /// Returns the reason if the guest is refused.
    pub fn new(
        settings: ServiceSettings,
        engine: Engine,
        open: Arc<ConnectionRegistry>,
        component: Bytes,
    ) -> Result<Self, String> {
        let guest = prepare::load_guest(&engine, &settings, &component, None)?;
        let shared = SharedParts {
            name: settings.name.as_str().into(),
            stats: Arc::new(ServiceStats::default()),
            registry: open,
            kill_switch: Arc::new(KillSwitch::default()),
        };
        let first = shared.version(guest, component, &settings);
        Ok(Self {
            engine,
            shared,
            current: ArcSwap::new(first.version.clone()),
            versions: Mutex::new(Versions::new(Arc::new(settings), first)),
            swap_lock: Arc::default(),
            swapped: Notify::new(),
            swaps: Counters::new(),
        })
    }

    /// Creates a service like [`Self::new`], on threads of low priority.
    ///
    /// # Errors
    ///
    /// [`SwapError::Refused`] if the guest is refused, [`SwapError::Internal`] if the host fails.
    pub async fn make(
        settings: ServiceSettings,
        engine: Engine,
        open: Arc<ConnectionRegistry>,
        component: Bytes,
    ) -> Result<Self, SwapError> {
        prepare::in_background(move || Self::new(settings, engine, open, component)).await
    }

    /// Name of the service.
    pub fn name(&self) -> &str {
        &self.shared.name
    }

    /// The version for a new connection.
    pub fn current(&self) -> Arc<Version> {
        self.current.load_full()
    }

    /// Bytes of the current component.
    pub fn component(&self) -> Bytes {
        lock(&self.versions).current.component.clone()
    }

    /// Number of open connections, of all versions together.
    pub fn open(&self) -> u64 {
        self.status().iter().map(|version| version.open).sum()
    }

    /// The status of each version, the latest first.
    pub fn status(&self) -> Vec<VersionStatus> {
        lock(&self.versions).status()
    }

    /// Statistics of the service's connections, of all versions together.
    pub fn stats(&self) -> &ServiceStats {
        &self.shared.stats
    }

    /// Starts draining: the current version stays, and idle connections may end.
    pub fn drain(&self) {
        lock(&self.versions).drain();
    }

    /// Looks after replaced versions until the service has ended.
    ///
    /// Frees versions without connections, ends connections whose version was replaced too long ago,
    /// and drains and ends all versions together with the service.
    pub async fn watch_old_versions(&self, service: &Lifecycle) {
        let retiring = async {
            loop {
                if self.retire_old_versions() == 0 {
                    self.swapped.notified().await;
                } else {
                    tokio::time::sleep(RETIRE_INTERVAL).await;
                }
            }
        };
        let ending = async {
            service.draining().await;
            self.drain();
            service.ended().await;
            self.shared.registry.end_all(&self.shared.kill_switch);
        };
        tokio::select! {
            () = ending => {}
            () = retiring => {}
        }
    }

    /// Frees unused versions and ends the connections of expired ones.
    ///
    /// Returns how many replaced versions need another look.
    fn retire_old_versions(&self) -> usize {
        let mut versions = lock(&self.versions);
        for digest in versions.free_unused() {
            info!(
                service = self.name(),
                version = digest.short(),
                "an old version is freed"
            );
        }
        if let Some(age) = versions.settings.max_old_version_age {
            versions
                .expired(age)
                .for_each(|version| self.shared.registry.end_old(version));
        }
        versions.pending()
    }
}

/// Interval of looks at replaced versions. Arbitrary: a look costs a few loads.
const RETIRE_INTERVAL: Duration = Duration::from_millis(100);
