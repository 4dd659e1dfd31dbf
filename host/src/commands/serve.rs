//! `serve`: from arguments to the end of the last connection.

use std::io::{self, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::SystemTime;

use futures::{Stream, StreamExt, stream};
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;
use tokio::runtime;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Mutex, Semaphore, mpsc};
use tracing::{info, warn};
use wasinetd::Error;
use wasinetd::admin::{self, Admin, AdminState, LogStream};
use wasinetd::capacity::{self, Plan};
use wasinetd::connection;
use wasinetd::lifecycle::Controller;
use wasinetd::limit;
use wasinetd::listener::{self, Incoming, MergedStreams};
use wasinetd::net::ListenAddress;
use wasinetd::sandbox::Engine;
use wasinetd::server::{self, DrainOutcome, Liveness, Shards, StopRequest};
use wasinetd::service::{self, Services, SniRoute};
use wasinetd::telemetry::spans::SpanSender;

use super::activation::PassedSockets;
use super::configured::{LoadedService, ResolvedConfig, load_all, requirements};
use super::fleet::{self, ReadyService, ShardGroup, SharedResources, Supervisor};
use super::operator::ControlLoop;
use super::successor::{self, InheritedFds, Upgrade};
use super::supervisor::ServiceManager;
use super::watch::FileWatcher;
use super::{cache, internal, token};
use crate::cli::{Dispatch, ServeArgs, ServerArgs};
use crate::logging;

/// The exit code when connections were ended before they were done (BSD `sysexits.h`:
/// EX_TEMPFAIL). To a supervisor the stop itself has succeeded all the same.
const EX_TEMPFAIL: u8 = 75;

/// Serves until a signal says to stop.
pub(crate) fn serve(args: ServeArgs) -> Result<ExitCode, Error> {
    capacity::raise_open_files()?;
    let since = SystemTime::now();
    let mut inherited = InheritedFds::take();
    let mut passed = PassedSockets::take()?;
    let program = successor::program().map_err(internal("finding the program"))?;
    let config = args.config.clone();
    let configured = ResolvedConfig::of(args, || usual_addresses(&inherited, &passed))?;
    let server = configured.server;
    // Before there are threads.
    let admin = admin(&server, &mut inherited)?;
    let known = inherited.guests();
    let known = known.map_err(internal("taking over the guests"))?;
    let logs = LogStream::default();
    let _log = logging::start(server.log_format, server.log_level, logs.clone());
    // Before the files are read, so that no change of them is missed.
    let guests = configured.services.iter();
    let guests = guests.flat_map(|spec| fleet::watched(spec, None));
    let mut watched = FileWatcher::new(guests.collect())?;
    let checked = load_all(configured.services, config.as_deref(), known)?;
    let files = checked.iter();
    let files = files.flat_map(|one| fleet::watched(&one.spec, one.tls.as_deref()));
    watched.add(files.collect())?;
    let limits = checked.iter().map(|one| &one.spec.args.guest_limits);
    let limits = server.shared_limits.limits(capacity::memory(), limits);
    let (needs, files) = requirements(&checked);
    let plan = Plan::new(&needs, limits.stack, files);
    let max_connections = plan.max_connections(configured.max_connections)?;
    let shards = shards(&server, &checked, config.is_some())?;
    // An address that is taken should be heard of before the guests are compiled, and clients only
    // after.
    let bound = checked
        .into_iter()
        .map(|one| {
            let count = shards
                .iter()
                .find(|(kind, _)| *kind == one.spec.args.dispatch);
            let count = count.map_or(1, |(_, shards)| shards.count());
            let bound = fleet::bind(&one.spec, count, &mut inherited, &mut passed)?;
            Ok((one, bound))
        })
        .collect::<Result<Vec<_>, Error>>()?;
    let cache = cache(&server.cache)?;
    let room = plan.room(max_connections);
    let engine = Engine::new(room, &needs, limits.clone(), cache)?;
    let spans = server
        .otlp
        .as_deref()
        .map(SpanSender::to_collector)
        .transpose();
    let spans = spans.map_err(internal("setting up --otlp"))?.map(Arc::new);
    let shared = SharedResources {
        engine: engine.clone(),
        open: Arc::default(),
        spans: spans.clone(),
        limits,
        places: Arc::new(Semaphore::new(max_connections)),
        max_connections,
        drain_timeout: server.drain_timeout,
    };
    let ready = bound
        .into_iter()
        .map(|(checked, bound)| ReadyService::new(&shared, checked, bound))
        .collect::<Result<Vec<_>, _>>()?;
    let control = runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(internal("starting a runtime"))?;
    let context = control.enter();
    let signals = Signals::new().map_err(internal("listening for signals"))?;
    warn_of_capacity(configured.max_connections, &plan, max_connections);
    warn_of_sockets(&ready, &passed);
    // Whoever connects to those that nobody serves is not to wait for us.
    drop(passed);
    let admin_socket = admin.as_ref().map(Admin::try_clone_socket).transpose();
    let admin_socket = admin_socket.map_err(internal("keeping a socket for a successor"))?;
    let handover = Upgrade::new(admin_socket, program);

    let controller = Controller::default();
    let lifecycle = controller.lifecycle();
    let pulse = Liveness::new(
        shards
            .iter()
            .flat_map(|(_, shards)| shards.handles())
            .collect(),
    );
    let (threads, connections) = shards
        .into_iter()
        .map(|(kind, shards)| gather(kind, shards))
        .unzip();
    let open = shared.open.clone();
    let services = Services::default();
    let fleet = Arc::new(Supervisor::new(shared, threads, services.clone(), ready)?);
    announce(&fleet, config.is_some(), admin.as_ref());
    let (restarts, restart) = mpsc::channel(1);
    let (reloads, reload) = mpsc::channel(1);
    let (drain, drains) = mpsc::channel(1);
    let (files, file) = mpsc::channel(1);
    let wishes = received(drains).map(|()| StopRequest::Drain);
    let serving = server::serve(
        connections,
        connection::handle::<SniRoute>,
        &controller,
        stream::select(signals.stop.map(|()| StopRequest::Now), wishes),
        server.drain_timeout,
    );
    let limits = {
        let fleet = fleet.clone();
        move || fleet.limits()
    };
    let operated = AdminState {
        registry: registry(&engine, services.clone()),
        services,
        open,
        lifecycle: lifecycle.clone(),
        max_connections,
        limits: Box::new(limits),
        logs,
        drain: drain.clone(),
        restarts,
        reloads,
        since,
    };
    let supervisor = ServiceManager::new();
    let operator = ControlLoop {
        supervisor: &supervisor,
        fleet: &fleet,
        config: config.map(|path| (path, configured.server_table)),
        controller: &controller,
        admin: admin.as_ref(),
        drain,
        files,
        waiting: AtomicUsize::new(0),
        turn: Mutex::default(),
    };
    let ended = control.block_on(async {
        let operating = async {
            match &admin {
                Some(admin) => admin.serve(operated).await,
                None => std::future::pending().await,
            }
        };
        // Operators who come after a hand-over are the successor's.
        let operating = async {
            tokio::select! {
                failed = operating => failed,
                () = operator.handed_over() => std::future::pending().await,
            }
        };
        let restarts = stream::select(signals.restart.map(|()| None), received(restart).map(Some));
        let reloads = stream::select(signals.reload.map(|()| None), received(reload).map(Some));
        let working = async {
            tokio::join!(
                fleet.follow(&lifecycle),
                operator.reload(reloads),
                operator.follow_files(watched, file),
                operator.restart(restarts, handover),
                operator.say_that_it_stops(),
                supervisor.watchdog(&pulse),
            );
            std::future::pending().await
        };
        fleet.take_over();
        inherited.ready();
        if let Some(admin) = &admin {
            admin.take_over();
        }
        supervisor.ready();
        let ended = tokio::select! {
            ended = serving => ended,
            Err(error) = operating => Err(internal("serving operators")(error)),
            never = working => never,
        };
        if let Some(admin) = &admin {
            admin.finish_responses().await;
        }
        ended
    });
    drop(context);
    // A thread that reads a file of a file system that hangs is not waited for.
    control.shutdown_background();
    let ended = ended?;
    if let Some(spans) = spans {
        spans.close();
    }
    match ended {
        DrainOutcome::Drained => Ok(ExitCode::SUCCESS),
        DrainOutcome::Cut => Ok(ExitCode::from(EX_TEMPFAIL)),
    }
}

/// Where to listen if nothing else is said: at what was passed, or at the usual address.
fn usual_addresses(inherited: &InheritedFds, passed: &PassedSockets) -> Vec<ListenAddress> {
    const USUAL: ListenAddress =
        ListenAddress::Ip(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 7878));
    let given = [inherited.passed(), passed.addresses()];
    let mut given = given.into_iter().filter(|addresses| !addresses.is_empty());
    given.next().unwrap_or_else(|| vec![USUAL])
}

/// The threads for each kind of dispatch that is asked for. With a config file for both: it may ask for
/// the other one by and by, and threads that have nothing to do cost nothing.
fn shards(
    server: &ServerArgs,
    services: &[LoadedService],
    has_config: bool,
) -> Result<Vec<(Dispatch, Shards)>, Error> {
    let is_wanted = |kind: &Dispatch| {
        let mut services = services.iter();
        has_config || services.any(|one| one.spec.args.dispatch == *kind)
    };
    let kinds = [Dispatch::Concurrent, Dispatch::Spawn]
        .into_iter()
        .filter(is_wanted);
    kinds
        .map(|kind| Ok((kind, Shards::new(dispatch(kind), threads(server))?)))
        .collect()
}

type Connections = MergedStreams<Incoming<Arc<SniRoute>>>;

/// Where connections are added that such threads are to handle.
fn gather(dispatch: Dispatch, shards: Shards) -> (ShardGroup, (Shards, Vec<Connections>)) {
    let (joining, gathered) = (0..shards.count()).map(|_| MergedStreams::new()).unzip();
    let threads = ShardGroup {
        dispatch,
        handles: shards.handles(),
        joining,
    };
    (threads, (shards, gathered))
}

/// What operators connect to.
fn admin(args: &ServerArgs, inherited: &mut InheritedFds) -> Result<Option<Admin>, Error> {
    let Some(address) = &args.admin else {
        return Ok(None);
    };
    let token = args.admin_token_file.as_deref().map(token).transpose()?;
    if let (admin::AdminAddress::Loopback(_), None) = (address, &token) {
        return Err(Error::NoToken);
    }
    let adopt = |socket, file| Admin::adopt(address, token.clone(), socket, file);
    match inherited.admin(adopt) {
        Some(admin) => Ok(Some(admin)),
        None => Ok(Some(Admin::bind(address, token)?)),
    }
}

fn received<T>(mut channel: mpsc::Receiver<T>) -> impl Stream<Item = T> {
    stream::poll_fn(move |cx| channel.poll_recv(cx))
}

/// All that is counted.
fn registry(engine: &Engine, services: Services) -> Registry {
    let mut registry = Registry::with_prefix("wasinetd");
    let build = Info::new([("version", env!("CARGO_PKG_VERSION"))]);
    registry.register("build", "The wasinetd that serves", build);
    limit::register(&mut registry);
    listener::register(&mut registry);
    connection::register(&mut registry);
    engine.register(&mut registry);
    service::register(services, &mut registry);
    registry
}

fn dispatch(dispatch: Dispatch) -> server::Dispatch {
    match dispatch {
        Dispatch::Spawn => server::Dispatch::Spawn,
        Dispatch::Concurrent => server::Dispatch::Concurrent,
    }
}

/// The threads that connections run on: as asked for, or one for each core but one. That one is for
/// all that goes on beside the guests, the kernel's share of the network most of all.
fn threads(args: &ServerArgs) -> usize {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    args.threads.unwrap_or((cores - 1).max(1))
}

/// A default that does not fit is lowered, and not in silence. Nor is what might not hold.
fn warn_of_capacity(asked: Option<usize>, plan: &Plan, max_connections: usize) {
    if asked.is_none() && max_connections < capacity::DEFAULT_MAX_CONNECTIONS {
        let bound = plan.tightest();
        warn!(
            max_connections,
            bound = bound.name,
            lift_with = bound.fix,
            "fewer connections than the default fit on this machine"
        );
    }
    let room = plan.room(max_connections);
    if room.stacks < 2 * room.connections {
        info!(
            max_connections,
            stacks = room.stacks,
            lift_with = "sysctl -w vm.max_map_count=1048576",
            "not each connection can have the second stack that a guest needs while it blocks"
        );
    }
    if plan.all_open.fits < max_connections {
        warn!(
            max_connections,
            suffices_for = plan.all_open.fits,
            lift_with = plan.all_open.fix,
            "guests that open as many files as they may could use up those of this process"
        );
    }
}

/// What is not as one might think of the sockets.
fn warn_of_sockets(ready: &[ReadyService], passed: &PassedSockets) {
    let rest = passed.rest();
    if !rest.is_empty() {
        warn!(
            sockets = rest.join(", "),
            fix = "name them with --listen fd:NAME, or do not pass them",
            "sockets were passed that nobody listens at"
        );
    }
    let most = std::fs::read_to_string("/proc/sys/net/core/somaxconn");
    let most = most.ok().and_then(|most| most.trim().parse::<u32>().ok());
    let backlog = ready.iter().map(ReadyService::backlog).max().unwrap_or(0);
    if let Some(most) = most.filter(|most| *most < backlog) {
        warn!(
            backlog,
            somaxconn = most,
            lift_with = format!("sysctl -w net.core.somaxconn={backlog}"),
            "the kernel lowers --backlog"
        );
    }
}

/// Tells who started us where to connect. The one thing that goes to standard output.
fn announce(fleet: &Supervisor, by_name: bool, admin: Option<&Admin>) {
    let mut stdout = io::stdout().lock();
    for (name, address) in fleet.addresses() {
        // The server is of use even where nobody reads this.
        let _ = match by_name {
            true => writeln!(stdout, "listening on {address} for {name}"),
            false => writeln!(stdout, "listening on {address}"),
        };
    }
    if let Some(admin) = admin {
        let _ = writeln!(stdout, "operators connect to {}", admin.address());
    }
    let _ = stdout.flush();
}

/// An item of a stream for each signal.
struct Signals<A, B, C> {
    /// SIGTERM and SIGINT.
    stop: A,
    /// SIGHUP.
    reload: B,
    /// SIGUSR2.
    restart: C,
}

impl Signals<(), (), ()> {
    fn new() -> io::Result<
        Signals<
            impl Stream<Item = ()> + Send,
            impl Stream<Item = ()> + Send,
            impl Stream<Item = ()> + Send,
        >,
    > {
        let each =
            |kind| signal(kind).map(|mut signal| stream::poll_fn(move |cx| signal.poll_recv(cx)));
        Ok(Signals {
            stop: stream::select(
                each(SignalKind::terminate())?,
                each(SignalKind::interrupt())?,
            ),
            reload: each(SignalKind::hangup())?,
            restart: each(SignalKind::user_defined2())?,
        })
    }
}
