//! What the subcommands do.

use std::fmt;
use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use futures::{Stream, stream};
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;
use tokio::runtime;
use tokio::signal::unix::{SignalKind, signal};
use tracing::{info, warn};
use wasinetd::Error;
use wasinetd::admin::Admin;
use wasinetd::capacity::{self, Plan};
use wasinetd::connection::{self, Counts, Service};
use wasinetd::lifecycle::Controller;
use wasinetd::limit;
use wasinetd::listener::{self, Admission, Bound, Incoming, Listening, Places};
use wasinetd::sandbox::{Access, Engine, Grants, Guest, Needs, Refusal, Report};
use wasinetd::server::{self, Ended, Shards};

use crate::cli::{CheckArgs, Dispatch, ServeArgs};
use crate::logging;

/// The exit code when connections were ended before they were done (BSD `sysexits.h`:
/// EX_TEMPFAIL). To a supervisor the stop itself has succeeded all the same.
const EX_TEMPFAIL: u8 = 75;

/// Serves until a signal says to stop.
pub(crate) fn serve(args: ServeArgs) -> Result<ExitCode, Error> {
    capacity::raise_open_files()?;
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
    let admin = args.admin.as_deref().map(Admin::bind).transpose()?;
    let bound: Vec<Bound> = args
        .listen
        .iter()
        .map(|address| Bound::new(*address, shards.count(), args.connection_limits.keepalive()))
        .collect::<Result<_, _>>()?;
    let engine = Engine::new(plan.room(max_connections), &needs, limits)?;
    let guest = Guest::new(&engine, &component, grants).map_err(refused(&args.guest))?;
    let listening: Vec<Listening> = bound
        .into_iter()
        .map(Bound::listen)
        .collect::<Result<_, _>>()?;
    let control = runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(internal("starting a runtime"))?;
    let _context = control.enter();
    let stop = signals().map_err(internal("listening for signals"))?;
    let _log = logging::start(args.log_format, args.log_level);
    warn_of_capacity(&args, &plan, max_connections);
    announce(&listening);

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
    let mut registry = registry();
    engine.register(&mut registry);
    let service = Arc::new(Service {
        guest,
        limits: args.connection_limits.limits(),
        lifecycle: lifecycle.clone(),
        counts: Counts::register(&mut registry),
    });
    let handler = move |accepted| connection::handle(accepted, service.clone());
    let serving = server::serve(
        shards,
        incoming,
        handler,
        &controller,
        stop,
        args.drain_timeout,
    );
    let ended = control.block_on(async {
        let operating = async {
            match &admin {
                Some(admin) => admin.serve(registry, lifecycle).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            ended = serving => ended,
            Err(error) = operating => Err(internal("serving operators")(error)),
        }
    })?;
    match ended {
        Ended::Drained => Ok(ExitCode::SUCCESS),
        Ended::Cut => Ok(ExitCode::from(EX_TEMPFAIL)),
    }
}

/// What is counted, as far as it is the same for all that is served.
fn registry() -> Registry {
    let mut registry = Registry::with_prefix("wasinetd");
    let build = Info::new([("version", env!("CARGO_PKG_VERSION"))]);
    registry.register("build", "The wasinetd that serves", build);
    limit::register(&mut registry);
    listener::register(&mut registry);
    registry
}

/// Says whether `serve` would accept a guest, and how many connections it could serve.
pub(crate) fn check(args: &CheckArgs) -> Result<ExitCode, Error> {
    let component = read(&args.guest)?;
    let needs = Needs::of(&component).map_err(refused(&args.guest))?;
    let limits = args.guest_limits.limits(capacity::memory());
    needs.fit(&limits).map_err(refused(&args.guest))?;
    let plan = Plan::new(&needs, &limits, true).with_pool(args.max_connections);
    // One is enough to compile and link for.
    let engine = Engine::new(plan.room(1), &needs, limits.clone())?;
    let connect = args.network.allow_connect.clone();
    let grants = Grants::default().with_destinations(connect);
    let guest = Guest::new(&engine, &component, grants).map_err(refused(&args.guest))?;
    let mut stdout = io::stdout().lock();
    // Whoever closes the pipe has read enough.
    let _ = write!(
        stdout,
        "{}: accepted\n\n{}\n{}",
        args.guest.display(),
        Lists {
            report: guest.report(),
            max_memory: limits.memory,
        },
        Capacity(plan),
    );
    Ok(ExitCode::SUCCESS)
}

/// What a guest imports, exports and needs, for people.
struct Lists<'a> {
    report: &'a Report,
    max_memory: usize,
}

impl fmt::Display for Lists<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Report {
            imports,
            exports,
            needs,
        } = self.report;
        for (title, names) in [("imports", imports), ("exports", exports)] {
            writeln!(f, "{title}:")?;
            for name in names {
                writeln!(f, "  {name}")?;
            }
        }
        writeln!(f, "each connection takes:")?;
        writeln!(f, "  core instances: {}", needs.core_instances)?;
        writeln!(
            f,
            "  memories: {} ({} KiB to start with, {} KiB with tables at most)",
            needs.memories,
            needs.memory_bytes / 1024,
            self.max_memory / 1024
        )?;
        writeln!(f, "  tables: {}", needs.tables)
    }
}

/// How many connections fit, by each bound, for people.
struct Capacity(Plan);

impl fmt::Display for Capacity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tightest = self.0.tightest();
        writeln!(f, "connections that fit at once: {}", tightest.fits)?;
        for bound in &self.0.bounds {
            writeln!(f, "  {:<40} {:>10}", bound.name, bound.fits)?;
        }
        writeln!(
            f,
            "the tight one is {}; to lift it: {}",
            tightest.name, tightest.fix
        )
    }
}

fn read(path: &Path) -> Result<Vec<u8>, Error> {
    std::fs::read(path).map_err(|source| Error::GuestUnreadable {
        path: path.into(),
        source,
    })
}

fn refused(path: &Path) -> impl Fn(Refusal) -> Error {
    move |refusal| Error::GuestRefused {
        path: path.into(),
        reason: refusal.to_string(),
    }
}

fn internal<E: fmt::Display>(stage: &'static str) -> impl Fn(E) -> Error {
    move |error| Error::Internal {
        stage,
        reason: error.to_string(),
    }
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
fn announce(listening: &[Listening]) {
    let mut stdout = io::stdout().lock();
    for Listening { address, .. } in listening {
        // The server is of use even where nobody reads this.
        let _ = writeln!(stdout, "listening on {address}");
    }
    let _ = stdout.flush();
}

/// An item for each SIGTERM and SIGINT.
fn signals() -> io::Result<impl Stream<Item = ()> + Send> {
    let each =
        |kind| signal(kind).map(|mut signal| stream::poll_fn(move |cx| signal.poll_recv(cx)));
    Ok(stream::select(
        each(SignalKind::terminate())?,
        each(SignalKind::interrupt())?,
    ))
}
