//! `check` and `compile`: what can be said and done about a guest without serving it.

use std::fmt;
use std::io::{self, Write};
use std::process::ExitCode;

use wasinetd::Error;
use wasinetd::capacity::{self, Plan};
use wasinetd::sandbox::{Engine, Grants, Guest, Needs, Report};

use super::{read, refused, required_cache};
use crate::cli::{CheckArgs, CompileArgs};

/// Says whether `serve` would accept a guest, and how many connections it could serve.
pub(crate) fn check(args: &CheckArgs) -> Result<ExitCode, Error> {
    let component = read(&args.guest)?;
    let needs = Needs::of(&component).map_err(refused(&args.guest))?;
    let limits = args.guest_limits.limits(capacity::memory());
    needs.fit(&limits).map_err(refused(&args.guest))?;
    let plan = Plan::new(&needs, &limits, true).with_pool(args.max_connections);
    // One is enough to compile and link for.
    let engine = Engine::new(plan.room(1), &needs, limits.clone(), None)?;
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

/// Compiles guests into the cache.
pub(crate) fn compile(args: &CompileArgs) -> Result<ExitCode, Error> {
    let limits = args.guest_limits.limits(capacity::memory());
    let mut stdout = io::stdout().lock();
    for path in &args.guests {
        let component = read(path)?;
        let needs = Needs::of(&component).map_err(refused(path))?;
        needs.fit(&limits).map_err(refused(path))?;
        let plan = Plan::new(&needs, &limits, true);
        let cache = required_cache(&args.cache)?;
        let engine = Engine::new(plan.room(1), &needs, limits.clone(), Some(cache))?;
        let connect = args.network.allow_connect.clone();
        let grants = Grants::default().with_destinations(connect);
        let guest = Guest::new(&engine, &component, grants).map_err(refused(path))?;
        let done = match guest.was_compiled() {
            true => "compiled",
            false => "compiled before",
        };
        // Whoever closes the pipe has read enough.
        let _ = writeln!(stdout, "{}: {done} ({})", path.display(), guest.digest());
    }
    Ok(ExitCode::SUCCESS)
}
