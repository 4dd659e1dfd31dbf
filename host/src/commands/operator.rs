//! Does what operators and signals say while the server serves.

use std::path::{Path, PathBuf};
use std::pin::{Pin, pin};

use bytes::Bytes;
use futures::stream::{SelectAll, select_all};
use futures::{Stream, StreamExt};
use tokio::sync::{Notify, mpsc, oneshot};
use tracing::{info, warn};
use wasinetd::Error;
use wasinetd::admin::{Admin, Obeyed, Reloaded};
use wasinetd::config::Table;
use wasinetd::lifecycle::Controller;

use super::configured::{Checked, Configured, check_all};
use super::fleet::{Change, Changes, Fleet};
use super::successor::Handover;
use super::supervisor::Supervisor;
use super::{read, watch};

/// What it is done with.
pub(super) struct Operator<'a> {
    pub(super) supervisor: &'a Supervisor,
    pub(super) fleet: &'a Fleet,
    /// The config file, with what it says of the server, which only a new process follows.
    pub(super) config: Option<(PathBuf, Table)>,
    pub(super) controller: &'a Controller,
    pub(super) admin: Option<&'a Admin>,
    pub(super) drain: mpsc::Sender<()>,
    /// Told when other guests may have to be watched.
    pub(super) reloaded: Notify,
}

/// What has changed in files.
pub(super) type Watched = SelectAll<Pin<Box<dyn Stream<Item = Change>>>>;

/// Watches files for what their changes mean.
pub(super) fn watch(files: Vec<(Change, PathBuf)>) -> Result<Watched, Error> {
    let watched = files.into_iter().map(|(change, file)| {
        let changes = watch::changes(&file)?.map(move |()| change.clone());
        Ok(Box::pin(changes) as Pin<Box<dyn Stream<Item = _>>>)
    });
    Ok(select_all(watched.collect::<Result<Vec<_>, Error>>()?))
}

impl Operator<'_> {
    /// Serves what the files say by now, at each item, and says what came of it, until the server drains.
    pub(super) async fn reload(
        &self,
        reloads: impl Stream<Item = Option<oneshot::Sender<Reloaded>>>,
    ) {
        let reloading = async {
            let mut reloads = pin!(reloads);
            while let Some(done) = reloads.next().await {
                self.supervisor.reloading();
                let outcome = self.read_again().await;
                self.supervisor.ready();
                match &outcome {
                    Ok(changes) => info!(%changes, "reloaded"),
                    Err(error) => warn!(%error, "nothing has changed"),
                }
                if let Some(done) = done {
                    // Whoever asked may have gone.
                    let _ = done.send(outcome);
                }
            }
        };
        self.until_draining(reloading).await;
    }

    /// Swaps to what the files of guests have, and speaks TLS with what those of certificates have, when
    /// they have changed that are to be watched.
    pub(super) async fn follow_files(&self, mut watched: Watched) {
        let following = async {
            loop {
                tokio::select! {
                    Some(change) = watched.next() => match change {
                        Change::Guest(name) => self.swap_from_file(&name).await,
                        Change::Tls(name) => self.read_certificates(Some(&name)).await,
                    },
                    () = self.reloaded.notified() => match watch(self.fleet.watched()) {
                        Ok(others) => watched = others,
                        Err(error) => warn!(%error, "files are watched as before"),
                    }
                }
            }
        };
        self.until_draining(following).await;
    }

    async fn until_draining(&self, work: impl Future<Output = ()>) {
        let lifecycle = self.controller.lifecycle();
        tokio::select! {
            biased;
            () = lifecycle.draining() => {}
            () = work => {}
        }
    }

    async fn read_again(&self) -> Reloaded {
        self.read_certificates(None).await;
        match &self.config {
            Some((path, table)) => {
                let changes = self.follow_config(path.clone(), table).await;
                self.reloaded.notify_one();
                changes.map_err(|error| error.to_string())
            }
            None => {
                let mut outcomes = Vec::new();
                for name in self.fleet.names() {
                    outcomes.push(self.swap(&name).await?);
                }
                Ok(outcomes.join(", "))
            }
        }
    }

    async fn follow_config(&self, path: PathBuf, before: &Table) -> Result<String, Error> {
        // Guests may be large, and on a file system that takes its time.
        let reading = tokio::task::spawn_blocking(move || wanted(&path));
        let failed = |error| super::internal("reading the config file")(error);
        let (server, services) = reading.await.map_err(failed)??;
        let changes = self.fleet.turn_into(services).await?;
        let mut text = described(&changes);
        if !server.same_but(before, &[]) {
            text += "; what is set for the server itself needs a restart (ctl restart)";
        }
        Ok(text)
    }

    /// Reads the files of TLS again, of one service or all.
    async fn read_certificates(&self, of: Option<&str>) {
        for tls in self.fleet.tls_of(of) {
            match tokio::task::spawn_blocking(move || tls.reload()).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => warn!(%error, "TLS is spoken as before"),
                Err(error) => warn!(%error, "reading the files of TLS failed"),
            }
        }
    }

    async fn swap_from_file(&self, name: &str) {
        if let Err(error) = self.swap(name).await {
            warn!(service = name, %error, "nothing has changed");
        }
    }

    /// Swaps a service to what its guest's file has.
    async fn swap(&self, name: &str) -> Reloaded {
        let Some((service, file)) = self.fleet.guest_of(name) else {
            return Err("the service is gone".into());
        };
        // A file system may take its time.
        let component = tokio::task::spawn_blocking(move || read(&file)).await;
        let component = component.map_err(|error| error.to_string())?;
        let component = component.map_err(|error| error.to_string())?;
        // That it is swapped, or why not, is logged there.
        match service.swap(Bytes::from(component)).await {
            Ok(swapped) if swapped.digest == swapped.before => Ok(format!("{name} is unchanged")),
            Ok(swapped) => Ok(format!("{name} serves {} now", swapped.digest.short())),
            Err(error) => Err(error.to_string()),
        }
    }

    /// Hands over to a new process at an item, and says what came of it, until the server drains: the
    /// sockets are not to be kept open then, and a new process that is on its way is of no use.
    pub(super) async fn restart(
        &self,
        restarts: impl Stream<Item = Option<oneshot::Sender<Obeyed>>>,
        handover: Handover,
    ) {
        let lifecycle = self.controller.lifecycle();
        let mut restarts = pin!(restarts);
        loop {
            let done = tokio::select! {
                biased;
                () = lifecycle.draining() => return,
                Some(done) = restarts.next() => done,
            };
            let outcome = tokio::select! {
                biased;
                () = lifecycle.draining() => Err("the server drains".into()),
                outcome = self.hand_over(&handover) => outcome,
            };
            match &outcome {
                Ok(pid) => info!(pid, "a new process has taken over"),
                Err(error) => warn!(%error, "no new process has taken over"),
            }
            if let Some(done) = done {
                // Whoever asked may have gone.
                let _ = done.send(outcome);
            }
        }
    }

    async fn hand_over(&self, handover: &Handover) -> Obeyed {
        let served = self.fleet.to_hand_over();
        let served = served.map_err(|error| error.to_string())?;
        let successor = handover.start(&served).await?;
        if !self.controller.hand_over() {
            return Err("the server drains".into());
        }
        let pid = successor.pid();
        successor.takes_over();
        self.supervisor.succeeded_by(pid);
        if let Some(admin) = self.admin {
            admin.hand_over();
        }
        // One that is on its way already is as good.
        let _ = self.drain.try_send(());
        Ok(pid)
    }

    /// Waits until another process has taken over.
    pub(super) async fn handed_over(&self) {
        let lifecycle = self.controller.lifecycle();
        lifecycle.draining().await;
        if !lifecycle.is_handed_over() {
            std::future::pending().await
        }
    }

    /// Says so to the service manager when the server drains. With a successor it does not stop.
    pub(super) async fn say_that_it_stops(&self) {
        let lifecycle = self.controller.lifecycle();
        lifecycle.draining().await;
        if !lifecycle.is_handed_over() {
            self.supervisor.stopping();
        }
    }
}

/// What a config file says now, with what it says of the server.
fn wanted(path: &Path) -> Result<(Table, Vec<Checked>), Error> {
    let configured = Configured::of_file(path)?;
    let services = check_all(configured.services, Some(path), Default::default())?;
    Ok((configured.server_table, services))
}

fn described(changes: &Changes) -> String {
    let parts = [
        ("added", &changes.added),
        ("changed", &changes.changed),
        ("removed", &changes.removed),
    ];
    let parts = parts.iter().filter(|(_, names)| !names.is_empty());
    let parts: Vec<_> = parts
        .map(|(what, names)| format!("{what}: {}", names.join(", ")))
        .collect();
    match &parts[..] {
        [] => "nothing has changed".into(),
        parts => parts.join("; "),
    }
}
