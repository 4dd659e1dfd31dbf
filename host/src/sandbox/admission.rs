//! Admission of a component: from bytes to code that may run.

use wasmtime::component::Component;

use super::digest::Digest;
use super::engine::Engine;
use super::grants::Grants;
use super::imports::Report;
use super::limits::GuestLimits;
use super::requirements::{RESTART, Refusal, Requirements};

/// A component that may run.
pub(super) struct AdmittedComponent {
    pub(super) component: Component,
    pub(super) report: Report,
    /// False if the compiled code comes from the cache.
    pub(super) was_compiled: bool,
}

/// Checks a component, and compiles it unless the cache has its code.
pub(super) fn admit(
    engine: &Engine,
    bytes: &[u8],
    digest: &Digest,
    grants: &Grants,
    limits: &GuestLimits,
) -> Result<AdmittedComponent, Refusal> {
    let requirements = Requirements::of(bytes)?;
    check_size(engine, &requirements, limits)?;
    let cached = engine.cached(digest);
    let was_compiled = cached.is_none();
    let component = match cached {
        Some(component) => component,
        None => {
            let component = Component::new(engine.wasmtime(), bytes).map_err(|error| {
                Refusal::new(format!("it does not compile: {error:#}; rebuild it"))
            })?;
            engine.cache(digest, &component);
            component
        }
    };
    let ty = component.component_type();
    let report = Report {
        imports: names(ty.imports(engine.wasmtime())),
        exports: names(ty.exports(engine.wasmtime())),
        requirements,
    };
    report.check(may_connect(grants))?;
    Ok(AdmittedComponent {
        component,
        report,
        was_compiled,
    })
}

/// Checks a compiled component against other grants and limits.
pub(super) fn check(
    engine: &Engine,
    report: &Report,
    grants: &Grants,
    limits: &GuestLimits,
) -> Result<(), Refusal> {
    check_size(engine, &report.requirements, limits)?;
    report.check(may_connect(grants))
}

fn may_connect(grants: &Grants) -> bool {
    !grants.destinations().is_empty()
}

fn check_size(
    engine: &Engine,
    requirements: &Requirements,
    limits: &GuestLimits,
) -> Result<(), Refusal> {
    requirements.fit(limits)?;
    requirements.fit_pool(engine.slots())?;
    let max_memory = engine.limits().memory;
    if limits.memory > max_memory {
        return Err(Refusal::new(format!(
            "max-memory is {}, and this server was started with room for {max_memory} bytes each; {RESTART}",
            limits.memory
        )));
    }
    Ok(())
}

fn names<'a, T>(interfaces: impl Iterator<Item = (&'a str, T)>) -> Vec<String> {
    interfaces.map(|(name, _)| name.into()).collect()
}
