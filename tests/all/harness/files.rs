//! Paths of the workspace: guests, fixtures and pages.

use std::io::Write;
use std::path::{Path, PathBuf};

/// The root directory of the workspace.
pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("tests/ is in the workspace")
        .into()
}

/// Asserts that `make build` has made `path`.
pub(super) fn built(path: PathBuf) -> PathBuf {
    assert!(
        path.exists(),
        "{} is missing: run `make build` first",
        path.display()
    );
    path
}

/// A guest in `target/guests`, by name.
pub(crate) fn guest(name: &str) -> PathBuf {
    let guests = root().join("target/guests");
    built(guests.join(name).with_extension("wasm"))
}

/// A guest that exists for tests only, by name.
pub(crate) fn fixture(name: &str) -> PathBuf {
    guest(&format!("fixtures/{name}"))
}

/// A test guest in the text format (WAT), by name.
pub(crate) fn wat_fixture(name: &str) -> PathBuf {
    let text = root().join("guest/fixtures/src").join(name);
    let component = wat::parse_file(text.with_extension("wat"))
        .unwrap_or_else(|error| panic!("{name} is not a component: {error}"));
    let path = root().join("target/guests/fixtures").join(name);
    // Tests that run at the same time write the same file, so each replaces it atomically.
    let mut file = tempfile::NamedTempFile::new_in(root().join("target")).expect("disk is free");
    file.write_all(&component).expect("disk is free");
    let path = path.with_extension("wasm");
    file.persist(&path)
        .expect("both paths are in one file system");
    path
}

/// The content of a page that the server serves.
pub(crate) fn page(name: &str) -> String {
    std::fs::read_to_string(root().join("static").join(name)).expect("the pages are in static/")
}

/// Writes a copy of the guest `named_version` that calls itself `name`.
pub(crate) fn write_version(path: &Path, name: &str) {
    let mut component = std::fs::read(fixture("named_version")).expect("the fixture exists");
    let offset = component
        .windows(16)
        .position(|bytes| bytes == b"NAME-OF-VERSION-")
        .expect("the guest contains the placeholder of its name");
    component[offset..offset + 16].copy_from_slice(format!("{name:_<16}").as_bytes());
    std::fs::write(path, component).expect("disk is free");
}
