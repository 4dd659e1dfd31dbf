//! `serve`: from arguments to the end of the last connection.

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;
use futures::{Stream, StreamExt, stream};
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;
use tokio::runtime;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tracing::{info, warn};
use wasinetd::Error;
use wasinetd::admin::{Address, Admin, Logs, Operated};
use wasinetd::capacity::{self, Plan};
use wasinetd::connection::tls::Tls;
use wasinetd::connection::{self, Front, Open};
use wasinetd::lifecycle::Controller;
use wasinetd::limit;
use wasinetd::listener::{self, Admission, Bound, Incoming, Listening, Places};
use wasinetd::sandbox::{Access, Engine, Grants, Needs};
use wasinetd::server::{self, Ended, Shards, Stop};
use wasinetd::service::{self, Service, Settings};
use wasinetd::spans::Spans;

use super::operator::Operator;
use super::successor::{self, Handover, Inherited};
use super::supervisor::Supervisor;
use super::watch;
use super::{cache, internal, read, refused, token};
use crate::cli::{Dispatch, ServeArgs};
use crate::logging;

/// The exit code when connections were ended before they were done (BSD `sysexits.h`:
/// EX_TEMPFAIL). To a supervisor the stop itself has succeeded all the same.
const EX_TEMPFAIL: u8 = 75;

/// The service of a server that is started without a config file.
const ONLY_SERVICE: &str = "default";

/// Serves until a signal says to stop.
pub(crate) fn serve(args: ServeArgs) -> Result<ExitCode, Error> {
    capacity::raise_open_files()?;
    let since = SystemTime::now();
    let mut inherited = Inherited::take();
    let program = successor::program().map_err(internal("finding the program"))?;
    // Before there are threads.
    let admin = admin(&args, &mut inherited)?;
    // Before the file is read, so that no change of it is missed.
    let changes = match args.swap.watch {
        true => watch::changes(&args.guest)?.left_stream(),
        false => stream::pending().right_stream(),
    };
    let component: Bytes = match inherited.guest() {
        Some(component) => component.map_err(internal("taking over the guest"))?,
        None => read(&args.guest)?,
    }
    .into();
    let needs = Needs::of(&component).map_err(refused(&args.guest))?;
    let limits = args.guest_limits.limits(capacity::memory());
    needs.fit(&limits).map_err(refused(&args.guest))?;
    let opens = !args.directories().is_empty() || !args.network.allow_connect.is_empty();
    let plan = Plan::new(&needs, &limits, opens);
    let max_connections = plan.max_connections(args.max_connections)?;
    let grants = grants(&args)?;
    let shards = Shards::new(dispatch(args.dispatch), threads(&args))?;
    // An address that is taken should be heard of before the guest is compiled, and clients only
    // after.
    let bound: Vec<Bound> = args
        .listen
        .iter()
        .map(|address| match inherited.sockets(*address) {
            none if none.is_empty() => {
                Bound::new(*address, shards.count(), args.connection_limits.keepalive())
            }
            sockets => Ok(Bound::adopt(*address, sockets)),
        })
        .collect::<Result<_, _>>()?;
    let logs = Logs::default();
    let _log = logging::start(args.log_format, args.log_level, logs.clone());
    let tls = args.front.tls()?.map(Tls::new).transpose()?.map(Arc::new);
    let certificates = match &tls {
        Some(tls) => watch::all_changes(&tls.files())?.left_stream(),
        None => stream::pending().right_stream(),
    };
    let cache = cache(&args.cache)?;
    let engine = Engine::new(plan.room(max_connections), &needs, limits, cache)?;
    let open = Arc::new(Open::default());
    let spans = args.otlp.as_deref().map(Spans::to_collector).transpose();
    let spans = spans.map_err(internal("setting up --otlp"))?.map(Arc::new);
    let settings = Settings {
        spans: spans.clone(),
        name: ONLY_SERVICE.into(),
        limits: args.connection_limits.limits(),
        grants,
        probe: args.swap.probe(),
        max_old_version_age: args.swap.max_old_version_age(),
    };
    let service = Service::new(settings, engine.clone(), open.clone(), component);
    let service = Arc::new(service.map_err(|reason| Error::GuestRefused {
        path: args.guest.clone(),
        reason,
    })?);
    let listening: Vec<Listening> = bound
        .into_iter()
        .map(Bound::listen)
        .collect::<Result<_, _>>()?;
    let control = runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(internal("starting a runtime"))?;
    let context = control.enter();
    let signals = Signals::new().map_err(internal("listening for signals"))?;
    warn_of_capacity(&args, &plan, max_connections);
    announce(&listening, admin.as_ref());
    let handover = handover(&listening, admin.as_ref(), program)?;

    let controller = Controller::default();
    let lifecycle = controller.lifecycle();
    let places = Places::new(max_connections);
    let admission = Admission::new(listener::Rules {
        proxies: args.front.proxy_from.clone(),
        ..args.admission.rules(max_connections)
    });
    let front = Arc::new(Front {
        lifecycle: Some(lifecycle.clone()),
        ..args.front.front(tls.clone())
    });
    let when_full = args.admission.when_full();
    let pulse = shards.pulse();
    let listeners = Listening::by_shard(listening, shards.count());
    let incoming = shards
        .contexts()
        .zip(listeners)
        .map(|(_context, listeners)| {
            let (places, admission) = (places.clone(), admission.clone());
            Incoming::new(listeners, places, when_full.clone(), admission, &lifecycle)
        })
        .collect::<Result<_, _>>()?;
    let handler = {
        let service = service.clone();
        // The name that clients have for the server says nothing yet: there is one service.
        let version = move |_: Option<&str>| service.current();
        move |accepted| connection::handle(accepted, &front, &version)
    };
    let (restarts, restart) = mpsc::channel(1);
    let (drain, drains) = mpsc::channel(1);
    let wishes = received(drains).map(|()| Stop::Drain);
    let serving = server::serve(
        shards,
        incoming,
        handler,
        &controller,
        stream::select(signals.stop.map(|()| Stop::Now), wishes),
        args.drain_timeout,
    );
    let operated = Operated {
        registry: registry(&engine, &service),
        services: vec![service.clone()],
        open,
        lifecycle: lifecycle.clone(),
        max_connections,
        limits: args.limits(max_connections, capacity::memory()),
        logs,
        drain: drain.clone(),
        restarts,
        since,
    };
    let supervisor = Supervisor::new();
    let operator = Operator {
        supervisor: &supervisor,
        service: &service,
        guest: &args.guest,
        tls: tls.as_ref(),
        controller: &controller,
        admin: admin.as_ref(),
        drain,
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
        let working = async {
            tokio::join!(
                service.tend(&lifecycle),
                operator.reload(stream::select(signals.reload, changes)),
                operator.renew(certificates),
                operator.restart(restarts, handover),
                operator.say_that_it_stops(),
                supervisor.watchdog(&pulse),
            );
            std::future::pending().await
        };
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
            admin.last_answers().await;
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
        Ended::Drained => Ok(ExitCode::SUCCESS),
        Ended::Cut => Ok(ExitCode::from(EX_TEMPFAIL)),
    }
}

/// What operators connect to.
fn admin(args: &ServeArgs, inherited: &mut Inherited) -> Result<Option<Admin>, Error> {
    let Some(address) = &args.admin else {
        return Ok(None);
    };
    let token = args.admin_token_file.as_deref().map(token).transpose()?;
    if let (Address::Loopback(_), None) = (address, &token) {
        return Err(Error::NoToken);
    }
    match inherited.admin() {
        Some(socket) => Admin::adopt(address, token, socket).map(Some),
        None => Admin::bind(address, token).map(Some),
    }
}

/// What a successor is to be given.
fn handover(
    listening: &[Listening],
    admin: Option<&Admin>,
    program: PathBuf,
) -> Result<Handover, Error> {
    let sockets = listening.iter().map(Listening::try_clone_sockets);
    let sockets: Result<Vec<_>, _> = sockets.collect();
    let admin = admin.map(Admin::try_clone_socket).transpose();
    let failed = internal("keeping the sockets for a successor");
    Ok(Handover::new(
        sockets.map_err(&failed)?.into_iter().flatten().collect(),
        admin.map_err(&failed)?,
        program,
    ))
}

fn received<T>(mut channel: mpsc::Receiver<T>) -> impl Stream<Item = T> {
    stream::poll_fn(move |cx| channel.poll_recv(cx))
}

/// All that is counted.
fn registry(engine: &Engine, service: &Arc<Service>) -> Registry {
    let mut registry = Registry::with_prefix("wasinetd");
    let build = Info::new([("version", env!("CARGO_PKG_VERSION"))]);
    registry.register("build", "The wasinetd that serves", build);
    limit::register(&mut registry);
    listener::register(&mut registry);
    connection::register(&mut registry);
    engine.register(&mut registry);
    service::register(vec![service.clone()], &mut registry);
    registry
}

fn grants(args: &ServeArgs) -> Result<Grants, Error> {
    let grants = Grants::new(&args.directories(), args.env.clone());
    let grants = grants.map_err(|(grant, reason)| Error::Directory {
        flag: match grant.access {
            Access::ReadOnly => "--dir",
            Access::ReadWrite => "--dir-rw",
        },
        path: grant.host,
        reason,
    })?;
    Ok(grants.with_destinations(args.network.allow_connect.clone()))
}

fn dispatch(dispatch: Dispatch) -> server::Dispatch {
    match dispatch {
        Dispatch::Spawn => server::Dispatch::Spawn,
        Dispatch::Concurrent => server::Dispatch::Concurrent,
    }
}

/// The threads that connections run on: as asked for, or one for each core but one. That one is for
/// all that goes on beside the guests, the kernel's share of the network most of all.
fn threads(args: &ServeArgs) -> usize {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    args.threads.unwrap_or((cores - 1).max(1))
}

/// A default that does not fit is lowered, and not in silence. Nor is what might not hold.
fn warn_of_capacity(args: &ServeArgs, plan: &Plan, max_connections: usize) {
    if args.max_connections.is_none() && max_connections < capacity::DEFAULT_MAX_CONNECTIONS {
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

/// Tells who started us where to connect. The one thing that goes to standard output.
fn announce(listening: &[Listening], admin: Option<&Admin>) {
    let mut stdout = io::stdout().lock();
    for Listening { address, .. } in listening {
        // The server is of use even where nobody reads this.
        let _ = writeln!(stdout, "listening on {address}");
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
