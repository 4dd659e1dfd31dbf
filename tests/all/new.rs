//! `wasinetd new` writes a crate that builds, passes its own tests and is served.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::harness::{Server, root, run, wasinetd};

/// Runs `wasinetd new` in a directory.
fn new(directory: &Path, arguments: &[&str]) -> Output {
    let mut command = wasinetd();
    run(command.current_dir(directory).arg("new").args(arguments))
}

/// Runs `wasinetd new`, which must succeed, and returns its standard output.
fn new_guest(directory: &Path, arguments: &[&str]) -> String {
    let output = new(directory, arguments);
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{message}");
    String::from_utf8(output.stdout).expect("the output is UTF-8")
}

/// Runs cargo in a directory, offline, with the dependency versions of this workspace.
///
/// Its priority is low, because tests that run at the same time check durations.
fn cargo(directory: &Path, arguments: &[&str]) -> String {
    let lock = directory.join("Cargo.lock");
    if !lock.exists() {
        fs::copy(root().join("Cargo.lock"), lock).expect("there is room");
    }
    let mut command = Command::new("nice");
    command
        .arg(std::env::var_os("CARGO").unwrap_or("cargo".into()))
        .args(arguments)
        .current_dir(directory)
        .env("CARGO_NET_OFFLINE", "true")
        // `make test` sets it to time the tests.
        .env_remove("RUSTC_BOOTSTRAP")
        .env("CARGO_TARGET_DIR", target());
    let output = run(&mut command);
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(
        output.status.success(),
        "{command:?} failed with {}\n{}{}",
        output.status,
        text(&output.stdout),
        text(&output.stderr)
    );
    text(&output.stdout)
}

/// The target directory, kept between test runs so that dependencies are compiled once.
fn target() -> PathBuf {
    root().join("target/test-new")
}

/// The relative paths of all files under a directory.
fn files(directory: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut pending = vec![directory.to_path_buf()];
    while let Some(next) = pending.pop() {
        for entry in fs::read_dir(next).expect("the directory exists") {
            let path = entry.expect("the entry can be read").path();
            match path.is_dir() {
                true => pending.push(path),
                false => {
                    let relative = path.strip_prefix(directory);
                    files.push(relative.expect("the file is inside").into());
                }
            }
        }
    }
    files.sort();
    files
}

fn text(path: PathBuf) -> String {
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The test follows the next steps that `wasinetd new` prints.
#[test]
fn a_new_guest_builds_passes_its_tests_and_is_served() {
    let directory = tempfile::tempdir().unwrap();
    let message = new_guest(directory.path(), &["first-steps"]);
    let component = message
        .split_whitespace()
        .find(|word| word.ends_with(".wasm"))
        .expect("the next steps name the component");
    let directory = directory.path().join("first-steps");
    assert!(
        [
            "cargo test\n",
            "cargo build --release\n",
            "cd first-steps\n"
        ]
        .iter()
        .all(|step| message.contains(step)),
        "{message}"
    );
    assert!(text(directory.join("README.md")).contains(component));

    cargo(&directory, &["fmt", "--check"]);
    let tested = cargo(&directory, &["test"]);
    assert!(tested.contains("test result: ok. 3 passed"), "{tested}");
    // A test filter works too.
    let tested = cargo(&directory, &["test", "each_line"]);
    assert!(tested.contains("test result: ok. 1 passed"), "{tested}");

    cargo(&directory, &["build", "--release"]);
    let component = target().join(component.strip_prefix("target/").unwrap());
    let checked = run(wasinetd().arg("check").arg(&component));
    assert!(checked.status.success(), "{checked:?}");

    let server = Server::start("concurrent", &component, &[]);
    let mut client = server.connect();
    assert_eq!(client.read_line(), "Who is there?");
    client.send("Ada\none\r\ntwo\nbye\nand more");
    assert_eq!(
        client.read_to_end(),
        "Hello Ada! Say something, or bye.\n\
         Ada, line 1: one\n\
         Ada, line 2: two\n\
         Goodbye after 2 lines.\n"
    );
    server.wait_for_log(&["connection 1 begins"]);
    // The next connection starts afresh, and an error of the guest resets it.
    let mut client = server.connect();
    assert_eq!(client.read_line(), "Who is there?");
    client.send("x".repeat(2000));
    let (answer, end) = client.read_all();
    assert_eq!(answer, b"");
    assert_eq!(end.unwrap_err().kind(), ErrorKind::ConnectionReset);
    server.wait_for_log(&["the client sent a line that is too long"]);
}

#[test]
fn the_written_sdk_equals_the_one_in_this_repository() {
    let directory = tempfile::tempdir().unwrap();
    new_guest(directory.path(), &["copy"]);
    let copy = directory.path().join("copy");
    assert_same_files(&copy);
    assert_same_manifest(&copy);
    assert_same_build_settings(&copy);
}

fn assert_same_files(copy: &Path) {
    let sdk = root().join("guest/sdk");
    assert_eq!(files(&copy.join("sdk/wit")), files(&root().join("wit")));
    for file in files(&root().join("wit")) {
        let wit = |top: PathBuf| text(top.join("wit").join(&file));
        assert_eq!(wit(copy.join("sdk")), wit(root()), "{file:?}");
    }
    assert_eq!(files(&copy.join("sdk/src")), files(&sdk.join("src")));
    for file in files(&sdk.join("src")) {
        let source = |top: PathBuf| text(top.join("src").join(&file));
        let expected = source(sdk.clone()).replace(r#""../../wit""#, r#""wit""#);
        assert_eq!(source(copy.join("sdk")), expected, "{file:?}");
    }
    for (written, original) in [
        ("sdk/LICENSE", "LICENSE"),
        ("rust-toolchain.toml", "rust-toolchain.toml"),
    ] {
        assert_eq!(text(copy.join(written)), text(root().join(original)));
    }
}

/// The written manifest does not inherit from a workspace, but has the same values.
fn assert_same_manifest(copy: &Path) {
    let manifest = |workspace: &Path, name: &str| {
        let metadata = cargo(workspace, &["metadata", "--no-deps", "--format-version=1"]);
        let metadata: serde_json::Value = serde_json::from_str(&metadata).unwrap();
        metadata["packages"]
            .as_array()
            .and_then(|all| all.iter().find(|package| package["name"] == name))
            .unwrap_or_else(|| panic!("{name} is not in {metadata}"))
            .clone()
    };
    let original = manifest(&root(), "wasinetd-guest");
    let written = manifest(copy, "wasinetd-guest");
    for key in [
        "version",
        "description",
        "edition",
        "license",
        "rust_version",
        "dependencies",
        "features",
    ] {
        assert_eq!(written[key], original[key], "{key}");
    }
    let guest = manifest(copy, "copy");
    assert_eq!(guest["edition"], original["edition"]);
    assert_eq!(guest["rust_version"], original["rust_version"]);
}

/// Guests are linked and optimized with the same settings.
fn assert_same_build_settings(copy: &Path) {
    let written = text(copy.join(".cargo/config.toml"));
    let original = text(root().join(".cargo/config.toml"));
    let mut compared = 0;
    for flag in original.lines().filter(|line| line.contains("-Clink-arg")) {
        assert!(written.contains(flag), "{flag}");
        compared += 1;
    }
    assert!(compared > 0 && written.matches("-Clink-arg").count() == compared);
    let original = text(root().join("Cargo.toml"));
    let profile = original.split("[profile.guest]\n").nth(1).unwrap();
    let written = text(copy.join("Cargo.toml"));
    let profile = profile.lines().take_while(|line| line.contains('='));
    for setting in profile.filter(|line| !line.starts_with("inherits")) {
        assert!(written.contains(&format!("\n{setting}\n")), "{setting}");
    }
}

#[test]
fn a_new_guest_can_use_the_sdk_of_a_checkout() {
    let directory = tempfile::tempdir().unwrap();
    let sdk = root().join("guest/sdk");
    for (name, path) in [("by-top", root()), ("by-crate", sdk.clone())] {
        new_guest(directory.path(), &[name, "--sdk", path.to_str().unwrap()]);
        let guest = directory.path().join(name);
        assert!(!guest.join("sdk").exists());
        assert!(!text(guest.join("README.md")).contains("sdk/"));
        let metadata = cargo(&guest, &["metadata", "--format-version=1"]);
        let manifest = format!(r#""manifest_path":"{}/Cargo.toml""#, sdk.display());
        assert!(metadata.contains(&manifest), "{manifest} in {metadata}");
    }
    let invalid = new(directory.path(), &["none", "--sdk", "."]);
    let message = String::from_utf8_lossy(&invalid.stderr);
    assert_eq!(invalid.status.code(), Some(64), "{message}");
    assert!(
        message.contains("--sdk") && message.contains("checkout"),
        "{message}"
    );
    assert!(!directory.path().join("none").exists());
}

#[test]
fn new_overwrites_nothing_and_leaves_nothing_behind_on_failure() {
    let directory = tempfile::tempdir().unwrap();
    let top = directory.path();
    let assert_refused = |name: &str, code: i32, why: &str| {
        let output = new(top, &["--", name]);
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{name}: {message}");
        assert!(message.contains(why), "{name}: {message}");
    };
    for name in [
        "", ".", "..", "/", "9lives", "-x", "_x", "naïve", "a b", "a.b",
    ] {
        assert_refused(name, 64, "greeter");
    }
    for name in ["match", "dir/test", "wasinetd-guest", "futures", "build"] {
        assert_refused(name, 64, "choose another name");
    }
    assert_refused("no/such/directory", 73, "cannot create");
    assert_eq!(files(top), Vec::<PathBuf>::new());

    fs::create_dir(top.join("full")).unwrap();
    fs::write(top.join("full/mine"), "mine").unwrap();
    fs::write(top.join("file"), "mine").unwrap();
    std::os::unix::fs::symlink("nowhere", top.join("link")).unwrap();
    for name in ["full", "file", "link"] {
        assert_refused(name, 64, "exists already");
    }
    assert_refused("file/below", 73, "cannot create");
    fs::create_dir(top.join("closed")).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o555);
    fs::set_permissions(top.join("closed"), mode).unwrap();
    // Root can write anyway.
    if fs::write(top.join("closed/file"), "").is_err() {
        assert_refused("closed/guest", 73, "can be written to");
    }
    let expected = ["closed", "file", "full", "link"];
    let mut entries: Vec<_> = fs::read_dir(top)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    entries.sort();
    assert_eq!(entries, expected);
    assert_eq!(files(&top.join("full")), [Path::new("mine")]);

    // An empty directory can be filled, also below others.
    fs::create_dir_all(top.join("dir/empty")).unwrap();
    new_guest(top, &["dir/empty"]);
    assert!(top.join("dir/empty/src/lib.rs").exists());
    assert_eq!(fs::read_dir(top.join("dir")).unwrap().count(), 1);
    assert_refused("dir/empty", 64, "exists already");
}
