//! The modules of a crate and their imports.

use std::collections::BTreeMap;

use super::scan::{RawPath, Scan};
use super::sources::Sources;

/// The names of a module from the top of its crate. Empty for the crate root.
pub(super) type ModulePath = Vec<String>;

/// A crate: every module that is a file of its own, without test modules.
pub(super) struct Crate {
    pub(super) modules: BTreeMap<ModulePath, Module>,
}

pub(super) struct Module {
    /// The path of the file below the source directory.
    pub(super) file: String,
    /// Paths that lead to other modules of the crate.
    pub(super) imports: Vec<Import>,
    /// Paths that lead out of the crate.
    pub(super) externals: Vec<External>,
}

pub(super) struct Import {
    pub(super) line: usize,
    /// The path from the crate root, for messages.
    pub(super) name: String,
    pub(super) target: ModulePath,
}

pub(super) struct External {
    pub(super) line: usize,
    /// The first name of the path: another crate, or a name that the file has imported.
    pub(super) name: String,
}

impl Crate {
    /// Reads the modules that the file `root` declares, and their children.
    pub(super) fn read(sources: &Sources, root: &str) -> Self {
        let mut scans = BTreeMap::new();
        scan_modules(sources, Vec::new(), root, "", &mut scans);
        let modules = scans.iter().map(|(path, (file, scan))| {
            let mut module = Module {
                file: file.clone(),
                imports: Vec::new(),
                externals: Vec::new(),
            };
            for raw in &scan.paths {
                add_path(&mut module, path, raw, scan, |path| {
                    scans.contains_key(path)
                });
            }
            (path.clone(), module)
        });
        Self {
            modules: modules.collect(),
        }
    }
}

type Scans = BTreeMap<ModulePath, (String, Scan)>;

/// Scans a module, and its children in `directory`.
fn scan_modules(
    sources: &Sources,
    module: ModulePath,
    file: &str,
    directory: &str,
    scans: &mut Scans,
) {
    let text = sources
        .get(file)
        .unwrap_or_else(|| panic!("{file} is missing"));
    let scan = Scan::new(text).unwrap_or_else(|error| panic!("{file}: {error}"));
    for child in &scan.children {
        let path = [module.as_slice(), std::slice::from_ref(child)].concat();
        let file = format!("{directory}{child}.rs");
        scan_modules(sources, path, &file, &format!("{directory}{child}/"), scans);
    }
    scans.insert(module, (file.into(), scan));
}

/// Resolves a path that the file of `path` contains.
fn add_path(
    module: &mut Module,
    path: &[String],
    raw: &RawPath,
    scan: &Scan,
    is_module: impl Fn(&[String]) -> bool,
) {
    let line = raw.line;
    let mut names = raw.names.iter().map(String::as_str).peekable();
    // Inline modules count as levels for `super`, although they are no files.
    let mut absolute = [path, &raw.inline].concat();
    let first = names.next().expect("a path has a name");
    match first {
        "crate" => absolute.clear(),
        "self" => {}
        "super" => drop(absolute.pop()),
        _ if raw.inline.is_empty() && scan.children.iter().any(|child| child == first) => {
            absolute.push(first.into());
        }
        _ => {
            let name = first.into();
            module.externals.push(External { line, name });
            return;
        }
    }
    while names.next_if_eq(&"super").is_some() {
        absolute.pop();
    }
    absolute.extend(names.map(String::from));
    let target = (0..=absolute.len())
        .rev()
        .map(|length| &absolute[..length])
        .find(|prefix| is_module(prefix))
        .expect("the crate root is a module");
    if target != path {
        module.imports.push(Import {
            line,
            name: format!("crate::{}", absolute.join("::")),
            target: target.to_vec(),
        });
    }
}
