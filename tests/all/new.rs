//! What `wasinetd new` writes: a crate that builds, tests itself and is served.

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

fn new_guest(directory: &Path, arguments: &[&str]) -> String {
    let output = new(directory, arguments);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    String::from_utf8(output.stdout).expect("it is text")
}

/// Runs cargo in a directory, with the crates that this workspace was built with and no network, and
/// below others: they have times to keep.
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

/// Kept from one run of the tests to the next, so that dependencies are compiled once.
fn target() -> PathBuf {
    root().join("target/test-new")
}

/// All files under a directory, by their paths in it.
fn files(directory: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut rest = vec![directory.to_path_buf()];
    while let Some(next) = rest.pop() {
        for entry in fs::read_dir(next).expect("it is there") {
            let path = entry.expect("it can be read").path();
            match path.is_dir() {
                true => rest.push(path),
                false => files.push(path.strip_prefix(directory).expect("it is in it").into()),
            }
        }
    }
    files.sort();
    files
}

fn text(path: PathBuf) -> String {
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The next steps that it prints are taken as they are.
#[test]
fn a_new_guest_builds_tests_itself_and_is_served() {
    let directory = tempfile::tempdir().unwrap();
    let said = new_guest(directory.path(), &["first-steps"]);
    let component = said
        .split_whitespace()
        .find(|word| word.ends_with(".wasm"))
        .expect("it says what to serve");
    let directory = directory.path().join("first-steps");
    assert!(
        [
            "cargo test\n",
            "cargo build --release\n",
            "cd first-steps\n"
        ]
        .iter()
        .all(|step| said.contains(step)),
        "{said}"
    );
    assert!(text(directory.join("README.md")).contains(component));

    cargo(&directory, &["fmt", "--check"]);
    let tested = cargo(&directory, &["test"]);
    assert!(tested.contains("test result: ok. 3 passed"), "{tested}");
    // Which test to run reaches them as well.
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
    // One begins where no other has left off, and an error is a reset.
    let mut client = server.connect();
    assert_eq!(client.read_line(), "Who is there?");
    client.send("x".repeat(2000));
    let (answer, end) = client.read_all();
    assert_eq!(answer, b"");
    assert_eq!(end.unwrap_err().kind(), ErrorKind::ConnectionReset);
    server.wait_for_log(&["the client sent a line that is too long"]);
}

#[test]
fn the_sdk_is_written_as_it_is_here() {
    let directory = tempfile::tempdir().unwrap();
    new_guest(directory.path(), &["copy"]);
    let copy = directory.path().join("copy");
    let sdk = root().join("guest/sdk");

    // Nothing is missing, and nothing is old.
    assert_eq!(files(&copy.join("sdk/wit")), files(&root().join("wit")));
    for file in files(&root().join("wit")) {
        let of = |top: PathBuf| text(top.join("wit").join(&file));
        assert_eq!(of(copy.join("sdk")), of(root()), "{file:?}");
    }
    assert_eq!(files(&copy.join("sdk/src")), files(&sdk.join("src")));
    for file in files(&sdk.join("src")) {
        let of = |top: PathBuf| text(top.join("src").join(&file));
        let there = of(sdk.clone()).replace(r#""../../wit""#, r#""wit""#);
        assert_eq!(of(copy.join("sdk")), there, "{file:?}");
    }
    for (there, here) in [
        ("sdk/LICENSE", "LICENSE"),
        ("rust-toolchain.toml", "rust-toolchain.toml"),
    ] {
        assert_eq!(text(copy.join(there)), text(root().join(here)));
    }

    // Its manifest, which stands alone there, says the same as the one here.
    let manifest = |workspace: &Path, name: &str| {
        let metadata = cargo(workspace, &["metadata", "--no-deps", "--format-version=1"]);
        let metadata: serde_json::Value = serde_json::from_str(&metadata).unwrap();
        metadata["packages"]
            .as_array()
            .and_then(|all| all.iter().find(|package| package["name"] == name))
            .unwrap_or_else(|| panic!("{name} is not in {metadata}"))
            .clone()
    };
    let ours = manifest(&root(), "wasinetd-guest");
    let theirs = manifest(&copy, "wasinetd-guest");
    for key in [
        "version",
        "description",
        "edition",
        "license",
        "rust_version",
        "dependencies",
        "features",
    ] {
        assert_eq!(theirs[key], ours[key], "{key}");
    }
    let guest = manifest(&copy, "copy");
    assert_eq!(guest["edition"], ours["edition"]);
    assert_eq!(guest["rust_version"], ours["rust_version"]);

    // A guest is linked as ours are.
    let config = text(copy.join(".cargo/config.toml"));
    let settings = text(root().join(".cargo/config.toml"));
    let mut compared = 0;
    for flag in settings.lines().filter(|line| line.contains("-Clink-arg")) {
        assert!(config.contains(flag), "{flag}");
        compared += 1;
    }
    assert!(compared > 0 && config.matches("-Clink-arg").count() == compared);
    // And optimized.
    let ours = text(root().join("Cargo.toml"));
    let profile = ours.split("[profile.guest]\n").nth(1).unwrap();
    let theirs = text(copy.join("Cargo.toml"));
    let profile = profile.lines().take_while(|line| line.contains('='));
    for setting in profile.filter(|line| !line.starts_with("inherits")) {
        assert!(theirs.contains(&format!("\n{setting}\n")), "{setting}");
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
    let none = new(directory.path(), &["none", "--sdk", "."]);
    let said = String::from_utf8_lossy(&none.stderr);
    assert_eq!(none.status.code(), Some(64), "{said}");
    assert!(
        said.contains("--sdk") && said.contains("checkout"),
        "{said}"
    );
    assert!(!directory.path().join("none").exists());
}

#[test]
fn nothing_is_written_over_and_nothing_is_left_behind() {
    let directory = tempfile::tempdir().unwrap();
    let top = directory.path();
    let refused = |name: &str, code: i32, why: &str| {
        let output = new(top, &["--", name]);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{name}: {said}");
        assert!(said.contains(why), "{name}: {said}");
    };
    for name in [
        "", ".", "..", "/", "9lives", "-x", "_x", "naïve", "a b", "a.b",
    ] {
        refused(name, 64, "greeter");
    }
    for name in ["match", "dir/test", "wasinetd-guest", "futures", "build"] {
        refused(name, 64, "choose another name");
    }
    refused("no/such/directory", 73, "cannot create");
    assert_eq!(files(top), Vec::<PathBuf>::new());

    fs::create_dir(top.join("full")).unwrap();
    fs::write(top.join("full/mine"), "mine").unwrap();
    fs::write(top.join("file"), "mine").unwrap();
    std::os::unix::fs::symlink("nowhere", top.join("link")).unwrap();
    for name in ["full", "file", "link"] {
        refused(name, 64, "is there already");
    }
    refused("file/below", 73, "cannot create");
    fs::create_dir(top.join("closed")).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o555);
    fs::set_permissions(top.join("closed"), mode).unwrap();
    // Who may write everywhere cannot be kept from it.
    if fs::write(top.join("closed/file"), "").is_err() {
        refused("closed/guest", 73, "can be written to");
    }
    let there = ["closed", "file", "full", "link"];
    let mut entries: Vec<_> = fs::read_dir(top)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    entries.sort();
    assert_eq!(entries, there);
    assert_eq!(files(&top.join("full")), [Path::new("mine")]);

    // What is empty can be filled, wherever it is.
    fs::create_dir_all(top.join("dir/empty")).unwrap();
    new_guest(top, &["dir/empty"]);
    assert!(top.join("dir/empty/src/lib.rs").exists());
    assert_eq!(fs::read_dir(top.join("dir")).unwrap().count(), 1);
    refused("dir/empty", 64, "is there already");
}
