//! Versions of a guest: the current one, the previous one, and older ones that are still in use.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;

use super::settings::ServiceSettings;
use crate::connection::{
    ConnectionRegistry, KillSwitch, OutcomeKind, ServiceStats, Version, VersionStats,
};
use crate::lifecycle::Controller;
use crate::sandbox::{Digest, Guest};

/// Numbers of ended connections, by outcome.
pub(super) type EndedCounts = [u64; OutcomeKind::COUNT];

/// A version of a guest, as operators see it.
#[derive(Debug)]
pub struct VersionStatus {
    /// Digest of the component.
    pub digest: Digest,
    /// Time when it became the current version.
    pub since: SystemTime,
    /// Place among the versions of its service.
    pub state: VersionState,
    /// Open connections.
    pub open: u64,
    /// Ended connections, by outcome.
    pub ended: [u64; OutcomeKind::COUNT],
}

/// Place of a version among the versions of its service.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum VersionState {
    /// New connections use it.
    Current,
    /// A rollback makes it the current version again.
    Previous,
    /// It is freed once its connections have ended.
    Old,
}

/// All versions of a service.
pub(super) struct Versions {
    /// Settings of the current version.
    pub(super) settings: Arc<ServiceSettings>,
    pub(super) current: InstalledVersion,
    /// Kept for a rollback, even without connections.
    pub(super) previous: Option<InstalledVersion>,
    /// Versions before those two that are still in use, the latest first.
    pub(super) older: Vec<InstalledVersion>,
    /// Ended connections of freed versions, as [`InstalledVersion::ended_since_old`] counts them.
    pub(super) ended_on_freed: EndedCounts,
    /// The server is draining, so the current version stays.
    pub(super) draining: bool,
}

impl Versions {
    pub(super) fn new(settings: Arc<ServiceSettings>, current: InstalledVersion) -> Self {
        Self {
            settings,
            current,
            previous: None,
            older: Vec::new(),
            ended_on_freed: Default::default(),
            draining: false,
        }
    }

    /// Makes `next` the current version. Returns the digest of the replaced one.
    ///
    /// New settings leave no previous version: a rollback would bring back the old settings too.
    pub(super) fn replace_current(
        &mut self,
        next: InstalledVersion,
        settings: Arc<ServiceSettings>,
    ) -> Digest {
        let mut replaced = std::mem::replace(&mut self.current, next);
        replaced.controller.replace();
        replaced.replaced_at = Some(Instant::now());
        let digest = replaced.guest().digest().clone();
        let has_new_settings = !Arc::ptr_eq(&self.settings, &settings);
        self.settings = settings;
        if let Some(previous) = self.previous.replace(replaced) {
            self.push_older(previous);
        }
        if has_new_settings && let Some(previous) = self.previous.take() {
            self.push_older(previous);
        }
        digest
    }

    fn push_older(&mut self, mut version: InstalledVersion) {
        version.ended_before_old = version.version.stats.ended();
        self.older.insert(0, version);
    }

    /// Drops older versions without connections, and returns their digests.
    pub(super) fn free_unused(&mut self) -> Vec<Digest> {
        let (unused, in_use): (Vec<_>, Vec<_>) = std::mem::take(&mut self.older)
            .into_iter()
            .partition(InstalledVersion::is_unused);
        self.older = in_use;
        for version in &unused {
            let ended = version.ended_since_old();
            self.ended_on_freed =
                std::array::from_fn(|outcome| self.ended_on_freed[outcome] + ended[outcome]);
        }
        unused
            .iter()
            .map(|version| version.guest().digest().clone())
            .collect()
    }

    /// Versions in use that were replaced more than `age` ago.
    pub(super) fn expired(&self, age: Duration) -> impl Iterator<Item = &Arc<Version>> {
        self.replaced()
            .filter(move |version| !version.is_unused() && version.is_replaced_for(age))
            .map(|version| &version.version)
    }

    /// Number of replaced versions that need another look: older ones, and a previous one in use.
    pub(super) fn pending(&self) -> usize {
        let previous = self.previous.iter().filter(|version| !version.is_unused());
        self.older.len() + previous.count()
    }

    /// Keeps the current version for good. The connections of all versions drain.
    pub(super) fn drain(&mut self) {
        self.draining = true;
        self.current.controller.drain();
        self.replaced()
            .for_each(|version| version.controller.drain());
    }

    /// The status of each version, the latest first.
    pub(super) fn status(&self) -> Vec<VersionStatus> {
        let current = self.current.status(VersionState::Current);
        let previous = self.previous.iter();
        let previous = previous.map(|version| version.status(VersionState::Previous));
        let older = self.older.iter();
        let older = older.map(|version| version.status(VersionState::Old));
        [current].into_iter().chain(previous).chain(older).collect()
    }

    fn replaced(&self) -> impl Iterator<Item = &InstalledVersion> {
        self.previous.iter().chain(&self.older)
    }
}

/// The parts of a service that all its versions share.
pub(super) struct SharedParts {
    pub(super) name: Arc<str>,
    pub(super) stats: Arc<ServiceStats>,
    pub(super) registry: Arc<ConnectionRegistry>,
    pub(super) kill_switch: Arc<KillSwitch>,
}

impl SharedParts {
    /// A version that handles connections with `guest`, within `settings`.
    ///
    /// `component` holds the bytes that the guest was made from.
    pub(super) fn version(
        &self,
        guest: Arc<Guest>,
        component: Bytes,
        settings: &ServiceSettings,
    ) -> InstalledVersion {
        let controller = Controller::default();
        let version = Version {
            service: self.name.clone(),
            guest,
            limits: settings.limits,
            lifecycle: controller.lifecycle(),
            stats: VersionStats::default(),
            service_stats: self.stats.clone(),
            kill_switch: self.kill_switch.clone(),
            spans: settings.spans.clone(),
        };
        InstalledVersion {
            version: Arc::new(version),
            controller,
            since: SystemTime::now(),
            replaced_at: None,
            component,
            ended_before_old: Default::default(),
        }
    }
}

/// A version, from its first connection until its last one has ended.
pub(super) struct InstalledVersion {
    pub(super) version: Arc<Version>,
    /// Tells the connections of the version to drain or to end.
    controller: Controller,
    since: SystemTime,
    replaced_at: Option<Instant>,
    /// Bytes of the component. An upgrade hands them to the new process.
    pub(super) component: Bytes,
    /// Connections that had ended when the version became an older one. Metrics have counted those
    /// under the digest of the version, and count only the rest as `older`.
    ended_before_old: EndedCounts,
}

impl InstalledVersion {
    pub(super) fn guest(&self) -> &Arc<Guest> {
        &self.version.guest
    }

    /// Connections that ended since the version became an older one.
    pub(super) fn ended_since_old(&self) -> EndedCounts {
        let ended = self.version.stats.ended();
        std::array::from_fn(|outcome| ended[outcome] - self.ended_before_old[outcome])
    }

    /// Whether no connection uses the version. Holds only for replaced versions: no connection can
    /// start with one.
    fn is_unused(&self) -> bool {
        Arc::strong_count(&self.version) == 1
    }

    fn is_replaced_for(&self, age: Duration) -> bool {
        self.replaced_at
            .is_some_and(|replaced_at| replaced_at.elapsed() > age)
    }

    fn status(&self, state: VersionState) -> VersionStatus {
        VersionStatus {
            digest: self.guest().digest().clone(),
            since: self.since,
            state,
            open: self.version.stats.open(),
            ended: self.version.stats.ended(),
        }
    }
}
