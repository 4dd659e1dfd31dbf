//! Brings up a server: loads, binds and compiles everything that its configuration names.

use std::io;
use std::sync::Arc;
use std::time::SystemTime;

use tokio::runtime::{self, Runtime};
use tokio::sync::Semaphore;
use tracing::{info, warn};

use super::cache_location::CacheLocation;
use super::control::{ConfigSource, ExplainReload};
use super::endpoint::bind_all;
use super::error::{ReloadError, StartupError};
use super::file_watch::FileWatcher;
use super::plan::{PlannedEndpoint, ReadyService};
use super::resources::{ShardGroup, SharedResources};
use super::running::{FileChange, watched_files};
use super::services::Supervisor;
use super::serving::{Connections, Server, Signals};
use super::sizing::Sizing;
use crate::admin::{Admin, AdminAddress, LogStream};
use crate::capacity;
use crate::config::load::KnownComponents;
use crate::config::{LoadedService, ServerConfig, ServiceConfig, load_all};
use crate::listener::MergedStreams;
use crate::net::ListenAddress;
use crate::sandbox::Engine;
use crate::server::{Dispatch, DrainOutcome, Liveness, Shards};
use crate::service::Services;
use crate::systemd::activation::PassedSockets;
use crate::telemetry::spans::SpanSender;
use crate::upgrade::{InheritedFds, Upgrade};

/// Everything that a server starts with. The binary has it from the command line and the environment.
pub struct Inputs {
    /// Settings of the server.
    pub server: ServerConfig,
    /// The services to serve.
    pub services: Vec<ServiceConfig>,
    /// The config file, if there is one.
    pub config_file: Option<ConfigSource>,
    /// Components from a parent process.
    pub components: KnownComponents,
    /// Sockets from a parent process.
    pub inherited: InheritedFds,
    /// Sockets from the service manager.
    pub passed: PassedSockets,
    /// The socket of the admin API.
    pub admin: Option<Admin>,
    /// Directory of compiled guests.
    pub cache: CacheLocation,
    /// The log, which admin clients can follow.
    pub logs: LogStream,
    /// The upgrade to carry out on request.
    pub upgrade: Upgrade,
    /// Explains the errors of reloads.
    pub explain: ExplainReload,
    /// Version of the program, for the metrics.
    pub version: &'static str,
    /// When the process started.
    pub since: SystemTime,
}

/// A server that listens and has everything it needs, with nobody accepting yet.
pub struct PreparedServer {
    control: Runtime,
    server: Server,
    spans: Option<Arc<SpanSender>>,
}

impl PreparedServer {
    /// Loads and compiles all guests, binds all addresses and starts all threads.
    ///
    /// # Errors
    ///
    /// Fails if any of that does.
    // long: the order of these steps is what startup is; each is one call
    pub fn new(inputs: Inputs) -> Result<Self, StartupError> {
        let Inputs {
            server,
            services,
            config_file,
            components,
            mut inherited,
            mut passed,
            admin,
            cache,
            logs,
            upgrade,
            explain,
            version,
            since,
        } = inputs;
        let has_config_file = config_file.is_some();
        let (loaded, watcher) = load_and_watch(services, components, has_config_file)?;
        let sizing =
            Sizing::of_services(&loaded, |memory, most| server.shared_limits(memory, most));
        let max_connections = sizing.plan.max_connections(server.max_connections)?;
        let shards = start_shards(&server, &loaded, has_config_file)?;
        // A taken address is reported before guests are compiled, and clients come only after.
        let mut bound = Vec::new();
        for service in loaded {
            let count = shards_of(&shards, service.config.listener.dispatch);
            let sockets = bind_all(&service.config, count, &mut inherited, &mut passed)?;
            bound.push((service, sockets));
        }
        let engine = sizing.engine(max_connections, cache.open()?)?;
        let shared = share(&server, &sizing, max_connections, engine.clone())?;
        let mut ready = Vec::new();
        for (service, sockets) in bound {
            ready.push(ReadyService::at_startup(&shared, service, sockets)?);
        }
        let control = runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(StartupError::internal("starting a runtime"))?;
        warn_of_capacity(server.max_connections, &sizing, max_connections);
        warn_of_sockets(&ready, &passed);
        // Clients of unused sockets must not wait for this server.
        drop(passed);
        let handles = shards.iter().flat_map(|(_, shards)| shards.handles());
        let liveness = Liveness::new(handles.collect());
        let groups = shards.into_iter().map(|(kind, shards)| group(kind, shards));
        let (groups, connections) = groups.unzip();
        let (open, spans) = (shared.open.clone(), shared.spans.clone());
        let services = Services::default();
        let supervisor = {
            let _context = control.enter();
            Supervisor::new(shared, groups, services.clone(), ready).map_err(startup_error)?
        };
        let server = Server {
            supervisor: Arc::new(supervisor),
            services,
            connections,
            liveness,
            watcher,
            engine,
            open,
            max_connections,
            drain_timeout: server.drain_timeout,
            config_file,
            inherited,
            admin,
            logs,
            upgrade,
            explain,
            version,
            since,
        };
        Ok(Self {
            control,
            server,
            spans,
        })
    }

    /// All addresses that clients can connect to, each with the name of its service.
    pub fn addresses(&self) -> Vec<(String, ListenAddress)> {
        self.server.supervisor.addresses()
    }

    /// Address of the admin API.
    pub fn admin_address(&self) -> Option<AdminAddress> {
        self.server.admin.as_ref().map(Admin::address)
    }

    /// Runs `make` within the runtime of the control thread, such as to listen for signals.
    pub fn within_runtime<T>(&self, make: impl FnOnce() -> T) -> T {
        let _context = self.control.enter();
        make()
    }

    /// Serves until `signals` stop the server, or until another process takes over.
    ///
    /// # Errors
    ///
    /// Fails if the threads end or the admin API fails.
    pub fn run(self, signals: Signals) -> Result<DrainOutcome, StartupError> {
        let ended = self.control.block_on(self.server.serve(signals));
        // A thread that waits for a file system that hangs must not hold up the exit.
        self.control.shutdown_background();
        let ended = ended?;
        if let Some(spans) = self.spans {
            spans.close();
        }
        Ok(ended)
    }
}

/// Loads all services, and watches their files from before they were read: no change is missed.
fn load_and_watch(
    services: Vec<ServiceConfig>,
    components: KnownComponents,
    has_config_file: bool,
) -> Result<(Vec<LoadedService>, FileWatcher<FileChange>), StartupError> {
    let guests = services
        .iter()
        .flat_map(|config| watched_files(config, None));
    let mut watcher = FileWatcher::new(guests.collect())?;
    let loaded = load_all(services, components)
        .map_err(|errors| StartupError::from_load(errors, has_config_file))?;
    let files = loaded.iter();
    let files = files.flat_map(|service| watched_files(&service.config, service.tls.as_deref()));
    watcher.add(files.collect())?;
    Ok((loaded, watcher))
}

/// Starts the threads for each kind of dispatch that a service uses.
///
/// A config file gets both kinds: a reload may ask for the other one, and idle threads cost nothing.
fn start_shards(
    server: &ServerConfig,
    services: &[LoadedService],
    has_config_file: bool,
) -> Result<Vec<(Dispatch, Shards)>, StartupError> {
    let is_used = |kind: &Dispatch| {
        let mut services = services.iter();
        has_config_file || services.any(|service| service.config.listener.dispatch == *kind)
    };
    let kinds = [Dispatch::Concurrent, Dispatch::Spawn];
    let kinds = kinds.into_iter().filter(is_used);
    kinds
        .map(|kind| Ok((kind, Shards::new(kind, threads(server))?)))
        .collect()
}

/// Threads for connections. By default one core is left for everything beside guests, mostly the
/// kernel's part of the network.
fn threads(server: &ServerConfig) -> usize {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    server.threads.unwrap_or((cores - 1).max(1))
}

fn shards_of(shards: &[(Dispatch, Shards)], dispatch: Dispatch) -> usize {
    let mut shards = shards.iter();
    let found = shards.find(|(kind, _)| *kind == dispatch);
    found.map_or(1, |(_, shards)| shards.count())
}

/// Pairs the threads of one kind with the streams that bring them connections.
fn group(dispatch: Dispatch, shards: Shards) -> (ShardGroup, (Shards, Vec<Connections>)) {
    let (merges, merged) = (0..shards.count()).map(|_| MergedStreams::new()).unzip();
    let group = ShardGroup {
        dispatch,
        handles: shards.handles(),
        merges,
    };
    (group, (shards, merged))
}

fn share(
    server: &ServerConfig,
    sizing: &Sizing,
    max_connections: usize,
    engine: Engine,
) -> Result<SharedResources, StartupError> {
    let spans = server
        .otlp
        .as_deref()
        .map(SpanSender::to_collector)
        .transpose();
    let failed =
        |reason| StartupError::internal("setting up the export of spans")(io::Error::other(reason));
    let spans: Option<SpanSender> = spans.map_err(failed)?;
    Ok(SharedResources {
        engine,
        open: Arc::default(),
        spans: spans.map(Arc::new),
        limits: sizing.limits.clone(),
        connection_permits: Arc::new(Semaphore::new(max_connections)),
        max_connections,
        drain_timeout: server.drain_timeout,
    })
}

/// The first commit of a supervisor fails only where sockets or files do.
fn startup_error(error: ReloadError) -> StartupError {
    match error {
        ReloadError::Bind(error) => error.into(),
        ReloadError::Draining => StartupError::Draining,
        other => StartupError::internal("starting the services")(io::Error::other(other)),
    }
}

/// Warns if fewer connections fit than the default, or if their guests could run out of something.
fn warn_of_capacity(configured: Option<usize>, sizing: &Sizing, max_connections: usize) {
    let plan = &sizing.plan;
    if configured.is_none() && max_connections < capacity::DEFAULT_MAX_CONNECTIONS {
        let bound = plan.tightest();
        warn!(
            max_connections,
            bound = bound.name,
            lift_with = bound.fix,
            "fewer connections than the default fit on this machine"
        );
    }
    let room = plan.pool_size(max_connections);
    if room.stacks < 2 * room.connections {
        info!(
            max_connections,
            stacks = room.stacks,
            lift_with = "sysctl -w vm.max_map_count=1048576",
            "too few stacks: not every connection can have the second stack that a blocked guest needs"
        );
    }
    if plan.all_open.fits < max_connections {
        warn!(
            max_connections,
            suffices_for = plan.all_open.fits,
            lift_with = plan.all_open.fix,
            "guests that open as many files as they may could use up the files of this process"
        );
    }
}

/// Warns of passed sockets that no service uses, and of a backlog that the kernel cuts.
fn warn_of_sockets(ready: &[ReadyService], passed: &PassedSockets) {
    let unused = passed.unused();
    if !unused.is_empty() {
        warn!(
            sockets = unused.join(", "),
            fix = "name them with --listen fd:NAME, or do not pass them",
            "no service listens on some passed sockets"
        );
    }
    let most = std::fs::read_to_string("/proc/sys/net/core/somaxconn");
    let most = most.ok().and_then(|most| most.trim().parse::<u32>().ok());
    let binds = |endpoint: &PlannedEndpoint| matches!(endpoint, PlannedEndpoint::Bind(..));
    let services = ready
        .iter()
        .filter(|service| service.endpoints.iter().any(binds));
    let backlogs = services.map(|service| service.config.listener.sockets.backlog);
    let backlog = backlogs.max().unwrap_or(0);
    if let Some(most) = most.filter(|most| *most < backlog) {
        warn!(
            backlog,
            somaxconn = most,
            lift_with = format!("sysctl -w net.core.somaxconn={backlog}"),
            "the kernel lowers the backlog"
        );
    }
}
