//! The cache of compiled guests, and the man pages.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::harness::{Server, guest, output, run, wasinetd};

/// The files in a cache directory.
fn cached_files(cache: &Path) -> Vec<PathBuf> {
    let files = fs::read_dir(cache).expect("the cache exists");
    files.map(|file| file.unwrap().path()).collect()
}

#[test]
fn compiled_guests_are_cached_and_verified() {
    let directory = tempfile::tempdir().unwrap();
    let cache = directory.path().join("cache");
    let arguments = ["--cache", cache.to_str().unwrap()];
    let assert_echoes = |server: &Server| {
        let mut client = server.connect();
        client.send("hello");
        assert_eq!(client.read(5), "hello");
    };
    assert_echoes(&Server::start("concurrent", &guest("echo"), &arguments));
    let files = cached_files(&cache);
    assert_eq!(files.len(), 1, "{files:?}");
    let code = fs::read(&files[0]).unwrap();
    {
        // The cached file is used and not written again.
        let before = fs::metadata(&files[0]).unwrap();
        let server = Server::start("concurrent", &guest("echo"), &arguments);
        assert_echoes(&server);
        assert_eq!(server.log_lines("compiled again").len(), 0, "{server:?}");
        let after = fs::metadata(&files[0]).unwrap();
        use std::os::unix::fs::MetadataExt;
        assert_eq!(before.ino(), after.ino());
    }
    for invalid in [&code[..code.len() / 2], b"", &[0x90; 4096]] {
        fs::write(&files[0], invalid).unwrap();
        let server = Server::start("concurrent", &guest("echo"), &arguments);
        server.wait_for_log(&["it is compiled again"]);
        assert_echoes(&server);
        assert_eq!(fs::read(&files[0]).unwrap(), code);
    }
}

#[test]
fn a_cache_open_to_other_users_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let refuse = |cache: &Path| {
        let mut command = wasinetd();
        command.args(["serve", "--listen", "127.0.0.1:0", "--cache"]);
        let output = output(command.arg(cache).arg(guest("echo")));
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(78), "{text}");
        assert!(text.contains("--cache"), "{text}");
        text
    };
    for mode in [0o755, 0o770, 0o777] {
        fs::set_permissions(directory.path(), Permissions::from_mode(mode)).unwrap();
        let text = refuse(directory.path());
        assert!(text.contains(&format!("{mode:03o}")), "{text}");
    }
    let file = directory.path().join("file");
    fs::write(&file, "").unwrap();
    refuse(&file);
    // Only root can create a directory that belongs to another user.
    let others = directory.path().join("others");
    fs::create_dir(&others).unwrap();
    fs::set_permissions(&others, Permissions::from_mode(0o700)).unwrap();
    if std::os::unix::fs::chown(&others, Some(12345), None).is_ok() {
        let text = refuse(&others);
        assert!(text.contains("12345"), "{text}");
    }
}

#[test]
fn compile_warms_the_cache() {
    let directory = tempfile::tempdir().unwrap();
    let cache = directory.path().join("cache");
    let compile = |guests: &[PathBuf]| {
        let mut command = wasinetd();
        command.arg("compile").args(guests);
        let output = run(command.arg("--cache").arg(&cache));
        (
            output.status.code(),
            String::from_utf8_lossy(&output.stdout).into_owned(),
        )
    };
    let (code, stdout) = compile(&[guest("echo"), guest("hello")]);
    assert_eq!(
        (code, stdout.matches(": compiled (").count()),
        (Some(0), 2),
        "{stdout}"
    );
    let (code, stdout) = compile(&[guest("echo")]);
    assert!(
        code == Some(0) && stdout.contains("compiled before"),
        "{stdout}"
    );
    let files = cached_files(&cache);
    assert_eq!(files.len(), 2);
    let arguments = ["--cache", cache.to_str().unwrap()];
    drop(Server::start("concurrent", &guest("hello"), &arguments));
    // The server used the cached code: no third file appeared.
    assert_eq!(cached_files(&cache).len(), 2);
    assert_eq!(compile(&["README.md".into()]).0, Some(65));
}

#[test]
fn the_man_pages_document_every_option() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().to_str().unwrap();
    assert!(run(wasinetd().args(["man", path])).status.success());
    for (command, page) in [
        (&["serve"][..], "wasinetd-serve"),
        (&["ctl", "swap"], "wasinetd-ctl-swap"),
    ] {
        let help = run(wasinetd().args(command).arg("--help"));
        let help = String::from_utf8(help.stdout).unwrap();
        let page = fs::read_to_string(directory.path().join(format!("{page}.8"))).unwrap();
        let options = help
            .split_whitespace()
            .filter(|word| word.starts_with("--"));
        let mut checked = 0;
        for option in options {
            let name = option.trim_end_matches(|c: char| !c.is_ascii_lowercase());
            assert!(page.contains(&name.replace('-', "\\-")), "{name}");
            checked += 1;
        }
        assert!(checked > 2, "{help}");
    }
    let page = fs::read_to_string(directory.path().join("wasinetd-serve.8")).unwrap();
    assert!(
        page.contains("SIGUSR2") && page.contains("NOTIFY_SOCKET"),
        "{page}"
    );
    assert_eq!(
        run(wasinetd().args(["man", "/no/such/directory"]))
            .status
            .code(),
        Some(78)
    );
}
