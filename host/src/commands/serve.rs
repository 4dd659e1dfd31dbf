//! `serve`: from arguments to the end of the last connection.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::SystemTime;

use futures::{Stream, StreamExt, stream};
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;
use tokio::runtime;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tracing::{info, warn};
use wasinetd::Error;
use wasinetd::admin::{Address, Admin, Logs, Operated, Order};
use wasinetd::capacity::{self, Plan};
use wasinetd::connection::{self, Open};
use wasinetd::lifecycle::Controller;
use wasinetd::limit;
use wasinetd::listener::{self, Admission, Bound, Incoming, Listening, Places};
use wasinetd::sandbox::{Access, Engine, Grants, Needs};
use wasinetd::server::{self, Ended, Shards};
use wasinetd::service::{self, Service, Settings};

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
    // Before the file is read, so that no change of it is missed.
    let changes = match args.swap.watch {
        true => watch::changes(&args.guest)?.left_stream(),
        false => stream::pending().right_stream(),
    };
    let component = read(&args.guest)?;
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
    let admin = admin(&args)?;
    let bound: Vec<Bound> = args
        .listen
        .iter()
        .map(|address| Bound::new(*address, shards.count(), args.connection_limits.keepalive()))
        .collect::<Result<_, _>>()?;
    let logs = Logs::default();
    let _log = logging::start(args.log_format, args.log_level, logs.clone());
    let cache = cache(&args.cache)?;
    let engine = Engine::new(plan.room(max_connections), &needs, limits, cache)?;
    let open = Arc::new(Open::default());
    let settings = Settings {
        name: ONLY_SERVICE.into(),
        limits: args.connection_limits.limits(),
        grants,
        probe: args.swap.probe(),
        max_old_version_age: args.swap.max_old_version_age(),
    };
    let service = Service::new(settings, engine.clone(), open.clone(), &component);
    let service = Arc::new(service.map_err(|reason| Error::GuestRefused {
        path: args.guest.clone(),
        reason,
    })?);
    drop(component);
    let listening: Vec<Listening> = bound
        .into_iter()
        .map(Bound::listen)
        .collect::<Result<_, _>>()?;
    let control = runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(internal("starting a runtime"))?;
    let _context = control.enter();
    let (stop, reload) = signals().map_err(internal("listening for signals"))?;
    warn_of_capacity(&args, &plan, max_connections);
    announce(&listening, admin.as_ref());

    let controller = Controller::default();
    let lifecycle = controller.lifecycle();
    let places = Places::new(max_connections);
    let admission = Admission::new(args.admission.rules(max_connections));
    let when_full = args.admission.when_full();
    let incoming = shards
        .contexts()
        .zip(Listening::by_shard(listening))
        .map(|(_context, listeners)| {
            let (places, admission) = (places.clone(), admission.clone());
            Incoming::new(listeners, places, when_full.clone(), admission, &lifecycle)
        })
        .collect::<Result<_, _>>()?;
    let handler = {
        let service = service.clone();
        move |accepted| connection::handle(accepted, service.current())
    };
    let (orders, ordered) = mpsc::channel(1);
    let (drain, drains) = mpsc::channel(1);
    let serving = server::serve(
        shards,
        incoming,
        handler,
        &controller,
        stream::select(stop, received(drains)),
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
        orders,
        since,
    };
    let ended = control.block_on(async {
        let operating = async {
            match &admin {
                Some(admin) => admin.serve(operated).await,
                None => std::future::pending().await,
            }
        };
        let reloads = stream::select(reload, changes);
        let reloading = reload_at_each(&service, &args.guest, reloads);
        let obeying = obey(ordered, drain);
        let tending = async {
            tokio::join!(service.tend(&lifecycle), reloading, obeying);
            std::future::pending().await
        };
        tokio::select! {
            ended = serving => ended,
            Err(error) = operating => Err(internal("serving operators")(error)),
            never = tending => never,
        }
    })?;
    match ended {
        Ended::Drained => Ok(ExitCode::SUCCESS),
        Ended::Cut => Ok(ExitCode::from(EX_TEMPFAIL)),
    }
}

/// What operators connect to.
fn admin(args: &ServeArgs) -> Result<Option<Admin>, Error> {
    let Some(address) = &args.admin else {
        return Ok(None);
    };
    let token = args.admin_token_file.as_deref().map(token).transpose()?;
    if let (Address::Loopback(_), None) = (address, &token) {
        return Err(Error::NoToken);
    }
    Admin::bind(address, token).map(Some)
}

/// Swaps to what the guest's file has then.
async fn reload_at_each(service: &Arc<Service>, guest: &Path, reloads: impl Stream<Item = ()>) {
    let mut reloads = pin!(reloads);
    while let Some(()) = reloads.next().await {
        reload(service, guest).await;
    }
}

async fn reload(service: &Arc<Service>, path: &Path) {
    let file: PathBuf = path.into();
    // A file system may take its time.
    let component = tokio::task::spawn_blocking(move || read(&file)).await;
    match component {
        // Whether it is swapped, and why not, is logged there.
        Ok(Ok(component)) => drop(service.clone().swap(component).await),
        Ok(Err(error)) => warn!(%error, "nothing has changed"),
        Err(error) => warn!(%error, "reading the guest's file failed"),
    }
}

/// Carries out what operators want of the whole server.
async fn obey(mut ordered: mpsc::Receiver<Order>, drain: mpsc::Sender<()>) {
    while let Some(order) = ordered.recv().await {
        match order {
            // One that is on its way already is as good.
            Order::Drain => drop(drain.try_send(())),
            Order::Restart(done) => drop(done.send(Err("not yet".into()))),
        }
    }
}

fn received(mut channel: mpsc::Receiver<()>) -> impl Stream<Item = ()> {
    stream::poll_fn(move |cx| channel.poll_recv(cx))
}

/// All that is counted.
fn registry(engine: &Engine, service: &Arc<Service>) -> Registry {
    let mut registry = Registry::with_prefix("wasinetd");
    let build = Info::new([("version", env!("CARGO_PKG_VERSION"))]);
    registry.register("build", "The wasinetd that serves", build);
    limit::register(&mut registry);
    listener::register(&mut registry);
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

/// An item for each SIGTERM and SIGINT, and one for each SIGHUP.
fn signals() -> io::Result<(impl Stream<Item = ()> + Send, impl Stream<Item = ()> + Send)> {
    let each =
        |kind| signal(kind).map(|mut signal| stream::poll_fn(move |cx| signal.poll_recv(cx)));
    let stop = stream::select(
        each(SignalKind::terminate())?,
        each(SignalKind::interrupt())?,
    );
    Ok((stop, each(SignalKind::hangup())?))
}
