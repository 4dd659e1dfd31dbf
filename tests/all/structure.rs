//! The structure of the source: module layers, and the length of functions.

mod graph;
mod length;
mod modules;
mod scan;
mod sources;

use std::collections::BTreeMap;

use modules::Crate;
use sources::read_sources;

use crate::harness::root;

/// Rooms of the library that every other room may import.
const BASE: [&str; 5] = ["lifecycle", "limit", "net", "sync", "telemetry"];

/// The rooms that each room of the library may import, besides [`BASE`].
///
/// A room is a module at the top of the library, with its children.
const ROOMS: [(&str, &[&str]); 16] = [
    ("lifecycle", &[]),
    ("limit", &[]),
    ("net", &[]),
    ("sync", &[]),
    ("telemetry", &[]),
    ("listener", &[]),
    ("sandbox", &[]),
    ("server", &[]),
    ("connection", &["listener", "sandbox"]),
    ("service", &["connection", "listener", "sandbox"]),
    ("admin", &["connection", "listener", "sandbox", "service"]),
    ("capacity", &["sandbox"]),
    (
        "config",
        &[
            "admin",
            "connection",
            "listener",
            "sandbox",
            "server",
            "service",
        ],
    ),
    ("systemd", &["listener", "server"]),
    ("upgrade", &["listener", "systemd"]),
    (
        "supervisor",
        &[
            "admin",
            "capacity",
            "config",
            "connection",
            "listener",
            "sandbox",
            "server",
            "service",
            "systemd",
            "upgrade",
        ],
    ),
];

/// Libraries that one part of the host hides from the others.
const HIDDEN: [(&[&str], &[&str]); 2] = [
    (&["wasmtime", "wasmtime_wasi"], &["sandbox.rs", "sandbox/"]),
    (
        &["clap"],
        &["main.rs", "cli.rs", "cli/", "commands.rs", "commands/"],
    ),
];

/// The longest function that needs no reason.
const MAX_LINES: usize = 70;

fn library() -> Crate {
    Crate::read(&read_sources(&root().join("host/src")), "lib.rs")
}

fn binary() -> Crate {
    Crate::read(&read_sources(&root().join("host/src")), "main.rs")
}

fn assert_none(problems: &[String]) {
    assert!(
        problems.is_empty(),
        "{} problems:\n{}",
        problems.len(),
        problems.join("\n")
    );
}

#[test]
fn modules_of_the_library_do_not_import_in_a_circle() {
    assert_none(&graph::cycles(&library()));
}

#[test]
fn modules_of_the_binary_do_not_import_in_a_circle() {
    assert_none(&graph::cycles(&binary()));
}

#[test]
fn rooms_import_only_the_rooms_below_them() {
    assert_none(&graph::forbidden_imports(&library(), &BASE, &ROOMS));
}

#[test]
fn libraries_are_named_only_where_they_are_hidden() {
    let crates = [library(), binary()];
    assert_none(&graph::named_libraries(&crates, &HIDDEN));
}

#[test]
fn long_functions_have_a_reason() {
    let problems: Vec<String> = ["host/src", "host/benches", "guest", "tests"]
        .iter()
        .flat_map(|directory| {
            let sources = read_sources(&root().join(directory));
            let long = length::long_functions(&sources, MAX_LINES);
            long.into_iter()
                .map(move |function| format!("{directory}/{function}"))
        })
        .collect();
    assert_none(&problems);
}

/// A tree of sources that exists for a test only.
fn tree(files: &[(&str, &str)]) -> BTreeMap<String, String> {
    files
        .iter()
        .map(|(path, text)| (path.to_string(), text.to_string()))
        .collect()
}

fn cycles(files: &[(&str, &str)]) -> Vec<String> {
    graph::cycles(&Crate::read(&tree(files), "lib.rs"))
}

#[test]
fn a_circle_is_found() {
    let found = cycles(&[
        ("lib.rs", "mod a; mod b; mod c;"),
        ("a.rs", "use crate::b::B;"),
        ("b.rs", "\nuse crate::{c::{self, C}, x::Y};"),
        ("c.rs", "fn f() { crate::a::g(); }"),
    ]);
    assert_eq!(found.len(), 1, "{found:?}");
    let lines: Vec<&str> = found[0].lines().map(str::trim).collect();
    assert_eq!(
        lines,
        [
            "a -> b -> c -> a",
            "a.rs:1 names crate::b::B",
            "b.rs:2 names crate::c",
            "c.rs:1 names crate::a::g",
        ]
    );
}

#[test]
fn a_chain_is_no_circle() {
    let found = cycles(&[
        ("lib.rs", "mod a; mod b; mod c;"),
        (
            "a.rs",
            "use crate::{b, c};\nuse std::collections::BTreeMap;",
        ),
        ("b.rs", "use super::c::*;"),
        (
            "c.rs",
            "impl Trait for X { fn f() -> impl Y + use<'_> { self.a::<u8>() } }",
        ),
    ]);
    assert_none(&found);
}

#[test]
fn a_facade_may_re_export_its_children() {
    let found = cycles(&[
        ("lib.rs", "mod room; mod other;"),
        (
            "room.rs",
            "mod left; mod right;\npub use left::Left;\npub use self::right::Right;",
        ),
        ("room/left.rs", "use super::right::Right;"),
        ("room/right.rs", "pub(in super::super) struct Right;"),
        ("other.rs", "use crate::room::{Left, Right};"),
    ]);
    assert_none(&found);
}

#[test]
fn a_child_that_imports_through_its_facade_makes_a_circle() {
    for import in [
        "use super::Right;",
        "use crate::room::Right;",
        "type R = super::Right;",
    ] {
        let found = cycles(&[
            ("lib.rs", "mod room;"),
            (
                "room.rs",
                "mod left; mod right; pub use left::Left; pub use right::Right;",
            ),
            ("room/left.rs", import),
            ("room/right.rs", ""),
        ]);
        assert_eq!(found.len(), 1, "{import}: {found:?}");
        assert!(
            found[0].starts_with("room -> room::left -> room"),
            "{found:?}"
        );
    }
}

#[test]
fn a_path_to_a_child_counts_without_an_import() {
    let found = cycles(&[
        ("lib.rs", "mod room;"),
        ("room.rs", "mod child; fn f() { child::g(); }"),
        ("room/child.rs", "use super::f;"),
    ]);
    assert_eq!(found.len(), 1, "{found:?}");
}

#[test]
fn inline_modules_belong_to_their_file() {
    let found = cycles(&[
        ("lib.rs", "mod a; mod b;"),
        (
            "a.rs",
            "mod inner { use super::X; use super::super::b::B; }",
        ),
        ("b.rs", "use super::a::inner::Y;"),
    ]);
    assert_eq!(found.len(), 1, "{found:?}");
}

#[test]
fn test_modules_and_text_do_not_count() {
    let found = cycles(&[
        ("lib.rs", "mod a; mod b;"),
        ("a.rs", "use crate::b::B;"),
        (
            "b.rs",
            "// use crate::a::A;\n/// [`A`](crate::a::A)\nconst X: &str = \"crate::a::A\";\n\
            #[cfg(test)]\nmod tests { use crate::a::A; }\n\
            #[cfg(test)]\n#[path = \"x.rs\"]\nmod more_tests;\n\
            #[cfg(test)]\nuse crate::a::A;",
        ),
    ]);
    assert_none(&found);
}

#[test]
fn imports_between_rooms_follow_the_table() {
    let files = [
        ("lib.rs", "mod base; mod low; mod high; mod unknown;"),
        ("base.rs", ""),
        ("low.rs", "mod child;"),
        ("low/child.rs", "use crate::base::B;\nuse crate::high::H;"),
        ("high.rs", "use crate::{base, low::child};"),
        ("unknown.rs", ""),
    ];
    let rooms = [("base", &[] as &[&str]), ("low", &[]), ("high", &["low"])];
    let found = graph::forbidden_imports(&Crate::read(&tree(&files), "lib.rs"), &["base"], &rooms);
    assert_eq!(
        found,
        [
            "low/child.rs:2 names crate::high::H: low may not import high",
            "unknown.rs: the table of rooms does not have unknown",
        ]
    );
}

#[test]
fn a_hidden_library_is_found_elsewhere() {
    let files = [
        ("lib.rs", "mod engine; mod other;"),
        ("engine.rs", "mod store; use wasmtime::Engine;"),
        ("engine/store.rs", "fn f(_: &wasmtime::Store) {}"),
        (
            "other.rs",
            "struct X { wasmtime: u8 }\n#[derive(wasmtime::X)]\nstruct Y;",
        ),
    ];
    let crates = [Crate::read(&tree(&files), "lib.rs")];
    let hidden = [(
        &["wasmtime"] as &[&str],
        &["engine.rs", "engine/"] as &[&str],
    )];
    let found = graph::named_libraries(&crates, &hidden);
    assert_eq!(found, ["other.rs:2 names wasmtime"]);
}

#[test]
fn the_length_of_a_function_is_counted() {
    let body = "    \"fn x() {\n}\";\n".repeat(2);
    let files = [
        (
            "a.rs",
            format!("trait T {{ fn no_body(); }}\nfn short() {{}}\nfn six() {{\n{body}}}\n"),
        ),
        (
            "b.rs",
            format!("// long: it is a table\n#[test]\n/// Doc.\npub fn six(\n) {{\n{body}}}\n"),
        ),
        (
            "c.rs",
            "fn outer() {\n    fn inner() {\n        a();\n    }\n}\n".into(),
        ),
    ];
    let sources = files
        .iter()
        .map(|(path, text)| (path.to_string(), text.clone()))
        .collect();
    assert_none(&length::long_functions(&sources, 7));
    assert_eq!(
        length::long_functions(&sources, 5),
        ["a.rs:3: six has 6 lines"]
    );
    let nested = length::long_functions(&sources, 3);
    assert!(
        nested.contains(&"c.rs:1: outer has 5 lines".into()),
        "{nested:?}"
    );
}
