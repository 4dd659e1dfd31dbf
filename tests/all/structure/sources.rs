//! Rust files of a directory.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// Source files, by their path below the directory that was read.
pub(super) type Sources = BTreeMap<String, String>;

/// Reads the Rust files below `directory`, without build directories.
pub(super) fn read_sources(directory: &Path) -> Sources {
    let mut sources = Sources::new();
    read_below(directory, "", &mut sources);
    assert!(!sources.is_empty(), "{} is empty", directory.display());
    sources
}

fn read_below(directory: &Path, prefix: &str, sources: &mut Sources) {
    for entry in fs::read_dir(directory).expect("the directory exists") {
        let entry = entry.expect("the directory can be read");
        let name = entry.file_name().into_string().expect("names are UTF-8");
        let path = format!("{prefix}{name}");
        if entry.path().is_dir() {
            if name != "target" {
                read_below(&entry.path(), &format!("{path}/"), sources);
            }
        } else if name.ends_with(".rs") {
            let text = fs::read_to_string(entry.path()).expect("the file is UTF-8");
            sources.insert(path, text);
        }
    }
}
