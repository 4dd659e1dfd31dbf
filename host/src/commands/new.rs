//! `new`: creates the crate of a small guest, complete with tests.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use crate::cli::NewArgs;
use crate::exit::{Failure, code};

/// Files of this repository: their names in the new crate, and their text.
macro_rules! files {
    ($from:literal: $($name:literal),* $(,)?) => {
        [$(($name, include_str!(concat!($from, $name)))),*]
    };
}

/// Files of the SDK, without its manifest: that one needs the workspace of this repository.
const SDK: [(&str, &str); 6] = files!("../../../guest/sdk/":
    "src/fs.rs",
    "src/half.rs",
    "src/lib.rs",
    "src/rt.rs",
    "src/stream.rs",
    "src/tls.rs",
);

/// The WIT that the SDK is generated from, and its licence.
const WIT: [(&str, &str); 15] = files!("../../../":
    "LICENSE",
    "wit/tcp.wit",
    "wit/world.wit",
    "wit/deps/README.md",
    "wit/deps/wasi-cli-0.2.12/package.wit",
    "wit/deps/wasi-cli-0.3.0/package.wit",
    "wit/deps/wasi-clocks-0.2.12/package.wit",
    "wit/deps/wasi-clocks-0.3.0/package.wit",
    "wit/deps/wasi-filesystem-0.2.12/package.wit",
    "wit/deps/wasi-filesystem-0.3.0/package.wit",
    "wit/deps/wasi-io-0.2.12/package.wit",
    "wit/deps/wasi-random-0.2.12/package.wit",
    "wit/deps/wasi-random-0.3.0/package.wit",
    "wit/deps/wasi-sockets-0.2.12/package.wit",
    "wit/deps/wasi-sockets-0.3.0/package.wit",
);

/// The path from the SDK to the WIT: in this repository, and in a copy of the SDK.
const WIT_PATHS: (&str, &str) = (r#"path: "../../wit""#, r#"path: "wit""#);

macro_rules! template {
    ($name:literal) => {
        include_str!(concat!("../../templates/guest/", $name))
    };
}

/// Creates the crate, complete or not at all.
pub(crate) fn new(args: &NewArgs) -> Result<ExitCode, Failure> {
    let directory = &args.directory;
    let name = directory.file_name().and_then(|name| name.to_str());
    let name = name.expect("the command line parser checks the name");
    let sdk = args.sdk.as_deref().map(find_sdk).transpose()?;
    if is_taken(directory) {
        let message = format!(
            "{directory:?} exists already and is not an empty directory; choose another name, or remove it"
        );
        return Err(Failure::new(code::USAGE, message));
    }
    create(directory, |directory| {
        write(directory, name, sdk.as_deref())
    })
    .map_err(|error| {
        let message = format!(
            "cannot create {directory:?}: {error}; choose an existing directory that you can write to"
        );
        Failure::new(code::CANNOT_CREATE, message)
    })?;
    // The reader may have closed the pipe.
    let _ = write!(
        io::stdout().lock(),
        "Created the guest {name}. Next:

    cd {directory}
    cargo test
    cargo build --release
    wasinetd serve {wasm}

and in another terminal: nc 127.0.0.1 7878
The protocol is in src/lib.rs. README.md describes the other files.
",
        directory = directory.display(),
        wasm = wasm(name),
    );
    Ok(ExitCode::SUCCESS)
}

/// Whether `directory` exists and is not an empty directory.
fn is_taken(directory: &Path) -> bool {
    match fs::symlink_metadata(directory) {
        Ok(metadata) if metadata.is_dir() => {
            fs::read_dir(directory).map_or(true, |mut entries| entries.next().is_some())
        }
        Ok(_) => true,
        // Creating the directory fails for the same reason, if it matters.
        Err(_) => false,
    }
}

/// Creates `directory` with the content that `fill` writes: beside its place first, then moved there.
fn create(directory: &Path, fill: impl FnOnce(&Path) -> io::Result<()>) -> io::Result<()> {
    let parent = match directory.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let temporary = tempfile::Builder::new()
        .prefix(".wasinetd-new-")
        .tempdir_in(parent)?;
    // A subdirectory, because the temporary directory itself is closed to other users.
    let content = temporary.path().join("new");
    fs::create_dir(&content)?;
    fill(&content)?;
    fs::rename(&content, directory)
}

fn write(directory: &Path, name: &str, sdk: Option<&Path>) -> io::Result<()> {
    let (sdk_path, sdk_row) = match sdk {
        // A JSON string is a TOML string.
        Some(sdk) => (serde_json::to_string(sdk)?, String::new()),
        None => (
            r#""sdk""#.into(),
            format!(
                "| `sdk/` | the SDK, crate `wasinetd-guest` of wasinetd {}; its documentation: `cargo doc --open` |\n",
                env!("CARGO_PKG_VERSION")
            ),
        ),
    };
    let manifest = template!("Cargo.toml.in")
        .replace("{{name}}", name)
        .replace("{{sdk}}", &sdk_path);
    let readme = template!("README.md.in")
        .replace("{{name}}", name)
        .replace("{{wasm}}", &wasm(name))
        .replace("{{sdk row}}\n", &sdk_row);
    let files = [
        (".cargo/config.toml", template!("cargo-config.toml.in")),
        (".gitignore", template!("gitignore.in")),
        ("Cargo.toml", &manifest),
        ("README.md", &readme),
        // The Rust release that the SDK is tested with.
        (
            "rust-toolchain.toml",
            include_str!("../../../rust-toolchain.toml"),
        ),
        ("src/lib.rs", template!("src/lib.rs")),
    ];
    write_all(directory, &files)?;
    match sdk {
        Some(_) => Ok(()),
        None => write_sdk(&directory.join("sdk")),
    }
}

/// Writes the SDK as a crate that needs no workspace.
fn write_sdk(directory: &Path) -> io::Result<()> {
    let manifest = template!("sdk/Cargo.toml.in").replace("{{version}}", env!("CARGO_PKG_VERSION"));
    write_all(directory, &[("Cargo.toml", &manifest)])?;
    let (path_here, path_in_copy) = WIT_PATHS;
    for (name, text) in SDK {
        write_all(directory, &[(name, &text.replace(path_here, path_in_copy))])?;
    }
    write_all(directory, &WIT)
}

fn write_all(directory: &Path, files: &[(&str, &str)]) -> io::Result<()> {
    files.iter().try_for_each(|(name, text)| {
        let path = directory.join(name);
        path.parent().map_or(Ok(()), fs::create_dir_all)?;
        fs::write(path, text)
    })
}

/// Path of the component that cargo builds from the crate `name`.
fn wasm(name: &str) -> String {
    format!(
        "target/wasm32-wasip2/release/{}.wasm",
        name.replace('-', "_")
    )
}

/// The absolute path of the SDK: in a checkout of wasinetd at `path`, or `path` itself.
fn find_sdk(path: &Path) -> Result<PathBuf, Failure> {
    let failed = |reason: String| {
        let message =
            format!("cannot use {path:?} given to --sdk: {reason}; name a checkout of wasinetd");
        Failure::new(code::USAGE, message)
    };
    let sdk = [path.join("guest/sdk"), path.into()]
        .into_iter()
        .find(|path| path.join("src/rt.rs").is_file() && path.join("Cargo.toml").is_file())
        .ok_or_else(|| failed("it has no crate wasinetd-guest".into()))?;
    let absolute = fs::canonicalize(sdk).map_err(|error| failed(error.to_string()))?;
    match absolute.to_str() {
        Some(_) => Ok(absolute),
        None => Err(failed(
            "the path is not UTF-8, as Cargo.toml requires".into(),
        )),
    }
}
