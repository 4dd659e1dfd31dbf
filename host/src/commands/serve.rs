//! `serve`: runs a server until a signal stops it.

use std::env;
use std::io::{self, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::SystemTime;

use futures::{StreamExt, stream};
use tokio::signal::unix::{SignalKind, signal};
use wasinetd::admin::{Admin, AdminAddress, LogStream};
use wasinetd::capacity;
use wasinetd::config::{Mistakes, ResolvedConfig, ServerConfig};
use wasinetd::net::ListenAddress;
use wasinetd::server::DrainOutcome;
use wasinetd::supervisor::control::ConfigSource;
use wasinetd::supervisor::{Inputs, PreparedServer, Signals, StartupError};
use wasinetd::systemd::activation::PassedSockets;
use wasinetd::upgrade::{InheritedFds, Upgrade, installed_program, message};

use super::admin_token::read_token;
use super::cache;
use crate::cli::{ServeArgs, command_line_config, config_file};
use crate::exit::{Failure, code, explain_reload};
use crate::logging;

/// Serves until a signal stops the server.
pub(crate) fn serve(args: ServeArgs) -> Result<ExitCode, Failure> {
    capacity::raise_open_files()?;
    let since = SystemTime::now();
    // Before this process opens a file of its own, and before it has threads.
    let inherited = env::var(message::VARIABLE).unwrap_or_default();
    let mut inherited = InheritedFds::take(&inherited);
    let stage = "taking the sockets of LISTEN_FDS";
    let passed = PassedSockets::take().map_err(Failure::internal(stage))?;
    let program = installed_program(env::args_os().next());
    let program = program.map_err(Failure::internal("finding the program"))?;
    let config_path = args.config.clone();
    let config = resolve(args, &inherited, &passed)?;
    let admin = open_admin(&config.server, &mut inherited)?;
    let components = inherited.take_components();
    let components = components.map_err(Failure::internal("taking over the guests"))?;
    let logs = LogStream::default();
    let (format, level) = (config.server.log_format, config.server.log_level);
    let _log = logging::start(format, level, logs.clone());
    let upgrade = upgrade(program, admin.as_ref())?;
    let prepared = PreparedServer::new(Inputs {
        cache: cache::location(&config.server.cache),
        config_file: config_path.clone().map(|path| ConfigSource {
            path,
            read: config_file::read,
            server: config.server.clone(),
        }),
        server: config.server,
        services: config.services,
        components,
        inherited,
        passed,
        admin,
        logs,
        upgrade,
        explain: explain_reload,
        version: env!("CARGO_PKG_VERSION"),
        since,
    });
    let prepared = prepared.map_err(|error| match (error, &config_path) {
        (StartupError::Mistakes(mistakes), Some(path)) => {
            Failure::from(Mistakes::new(path, mistakes))
        }
        (error, _) => error.into(),
    })?;
    // Before a parent learns the addresses: it may send a signal at once.
    let signals = prepared.within_runtime(listen_for_signals);
    let signals = signals.map_err(Failure::internal("listening for signals"))?;
    announce(&prepared, config_path.is_some());
    match prepared.run(signals)? {
        DrainOutcome::Drained => Ok(ExitCode::SUCCESS),
        DrainOutcome::Cut => Ok(code::CUT_OFF.into()),
    }
}

/// The configuration of the command line, or of the file that it names.
fn resolve(
    args: ServeArgs,
    inherited: &InheritedFds,
    passed: &PassedSockets,
) -> Result<ResolvedConfig, Failure> {
    match (&args.config, args.guest.clone()) {
        (Some(path), _) => Ok(config_file::read(path)?),
        (None, Some(guest)) => {
            let default = || default_addresses(inherited, passed);
            Ok(command_line_config(args, guest, default))
        }
        (None, None) => unreachable!("clap requires a guest or a config file"),
    }
}

/// Addresses for a command line without `--listen`: all passed sockets, or the usual port.
fn default_addresses(inherited: &InheritedFds, passed: &PassedSockets) -> Vec<ListenAddress> {
    const USUAL_PORT: u16 = 7878;
    let passed = [inherited.passed_addresses(), passed.addresses()];
    let mut passed = passed.into_iter().filter(|addresses| !addresses.is_empty());
    passed.next().unwrap_or_else(|| {
        let usual = SocketAddr::from((Ipv4Addr::LOCALHOST, USUAL_PORT));
        vec![ListenAddress::Ip(usual)]
    })
}

/// Opens the socket of the admin API, or takes over the inherited one.
fn open_admin(
    server: &ServerConfig,
    inherited: &mut InheritedFds,
) -> Result<Option<Admin>, Failure> {
    let Some(address) = &server.admin else {
        return Ok(None);
    };
    let token = server
        .admin_token_file
        .as_deref()
        .map(read_token)
        .transpose()?;
    if let (AdminAddress::Loopback(_), None) = (address, &token) {
        let message = "--admin is a loopback address, which any user of this machine can connect to; name a file with a token for clients: --admin-token-file FILE, or use --admin unix:PATH";
        return Err(Failure::new(code::USAGE, message));
    }
    let adopt = |socket, file| Admin::adopt(address, token.clone(), socket, file);
    match inherited.take_admin(adopt) {
        Some(admin) => Ok(Some(admin)),
        None => Ok(Some(Admin::bind(address, token)?)),
    }
}

fn upgrade(program: PathBuf, admin: Option<&Admin>) -> Result<Upgrade, Failure> {
    let admin = admin.map(Admin::try_clone_socket).transpose();
    let admin = admin.map_err(Failure::internal("keeping a socket for an upgrade"))?;
    let arguments = env::args_os().skip(1).collect();
    Ok(Upgrade::new(program, arguments, admin))
}

/// Prints the addresses: the only output on standard output.
fn announce(prepared: &PreparedServer, with_names: bool) {
    let mut stdout = io::stdout().lock();
    for (name, address) in prepared.addresses() {
        // The server is useful even if nobody reads this.
        let _ = match with_names {
            true => writeln!(stdout, "listening on {address} for {name}"),
            false => writeln!(stdout, "listening on {address}"),
        };
    }
    if let Some(address) = prepared.admin_address() {
        let _ = writeln!(stdout, "operators connect to {address}");
    }
    let _ = stdout.flush();
}

/// Installs the signal handlers, within a tokio runtime.
fn listen_for_signals() -> io::Result<Signals> {
    let each = |kind| {
        let mut signal = signal(kind)?;
        Ok::<_, io::Error>(stream::poll_fn(move |cx| signal.poll_recv(cx)))
    };
    let terminate = each(SignalKind::terminate())?;
    let interrupt = each(SignalKind::interrupt())?;
    Ok(Signals {
        stop: stream::select(terminate, interrupt).boxed(),
        reload: each(SignalKind::hangup())?.boxed(),
        restart: each(SignalKind::user_defined2())?.boxed(),
    })
}
