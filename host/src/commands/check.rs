//! `check`: whether `serve` would accept a guest or a config file.

use std::fmt;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use wasinetd::capacity::Plan;
use wasinetd::config::{Mistake, Mistakes, load_all};
use wasinetd::sandbox::Report;
use wasinetd::service::Service;
use wasinetd::supervisor::{Sizing, service_settings};

use super::guest::compile_guest;
use crate::cli::{CheckArgs, config_file};
use crate::exit::Failure;

/// Checks the guest or the config file that the arguments name.
pub(crate) fn check(args: CheckArgs) -> Result<ExitCode, Failure> {
    match (&args.config, args.guest.clone()) {
        (Some(path), _) => check_config(path),
        (None, Some(guest)) => check_guest(args, guest),
        (None, None) => unreachable!("clap requires a guest or a config file"),
    }
}

fn check_guest(args: CheckArgs, path: PathBuf) -> Result<ExitCode, Failure> {
    let max_connections = args.max_connections;
    let settings = args.settings();
    let (guest, plan) = compile_guest(&settings, path.clone(), None)?;
    let mut stdout = io::stdout().lock();
    // The reader may close the pipe early.
    let _ = write!(
        stdout,
        "{}: accepted\n\n{}\n{}",
        path.display(),
        GuestReport {
            report: guest.report(),
            max_memory: settings.handler.guest_limits.memory,
        },
        CapacityReport(plan.with_pool(max_connections)),
    );
    Ok(ExitCode::SUCCESS)
}

/// Checks all of a config file, up to an instance of each guest and its probe. Addresses are not
/// bound: a running server may have them.
fn check_config(path: &Path) -> Result<ExitCode, Failure> {
    let config = config_file::read(path)?;
    let loaded = load_all(config.services, Default::default()).map_err(|errors| {
        let mistakes = errors.into_iter().map(Mistake::from);
        Mistakes::new(path, mistakes.collect())
    })?;
    let server = config.server;
    let sizing = Sizing::of_services(&loaded, |memory, most| server.shared_limits(memory, most));
    let fits = sizing.plan.max_connections(server.max_connections)?;
    let engine = sizing.engine(1, None)?;
    let mut mistakes = Vec::new();
    let mut accepted = Vec::new();
    for service in loaded {
        let settings = service_settings(&service.config, service.grants, None);
        match Service::new(settings, engine.clone(), Arc::default(), service.component) {
            Ok(_) => accepted.push(service.config),
            Err(reason) => mistakes.push(Mistake {
                line: service.config.origin.line_of("guest"),
                text: format!(
                    "guest: {:?} is refused: {reason}",
                    service.config.handler.guest
                ),
            }),
        }
    }
    if !mistakes.is_empty() {
        return Err(Mistakes::new(path, mistakes).into());
    }
    let mut stdout = io::stdout().lock();
    // The reader may close the pipe early.
    let _ = writeln!(
        stdout,
        "{}: accepted, for {fits} connections at once",
        path.display()
    );
    for service in accepted {
        let addresses = service.listener.addresses.iter();
        let addresses: Vec<_> = addresses.map(ToString::to_string).collect();
        let (name, guest) = (&service.name, service.handler.guest.display());
        let _ = writeln!(stdout, "  {name}: {guest} at {}", addresses.join(", "));
    }
    Ok(ExitCode::SUCCESS)
}

/// Imports, exports and requirements of a guest.
struct GuestReport<'a> {
    report: &'a Report,
    max_memory: usize,
}

impl fmt::Display for GuestReport<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Report {
            imports,
            exports,
            requirements,
        } = self.report;
        for (title, names) in [("imports", imports), ("exports", exports)] {
            writeln!(f, "{title}:")?;
            for name in names {
                writeln!(f, "  {name}")?;
            }
        }
        writeln!(f, "each connection takes:")?;
        writeln!(f, "  core instances: {}", requirements.core_instances)?;
        writeln!(
            f,
            "  memories: {} ({} KiB to start with, {} KiB with tables at most)",
            requirements.memories,
            requirements.memory_bytes / 1024,
            self.max_memory / 1024
        )?;
        writeln!(f, "  tables: {}", requirements.tables)
    }
}

/// The number of connections that each bound allows.
struct CapacityReport(Plan);

impl fmt::Display for CapacityReport {
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
