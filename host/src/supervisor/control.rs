//! Carries out signals and the orders of the admin API, one at a time.

use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use futures::{Stream, StreamExt};
use rustix::process::{Pid, Signal, kill_process};
use tokio::sync::{Mutex, mpsc, oneshot};
use tracing::{info, warn};

use super::apply::AppliedChanges;
use super::error::ReloadError;
use super::file_watch::{FileWatcher, WatchError};
use super::running::{FileChange, watched_files};
use super::services::{ApplyError, Supervisor};
use crate::admin::{Admin, ReloadResult, RestartResult};
use crate::config::load::read_guest;
use crate::config::{
    ConfigError, LoadCause, LoadedService, Mistake, Mistakes, ResolvedConfig, ServerConfig,
    load_all,
};
use crate::lifecycle::Controller;
use crate::systemd::notify::ServiceManager;
use crate::upgrade::{Upgrade, UpgradeError};

/// The config file, and the parser that the binary provides for it.
#[derive(Clone)]
pub struct ConfigSource {
    /// The file.
    pub path: PathBuf,
    /// Reads and resolves the file.
    pub read: fn(&Path) -> Result<ResolvedConfig, ConfigError>,
    /// The server's settings at startup. Changes to them need a restart.
    pub server: ServerConfig,
}

/// Turns the error of a reload into the answer of the admin API: only the binary knows exit codes
/// and the names of flags.
pub type ExplainReload = fn(ReloadError) -> crate::admin::ReloadFailure;

/// Carries out reloads, swaps and upgrades while the server runs.
pub(super) struct ControlLoop<'a> {
    pub(super) manager: &'a ServiceManager,
    pub(super) supervisor: &'a Supervisor,
    pub(super) config: Option<ConfigSource>,
    pub(super) controller: &'a Controller,
    pub(super) admin: Option<&'a Admin>,
    pub(super) explain: ExplainReload,
    pub(super) drain: mpsc::Sender<()>,
    pub(super) files: mpsc::Sender<WatchRequest>,
    /// Reloads that wait for `turn`.
    pub(super) waiting_reloads: AtomicUsize,
    /// Held by a reload or an upgrade: the new process serves what this one has served.
    pub(super) turn: Mutex<()>,
}

/// A request to the task that watches files.
pub(super) enum WatchRequest {
    /// Watch these files as well.
    Add(
        Vec<(FileChange, PathBuf)>,
        oneshot::Sender<Result<(), WatchError>>,
    ),
    /// A reload is done: watch the files of the present services, and look at all of them once
    /// more, because they may have changed since the reload read them.
    Reloaded,
    /// Serve the files that have changed by now, then answer.
    Settle(oneshot::Sender<()>),
}

impl ControlLoop<'_> {
    /// Reloads at each item of `reloads`, until the server drains.
    pub(super) async fn reload(
        &self,
        reloads: impl Stream<Item = Option<oneshot::Sender<ReloadResult>>>,
    ) {
        let reloading = async {
            let mut reloads = pin!(reloads);
            while let Some(asked) = reloads.next().await {
                self.waiting_reloads.fetch_add(1, Ordering::Relaxed);
                let _turn = self.turn.lock().await;
                self.waiting_reloads.fetch_sub(1, Ordering::Relaxed);
                self.manager.reloading();
                let result = self.reload_once().await.map_err(self.explain);
                self.manager.ready();
                match &result {
                    Ok(changes) => info!(%changes, "reloaded"),
                    Err(failure) => warn!(error = failure.text, "nothing has changed"),
                }
                if let Some(asked) = asked {
                    // The client may have gone.
                    let _ = asked.send(result);
                }
            }
        };
        self.until_draining(reloading).await;
    }

    /// Follows watched files until the server drains: swaps guests and reloads certificates that have
    /// changed.
    pub(super) async fn follow_files(
        &self,
        mut watcher: FileWatcher<FileChange>,
        mut requests: mpsc::Receiver<WatchRequest>,
    ) {
        let following = async {
            loop {
                let (changes, settled) = tokio::select! {
                    change = watcher.next_change() => (vec![change], None),
                    Some(request) = requests.recv() => match request {
                        WatchRequest::Add(files, done) => {
                            // The reload may have been given up.
                            let _ = done.send(watcher.add(files));
                            continue;
                        }
                        WatchRequest::Reloaded => {
                            watcher.keep_only(&self.supervisor.watched_files());
                            (watcher.labels(), None)
                        }
                        WatchRequest::Settle(done) => (watcher.take_changed(), Some(done)),
                    }
                };
                for change in changes {
                    match change {
                        FileChange::Guest(name) => self.swap_changed(&name).await,
                        FileChange::Tls(name) => self.reload_certificates(Some(&name)).await,
                    }
                }
                if let Some(settled) = settled {
                    let _ = settled.send(());
                }
            }
        };
        self.until_draining(following).await;
    }

    /// Watches the files of `services` as well.
    async fn watch(&self, services: &[LoadedService]) -> Result<(), ReloadError> {
        let services = services.iter();
        let files = services.flat_map(|one| watched_files(&one.config, one.tls.as_deref()));
        let (done, answer) = oneshot::channel();
        // While the server drains nobody answers, and the reload comes to nothing anyway.
        let request = WatchRequest::Add(files.collect(), done);
        let _ = self.files.send(request).await;
        Ok(answer.await.unwrap_or(Ok(()))?)
    }

    /// Serves the files that have changed by now.
    async fn settle_files(&self) {
        let (done, settled) = oneshot::channel();
        // As above.
        let _ = self.files.send(WatchRequest::Settle(done)).await;
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

    async fn reload_once(&self) -> Result<String, ReloadError> {
        if let Some(source) = &self.config {
            let changes = self.reload_config(source).await?;
            self.reload_certificates(None).await;
            let _ = self.files.send(WatchRequest::Reloaded).await;
            return Ok(changes);
        }
        self.reload_certificates(None).await;
        let mut results = Vec::new();
        for name in self.supervisor.names() {
            results.push(self.swap_to_file(&name).await?);
        }
        Ok(results.join(", "))
    }

    async fn reload_config(&self, source: &ConfigSource) -> Result<String, ReloadError> {
        // Guests may be large, and their file system slow.
        let reading = {
            let source = source.clone();
            tokio::task::spawn_blocking(move || read_and_load(&source))
        };
        let failed = |error| ReloadError::internal("reading the config file", error);
        let (server, services) = reading.await.map_err(failed)??;
        self.watch(&services).await?;
        let changes = self.supervisor.apply_config(services).await;
        let changes = changes.map_err(|error| match error {
            ApplyError::Mistakes(mistakes) => mistakes_in(&source.path, mistakes),
            ApplyError::Other(error) => error,
        })?;
        let mut text = describe(&changes);
        if server != source.server {
            text += "; server-wide settings need a restart (ctl restart)";
        }
        if !changes.reuse_port_pending.is_empty() {
            let names = changes.reuse_port_pending.join(", ");
            text += &format!("; reuse-port changes only when the server stops and starts: {names}");
        }
        Ok(text)
    }

    /// Reloads the files of TLS of one service, or of all.
    async fn reload_certificates(&self, name: Option<&str>) {
        for tls in self.supervisor.tls_of(name) {
            match tokio::task::spawn_blocking(move || tls.reload()).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => {
                    let failure = (self.explain)(LoadCause::from(error).into());
                    let error = failure.text;
                    warn!(error, "TLS goes on with the certificates from before");
                }
                Err(error) => warn!(%error, "reading the files of TLS failed"),
            }
        }
    }

    /// Swaps a service to its guest's file, which has changed.
    async fn swap_changed(&self, name: &str) {
        if let Err(error) = self.swap_to_file(name).await.map_err(self.explain) {
            warn!(service = name, error = error.text, "nothing has changed");
        }
    }

    async fn swap_to_file(&self, name: &str) -> Result<String, ReloadError> {
        let Some((service, file)) = self.supervisor.guest_of(name) else {
            // A reload removed the service after its file had changed.
            return Ok(format!("{name} is gone"));
        };
        // The file system may be slow.
        let path = file.clone();
        let component = tokio::task::spawn_blocking(move || read_guest(&path)).await;
        let failed = |error| ReloadError::internal("reading the guest", error);
        let component = component.map_err(failed)??;
        // The service logs the swap.
        match service.swap(Bytes::from(component)).await {
            Ok(swapped) if swapped.digest == swapped.before => Ok(format!("{name} is unchanged")),
            Ok(swapped) => Ok(format!("{name} now serves {}", swapped.digest.short())),
            Err(error) => Err(ReloadError::from_swap(file)(error)),
        }
    }

    /// Upgrades at each item of `restarts`, until the server drains: its sockets must close then.
    pub(super) async fn restart(
        &self,
        restarts: impl Stream<Item = Option<oneshot::Sender<RestartResult>>>,
        upgrade: Upgrade,
    ) {
        let lifecycle = self.controller.lifecycle();
        let mut restarts = pin!(restarts);
        loop {
            let asked = tokio::select! {
                biased;
                () = lifecycle.draining() => return,
                Some(asked) = restarts.next() => asked,
            };
            let result = tokio::select! {
                biased;
                () = lifecycle.draining() => Err(UpgradeError::Draining.to_string()),
                result = self.upgrade_to(&upgrade) => result,
            };
            match &result {
                Ok(pid) => info!(pid, "a new process has taken over"),
                Err(error) => warn!(%error, "no new process has taken over"),
            }
            if let Some(asked) = asked {
                // The client may have gone.
                let _ = asked.send(result);
            }
        }
    }

    async fn upgrade_to(&self, upgrade: &Upgrade) -> RestartResult {
        let _turn = self.turn.lock().await;
        self.settle_files().await;
        let served = self.supervisor.hand_over().await;
        let served = served.map_err(|error| error.to_string())?;
        let process = upgrade.start(&served).await;
        let process = process.map_err(|error| error.to_string())?;
        if !self.controller.hand_over_to_process() {
            return Err(UpgradeError::Draining.to_string());
        }
        self.supervisor
            .drain(|listening| process.listens_on(listening));
        let pid = process.pid();
        let admin = self.admin.filter(|_| process.has_admin_socket());
        process.take_over();
        self.manager.replaced_by(pid);
        if self.waiting_reloads.load(Ordering::Relaxed) > 0 {
            info!(pid, "passing a reload on to the new process");
            let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
            // The process may have exited.
            let _ = pid.map(|pid| kill_process(pid, Signal::HUP));
        }
        if let Some(admin) = admin {
            admin.hand_over();
        }
        // A drain that was asked for already is as good.
        let _ = self.drain.try_send(());
        Ok(pid)
    }

    /// Waits until another process has taken over.
    pub(super) async fn handed_over(&self) {
        let lifecycle = self.controller.lifecycle();
        lifecycle.draining().await;
        if !lifecycle.is_handed_over_to_process() {
            std::future::pending().await
        }
    }

    /// Tells the service manager when the server drains, unless another process has taken over.
    pub(super) async fn announce_stop(&self) {
        let lifecycle = self.controller.lifecycle();
        lifecycle.draining().await;
        if !lifecycle.is_handed_over_to_process() {
            self.manager.stopping();
        }
    }
}

/// Reads the config file, and loads everything that it names.
fn read_and_load(source: &ConfigSource) -> Result<(ServerConfig, Vec<LoadedService>), ReloadError> {
    let config = (source.read)(&source.path)?;
    let services = load_all(config.services, Default::default()).map_err(|errors| {
        let mistakes = errors.into_iter().map(Mistake::from);
        mistakes_in(&source.path, mistakes.collect())
    })?;
    Ok((config.server, services))
}

fn mistakes_in(path: &Path, mistakes: Vec<Mistake>) -> ReloadError {
    ConfigError::from(Mistakes::new(path, mistakes)).into()
}

fn describe(changes: &AppliedChanges) -> String {
    let kinds = [
        ("added", &changes.added),
        ("changed", &changes.changed),
        ("removed", &changes.removed),
    ];
    let kinds = kinds.iter().filter(|(_, names)| !names.is_empty());
    let kinds: Vec<_> = kinds
        .map(|(kind, names)| format!("{kind}: {}", names.join(", ")))
        .collect();
    match &kinds[..] {
        [] => "nothing has changed".into(),
        kinds => kinds.join("; "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_described_by_kind() {
        let mut changes = AppliedChanges::default();
        assert_eq!(describe(&changes), "nothing has changed");
        changes.added = vec!["a".into(), "b".into()];
        changes.removed = vec!["c".into()];
        assert_eq!(describe(&changes), "added: a, b; removed: c");
    }

    #[test]
    fn a_config_file_that_names_nothing_on_disk_is_refused_with_lines() {
        let read = |path: &Path| {
            let mut echo = crate::config::model::tests::echo("a", &["127.0.0.1:1"]);
            echo.handler.guest = path.with_file_name("missing.wasm");
            echo.origin.line = 7;
            Ok(ResolvedConfig {
                server: crate::config::model::tests::server(),
                services: vec![echo],
            })
        };
        let source = ConfigSource {
            path: "/nowhere/wasinetd.toml".into(),
            read,
            server: crate::config::model::tests::server(),
        };
        let error = read_and_load(&source).err().expect("there is no guest");
        let text = error.to_string();
        assert!(
            text.starts_with("/nowhere/wasinetd.toml:7: guest: cannot read"),
            "{text}"
        );
    }
}
