//! What a service manager is told (systemd, sd_notify(3)). Without one, nobody is.

use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::Duration;

use sd_notify::NotifyState;
use tracing::{debug, warn};
use wasinetd::server::Liveness;

/// How long the last words may take to be heard when the server ends.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Who has started us, and wants to know how we are.
///
/// A thread tells it: a manager that does not listen is not to hold up anyone.
pub(super) struct ServiceManager {
    words: Option<Sender<Vec<NotifyState<'static>>>>,
    told: Receiver<()>,
}

impl ServiceManager {
    pub(super) fn new() -> Self {
        let (words, said) = mpsc::channel::<Vec<NotifyState<'static>>>();
        let (done, told) = mpsc::channel();
        thread::spawn(move || {
            for state in said {
                if let Err(error) = sd_notify::notify(&state) {
                    warn!(%error, "the service manager cannot be told");
                }
            }
            // Whoever waited may have given up.
            let _ = done.send(());
        });
        Self {
            words: Some(words),
            told,
        }
    }

    fn tell(&self, state: Vec<NotifyState<'static>>) {
        if let Some(words) = &self.words {
            // The thread ends after us.
            let _ = words.send(state);
        }
    }

    /// Clients can connect.
    pub(super) fn ready(&self) {
        self.tell(vec![NotifyState::Ready]);
    }

    /// A new version of the guest is made ready. To be followed by [`Self::ready`].
    pub(super) fn reloading(&self) {
        match NotifyState::monotonic_usec_now() {
            Ok(now) => self.tell(vec![NotifyState::Reloading, now]),
            Err(error) => debug!(%error, "the time is not known"),
        }
    }

    /// The server drains.
    pub(super) fn stopping(&self) {
        self.tell(vec![NotifyState::Stopping]);
    }

    /// Another process is the service from now on.
    pub(super) fn succeeded_by(&self, pid: u32) {
        self.tell(vec![NotifyState::MainPid(pid)]);
    }

    /// Says again and again that all threads go on, as often as it is wanted: in half of the time after
    /// which the service manager takes the server for stuck (`WatchdogSec=`). Says nothing while one is.
    pub(super) async fn watchdog(&self, pulse: &Liveness) {
        let within = sd_notify::watchdog_enabled();
        let Some(within) = within.filter(|within| *within > Duration::ZERO) else {
            return;
        };
        loop {
            pulse.check().await;
            self.tell(vec![NotifyState::Watchdog]);
            tokio::time::sleep(within / 2).await;
        }
    }
}

impl Drop for ServiceManager {
    fn drop(&mut self) {
        drop(self.words.take());
        let _ = self.told.recv_timeout(LAST_WORDS);
    }
}
