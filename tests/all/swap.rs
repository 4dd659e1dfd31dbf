//! Guests are replaced while they serve, without losing a connection.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::harness::{
    AdminSocket, Client, MODES, Server, fixture, guest, output, page, request, wait_until,
    wasinetd, write_version,
};

/// Asks the guest `named_version` for its version, and whether this was its last answer.
///
/// An answer repeats the name 500 times, so that a mixture of two versions shows.
pub(crate) fn answer(client: &mut Client) -> (String, bool) {
    client.send("?\n");
    let names = client.read(16 * 500);
    let last = client.read_line() == "bye";
    let name = &names[..16];
    assert_eq!(names, name.repeat(500), "an answer of several versions");
    (name.trim_end_matches('_').into(), last)
}

/// The name of the version that serves a new connection.
fn served_version(server: &Server) -> String {
    answer(&mut server.connect()).0
}

/// Waits until new connections get this version.
fn wait_for_version(server: &Server, name: &str) {
    wait_until(&format!("{name} does not serve"), || {
        served_version(server) == name
    });
}

fn text(path: &Path) -> &str {
    path.to_str().expect("the path is UTF-8")
}

/// Starts a server with a guest named `one`, and returns the file of that guest too.
fn start_names(mode: &str, arguments: &[&str]) -> (AdminSocket, PathBuf, Server) {
    let admin = AdminSocket::new();
    let file = admin.beside("guest.wasm");
    write_version(&file, "one");
    let arguments = [&["--admin", &admin.flag], arguments].concat();
    let server = Server::start(mode, &file, &arguments);
    (admin, file, server)
}

#[test]
fn an_operator_can_swap_and_roll_back() {
    for mode in MODES {
        let (admin, file, server) = start_names(mode, &[]);
        let two = admin.beside("two.wasm");
        write_version(&two, "two");
        let mut open = server.connect();
        assert_eq!(answer(&mut open), ("one".into(), false));
        let message = admin.ctl_text(&["swap", "default", text(&two)]);
        assert!(message.contains("has replaced"), "{message}");
        assert_eq!(served_version(&server), "two");
        // The open connection finishes with the version it started with.
        assert_eq!(answer(&mut open), ("one".into(), true));
        assert_eq!(open.read_to_end(), "");
        let message = admin.ctl_text(&["swap", "default", text(&two)]);
        assert!(message.contains("nothing has changed"), "{message}");
        let rollback = admin.ctl_json(&["rollback", "default"]);
        assert_ne!(rollback["digest"], rollback["before"]);
        assert_eq!(served_version(&server), "one");
        admin.ctl_text(&["rollback", "default"]);
        assert_eq!(served_version(&server), "two");
        let status = admin.ctl_json(&["status"]);
        let versions = status["services"][0]["versions"].as_array().unwrap();
        let states: Vec<_> = versions.iter().map(|version| &version["state"]).collect();
        assert_eq!(states[..2], ["current", "previous"]);
        let digest = sha256(&two);
        assert_eq!(versions[0]["digest"], digest);
        assert_eq!(versions[1]["digest"], sha256(&file));
        assert!(admin.ctl_text(&["status"]).contains(&digest[..12]));
    }
}

/// The digest by coreutils, independent of our own code.
fn sha256(path: &Path) -> String {
    let output = output(std::process::Command::new("sha256sum").arg(path));
    String::from_utf8(output.stdout).unwrap()[..64].into()
}

#[test]
fn a_bad_version_changes_nothing_and_is_reported() {
    for mode in MODES {
        let (admin, file, server) = start_names(mode, &[]);
        let bad = admin.beside("bad.wasm");
        let trap = crate::harness::wat_fixture("start_traps");
        let good = fs::read(&file).unwrap();
        fs::write(&bad, &good[..good.len() / 2]).unwrap();
        for (guest, reason) in [
            (&*bad, "not a valid component"),
            (Path::new("README.md"), "not WebAssembly"),
            (&*fixture("no_handler"), "does not export"),
            (&*fixture("sockets"), "imports the network"),
            (&*trap, "cannot instantiate the guest"),
        ] {
            let output = admin.ctl(&["swap", "default", text(guest)]);
            let message = String::from_utf8_lossy(&output.stderr).into_owned();
            assert_eq!(output.status.code(), Some(65), "{message}");
            assert!(
                message.contains(reason) && message.contains("nothing has changed"),
                "{message}"
            );
            server.wait_for_log(&["a swap failed", reason]);
        }
        assert_eq!(served_version(&server), "one");
        let metrics = admin.metrics();
        let refused = "wasinetd_swaps_total{service=\"default\",outcome=\"refused\"} 5";
        assert!(metrics.contains(refused), "{metrics}");
        let output = admin.ctl(&["rollback", "default"]);
        assert_eq!(output.status.code(), Some(69), "{output:?}");
    }
}

#[test]
fn sighup_swaps_to_the_current_guest_file() {
    for mode in MODES {
        let (admin, file, server) = start_names(mode, &[]);
        write_version(&file, "two");
        assert_eq!(served_version(&server), "one");
        server.signal(Signal::HUP);
        server.wait_for_log(&["guest version changed", "swapped"]);
        assert_eq!(served_version(&server), "two");
        server.signal(Signal::HUP);
        server.wait_for_log(&["reloaded", "unchanged"]);
        fs::write(&file, "nonsense").unwrap();
        server.signal(Signal::HUP);
        server.wait_for_log(&["a swap failed", "not WebAssembly"]);
        fs::remove_file(&file).unwrap();
        server.signal(Signal::HUP);
        server.wait_for_log(&["cannot read the guest"]);
        // `ctl reload` reports the same mistakes by its exit code.
        let reload = || {
            let output = admin.ctl(&["reload"]);
            let message = String::from_utf8(output.stderr).unwrap();
            (output.status.code(), message)
        };
        let (code, message) = reload();
        assert_eq!(code, Some(65), "{message}");
        assert!(message.contains("cannot read the guest"), "{message}");
        fs::write(&file, "nonsense").unwrap();
        let (code, message) = reload();
        assert_eq!(code, Some(65), "{message}");
        assert!(
            message.contains("is refused: ") && message.contains(text(&file)),
            "{message}"
        );
        assert_eq!(served_version(&server), "two");
    }
}

#[test]
fn a_watched_file_is_swapped_in_once_it_is_complete() {
    for mode in MODES {
        let (admin, file, server) = start_names(mode, &["--watch"]);
        let other = admin.beside("other.wasm");
        write_version(&other, "renamed");
        let whole = fs::read(&other).unwrap();
        fs::rename(&other, &file).unwrap();
        server.wait_for_log(&["guest version changed", "swapped"]);
        assert_eq!(served_version(&server), "renamed");
        // Written in place, with a pause in the middle until the server has tried the first half.
        write_version(&other, "in-place");
        let in_place = fs::read(&other).unwrap();
        let (first, second) = in_place.split_at(in_place.len() / 2);
        fs::write(&file, first).unwrap();
        server.wait_for_log(&["a swap failed", "not a valid component"]);
        assert_eq!(served_version(&server), "renamed");
        let mut half = fs::OpenOptions::new().append(true).open(&file).unwrap();
        std::io::Write::write_all(&mut half, second).unwrap();
        drop(half);
        wait_for_version(&server, "in-place");
        // Written in place without truncation: a mixture of both versions is valid as well.
        write_version(&other, "whole");
        let next = fs::read(&other).unwrap();
        let swap_count = || server.log_lines("guest version changed").len();
        wait_until("the second swap is not logged", || swap_count() == 2);
        let mut file_in_place = fs::OpenOptions::new().write(true).open(&file).unwrap();
        let (first, second) = next.split_at(next.len() - 1000);
        std::io::Write::write_all(&mut file_in_place, first).unwrap();
        // Longer than the quiet time after which the server takes a file for complete.
        thread::sleep(Duration::from_millis(700));
        assert_eq!(swap_count(), 2, "{server:?}");
        std::io::Write::write_all(&mut file_in_place, second).unwrap();
        drop(file_in_place);
        wait_for_version(&server, "whole");
        wait_until("the third swap is not logged", || swap_count() == 3);
        // Another file in the same directory changes all the time.
        let busy = AtomicBool::new(true);
        thread::scope(|scope| {
            scope.spawn(|| {
                while busy.load(Ordering::Relaxed) {
                    fs::write(admin.beside("busy.log"), "line").unwrap();
                    thread::sleep(Duration::from_millis(20));
                }
            });
            write_version(&file, "beside");
            wait_for_version(&server, "beside");
            busy.store(false, Ordering::Relaxed);
        });
        // The file is replaced by a symbolic link, as deployments do.
        fs::write(&other, whole).unwrap();
        let link = admin.beside("link");
        std::os::unix::fs::symlink(&other, &link).unwrap();
        fs::rename(&link, &file).unwrap();
        wait_for_version(&server, "renamed");
        assert_eq!(server.log_lines("a swap failed").len(), 1, "{server:?}");
    }
}

#[test]
fn a_retargeted_directory_symlink_is_noticed() {
    let admin = AdminSocket::new();
    let current = admin.beside("current");
    for release in ["one", "two"] {
        fs::create_dir(admin.beside(release)).unwrap();
        write_version(&admin.beside(release).join("guest.wasm"), release);
    }
    let point_link_to = |release: &str| {
        let next = admin.beside("next");
        std::os::unix::fs::symlink(admin.beside(release), &next).unwrap();
        fs::rename(&next, &current).unwrap();
    };
    point_link_to("one");
    let arguments = ["--admin", &admin.flag, "--watch"];
    let server = Server::start("concurrent", &current.join("guest.wasm"), &arguments);
    assert_eq!(served_version(&server), "one");
    point_link_to("two");
    server.wait_for_log(&["guest version changed", "swapped"]);
    assert_eq!(served_version(&server), "two");
}

#[test]
fn a_full_server_can_be_swapped() {
    for mode in MODES {
        let (admin, file, server) = start_names(mode, &["--max-connections", "1"]);
        let mut only = server.connect();
        assert_eq!(answer(&mut only), ("one".into(), false));
        write_version(&file, "two");
        admin.ctl_text(&["swap", "default", text(&file)]);
        assert_eq!(answer(&mut only), ("one".into(), true));
        drop(only);
        assert_eq!(served_version(&server), "two");
    }
}

#[test]
fn a_version_is_probed_before_it_serves() {
    for mode in MODES {
        let admin = AdminSocket::new();
        let probe = [
            "--dir",
            "static::/static",
            "--admin",
            &admin.flag,
            "--probe-send",
            r"GET / HTTP/1.1\r\nHost: probe\r\n\r\n",
            "--probe-expect",
            "HTTP/1.1 200",
            "--probe-timeout",
            "1s",
        ];
        let server = Server::start(mode, &guest("hello"), &probe);
        for (bad, reason) in [
            (
                guest("echo"),
                "the guest answered the probe with \\\"GET / HTTP/1",
            ),
            (fixture("sleeps_forever"), "within 1s"),
            (
                fixture("panic"),
                "the guest answered the probe with \\\"half",
            ),
            (fixture("spin"), "within 1s"),
        ] {
            let output = admin.ctl(&["swap", "default", text(&bad)]);
            let message = String::from_utf8_lossy(&output.stderr).replace('"', "\\\"");
            assert_eq!(output.status.code(), Some(65), "{message}");
            assert!(message.contains(reason), "{message} without {reason}");
        }
        assert_eq!(server.connect().get("/").body, page("hello.html"));
        // The first version is probed as well, before the server starts.
        let mut bad = wasinetd();
        bad.args(["serve", "--listen", "127.0.0.1:0"])
            .args(&probe[4..]);
        bad.args(["--admin", &format!("{}-2", admin.flag)]);
        let ended = output(bad.arg(guest("echo")));
        let message = String::from_utf8_lossy(&ended.stderr).into_owned();
        assert_eq!(ended.status.code(), Some(65), "{message}");
        assert!(
            message.contains("the guest answered the probe"),
            "{message}"
        );
        // The answer begins as expected, but the guest fails then.
        let mut bad = wasinetd();
        bad.args([
            "serve",
            "--listen",
            "127.0.0.1:0",
            "--probe-expect",
            "half an",
        ]);
        let ended = output(bad.arg(fixture("error")));
        let message = String::from_utf8_lossy(&ended.stderr).into_owned();
        assert_eq!(ended.status.code(), Some(65), "{message}");
        assert!(message.contains(", and ended with: out of"), "{message}");
    }
}

#[test]
fn connections_of_an_old_version_end_at_its_maximum_age() {
    for mode in MODES {
        let admin = AdminSocket::new();
        let age = ["--admin", &admin.flag, "--max-old-version-age", "300ms"];
        let server = Server::start(mode, &guest("echo"), &age);
        let mut old = server.connect();
        old.send("a");
        assert_eq!(old.read(1), "a");
        admin.ctl_text(&["swap", "default", text(&fixture("named_version"))]);
        let replaced = Instant::now();
        old.send("b");
        assert_eq!(old.read(1), "b");
        let new = &mut server.connect();
        answer(new);
        let (_, end) = old.read_all();
        assert!(
            end.is_err() && replaced.elapsed().as_millis() >= 300,
            "{end:?}"
        );
        server.wait_for_log(&["connection ended", "limit=\"max-old-version-age\""]);
        let met = "wasinetd_limits_met_total{limit=\"max-old-version-age\"} 1";
        assert!(admin.metrics().contains(met));
        // The limit does not apply to the current version, and can be turned off.
        answer(new);
        drop(server);
        let never = ["--admin", &admin.flag, "--max-old-version-age", "off"];
        let server = Server::start(mode, &guest("echo"), &never);
        let mut old = server.connect();
        old.send("a");
        assert_eq!(old.read(1), "a");
        admin.ctl_text(&["swap", "default", text(&fixture("named_version"))]);
        old.send("b");
        assert_eq!(old.read(1), "b");
    }
}

/// Clients that load a server while it is swapped.
pub(crate) struct Load<'a> {
    server: &'a Server,
    stop: AtomicBool,
    answers: AtomicUsize,
}

impl Load<'_> {
    /// Keeps each connection until the guest announces its last answer.
    fn keep_connections(&self) {
        while !self.stop.load(Ordering::Relaxed) {
            let mut client = self.server.connect();
            let (first, mut last) = answer(&mut client);
            while !last && !self.stop.load(Ordering::Relaxed) {
                let (name, now_last) = answer(&mut client);
                assert_eq!(name, first, "a connection changed its version");
                last = now_last;
                self.answers.fetch_add(1, Ordering::Relaxed);
            }
            if last {
                assert_eq!(client.read_to_end(), "");
            }
        }
    }

    /// Opens a connection for each question.
    fn reconnect(&self) {
        while !self.stop.load(Ordering::Relaxed) {
            answer(&mut self.server.connect());
            self.answers.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Runs `swaps` under the load of `each` clients of both kinds, and counts their answers.
    pub(crate) fn while_swapping(server: &Server, each: usize, swaps: impl FnOnce()) -> usize {
        let load = Load {
            server,
            stop: AtomicBool::new(false),
            answers: AtomicUsize::new(0),
        };
        thread::scope(|scope| {
            let clients: Vec<_> = (0..each)
                .flat_map(|_| {
                    [
                        scope.spawn(|| load.keep_connections()),
                        scope.spawn(|| load.reconnect()),
                    ]
                })
                .collect();
            swaps();
            load.stop.store(true, Ordering::Relaxed);
            // A panic in a client fails the test with its own message.
            clients
                .into_iter()
                .for_each(|client| client.join().unwrap());
        });
        load.answers.into_inner()
    }
}

#[test]
fn a_hundred_swaps_under_load_lose_no_answer() {
    for mode in MODES {
        let (admin, one, server) = start_names(mode, &[]);
        let two = admin.beside("two.wasm");
        write_version(&two, "two");
        let answers = Load::while_swapping(&server, 4, || {
            for n in 0..100 {
                let next = if n % 2 == 0 { &two } else { &one };
                let swap = admin.ctl_json(&["swap", "default", text(next)]);
                assert_ne!(swap["digest"], swap["before"], "swap {n}");
            }
        });
        assert!(answers > 1_000, "{answers} answers are too few for a load");
        for outcome in ["trap", "error", "reset", "client gone", "limit:"] {
            let lines = server.log_lines(&format!("outcome={outcome}"));
            assert_eq!(lines.len(), 0, "{lines:?}");
        }
    }
}

#[test]
fn replaced_versions_are_freed() {
    for mode in MODES {
        let (admin, file, server) = start_names(mode, &["--cache", "off"]);
        let swap = |n: usize| {
            write_version(&file, &format!("version-{n}"));
            admin.ctl_text(&["swap", "default", text(&file)]);
        };
        let mut memory = Vec::new();
        Load::while_swapping(&server, 1, || {
            for n in 0..36 {
                swap(n);
                memory.push(server.memory("VmRSS"));
            }
        });
        // A version holds more than 512 KiB. Compiler threads add a varying multiple of that, so
        // the maximum of the first swaps is compared with the minimum of the last ones: 18 versions
        // that stayed would be 9 MiB.
        let early_max = memory[3..10].iter().max().unwrap();
        let late_min = memory[28..].iter().min().unwrap();
        assert!(*late_min < early_max + 4 * 1024, "{memory:?} KiB");
        // All but the last two versions are freed when their last connections end.
        wait_until("old versions stay", || admin.version_count() <= 2);
        server.wait_for_log(&["an old version is freed"]);
        let series = admin.metrics();
        let series = series
            .lines()
            .filter(|line| line.starts_with("wasinetd_connections_open{"));
        assert_eq!(series.count(), 3);
    }
}

#[test]
fn hello_asks_clients_to_reconnect_after_a_swap() {
    for mode in MODES {
        let admin = AdminSocket::new();
        let pages = ["--dir", "static::/static", "--admin", &admin.flag];
        let server = Server::start(mode, &guest("hello"), &pages);
        let mut client = server.connect();
        assert!(!client.get("/").head.contains("Connection: close"));
        admin.ctl_text(&["swap", "default", text(&guest("echo"))]);
        // The guest answers the next request even after an idle period.
        wait_until("the new version does not serve", || {
            admin.version_count() >= 2
        });
        thread::sleep(Duration::from_secs(1));
        client.send(request("/"));
        let response = client.response();
        assert!(response.head.contains("Connection: close"), "{response:?}");
        assert_eq!(response.body, page("hello.html"));
        assert_eq!(client.read_to_end(), "");
    }
}
