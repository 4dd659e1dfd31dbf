//! A running server: its tasks, from the first client to the end of the last.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::{Duration, SystemTime};

use futures::stream::{self, BoxStream};
use futures::{Stream, StreamExt};
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;
use tokio::sync::{Mutex, mpsc, oneshot};

use super::control::{ConfigSource, ControlLoop, ExplainReload, WatchRequest};
use super::error::StartupError;
use super::file_watch::FileWatcher;
use super::running::FileChange;
use super::services::Supervisor;
use crate::admin::{Admin, AdminState, LogStream, ReloadResult, RestartResult};
use crate::connection::{self, ConnectionRegistry};
use crate::lifecycle::{Controller, Lifecycle};
use crate::limit;
use crate::listener::{self, Incoming, MergedStreams};
use crate::sandbox::Engine;
use crate::server::{self, DrainOutcome, Liveness, Shards, StopRequest};
use crate::service::{self, Services, SniRoute};
use crate::systemd::notify::ServiceManager;
use crate::upgrade::{InheritedFds, Upgrade};

/// The clients of all services, for one thread.
pub(super) type Connections = MergedStreams<Incoming<Arc<SniRoute>>>;

/// Signals, as one stream for each meaning.
pub struct Signals {
    /// Drain; the second time, end at once (SIGTERM, SIGINT).
    pub stop: BoxStream<'static, ()>,
    /// Reload (SIGHUP).
    pub reload: BoxStream<'static, ()>,
    /// Upgrade (SIGUSR2).
    pub restart: BoxStream<'static, ()>,
}

/// A server with everything that it needs to serve.
pub(super) struct Server {
    pub(super) supervisor: Arc<Supervisor>,
    pub(super) services: Services,
    pub(super) connections: Vec<(Shards, Vec<Connections>)>,
    pub(super) liveness: Liveness,
    pub(super) watcher: FileWatcher<FileChange>,
    pub(super) engine: Engine,
    pub(super) open: Arc<ConnectionRegistry>,
    pub(super) max_connections: usize,
    pub(super) drain_timeout: Duration,
    pub(super) config_file: Option<ConfigSource>,
    pub(super) inherited: InheritedFds,
    pub(super) admin: Option<Admin>,
    pub(super) logs: LogStream,
    pub(super) upgrade: Upgrade,
    pub(super) explain: ExplainReload,
    pub(super) version: &'static str,
    pub(super) since: SystemTime,
}

/// The receiving ends of the orders that the admin API passes on.
struct Orders {
    drain: mpsc::Receiver<()>,
    restart: mpsc::Receiver<oneshot::Sender<RestartResult>>,
    reload: mpsc::Receiver<oneshot::Sender<ReloadResult>>,
}

impl Server {
    /// Serves until the last connection has ended.
    pub(super) async fn serve(mut self, signals: Signals) -> Result<DrainOutcome, StartupError> {
        let controller = Controller::default();
        let (drain, orders, state) = self.orders(&controller.lifecycle());
        let (files, file_requests) = mpsc::channel(1);
        let stop = signals.stop.map(|()| StopRequest::Now);
        let stop = stream::select(stop, received(orders.drain).map(|()| StopRequest::Drain));
        let serving = server::serve(
            self.connections,
            connection::handle::<SniRoute>,
            &controller,
            stop,
            self.drain_timeout,
        );
        let manager = ServiceManager::new();
        let control = ControlLoop {
            manager: &manager,
            supervisor: &self.supervisor,
            config: self.config_file,
            controller: &controller,
            admin: self.admin.as_ref(),
            explain: self.explain,
            drain,
            files,
            waiting_reloads: AtomicUsize::new(0),
            turn: Mutex::default(),
        };
        let answering = async {
            let answering = async {
                match &self.admin {
                    Some(admin) => admin.serve(state).await,
                    None => std::future::pending().await,
                }
            };
            // After an upgrade the new process answers.
            tokio::select! {
                failed = answering => failed,
                () = control.handed_over() => std::future::pending().await,
            }
        };
        let controlling = control_tasks(
            &control,
            signals.reload,
            signals.restart,
            (orders.reload, orders.restart),
            (self.watcher, file_requests),
            (self.upgrade, &self.liveness),
        );
        self.supervisor.set_up_inherited_sockets();
        self.inherited.report_ready();
        if let Some(admin) = &self.admin {
            admin.take_over();
        }
        manager.ready();
        let ended = tokio::select! {
            ended = serving => Ok(ended?),
            Err(error) = answering => Err(StartupError::internal("serving the admin API")(error)),
            never = controlling => match never {},
        };
        if let Some(admin) = &self.admin {
            admin.finish_responses().await;
        }
        ended
    }

    /// The state that the admin API shows, and the orders that it passes on.
    fn orders(&self, lifecycle: &Lifecycle) -> (mpsc::Sender<()>, Orders, AdminState) {
        let (restarts, restart) = mpsc::channel(1);
        let (reloads, reload) = mpsc::channel(1);
        let (drain, drains) = mpsc::channel(1);
        let supervisor = self.supervisor.clone();
        let state = AdminState {
            registry: self.registry(),
            services: self.services.clone(),
            open: self.open.clone(),
            lifecycle: lifecycle.clone(),
            max_connections: self.max_connections,
            limits: Box::new(move || supervisor.limits()),
            logs: self.logs.clone(),
            drain: drain.clone(),
            restarts,
            reloads,
            since: self.since,
        };
        let orders = Orders {
            drain: drains,
            restart,
            reload,
        };
        (drain, orders, state)
    }

    /// All metrics.
    fn registry(&self) -> Registry {
        let mut registry = Registry::with_prefix("wasinetd");
        let build = Info::new([("version", self.version)]);
        registry.register("build", "The running wasinetd", build);
        limit::register(&mut registry);
        listener::register(&mut registry);
        connection::register(&mut registry);
        self.engine.register(&mut registry);
        service::register(self.services.clone(), &mut registry);
        registry
    }
}

/// Runs everything beside connections and the admin API, without end.
async fn control_tasks(
    control: &ControlLoop<'_>,
    reload_signals: BoxStream<'static, ()>,
    restart_signals: BoxStream<'static, ()>,
    (reload, restart): (
        mpsc::Receiver<oneshot::Sender<ReloadResult>>,
        mpsc::Receiver<oneshot::Sender<RestartResult>>,
    ),
    (watcher, file_requests): (FileWatcher<FileChange>, mpsc::Receiver<WatchRequest>),
    (upgrade, liveness): (Upgrade, &Liveness),
) -> Infallible {
    let reloads = stream::select(reload_signals.map(|()| None), received(reload).map(Some));
    let restarts = stream::select(restart_signals.map(|()| None), received(restart).map(Some));
    let server = control.controller.lifecycle();
    tokio::join!(
        control.supervisor.follow(&server),
        control.reload(reloads),
        control.follow_files(watcher, file_requests),
        control.restart(restarts, upgrade),
        control.announce_stop(),
        control.manager.feed_watchdog(liveness),
    );
    std::future::pending().await
}

fn received<T>(mut channel: mpsc::Receiver<T>) -> impl Stream<Item = T> {
    stream::poll_fn(move |cx| channel.poll_recv(cx))
}
