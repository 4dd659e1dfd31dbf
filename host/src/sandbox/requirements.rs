//! The resources that an instance of a component takes.

use wasmparser::{
    BinaryReaderError, ComponentAlias, ComponentAliasSectionReader, ComponentExportSectionReader,
    ComponentExternalKind, ComponentImportSectionReader, ComponentInstance,
    ComponentInstanceSectionReader, ComponentOuterAliasKind, Encoding, Instance,
    InstanceSectionReader, MemorySectionReader, Parser, Payload, TableSectionReader,
};

use super::limits::GuestLimits;

/// The most that one instance may take of each resource.
///
/// Arbitrary: a component from a compiler has one component instance, three core instances, one
/// memory and two tables. A component composed of several has a few times that.
pub(super) const MAX_CORE_INSTANCES: u32 = 64;
const MAX_COMPONENT_INSTANCES: u32 = 256;
const MAX_MEMORIES: u32 = 32;
const MAX_TABLES: u32 = 64;

/// The most elements that a table may start with.
///
/// Arbitrary: a table has one element for each function called by a pointer. Large programs have
/// some ten thousand.
const MAX_TABLE_ELEMENTS: u64 = 1_000_000;

/// The elements that every table slot of a pool has room for. The default of wasmtime.
pub(super) const MIN_TABLE_SLOT: usize = 20_000;

/// The tables that every pool has slots for, per instance. Unused slots cost only addresses.
const MIN_TABLES: u32 = 8;

/// The size of a page of linear memory, in bytes.
///
/// WebAssembly core specification, section 2.3.8.
pub(super) const WASM_PAGE_BYTES: usize = 64 << 10;

/// The fix if the pool of a server is too small.
///
/// Only the start of a server can set the size of the pool.
pub(super) const RESTART: &str = "restart the server to make room: a restart refuses no client";

/// Why a guest cannot run, and the fix.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Refusal(String);

impl Refusal {
    pub(super) fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }
}

/// The resources that one instance of a guest takes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Requirements {
    /// Instances of components in the component, itself included.
    pub component_instances: u32,
    /// Core module instances.
    pub core_instances: u32,
    /// Linear memories.
    pub memories: u32,
    /// The initial size of all linear memories together, in bytes.
    pub memory_bytes: u64,
    /// Tables.
    pub tables: u32,
    /// The initial number of elements of the largest table.
    pub table_elements: u64,
}

impl Requirements {
    /// Counts the requirements of a component, without compiling it.
    ///
    /// # Errors
    ///
    /// Refuses bytes that are not a component, and a component with too many parts.
    pub fn of(bytes: &[u8]) -> Result<Self, Refusal> {
        if Parser::is_core_wasm(bytes) {
            return Err(Refusal::new(
                "it is a core WebAssembly module, not a component; build it with --target wasm32-wasip2, or turn it into a component with `wasm-tools component new`",
            ));
        }
        if !Parser::is_component(bytes) {
            return Err(Refusal::new(
                "it is not WebAssembly (it does not start with \\0asm); give the path of a component built for wasm32-wasip2",
            ));
        }
        let requirements = count(bytes).map_err(|error| {
            Refusal(format!("it is not a valid component: {error}; rebuild it"))
        })?;
        requirements.check_parts()?;
        Ok(requirements)
    }

    /// Refuses a component with too many parts.
    ///
    /// A small file can describe a component that nests without end. So this check comes before the
    /// component is compiled.
    fn check_parts(&self) -> Result<(), Refusal> {
        for (part, count, max) in [
            (
                "component instances",
                self.component_instances,
                MAX_COMPONENT_INSTANCES,
            ),
            ("core instances", self.core_instances, MAX_CORE_INSTANCES),
            ("memories", self.memories, MAX_MEMORIES),
            ("tables", self.tables, MAX_TABLES),
        ] {
            if count > max {
                return Err(Refusal(format!(
                    "each connection would take {count} {part}, and at most {max} are allowed; build it of fewer parts"
                )));
            }
        }
        Ok(())
    }

    /// Checks that an instance can start within `limits`.
    ///
    /// # Errors
    ///
    /// Refuses a guest with too much initial memory or too large tables.
    pub fn fit(&self, limits: &GuestLimits) -> Result<(), Refusal> {
        if self.memory_bytes > limits.memory as u64 {
            return Err(Refusal(format!(
                "each connection would start with {} bytes of memory, and max-memory allows {}; raise max-memory, or link the guest with a smaller initial memory",
                self.memory_bytes, limits.memory
            )));
        }
        if self.table_elements > MAX_TABLE_ELEMENTS {
            return Err(Refusal(format!(
                "one of its tables starts with {} elements, and at most {MAX_TABLE_ELEMENTS} are allowed; build it of fewer functions",
                self.table_elements
            )));
        }
        Ok(())
    }

    /// Checks that the `slots` that a pool has for each instance suffice.
    pub(super) fn fit_pool(&self, slots: &Self) -> Result<(), Refusal> {
        for (resource, needed, available) in [
            ("memories", self.memories.into(), slots.memories.into()),
            ("tables", self.tables.into(), slots.tables.into()),
            (
                "elements of a table",
                self.table_elements,
                slots.table_elements.max(MIN_TABLE_SLOT as u64),
            ),
        ] {
            if needed > available {
                return Err(Refusal(format!(
                    "each connection would take {needed} {resource}, and this server was started with room for {available}; {RESTART}"
                )));
            }
        }
        Ok(())
    }

    /// The larger of both requirements, for each resource.
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

    /// These requirements, with spare slots for later versions of the guests.
    pub(super) fn with_spare_slots(&self) -> Self {
        Self {
            memories: self.memories.max(1),
            tables: self.tables.max(MIN_TABLES),
            ..*self
        }
    }

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
}

/// Why the requirements of a component cannot be counted.
#[derive(Debug, thiserror::Error)]
enum CountError {
    #[error(transparent)]
    Malformed(#[from] BinaryReaderError),
    #[error("it instantiates a core module or component that is not part of it")]
    Undefined,
    #[error("it ends twice")]
    EndsTwice,
    #[error("it has no end")]
    NoEnd,
}

fn count(bytes: &[u8]) -> Result<Requirements, CountError> {
    let mut frames: Vec<Frame> = Vec::new();
    for payload in Parser::new(0).parse_all(bytes) {
        match payload? {
            Payload::Version { encoding, .. } => frames.push(Frame::new(encoding)),
            Payload::End(_) => {
                let frame = frames.pop().ok_or(CountError::EndsTwice)?;
                let requirements = Some(frame.requirements);
                match (frames.last_mut(), frame.encoding) {
                    (None, _) => return Ok(frame.requirements),
                    (Some(outer), Encoding::Module) => outer.modules.push(requirements),
                    (Some(outer), Encoding::Component) => outer.components.push(requirements),
                }
            }
            section => {
                let (frame, outer) = frames.split_last_mut().ok_or(CountError::Undefined)?;
                frame.count_section(section, outer)?;
            }
        }
    }
    Err(CountError::NoEnd)
}

/// A module or component with the definitions read so far.
struct Frame {
    encoding: Encoding,
    requirements: Requirements,
    /// The requirements of each core module. None for a module that this file does not define.
    modules: Vec<Option<Requirements>>,
    /// The requirements of each component. None for a component that this file does not define.
    components: Vec<Option<Requirements>>,
}

impl Frame {
    fn new(encoding: Encoding) -> Self {
        Self {
            encoding,
            requirements: Requirements {
                component_instances: u32::from(encoding == Encoding::Component),
                ..Requirements::default()
            },
            modules: Vec::new(),
            components: Vec::new(),
        }
    }

    fn count_section(&mut self, section: Payload<'_>, outer: &[Self]) -> Result<(), CountError> {
        match section {
            Payload::MemorySection(memories) => self.count_memories(memories),
            Payload::TableSection(tables) => self.count_tables(tables),
            Payload::InstanceSection(instances) => self.count_core_instances(instances),
            Payload::ComponentInstanceSection(instances) => {
                self.count_component_instances(instances)
            }
            Payload::ComponentImportSection(imports) => self.define_imports(imports),
            Payload::ComponentExportSection(exports) => self.define_exports(exports),
            Payload::ComponentAliasSection(aliases) => self.define_aliases(aliases, outer),
            _ => Ok(()),
        }
    }

    fn count_memories(&mut self, memories: MemorySectionReader<'_>) -> Result<(), CountError> {
        for memory in memories {
            let bytes = memory?.initial.saturating_mul(WASM_PAGE_BYTES as u64);
            self.requirements.add(Requirements {
                memories: 1,
                memory_bytes: bytes,
                ..Requirements::default()
            });
        }
        Ok(())
    }

    fn count_tables(&mut self, tables: TableSectionReader<'_>) -> Result<(), CountError> {
        for table in tables {
            self.requirements.add(Requirements {
                tables: 1,
                table_elements: table?.ty.initial,
                ..Requirements::default()
            });
        }
        Ok(())
    }

    fn count_core_instances(
        &mut self,
        instances: InstanceSectionReader<'_>,
    ) -> Result<(), CountError> {
        for instance in instances {
            let Instance::Instantiate { module_index, .. } = instance? else {
                continue;
            };
            let module = definition(&self.modules, module_index).ok_or(CountError::Undefined)?;
            self.requirements.add(Requirements {
                core_instances: 1,
                ..module
            });
        }
        Ok(())
    }

    fn count_component_instances(
        &mut self,
        instances: ComponentInstanceSectionReader<'_>,
    ) -> Result<(), CountError> {
        for instance in instances {
            let ComponentInstance::Instantiate {
                component_index, ..
            } = instance?
            else {
                continue;
            };
            let component =
                definition(&self.components, component_index).ok_or(CountError::Undefined)?;
            self.requirements.add(component);
        }
        Ok(())
    }

    fn define_imports(
        &mut self,
        imports: ComponentImportSectionReader<'_>,
    ) -> Result<(), CountError> {
        for import in imports {
            self.define_foreign(import?.ty.kind());
        }
        Ok(())
    }

    /// An export defines a second index for the exported item.
    fn define_exports(
        &mut self,
        exports: ComponentExportSectionReader<'_>,
    ) -> Result<(), CountError> {
        for export in exports {
            let export = export?;
            match export.kind {
                ComponentExternalKind::Module => {
                    self.modules.push(definition(&self.modules, export.index));
                }
                ComponentExternalKind::Component => {
                    self.components
                        .push(definition(&self.components, export.index));
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn define_aliases(
        &mut self,
        aliases: ComponentAliasSectionReader<'_>,
        outer: &[Self],
    ) -> Result<(), CountError> {
        for alias in aliases {
            match alias? {
                ComponentAlias::Outer { kind, count, index } => {
                    self.define_outer_alias(kind, count as usize, index, outer);
                }
                ComponentAlias::InstanceExport { kind, .. } => self.define_foreign(kind),
                // A core instance exports neither modules nor components.
                ComponentAlias::CoreInstanceExport { .. } => {}
            }
        }
        Ok(())
    }

    /// Defines an alias of an item `depth` levels further out.
    fn define_outer_alias(
        &mut self,
        kind: ComponentOuterAliasKind,
        depth: usize,
        index: u32,
        outer: &[Self],
    ) {
        let source = match depth {
            0 => Some(&*self),
            depth => outer.len().checked_sub(depth).map(|n| &outer[n]),
        };
        match kind {
            ComponentOuterAliasKind::CoreModule => {
                let module = source.and_then(|frame| definition(&frame.modules, index));
                self.modules.push(module);
            }
            ComponentOuterAliasKind::Component => {
                let component = source.and_then(|frame| definition(&frame.components, index));
                self.components.push(component);
            }
            _ => {}
        }
    }

    /// Defines an item that comes from outside this file.
    fn define_foreign(&mut self, kind: ComponentExternalKind) {
        match kind {
            ComponentExternalKind::Module => self.modules.push(None),
            ComponentExternalKind::Component => self.components.push(None),
            _ => {}
        }
    }
}

/// The definition at `index`. None if this file does not define that item.
fn definition(definitions: &[Option<Requirements>], index: u32) -> Option<Requirements> {
    definitions.get(index as usize).copied().flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Magic number and version of a component (component model, binary format).
    const PREAMBLE: [u8; 8] = *b"\0asm\x0d\0\x01\0";

    #[test]
    fn any_bytes_are_counted_or_refused() {
        bolero::check!().for_each(|bytes: &[u8]| {
            let _ = Requirements::of(bytes);
            let _ = Requirements::of(&[&PREAMBLE, bytes].concat());
        });
    }

    #[test]
    fn any_component_is_counted_or_refused() {
        // Sections of correct length, of few kinds and with small numbers: more of them are valid.
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
                if let Ok(requirements) = Requirements::of(&bytes) {
                    assert!(requirements.core_instances <= MAX_CORE_INSTANCES);
                }
            });
    }
}
