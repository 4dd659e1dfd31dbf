//! One guest, compiled as `serve` would compile it.

use std::path::PathBuf;

use wasinetd::capacity::Plan;
use wasinetd::config::LoadCause;
use wasinetd::config::load::{read_guest, requirements};
use wasinetd::sandbox::{Cache, Grants, Guest, SharedLimits};
use wasinetd::supervisor::Sizing;

use crate::cli::GuestSettings;
use crate::exit::Failure;

/// Compiles the guest at `path`. Returns it with the capacity plan for it.
pub(super) fn compile_guest(
    settings: &GuestSettings,
    path: PathBuf,
    cache: Option<Cache>,
) -> Result<(Guest, Plan), Failure> {
    let handler = &settings.handler;
    let component = read_guest(&path)?;
    let requirements = requirements(&path, &handler.guest_limits, &component)?;
    let sizing = Sizing::of_guest(handler, requirements, |memory, max_memory| SharedLimits {
        memory: max_memory,
        total_memory: settings.total_memory.unwrap_or(memory / 2),
        stack: settings.stack,
    });
    // Room for one instance is enough to compile and link.
    let engine = sizing.engine(1, cache)?;
    let grants = Grants::default().with_destinations(handler.allow_connect.clone());
    let guest = Guest::new(&engine, &component, grants, handler.guest_limits.clone());
    let guest = guest.map_err(|refusal| LoadCause::GuestRefused {
        path,
        reason: refusal.to_string(),
    })?;
    Ok((guest, sizing.plan))
}
