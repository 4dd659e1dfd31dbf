//! `check` and `compile`: what can be said and done about a guest without serving it.

use std::collections::HashMap;
use std::fmt;
use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use wasinetd::Error;
use wasinetd::capacity::{self, Plan};
use wasinetd::config::{Mistake, Mistakes};
use wasinetd::sandbox::{Engine, Grants, Guest, Report, Requirements};
use wasinetd::service::Service;

use super::configured::{LoadedService, ResolvedConfig, load_all, requirements};
use super::{fleet, read, refused, required_cache};
use crate::cli::{CheckArgs, CompileArgs};

/// Says whether `serve` would accept a guest, and how many connections it could serve.
pub(crate) fn check(args: &CheckArgs) -> Result<ExitCode, Error> {
    match (&args.config, &args.guest) {
        (Some(config), _) => check_config(config),
        (None, Some(guest)) => check_guest(args, guest),
        (None, None) => unreachable!("one of them is required"),
    }
}

fn check_guest(args: &CheckArgs, guest: &Path) -> Result<ExitCode, Error> {
    let component = read(guest)?;
    let needs = Requirements::of(&component).map_err(refused(guest))?;
    let limits = args.guest_limits.limits();
    needs.fit(&limits).map_err(refused(guest))?;
    let shared = [&args.guest_limits];
    let shared = args.shared_limits.limits(capacity::memory(), shared);
    let plan = Plan::new(&needs, shared.stack, limits.open_files).with_pool(args.max_connections);
    // One is enough to compile and link for.
    let engine = Engine::new(plan.pool_size(1), &needs, shared, None)?;
    let connect = args.network.allow_connect.clone();
    let grants = Grants::default().with_destinations(connect);
    let compiled = Guest::new(&engine, &component, grants, limits.clone());
    let compiled = compiled.map_err(refused(guest))?;
    let mut stdout = io::stdout().lock();
    // Whoever closes the pipe has read enough.
    let _ = write!(
        stdout,
        "{}: accepted\n\n{}\n{}",
        guest.display(),
        Lists {
            report: compiled.report(),
            max_memory: limits.memory,
        },
        Capacity(plan),
    );
    Ok(ExitCode::SUCCESS)
}

/// Says whether `serve` would take a config file: all of it, up to an instance of each guest and its
/// probe. Addresses are not looked at: they may be those of the server that runs.
fn check_config(path: &Path) -> Result<ExitCode, Error> {
    let configured = ResolvedConfig::of_file(path)?;
    let checked = load_all(configured.services, Some(path), HashMap::new())?;
    let guests = checked.iter().map(|one| &one.spec.args.guest_limits);
    let shared = configured.server.shared_limits;
    let shared = shared.limits(capacity::memory(), guests);
    let (needs, files) = requirements(&checked);
    let plan = Plan::new(&needs, shared.stack, files);
    let fits = plan.max_connections(configured.max_connections)?;
    let engine = Engine::new(plan.pool_size(1), &needs, shared, None)?;
    let mut mistakes = Vec::new();
    let mut stdout = io::stdout().lock();
    let mut accepted = Vec::new();
    for LoadedService {
        spec,
        component,
        grants,
        ..
    } in checked
    {
        let settings = fleet::settings(&spec, grants, None);
        match Service::new(settings, engine.clone(), Arc::default(), component) {
            Ok(_) => accepted.push(spec),
            Err(reason) => mistakes.push(Mistake {
                line: spec.line("guest"),
                text: format!("guest: {:?} is refused: {reason}", spec.guest),
            }),
        }
    }
    if !mistakes.is_empty() {
        let path = path.into();
        return Err(Error::Config(Mistakes { path, mistakes }));
    }
    // Whoever closes the pipe has read enough.
    let _ = writeln!(
        stdout,
        "{}: accepted, for {fits} connections at once",
        path.display()
    );
    for spec in accepted {
        let addresses: Vec<_> = spec.args.listen.iter().map(ToString::to_string).collect();
        let (name, guest) = (&spec.name, spec.guest.display());
        let _ = writeln!(stdout, "  {name}: {guest} at {}", addresses.join(", "));
    }
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
            requirements: needs,
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

/// Compiles guests into the cache.
pub(crate) fn compile(args: &CompileArgs) -> Result<ExitCode, Error> {
    let limits = args.guest_limits.limits();
    let shared = [&args.guest_limits];
    let shared = args.shared_limits.limits(capacity::memory(), shared);
    let mut stdout = io::stdout().lock();
    for path in &args.guests {
        let component = read(path)?;
        let needs = Requirements::of(&component).map_err(refused(path))?;
        needs.fit(&limits).map_err(refused(path))?;
        let plan = Plan::new(&needs, shared.stack, limits.open_files);
        let cache = required_cache(&args.cache)?;
        let engine = Engine::new(plan.pool_size(1), &needs, shared.clone(), Some(cache))?;
        let connect = args.network.allow_connect.clone();
        let grants = Grants::default().with_destinations(connect);
        let guest = Guest::new(&engine, &component, grants, limits.clone());
        let guest = guest.map_err(refused(path))?;
        let done = match guest.was_compiled() {
            true => "compiled",
            false => "compiled before",
        };
        // Whoever closes the pipe has read enough.
        let _ = writeln!(stdout, "{}: {done} ({})", path.display(), guest.digest());
    }
    Ok(ExitCode::SUCCESS)
}
