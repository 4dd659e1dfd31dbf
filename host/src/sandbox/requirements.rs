//! What a guest is made of, and whether it can be run.

use std::fmt;

use tracing::warn;
use wasmparser::{
    ComponentAlias, ComponentExternalKind, ComponentInstance, ComponentOuterAliasKind, Encoding,
    Instance, Parser, Payload,
};
use wasmtime::component::Component;

use super::digest::Digest;
use super::engine::TABLE_ELEMENTS;
use super::{Engine, Grants, GuestLimits};

/// The package of our WIT.
const PACKAGE: &str = "wasinetd:tcp";

/// Its version. A guest built against another minor version of a 0.x package does not fit (semver).
const VERSION: &str = "0.1.0";

/// The WASI packages that are linked, in these versions.
const WASI: [&str; 5] = [
    "wasi:cli",
    "wasi:clocks",
    "wasi:filesystem",
    "wasi:io",
    "wasi:random",
];
/// The package that is linked as well, for guests that may connect somewhere. Not its streams of 0.3:
/// what moves between two of the host's own is moved without end in one turn.
const WASI_NETWORK: &str = "wasi:sockets";
const WASI_NETWORK_VERSION: &str = "0.2";
const WASI_VERSIONS: [&str; 2] = ["0.2", "0.3"];

/// The most that an instance may take of each. Arbitrary: a component that a compiler makes has
/// one component instance, three core instances, one memory and two tables; one composed of several
/// has a few times that.
pub(super) const MAX_CORE_INSTANCES: u32 = 64;
const MAX_COMPONENT_INSTANCES: u32 = 256;
const MAX_MEMORIES: u32 = 32;
const MAX_TABLES: u32 = 64;

/// The most elements that a table may start with. Arbitrary: there is one for each function that is
/// called by a pointer, and large programs have some ten thousand.
const MAX_TABLE_ELEMENTS: u64 = 1_000_000;

/// What to do about what only the start of a server can make room for.
const RESTART: &str = "start it again so: a restart hands over without refusing anyone";

/// Why a guest cannot be run, with the fix.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Refusal(String);

impl Refusal {
    pub(super) fn mismatch(error: wasmtime::Error) -> Self {
        Self(format!(
            "it does not fit the world {PACKAGE}/connection-handler@{VERSION}: {error:#}; rebuild it against the WIT of this version"
        ))
    }
}

/// What one instance of a guest takes out of the pool.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Requirements {
    /// Instances of components in the component, itself included.
    pub component_instances: u32,
    /// Core module instances.
    pub core_instances: u32,
    /// Linear memories.
    pub memories: u32,
    /// The size that those memories start with, in bytes, together.
    pub memory_bytes: u64,
    /// Tables.
    pub tables: u32,
    /// The elements that the largest of those tables starts with.
    pub table_elements: u64,
}

impl Requirements {
    fn add(&mut self, other: Self) {
        self.component_instances = self
            .component_instances
            .saturating_add(other.component_instances);
        self.core_instances = self.core_instances.saturating_add(other.core_instances);
        self.memories = self.memories.saturating_add(other.memories);
        self.memory_bytes = self.memory_bytes.saturating_add(other.memory_bytes);
        self.tables = self.tables.saturating_add(other.tables);
        self.table_elements = self.table_elements.max(other.table_elements);
    }

    /// A small file can describe a component that nests without end. It is refused before it is
    /// compiled.
    fn check(&self) -> Result<(), Refusal> {
        for (what, has, most) in [
            (
                "component instances",
                self.component_instances,
                MAX_COMPONENT_INSTANCES,
            ),
            ("core instances", self.core_instances, MAX_CORE_INSTANCES),
            ("memories", self.memories, MAX_MEMORIES),
            ("tables", self.tables, MAX_TABLES),
        ] {
            if has > most {
                return Err(Refusal(format!(
                    "each connection would take {has} {what}, and at most {most} are allowed; build it of fewer parts"
                )));
            }
        }
        Ok(())
    }

    /// Enough for guests of either kind.
    pub fn or(&self, other: &Self) -> Self {
        Self {
            component_instances: self.component_instances.max(other.component_instances),
            core_instances: self.core_instances.max(other.core_instances),
            memories: self.memories.max(other.memories),
            memory_bytes: self.memory_bytes.max(other.memory_bytes),
            tables: self.tables.max(other.tables),
            table_elements: self.table_elements.max(other.table_elements),
        }
    }

    /// The same, and some more of what costs no more than addresses: the guests that follow the first
    /// are not to be kept from having a table more.
    pub(super) fn with_room_for_others(&self) -> Self {
        Self {
            memories: self.memories.max(1),
            tables: self.tables.max(8),
            ..*self
        }
    }

    /// Refuses a guest that an engine with `room` for others has no slots for.
    pub(super) fn fit_into(&self, room: &Self) -> Result<(), Refusal> {
        for (what, needs, has) in [
            ("memories", self.memories.into(), room.memories.into()),
            ("tables", self.tables.into(), room.tables.into()),
            (
                "elements of a table",
                self.table_elements,
                room.table_elements.max(TABLE_ELEMENTS as u64),
            ),
        ] {
            if needs > has {
                return Err(Refusal(format!(
                    "each connection would take {needs} {what}, and this server was started with room for {has}; {RESTART}"
                )));
            }
        }
        Ok(())
    }

    /// Refuses a guest that could not begin within `limits`.
    ///
    /// # Errors
    ///
    /// Says what it needs, and the fix.
    pub fn fit(&self, limits: &GuestLimits) -> Result<(), Refusal> {
        if self.memory_bytes > limits.memory as u64 {
            return Err(Refusal(format!(
                "each connection would begin with {} bytes of memory, and --max-memory allows {}; allow more, or link it with a smaller initial memory",
                self.memory_bytes, limits.memory
            )));
        }
        if self.table_elements > MAX_TABLE_ELEMENTS {
            return Err(Refusal(format!(
                "a table of it begins with {} elements, and at most {MAX_TABLE_ELEMENTS} are allowed; build it of fewer functions",
                self.table_elements
            )));
        }
        Ok(())
    }

    /// Reads the needs off the bytes of a component, without compiling it.
    ///
    /// # Errors
    ///
    /// Says what the bytes are if they are not a component.
    pub fn of(bytes: &[u8]) -> Result<Self, Refusal> {
        if Parser::is_core_wasm(bytes) {
            return Err(Refusal(
                "it is a core WebAssembly module, not a component; build it with --target wasm32-wasip2, or make a component of it with `wasm-tools component new`".into(),
            ));
        }
        if !Parser::is_component(bytes) {
            return Err(Refusal(
                "it is not WebAssembly (it does not start with \\0asm); give the path of a component built for wasm32-wasip2".into(),
            ));
        }
        let needs = count(bytes).map_err(|reason| {
            Refusal(format!("it is not a valid component: {reason}; rebuild it"))
        })?;
        needs.check()?;
        Ok(needs)
    }
}

/// A module or component that is being read, with what has been defined in it so far.
struct Frame {
    encoding: Encoding,
    needs: Requirements,
    /// None for one that is not defined in this file.
    modules: Vec<Option<Requirements>>,
    components: Vec<Option<Requirements>>,
}

impl Frame {
    fn new(encoding: Encoding) -> Self {
        Self {
            encoding,
            needs: Requirements {
                component_instances: u32::from(encoding == Encoding::Component),
                ..Requirements::default()
            },
            modules: Vec::new(),
            components: Vec::new(),
        }
    }
}

fn count(bytes: &[u8]) -> Result<Requirements, String> {
    let text = |error: wasmparser::BinaryReaderError| error.to_string();
    let mut frames: Vec<Frame> = Vec::new();
    for payload in Parser::new(0).parse_all(bytes) {
        let payload = payload.map_err(text)?;
        match &payload {
            Payload::Version { encoding, .. } => frames.push(Frame::new(*encoding)),
            Payload::End(_) => {
                let frame = frames.pop().ok_or("it ends twice")?;
                match (frames.last_mut(), frame.encoding) {
                    (None, _) => return Ok(frame.needs),
                    (Some(outer), Encoding::Module) => outer.modules.push(Some(frame.needs)),
                    (Some(outer), Encoding::Component) => outer.components.push(Some(frame.needs)),
                }
            }
            _ => section(&payload, &mut frames)
                .map_err(text)?
                .ok_or("it instantiates a core module or component that is not part of it")?,
        }
    }
    Err("it has no end".into())
}

/// Counts one section. None when it refers to what the file does not define.
fn section(payload: &Payload<'_>, frames: &mut [Frame]) -> wasmparser::Result<Option<()>> {
    let Some((frame, outer)) = frames.split_last_mut() else {
        return Ok(None);
    };
    match payload {
        Payload::MemorySection(memories) => {
            for memory in memories.clone() {
                frame.needs.memories = frame.needs.memories.saturating_add(1);
                let bytes = memory?.initial.saturating_mul(WASM_PAGE_BYTES);
                frame.needs.memory_bytes = frame.needs.memory_bytes.saturating_add(bytes);
            }
        }
        Payload::TableSection(tables) => {
            for table in tables.clone() {
                frame.needs.tables = frame.needs.tables.saturating_add(1);
                let elements = table?.ty.initial;
                frame.needs.table_elements = frame.needs.table_elements.max(elements);
            }
        }
        Payload::InstanceSection(instances) => {
            for instance in instances.clone() {
                let Instance::Instantiate { module_index, .. } = instance? else {
                    continue;
                };
                let Some(Some(needs)) = frame.modules.get(module_index as usize) else {
                    return Ok(None);
                };
                frame.needs.add(Requirements {
                    core_instances: 1,
                    ..*needs
                });
            }
        }
        Payload::ComponentInstanceSection(instances) => {
            for instance in instances.clone() {
                let ComponentInstance::Instantiate {
                    component_index, ..
                } = instance?
                else {
                    continue;
                };
                let Some(Some(needs)) = frame.components.get(component_index as usize) else {
                    return Ok(None);
                };
                frame.needs.add(*needs);
            }
        }
        Payload::ComponentImportSection(imports) => {
            for import in imports.clone() {
                match import?.ty.kind() {
                    ComponentExternalKind::Module => frame.modules.push(None),
                    ComponentExternalKind::Component => frame.components.push(None),
                    _ => {}
                }
            }
        }
        Payload::ComponentExportSection(exports) => {
            // An export makes a new name for what it exports.
            for export in exports.clone() {
                let export = export?;
                match export.kind {
                    ComponentExternalKind::Module => {
                        let same = frame.modules.get(export.index as usize).copied().flatten();
                        frame.modules.push(same);
                    }
                    ComponentExternalKind::Component => {
                        let same = frame
                            .components
                            .get(export.index as usize)
                            .copied()
                            .flatten();
                        frame.components.push(same);
                    }
                    _ => {}
                }
            }
        }
        Payload::ComponentAliasSection(aliases) => {
            for alias in aliases.clone() {
                self::alias(alias?, frame, outer);
            }
        }
        _ => {}
    }
    Ok(Some(()))
}

/// The size of a page of linear memory (WebAssembly core specification, section 2.3.8).
const WASM_PAGE_BYTES: u64 = 64 * 1024;

fn alias(alias: ComponentAlias<'_>, frame: &mut Frame, outer: &[Frame]) {
    match alias {
        ComponentAlias::Outer { kind, count, index } => {
            let (count, index) = (count as usize, index as usize);
            let source = |of: fn(&Frame) -> &Vec<Option<Requirements>>| match count {
                0 => of(frame).get(index).copied().flatten(),
                n => outer
                    .len()
                    .checked_sub(n)
                    .and_then(|n| of(&outer[n]).get(index).copied().flatten()),
            };
            match kind {
                ComponentOuterAliasKind::CoreModule => {
                    let needs = source(|frame| &frame.modules);
                    frame.modules.push(needs);
                }
                ComponentOuterAliasKind::Component => {
                    let needs = source(|frame| &frame.components);
                    frame.components.push(needs);
                }
                _ => {}
            }
        }
        ComponentAlias::InstanceExport { kind, .. } => match kind {
            ComponentExternalKind::Module => frame.modules.push(None),
            ComponentExternalKind::Component => frame.components.push(None),
            _ => {}
        },
        // A core instance exports neither.
        ComponentAlias::CoreInstanceExport { .. } => {}
    }
}

/// What a guest says about itself.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    /// The names of the interfaces that it imports.
    pub imports: Vec<String>,
    /// The names of the interfaces that it exports.
    pub exports: Vec<String>,
    /// What an instance takes.
    pub needs: Requirements,
}

/// Compiles a component, or takes what is kept of it, and checks that it imports only what is linked
/// and exports a handler. Says whether it had to be compiled.
pub(super) fn compile(
    engine: &Engine,
    bytes: &[u8],
    digest: &Digest,
    grants: &Grants,
    limits: &GuestLimits,
) -> Result<(Component, Report, bool), Refusal> {
    let needs = Requirements::of(bytes)?;
    fit(engine, &needs, limits)?;
    let kept = kept(engine, digest);
    let compiled = kept.is_none();
    let component = match kept {
        Some(component) => component,
        None => {
            let component = Component::new(engine.wasmtime(), bytes)
                .map_err(|error| Refusal(format!("it does not compile: {error:#}; rebuild it")))?;
            engine.keep(digest, &component);
            component
        }
    };
    let ty = component.component_type();
    let names = |names: &mut dyn Iterator<Item = &str>| names.map(String::from).collect();
    let report = Report {
        imports: names(&mut ty.imports(engine.wasmtime()).map(|(name, _)| name)),
        exports: names(&mut ty.exports(engine.wasmtime()).map(|(name, _)| name)),
        needs,
    };
    check(&report, !grants.destinations().is_empty())?;
    Ok((component, report, compiled))
}

/// Checks whether a guest that is compiled could be run with these grants and limits as well.
pub(super) fn admit(
    engine: &Engine,
    report: &Report,
    grants: &Grants,
    limits: &GuestLimits,
) -> Result<(), Refusal> {
    fit(engine, &report.needs, limits)?;
    check(report, !grants.destinations().is_empty())
}

fn fit(engine: &Engine, needs: &Requirements, limits: &GuestLimits) -> Result<(), Refusal> {
    needs.fit(limits)?;
    needs.fit_into(engine.pool_requirements())?;
    let most = engine.limits().memory;
    if limits.memory > most {
        return Err(Refusal(format!(
            "--max-memory is {}, and this server was started with room for {most} bytes each; {RESTART}",
            limits.memory
        )));
    }
    Ok(())
}

/// What is kept of a component, if it is of use.
fn kept(engine: &Engine, digest: &Digest) -> Option<Component> {
    let code = engine.cached(digest)?;
    // SAFETY: it is what an engine like this one has written. Its digest says that nothing of it has
    // changed since, and the cache that nobody but this user can have put it there.
    match unsafe { Component::deserialize(engine.wasmtime(), code) } {
        Ok(component) => Some(component),
        Err(error) => {
            warn!(%error, "what is kept of a guest does not fit; it is compiled again");
            None
        }
    }
}

fn check(report: &Report, may_connect: bool) -> Result<(), Refusal> {
    let names = || {
        report
            .imports
            .iter()
            .chain(&report.exports)
            .map(|name| InterfaceName::parse(name))
    };
    if let Some(name) = names().find(|name| name.package == PACKAGE && !name.compatible(VERSION)) {
        return Err(Refusal(format!(
            "it was built against {name}, and this wasinetd speaks {PACKAGE}@{VERSION}; rebuild it against that version, or run the wasinetd that it was built for"
        )));
    }
    let refused: Vec<&str> = report
        .imports
        .iter()
        .filter(|name| !InterfaceName::parse(name).is_linked(may_connect))
        .map(String::as_str)
        .collect();
    if refused
        .iter()
        .any(|name| InterfaceName::parse(name).is_network())
        && !may_connect
    {
        return Err(Refusal(format!(
            "it imports the network, which it is not granted: {}; say where it may connect to with --allow-connect HOST:PORT, or remove the code that needs it",
            refused.join(", ")
        )));
    }
    if !refused.is_empty() {
        return Err(Refusal(format!(
            "it imports what no guest is granted: {}; remove the code that needs it (`wasinetd check --help` lists what is granted)",
            refused.join(", ")
        )));
    }
    let has_handler = report
        .exports
        .iter()
        .map(|name| InterfaceName::parse(name))
        .any(|name| name.package == PACKAGE && name.interface == "handler");
    if !has_handler {
        return Err(Refusal(format!(
            "it does not export {PACKAGE}/handler@{VERSION} (its exports: {}); export a handler with `wasinetd_guest::export!` in a crate of type cdylib",
            if report.exports.is_empty() {
                "none".into()
            } else {
                report.exports.join(", ")
            }
        )));
    }
    Ok(())
}

/// The name of an interface, such as `wasi:cli/environment@0.2.0`.
struct InterfaceName<'a> {
    package: &'a str,
    interface: &'a str,
    version: &'a str,
}

impl<'a> InterfaceName<'a> {
    /// A name of another form becomes an unknown package.
    fn parse(name: &'a str) -> Self {
        let (path, version) = name.split_once('@').unwrap_or((name, ""));
        let (package, interface) = path.split_once('/').unwrap_or((path, ""));
        Self {
            package,
            interface,
            version,
        }
    }

    /// Whether major and minor version are those of `version`.
    fn compatible(&self, version: &str) -> bool {
        let minor = |version: &'_ str| {
            let mut parts = version.split('.').map(String::from);
            (parts.next(), parts.next())
        };
        minor(self.version) == minor(version)
    }

    fn is_linked(&self, may_connect: bool) -> bool {
        self.package == PACKAGE
            || (WASI.contains(&self.package) && self.is_known_version())
            || (may_connect && self.is_network())
    }

    fn is_network(&self) -> bool {
        self.package == WASI_NETWORK && self.compatible(WASI_NETWORK_VERSION)
    }

    fn is_known_version(&self) -> bool {
        WASI_VERSIONS.iter().any(|version| self.compatible(version))
    }
}

impl fmt::Display for InterfaceName<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}@{}", self.package, self.interface, self.version)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a component begins with: magic number and version (component model, binary format).
    const PREAMBLE: [u8; 8] = *b"\0asm\x0d\0\x01\0";

    #[test]
    fn whatever_bytes_there_are_they_are_read_or_refused() {
        bolero::check!().for_each(|bytes: &[u8]| {
            let _ = Requirements::of(bytes);
            let _ = Requirements::of(&[&PREAMBLE, bytes].concat());
        });
    }

    #[test]
    fn whatever_a_component_is_made_of_it_is_counted_or_refused() {
        // Sections with their right length, of few kinds and with small numbers in them, so that more of
        // them are valid.
        let sections = bolero::generator::produce::<Vec<(u8, Vec<u8>)>>();
        bolero::check!()
            .with_generator(sections)
            .for_each(|sections| {
                let mut bytes = PREAMBLE.to_vec();
                for (kind, content) in sections {
                    let content = &content[..content.len().min(100)];
                    bytes.extend([kind % 12, content.len() as u8]);
                    bytes.extend(content.iter().map(|byte| byte % 8));
                }
                if let Ok(needs) = Requirements::of(&bytes) {
                    assert!(needs.core_instances <= MAX_CORE_INSTANCES);
                }
            });
    }
}
