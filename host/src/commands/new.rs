//! `new`: a crate to begin a guest with, which builds, tests itself and is served as it is.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use wasinetd::Error;

use crate::cli::NewArgs;

/// Files of this repository by the names that they get, with their text.
macro_rules! files {
    ($from:literal: $($name:literal),* $(,)?) => {
        [$(($name, include_str!(concat!($from, $name)))),*]
    };
}

/// What there is of the SDK beside its manifest, which belongs to our workspace.
const SDK: [(&str, &str); 6] = files!("../../../guest/sdk/":
    "src/fs.rs",
    "src/half.rs",
    "src/lib.rs",
    "src/rt.rs",
    "src/stream.rs",
    "src/tls.rs",
);

/// What the SDK is generated from, and its licence.
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

/// Where the SDK finds the WIT: in our repository, and in the copy of it.
const WIT_PATHS: (&str, &str) = (r#"path: "../../wit""#, r#"path: "wit""#);

macro_rules! template {
    ($name:literal) => {
        include_str!(concat!("../../templates/guest/", $name))
    };
}

/// Makes the crate, whole or not at all.
pub(crate) fn new(args: &NewArgs) -> Result<ExitCode, Error> {
    let directory = &args.directory;
    let name = directory.file_name().and_then(|name| name.to_str());
    let name = name.expect("the command line was checked");
    let sdk = args.sdk.as_deref().map(sdk_in).transpose()?;
    if taken(directory) {
        return Err(Error::Taken {
            path: directory.clone(),
        });
    }
    create(directory, |directory| {
        write(directory, name, sdk.as_deref())
    })
    .map_err(|source| Error::Create {
        path: directory.clone(),
        source,
    })?;
    // Whoever closes the pipe has read enough.
    let _ = write!(
        io::stdout().lock(),
        "Created the guest {name}. Next:

    cd {directory}
    cargo test
    cargo build --release
    wasinetd serve {wasm}

and in another terminal: nc 127.0.0.1 7878
The protocol is in src/lib.rs; README.md says what else there is.
",
        directory = directory.display(),
        wasm = wasm(name),
    );
    Ok(ExitCode::SUCCESS)
}

/// Whether there is anything that would be lost or mixed with ours.
fn taken(directory: &Path) -> bool {
    match fs::symlink_metadata(directory) {
        Ok(there) if there.is_dir() => {
            fs::read_dir(directory).map_or(true, |mut entries| entries.next().is_some())
        }
        Ok(_) => true,
        // Whatever it is, it is met again where the directory is made.
        Err(_) => false,
    }
}

/// Has a directory filled beside its place, and puts it there when it is complete.
fn create(directory: &Path, fill: impl FnOnce(&Path) -> io::Result<()>) -> io::Result<()> {
    let parent = match directory.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let temporary = tempfile::Builder::new()
        .prefix(".wasinetd-new-")
        .tempdir_in(parent)?;
    // In it, because nobody else may enter a temporary directory, and this one is to stay.
    let complete = temporary.path().join("new");
    fs::create_dir(&complete)?;
    fill(&complete)?;
    fs::rename(&complete, directory)
}

fn write(directory: &Path, name: &str, sdk: Option<&Path>) -> io::Result<()> {
    let (sdk_path, sdk_row) = match sdk {
        // A string of JSON is one of TOML.
        Some(sdk) => (serde_json::to_string(sdk)?, String::new()),
        None => (
            r#""sdk""#.into(),
            format!(
                "| `sdk/` | the crate `wasinetd-guest` of wasinetd {}, which the protocol is written with; `cargo doc --open` documents it |\n",
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
    let own = [
        (".cargo/config.toml", template!("cargo-config.toml.in")),
        (".gitignore", template!("gitignore.in")),
        ("Cargo.toml", &manifest),
        ("README.md", &readme),
        // What the SDK is tested with.
        (
            "rust-toolchain.toml",
            include_str!("../../../rust-toolchain.toml"),
        ),
        ("src/lib.rs", template!("src/lib.rs")),
    ];
    write_all(directory, &own)?;
    match sdk {
        Some(_) => Ok(()),
        None => write_sdk(&directory.join("sdk")),
    }
}

/// The SDK as a crate that stands alone.
fn write_sdk(directory: &Path) -> io::Result<()> {
    let manifest = template!("sdk/Cargo.toml.in").replace("{{version}}", env!("CARGO_PKG_VERSION"));
    write_all(directory, &[("Cargo.toml", &manifest)])?;
    let (here, there) = WIT_PATHS;
    for (name, text) in SDK {
        write_all(directory, &[(name, &text.replace(here, there))])?;
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

/// Where cargo puts the component of a crate by this name.
fn wasm(name: &str) -> String {
    format!(
        "target/wasm32-wasip2/release/{}.wasm",
        name.replace('-', "_")
    )
}

/// The SDK in a checkout of wasinetd, or at this path itself, from wherever it is depended on.
fn sdk_in(path: &Path) -> Result<PathBuf, Error> {
    let failed = |reason: String| Error::Sdk {
        path: path.into(),
        reason,
    };
    let there = [path.join("guest/sdk"), path.into()]
        .into_iter()
        .find(|path| path.join("src/rt.rs").is_file() && path.join("Cargo.toml").is_file())
        .ok_or_else(|| failed("the crate wasinetd-guest is not there".into()))?;
    let absolute = fs::canonicalize(there).map_err(|error| failed(error.to_string()))?;
    match absolute.to_str() {
        Some(_) => Ok(absolute),
        None => Err(failed("Cargo.toml is UTF-8, and this path is not".into())),
    }
}
