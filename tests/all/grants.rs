//! A guest has access to its grants only.

use std::fs;
use std::os::unix::fs::symlink;

use crate::harness::{MODES, Server, fixture};

/// Sends a request to the fixture and returns the answer.
fn ask(server: &Server, request: &str) -> String {
    let mut client = server.connect();
    client.send(format!("{request}\n"));
    client.read_line()
}

#[test]
fn a_read_only_directory_can_be_read_but_not_written() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("file"), "content").unwrap();
    let grant = format!("{}::/data", directory.path().display());
    for mode in MODES {
        let server = Server::start(mode, &fixture("grants"), &["--dir", &grant]);
        assert_eq!(ask(&server, "read /data/file"), "ok content");
        assert_eq!(ask(&server, "fetch /data/file"), "ok content");
        for path in ["/data/file", "/data/new"] {
            let answer = ask(&server, &format!("write {path}"));
            assert!(answer.starts_with("error "), "{answer}");
        }
        assert_eq!(
            fs::read_to_string(directory.path().join("file")).unwrap(),
            "content"
        );
        assert!(!directory.path().join("new").exists());
    }
}

#[test]
fn a_writable_directory_can_be_written() {
    for mode in MODES {
        let directory = tempfile::tempdir().unwrap();
        let grant = format!("{}::/data", directory.path().display());
        let server = Server::start(mode, &fixture("grants"), &["--dir-rw", &grant]);
        assert_eq!(ask(&server, "write /data/new"), "ok done");
        assert_eq!(ask(&server, "read /data/new"), "ok written by a guest");
        assert_eq!(
            fs::read_to_string(directory.path().join("new")).unwrap(),
            "written by a guest"
        );
    }
}

#[test]
fn no_path_leaves_a_granted_directory() {
    let parent = tempfile::tempdir().unwrap();
    let directory = parent.path().join("inside");
    fs::create_dir(&directory).unwrap();
    fs::write(parent.path().join("secret"), "secret").unwrap();
    symlink("../secret", directory.join("relative")).unwrap();
    symlink(parent.path().join("secret"), directory.join("absolute")).unwrap();
    let grant = format!("{}::/data", directory.display());
    let host_path = parent.path().join("secret");
    for mode in MODES {
        let server = Server::start(mode, &fixture("grants"), &["--dir-rw", &grant]);
        for path in [
            "/data/../secret",
            "/data/./../secret",
            "/data/relative",
            "/data/absolute",
            host_path.to_str().unwrap(),
            "/etc/passwd",
            "../secret",
        ] {
            for verb in ["read", "write", "fetch"] {
                let answer = ask(&server, &format!("{verb} {path}"));
                assert!(answer.starts_with("error "), "{verb} {path}: {answer}");
            }
        }
        assert_eq!(fs::read_to_string(&host_path).unwrap(), "secret");
    }
}

#[test]
fn files_and_variables_need_a_grant() {
    for mode in MODES {
        let server = Server::start(mode, &fixture("grants"), &[]);
        assert!(ask(&server, "read /etc/passwd").starts_with("error "));
        assert!(ask(&server, "read Cargo.toml").starts_with("error "));
        assert!(ask(&server, "fetch /etc/passwd").starts_with("error "));
        assert!(ask(&server, "env PATH").starts_with("error "));
        assert!(ask(&server, "env HOME").starts_with("error "));
    }
}

#[test]
fn a_variable_is_granted_with_a_value_or_inherited() {
    for mode in MODES {
        let path = std::env::var("PATH").unwrap();
        let server = Server::start(
            mode,
            &fixture("grants"),
            &["--env", "GREETING=hello=there", "--env", "PATH"],
        );
        assert_eq!(ask(&server, "env GREETING"), "ok hello=there");
        assert_eq!(ask(&server, "env PATH"), format!("ok {path}"));
        assert!(ask(&server, "env HOME").starts_with("error "));
    }
}

#[test]
fn fetch_reads_whole_files_of_the_nearest_grant() {
    let directory = tempfile::tempdir().unwrap();
    let inner = directory.path().join("inner");
    fs::create_dir(&inner).unwrap();
    fs::create_dir(directory.path().join("other")).unwrap();
    fs::write(directory.path().join("other/file"), "in the nearer grant").unwrap();
    let grant = |path: &str, name| format!("{}{path}::{name}", directory.path().display());
    for mode in MODES {
        let server = Server::start(
            mode,
            &fixture("grants"),
            &[
                "--dir",
                &grant("", "/data"),
                "--dir",
                &grant("/other", "/data/inner"),
            ],
        );
        // Lengths around one read, and of several reads.
        for length in [0, 1, 4095, 4096, 4097, 20_000] {
            let text = "x".repeat(length);
            fs::write(directory.path().join("file"), &text).unwrap();
            let answer = ask(&server, "fetch /data/file");
            assert_eq!(answer, format!("ok {text}").trim_end());
        }
        assert_eq!(
            ask(&server, "fetch /data/inner/file"),
            "ok in the nearer grant"
        );
        for (path, kind) in [
            ("/data/none", "NotFound"),
            ("/database", "NotFound"),
            ("/data", "IsADirectory"),
            ("/data/file/below", "NotADirectory"),
        ] {
            let answer = ask(&server, &format!("fetch {path}"));
            assert!(answer.ends_with(&format!("({kind})")), "{path}: {answer}");
        }
    }
}
