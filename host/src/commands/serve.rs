//! `serve`: from arguments to the end of the last connection.

use std::env;
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
use tokio::sync::{mpsc, oneshot};
use tracing::{info, warn};
use wasinetd::Error;
use wasinetd::admin::{Address, Admin, Logs, Obeyed, Operated, Order};
use wasinetd::capacity::{self, Plan};
use wasinetd::connection::{self, Open};
use wasinetd::lifecycle::{Controller, Lifecycle};
use wasinetd::limit;
use wasinetd::listener::{self, Admission, Bound, Incoming, Listening, Places};
use wasinetd::sandbox::{Access, Engine, Grants, Needs};
use wasinetd::server::{self, Ended, Shards};
use wasinetd::service::{self, Service, Settings};
use wasinetd::spans::Spans;

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
    // Where it was installed: what is there later is what a successor is to be.
    let program = env::current_exe().map_err(internal("finding the program"))?;
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
    let admin = admin(&args, &mut inherited)?;
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
    let signals = Signals::new().map_err(internal("listening for signals"))?;
    warn_of_capacity(&args, &plan, max_connections);
    announce(&listening, admin.as_ref());
    let handover = handover(&listening, admin.as_ref(), program)?;

    let controller = Controller::default();
    let lifecycle = controller.lifecycle();
    let places = Places::new(max_connections);
    let admission = Admission::new(args.admission.rules(max_connections));
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
        move |accepted| connection::handle(accepted, service.current())
    };
    let (orders, ordered) = mpsc::channel(1);
    let (drain, drains) = mpsc::channel(1);
    let serving = server::serve(
        shards,
        incoming,
        handler,
        &controller,
        stream::select(signals.stop, received(drains)),
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
    let supervisor = Supervisor::new();
    let operator = Operator {
        supervisor: &supervisor,
        service: &service,
        guest: &args.guest,
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
        // Operators who come later are the successor's.
        let operating = async {
            tokio::select! {
                failed = operating => failed,
                () = handed_over(&lifecycle) => std::future::pending().await,
            }
        };
        let working = async {
            tokio::join!(
                service.tend(&lifecycle),
                operator.reload(stream::select(signals.reload, changes)),
                operator.obey(ordered, signals.restart, handover),
                supervisor.watchdog(&pulse),
                say_that_it_stops(&supervisor, &lifecycle),
            );
            std::future::pending().await
        };
        inherited.ready();
        supervisor.ready();
        tokio::select! {
            ended = serving => ended,
            Err(error) = operating => Err(internal("serving operators")(error)),
            never = working => never,
        }
    })?;
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

async fn handed_over(lifecycle: &Lifecycle) {
    lifecycle.draining().await;
    if !lifecycle.is_handed_over() {
        std::future::pending().await
    }
}

/// To the service manager, which takes a successor for us from the moment that there is one.
async fn say_that_it_stops(supervisor: &Supervisor, lifecycle: &Lifecycle) {
    lifecycle.draining().await;
    if !lifecycle.is_handed_over() {
        supervisor.stopping();
    }
}

/// Does what operators and signals say.
struct Operator<'a> {
    supervisor: &'a Supervisor,
    service: &'a Arc<Service>,
    guest: &'a Path,
    controller: &'a Controller,
    admin: Option<&'a Admin>,
    drain: mpsc::Sender<()>,
}

impl Operator<'_> {
    /// Swaps to what the guest's file has, at each item.
    async fn reload(&self, reloads: impl Stream<Item = ()>) {
        let mut reloads = pin!(reloads);
        while let Some(()) = reloads.next().await {
            self.supervisor.reloading();
            let file: PathBuf = self.guest.into();
            // A file system may take its time.
            let component = tokio::task::spawn_blocking(move || read(&file)).await;
            match component {
                // Whether it is swapped, and why not, is logged there.
                Ok(Ok(component)) => drop(self.service.clone().swap(component).await),
                Ok(Err(error)) => warn!(%error, "nothing has changed"),
                Err(error) => warn!(%error, "reading the guest's file failed"),
            }
            self.supervisor.ready();
        }
    }

    /// Carries out what is wanted of the whole server, until it drains: the sockets are not to be kept
    /// open then.
    async fn obey(
        &self,
        mut ordered: mpsc::Receiver<(Order, oneshot::Sender<Obeyed>)>,
        restarts: impl Stream<Item = ()>,
        handover: Handover,
    ) {
        let mut restarts = pin!(restarts);
        let lifecycle = self.controller.lifecycle();
        loop {
            let (order, done) = tokio::select! {
                () = lifecycle.draining() => return,
                Some(()) = restarts.next() => (Order::Restart, None),
                Some((order, done)) = ordered.recv() => (order, Some(done)),
            };
            let outcome = match order {
                Order::Drain => Ok(std::process::id()),
                Order::Restart => self.restart(&handover).await,
            };
            if outcome.is_ok() {
                // One that is on its way already is as good.
                let _ = self.drain.try_send(());
            }
            if let Some(done) = done {
                // Whoever asked may have gone.
                let _ = done.send(outcome);
            }
        }
    }

    async fn restart(&self, handover: &Handover) -> Result<u32, String> {
        let outcome = handover.start().await;
        successor::note(&outcome);
        if let Ok(pid) = outcome {
            self.supervisor.succeeded_by(pid);
            if let Some(admin) = self.admin {
                admin.hand_over();
            }
            self.controller.hand_over();
        }
        outcome
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
