//! Does what operators and signals say while the server serves.

use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use futures::{Stream, StreamExt};
use rustix::process::{Pid, Signal, kill_process};
use tokio::sync::{Mutex, mpsc, oneshot};
use tracing::{info, warn};
use wasinetd::Error;
use wasinetd::admin::{Admin, ReloadFailure, ReloadFailureKind, ReloadResult, RestartResult};
use wasinetd::config::Table;
use wasinetd::lifecycle::Controller;

use super::configured::{LoadedService, ResolvedConfig, load_all, wrong};
use super::fleet::{AppliedChanges, ApplyError, FileChange, Supervisor, watched};
use super::read;
use super::successor::Upgrade;
use super::supervisor::ServiceManager;
use super::watch::FileWatcher;

/// What it is done with.
pub(super) struct ControlLoop<'a> {
    pub(super) supervisor: &'a ServiceManager,
    pub(super) fleet: &'a Supervisor,
    /// The config file, with what it says of the server, which only a new process follows.
    pub(super) config: Option<(PathBuf, Table)>,
    pub(super) controller: &'a Controller,
    pub(super) admin: Option<&'a Admin>,
    pub(super) drain: mpsc::Sender<()>,
    /// Those who watch files are told by it.
    pub(super) files: mpsc::Sender<WatchRequest>,
    /// Reloads that wait for their turn.
    pub(super) waiting: AtomicUsize,
    /// Whose turn it is to reload or to hand over: a successor serves what this one has served.
    pub(super) turn: Mutex<()>,
}

/// What is to be done about the files that are watched.
pub(super) enum WatchRequest {
    /// Watch these as well, or say why that cannot be.
    Add(
        Vec<(FileChange, PathBuf)>,
        oneshot::Sender<Result<(), Error>>,
    ),
    /// Watch those of the services that there are by now, and look at all once more: they may have changed
    /// since they were read.
    Reloaded,
    /// Do what is due for those that have changed, and say when that is done.
    Settle(oneshot::Sender<()>),
}

impl ControlLoop<'_> {
    /// Serves what the files say by now, at each item, and says what came of it, until the server drains.
    pub(super) async fn reload(
        &self,
        reloads: impl Stream<Item = Option<oneshot::Sender<ReloadResult>>>,
    ) {
        let reloading = async {
            let mut reloads = pin!(reloads);
            while let Some(done) = reloads.next().await {
                self.waiting.fetch_add(1, Ordering::Relaxed);
                let _turn = self.turn.lock().await;
                self.waiting.fetch_sub(1, Ordering::Relaxed);
                self.supervisor.reloading();
                let outcome = self.read_again().await;
                self.supervisor.ready();
                match &outcome {
                    Ok(changes) => info!(%changes, "reloaded"),
                    Err(error) => warn!(%error, "nothing has changed"),
                }
                if let Some(done) = done {
                    // Whoever asked may have gone.
                    let _ = done.send(outcome.map_err(|error| explain(&error)));
                }
            }
        };
        self.until_draining(reloading).await;
    }

    /// Swaps to what the files of guests have, and speaks TLS with what those of certificates have, when
    /// they have changed that are to be watched.
    pub(super) async fn follow_files(
        &self,
        mut watched: FileWatcher<FileChange>,
        mut asked: mpsc::Receiver<WatchRequest>,
    ) {
        let following = async {
            loop {
                let (changes, settled) = tokio::select! {
                    change = watched.next() => (vec![change], None),
                    Some(asked) = asked.recv() => match asked {
                        WatchRequest::Add(files, done) => {
                            // Whoever asked may have gone.
                            let _ = done.send(watched.add(files));
                            continue;
                        }
                        WatchRequest::Reloaded => {
                            watched.keep(&self.fleet.watched());
                            (watched.all(), None)
                        }
                        WatchRequest::Settle(done) => (watched.changed_by_now(), Some(done)),
                    }
                };
                for change in changes {
                    match change {
                        FileChange::Guest(name) => self.swap_from_file(&name).await,
                        FileChange::Tls(name) => self.read_certificates(Some(&name)).await,
                    }
                }
                if let Some(settled) = settled {
                    let _ = settled.send(());
                }
            }
        };
        self.until_draining(following).await;
    }

    /// Has files watched that are not yet.
    async fn watch(&self, services: &[LoadedService]) -> Result<(), Error> {
        let files = services.iter();
        let files = files.flat_map(|one| watched(&one.spec, one.tls.as_deref()));
        let (done, answer) = oneshot::channel();
        // Nobody is there when the server drains, and then nothing else comes of it either.
        let _ = self
            .files
            .send(WatchRequest::Add(files.collect(), done))
            .await;
        answer.await.unwrap_or(Ok(()))
    }

    /// Serves what files have that have changed already.
    async fn settle(&self) {
        let (done, settled) = oneshot::channel();
        let _ = self.files.send(WatchRequest::Settle(done)).await;
        // As above.
        let _ = settled.await;
    }

    async fn until_draining(&self, work: impl Future<Output = ()>) {
        let lifecycle = self.controller.lifecycle();
        tokio::select! {
            biased;
            () = lifecycle.draining() => {}
            () = work => {}
        }
    }

    async fn read_again(&self) -> Result<String, Error> {
        match &self.config {
            Some((path, table)) => {
                let changes = self.follow_config(path.clone(), table).await?;
                self.read_certificates(None).await;
                let _ = self.files.send(WatchRequest::Reloaded).await;
                Ok(changes)
            }
            None => {
                self.read_certificates(None).await;
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
        let file = path.clone();
        let reading = tokio::task::spawn_blocking(move || wanted(&file));
        let failed = |error| super::internal("reading the config file")(error);
        let (server, services) = reading.await.map_err(failed)??;
        self.watch(&services).await?;
        let changes = self.fleet.apply_config(services).await;
        let changes = changes.map_err(|not_changed| match not_changed {
            ApplyError::Mistakes(mistakes) => wrong(&path, mistakes),
            ApplyError::Error(error) => error,
        })?;
        let mut text = described(&changes);
        if !server.same_but(before, &[]) {
            text += "; what is set for the server itself needs a restart (ctl restart)";
        }
        if !changes.bound_as_before.is_empty() {
            let names = changes.bound_as_before.join(", ");
            text += &format!(
                "; reuse-port is as it was until the server is stopped and started: {names}"
            );
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
    async fn swap(&self, name: &str) -> Result<String, Error> {
        let Some((service, file)) = self.fleet.guest_of(name) else {
            // Only a reload removes services, and this is called by one, or for files of a service.
            return Ok(format!("{name} is gone"));
        };
        // A file system may take its time.
        let path = file.clone();
        let component = tokio::task::spawn_blocking(move || read(&path)).await;
        let component = component.map_err(super::internal("reading the guest"))??;
        // That it is swapped, or why not, is logged there.
        match service.swap(Bytes::from(component)).await {
            Ok(swapped) if swapped.digest == swapped.before => Ok(format!("{name} is unchanged")),
            Ok(swapped) => Ok(format!("{name} serves {} now", swapped.digest.short())),
            Err(error) => Err(super::not_swapped(&file)(error)),
        }
    }

    /// Hands over to a new process at an item, and says what came of it, until the server drains: the
    /// sockets are not to be kept open then, and a new process that is on its way is of no use.
    pub(super) async fn restart(
        &self,
        restarts: impl Stream<Item = Option<oneshot::Sender<RestartResult>>>,
        handover: Upgrade,
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

    async fn hand_over(&self, handover: &Upgrade) -> RestartResult {
        let _turn = self.turn.lock().await;
        self.settle().await;
        let served = self.fleet.to_hand_over().await;
        let served = served.map_err(|error| error.to_string())?;
        let successor = handover.start(&served).await?;
        if !self.controller.hand_over() {
            return Err("the server drains".into());
        }
        self.fleet
            .drain(|listening| successor.listens_at(listening));
        let pid = successor.pid();
        let admin = self.admin.filter(|_| successor.answers_operators());
        successor.takes_over();
        self.supervisor.succeeded_by(pid);
        if self.waiting.load(Ordering::Relaxed) > 0 {
            info!(pid, "a reload is passed on to the new process");
            let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
            // It may have ended.
            let _ = pid.map(|pid| kill_process(pid, Signal::HUP));
        }
        if let Some(admin) = admin {
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

/// The failure of a reload, as the admin API reports it.
fn explain(error: &Error) -> ReloadFailure {
    ReloadFailure {
        kind: match error {
            Error::Internal { .. } => ReloadFailureKind::Internal,
            Error::Draining => ReloadFailureKind::Draining,
            _ => ReloadFailureKind::Refused,
        },
        text: error.to_string(),
        exit_code: error.exit_code(),
    }
}

/// What a config file says now, with what it says of the server.
fn wanted(path: &Path) -> Result<(Table, Vec<LoadedService>), Error> {
    let configured = ResolvedConfig::of_file(path)?;
    let services = load_all(configured.services, Some(path), Default::default())?;
    Ok((configured.server_table, services))
}

fn described(changes: &AppliedChanges) -> String {
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
