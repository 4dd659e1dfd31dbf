//! Notifications to the service manager (systemd, sd_notify(3)). Without one they go nowhere.

use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::Duration;

use sd_notify::NotifyState;
use tracing::{debug, warn};

use crate::server::Liveness;

/// Time for the last notifications when the process ends.
const LAST_NOTIFICATIONS: Duration = Duration::from_secs(1);

/// The service manager that started this process.
///
/// A thread of its own sends the notifications: a manager that does not read holds up nothing else.
pub struct ServiceManager {
    notifications: Option<Sender<Vec<NotifyState<'static>>>>,
    all_sent: Receiver<()>,
}

impl ServiceManager {
    /// Starts the thread that sends notifications.
    #[expect(clippy::new_without_default, reason = "it starts a thread")]
    pub fn new() -> Self {
        let (notifications, queue) = mpsc::channel::<Vec<NotifyState<'static>>>();
        let (done, all_sent) = mpsc::channel();
        thread::spawn(move || {
            for state in queue {
                if let Err(error) = sd_notify::notify(&state) {
                    warn!(%error, "cannot notify the service manager");
                }
            }
            // The process may have stopped waiting.
            let _ = done.send(());
        });
        Self {
            notifications: Some(notifications),
            all_sent,
        }
    }

    fn notify(&self, state: Vec<NotifyState<'static>>) {
        if let Some(notifications) = &self.notifications {
            // The thread ends after this value.
            let _ = notifications.send(state);
        }
    }

    /// Clients can connect.
    pub fn ready(&self) {
        self.notify(vec![NotifyState::Ready]);
    }

    /// A reload has begun. [`Self::ready`] ends it.
    pub fn reloading(&self) {
        match NotifyState::monotonic_usec_now() {
            Ok(now) => self.notify(vec![NotifyState::Reloading, now]),
            Err(error) => debug!(%error, "the monotonic clock is unknown"),
        }
    }

    /// The server drains.
    pub fn stopping(&self) {
        self.notify(vec![NotifyState::Stopping]);
    }

    /// The process with this ID is the service from now on.
    pub fn replaced_by(&self, pid: u32) {
        self.notify(vec![NotifyState::MainPid(pid)]);
    }

    /// Feeds the watchdog (`WatchdogSec=`) twice per period while all threads make progress.
    pub async fn feed_watchdog(&self, liveness: &Liveness) {
        let period = sd_notify::watchdog_enabled();
        let Some(period) = period.filter(|period| *period > Duration::ZERO) else {
            return;
        };
        loop {
            liveness.check().await;
            self.notify(vec![NotifyState::Watchdog]);
            tokio::time::sleep(period / 2).await;
        }
    }
}

impl Drop for ServiceManager {
    fn drop(&mut self) {
        drop(self.notifications.take());
        let _ = self.all_sent.recv_timeout(LAST_NOTIFICATIONS);
    }
}
