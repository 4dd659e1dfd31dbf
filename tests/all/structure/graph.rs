//! Rules for the imports between modules.

use std::collections::{BTreeMap, VecDeque};

use super::modules::{Crate, Import, ModulePath};

/// Describes the import cycles of a crate. Empty if there are none.
pub(super) fn cycles(modules: &Crate) -> Vec<String> {
    let starts = modules.modules.keys();
    let cycles = starts.flat_map(|start| cycles_from(modules, start));
    cycles.map(|cycle| describe(modules, &cycle)).collect()
}

/// A module of a cycle, and its import of the next module.
type Step<'a> = (&'a ModulePath, &'a Import);

/// The cycles whose first module in order of names is `start`.
///
/// There is one for each module that imports `start`.
///
/// Every cycle has a first module, so a crate with a cycle has an answer for one of its modules.
fn cycles_from<'a>(modules: &'a Crate, start: &'a ModulePath) -> Vec<Vec<Step<'a>>> {
    let mut reached_by: BTreeMap<&ModulePath, Step> = BTreeMap::new();
    let mut queue = VecDeque::from([start]);
    let mut last_steps: Vec<Step> = Vec::new();
    while let Some(module) = queue.pop_front() {
        for import in &modules.modules[module].imports {
            let target = &import.target;
            if target == start && !last_steps.iter().any(|(last, _)| *last == module) {
                last_steps.push((module, import));
            }
            if target > start && !reached_by.contains_key(target) {
                reached_by.insert(target, (module, import));
                queue.push_back(target);
            }
        }
    }
    let cycle = |last: Step<'a>| {
        let mut steps = vec![last];
        while let Some(step) = reached_by.get(steps[steps.len() - 1].0) {
            steps.push(*step);
        }
        steps.reverse();
        steps
    };
    last_steps.into_iter().map(cycle).collect()
}

fn describe(modules: &Crate, cycle: &[Step]) -> String {
    let name = |module: &ModulePath| match module.as_slice() {
        [] => "crate".into(),
        names => names.join("::"),
    };
    let mut text: String = cycle
        .iter()
        .map(|(module, _)| name(module) + " -> ")
        .collect();
    text += &name(cycle[0].0);
    for (module, import) in cycle {
        let file = &modules.modules[*module].file;
        text += &format!("\n    {file}:{} names {}", import.line, import.name);
    }
    text
}

/// Describes the imports between rooms that `rooms` does not allow.
pub(super) fn forbidden_imports(
    modules: &Crate,
    base: &[&str],
    rooms: &[(&str, &[&str])],
) -> Vec<String> {
    let rooms: BTreeMap<&str, &[&str]> = rooms.iter().copied().collect();
    let mut problems = Vec::new();
    for (path, module) in &modules.modules {
        // The crate root is no room.
        let Some(room) = path.first().map(String::as_str) else {
            continue;
        };
        let file = &module.file;
        let Some(allowed) = rooms.get(room) else {
            problems.push(format!("{file}: the table of rooms does not have {room}"));
            continue;
        };
        for Import { line, name, target } in &module.imports {
            let Some(other) = target.first().map(String::as_str) else {
                continue;
            };
            if other != room && !base.contains(&other) && !allowed.contains(&other) {
                let problem = format!("{file}:{line} names {name}: {room} may not import {other}");
                problems.push(problem);
            }
        }
    }
    problems
}

/// Describes where a library is named outside the files that hide it.
pub(super) fn named_libraries(crates: &[Crate], hidden: &[(&[&str], &[&str])]) -> Vec<String> {
    let mut problems = Vec::new();
    for module in crates.iter().flat_map(|modules| modules.modules.values()) {
        let file = &module.file;
        for external in &module.externals {
            let forbidden = hidden.iter().any(|(libraries, places)| {
                libraries.contains(&external.name.as_str())
                    && !places.iter().any(|place| is_in(file, place))
            });
            if forbidden {
                problems.push(format!("{file}:{} names {}", external.line, external.name));
            }
        }
    }
    problems
}

/// Whether `place` is the file, or a directory (`NAME/`) around the file.
fn is_in(file: &str, place: &str) -> bool {
    file == place || place.ends_with('/') && file.starts_with(place)
}
