//! Swaps: exchanging the current version of a guest for another one.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use tokio::sync::OwnedMutexGuard;
use tracing::{debug, info, warn};

use super::prepare;
use super::settings::ServiceSettings;
use super::state::Service;
use super::swap_outcome::{SwapError, SwapOutcome, SwapReport};
use crate::sandbox::{Digest, Guest};
use crate::sync::lock;
use crate::telemetry::counters::Named;

/// A tested version that no connection uses yet.
///
/// Other swaps of the service wait until it is installed or dropped.
pub struct PreparedVersion {
    /// `None` if the version is the current one already.
    change: Option<Change>,
    began: Instant,
    _lock: SwapLock,
}

/// The right to swap the guest of a service. One exists at a time.
pub struct SwapLock(#[expect(dead_code, reason = "held until dropped")] OwnedMutexGuard<()>);

/// The guest and the settings of the next version.
struct Change {
    guest: Arc<Guest>,
    component: Bytes,
    settings: Arc<ServiceSettings>,
}

impl Service {
    /// Tests the guest of `component`, then serves new connections with it.
    ///
    /// Open connections keep their version.
    ///
    /// # Errors
    ///
    /// [`SwapError`]: the current version stays.
    pub async fn swap(self: Arc<Self>, component: Bytes) -> Result<SwapReport, SwapError> {
        let prepared = self.prepare(component, None).await?;
        self.install(prepared)
    }

    /// Prepares a version for [`Self::install`] from the bytes of `component`.
    ///
    /// `settings` replace those of the current version, if given.
    ///
    /// # Errors
    ///
    /// [`SwapError`]: the current version stays.
    pub async fn prepare(
        self: &Arc<Self>,
        component: Bytes,
        settings: Option<ServiceSettings>,
    ) -> Result<PreparedVersion, SwapError> {
        let began = Instant::now();
        let lock = self.lock_swaps().await;
        match self.load(component, settings.map(Arc::new)).await {
            Ok(change) => Ok(PreparedVersion {
                change,
                began,
                _lock: lock,
            }),
            Err(error) => {
                self.report_failure(&error);
                Err(error)
            }
        }
    }

    /// Serves new connections with a prepared version. Open connections keep their version.
    ///
    /// If the version has new settings, [`Self::roll_back`] cannot undo this, because a rollback would
    /// bring back the old settings too.
    ///
    /// # Errors
    ///
    /// [`SwapError::Draining`] if the server drains meanwhile.
    pub fn install(&self, prepared: PreparedVersion) -> Result<SwapReport, SwapError> {
        let began = prepared.began;
        match prepared.change {
            Some(change) => {
                let result = self.exchange(change, began);
                self.report(SwapOutcome::Swapped, result)
            }
            None => self.report(SwapOutcome::Unchanged, Ok(self.unchanged(began))),
        }
    }

    /// Serves new connections with the previous version. Open connections keep their version.
    ///
    /// # Errors
    ///
    /// [`SwapError::NoPrevious`] or [`SwapError::Draining`]: the current version stays.
    pub async fn roll_back(&self) -> Result<SwapReport, SwapError> {
        let began = Instant::now();
        let _lock = self.lock_swaps().await;
        let result = self
            .previous()
            .ok_or(SwapError::NoPrevious)
            .and_then(|change| self.exchange(change, began));
        self.report(SwapOutcome::RolledBack, result)
    }

    /// Waits until no swap is under way. No other swap begins until the lock is dropped.
    pub async fn lock_swaps(&self) -> SwapLock {
        SwapLock(self.swap_lock.clone().lock_owned().await)
    }

    /// Loads and tests the guest of `component`. `None` if neither the guest nor the settings change.
    async fn load(
        self: &Arc<Self>,
        component: Bytes,
        new_settings: Option<Arc<ServiceSettings>>,
    ) -> Result<Option<Change>, SwapError> {
        let (settings, previous) = {
            let versions = lock(&self.versions);
            if versions.draining {
                return Err(SwapError::Draining);
            }
            let previous = versions.previous.as_ref();
            let previous = previous.map(|version| version.guest().clone());
            (versions.settings.clone(), previous)
        };
        let service = self.clone();
        prepare::in_background(move || {
            let digest = Digest::of(&component);
            let is_same = |guest: &Arc<Guest>| *guest.digest() == digest;
            let current = Some(service.current().guest.clone()).filter(is_same);
            let previous = previous.filter(is_same);
            let guest = match (current, previous, &new_settings) {
                (Some(_), _, None) => return Ok(None),
                // The previous version was tested with the same settings.
                (None, Some(previous), None) => previous,
                (current, previous, new_settings) => {
                    let settings = new_settings.as_ref().unwrap_or(&settings);
                    let compiled = current.or(previous);
                    prepare::load_guest(&service.engine, settings, &component, compiled.as_deref())?
                }
            };
            Ok(Some(Change {
                guest,
                component,
                settings: new_settings.unwrap_or(settings),
            }))
        })
        .await
    }

    /// The change that a rollback makes.
    fn previous(&self) -> Option<Change> {
        let versions = lock(&self.versions);
        let previous = versions.previous.as_ref()?;
        Some(Change {
            guest: previous.guest().clone(),
            component: previous.component.clone(),
            settings: versions.settings.clone(),
        })
    }

    /// Makes another version the current one.
    fn exchange(&self, change: Change, began: Instant) -> Result<SwapReport, SwapError> {
        let Change {
            guest,
            component,
            settings,
        } = change;
        let digest = guest.digest().clone();
        let next = self.shared.version(guest, component, &settings);
        let mut versions = lock(&self.versions);
        if versions.draining {
            return Err(SwapError::Draining);
        }
        // Before the replaced version drains: its connections may ask their clients to connect again,
        // and those clients must reach the new version.
        self.current.store(next.version.clone());
        let before = versions.replace_current(next, settings);
        drop(versions);
        self.swapped.notify_one();
        Ok(SwapReport {
            digest,
            before,
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

    /// Counts and logs the result of a swap. `outcome` is that of a success.
    fn report(
        &self,
        outcome: SwapOutcome,
        result: Result<SwapReport, SwapError>,
    ) -> Result<SwapReport, SwapError> {
        match &result {
            Ok(report) => self.report_success(outcome, report),
            Err(error) => self.report_failure(error),
        }
        result
    }

    fn report_success(&self, outcome: SwapOutcome, report: &SwapReport) {
        self.swaps.add(outcome);
        let SwapReport {
            digest,
            before,
            took,
        } = report;
        if outcome == SwapOutcome::Unchanged {
            debug!(
                service = self.name(),
                version = digest.short(),
                "the guest version is unchanged"
            );
        } else {
            info!(
                service = self.name(),
                version = digest.short(),
                before = before.short(),
                ?took,
                outcome = outcome.name(),
                "guest version changed"
            );
        }
    }

    fn report_failure(&self, error: &SwapError) {
        self.swaps.add(SwapOutcome::Refused);
        warn!(service = self.name(), %error, "a swap failed");
    }
}
