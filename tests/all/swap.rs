//! Guests are replaced while they are used, and nobody notices.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::harness::{
    AdminSocket, Client, MODES, Server, fixture, guest, output, page, request, wasinetd,
    write_version,
};

/// What the guest `names` answers to a line, as far as it is right: its name and nothing else, so many
/// times. True when it was the last answer.
pub(crate) fn answer(client: &mut Client) -> (String, bool) {
    client.send("?\n");
    let names = client.read(16 * 500);
    let last = client.read_line() == "bye";
    let name = &names[..16];
    assert_eq!(names, name.repeat(500), "an answer of several versions");
    (name.trim_end_matches('_').into(), last)
}

/// The name of the version that a new connection gets.
fn served(server: &Server) -> String {
    answer(&mut server.connect()).0
}

fn text(path: &Path) -> &str {
    path.to_str().expect("it is text")
}

/// A server whose first version is called `one`, with its file.
fn names(mode: &str, arguments: &[&str]) -> (AdminSocket, PathBuf, Server) {
    let admin = AdminSocket::new();
    let file = admin.beside("guest.wasm");
    write_version(&file, "one");
    let arguments = [&["--admin", &admin.flag], arguments].concat();
    let server = Server::start(mode, &file, &arguments);
    (admin, file, server)
}

#[test]
fn an_operator_swaps_and_rolls_back() {
    for mode in MODES {
        let (admin, file, server) = names(mode, &[]);
        let two = admin.beside("two.wasm");
        write_version(&two, "two");
        let mut open = server.connect();
        assert_eq!(answer(&mut open), ("one".into(), false));
        let said = admin.ctl_text(&["swap", "default", text(&two)]);
        assert!(said.contains("is served in place of"), "{said}");
        assert_eq!(served(&server), "two");
        // The one that was open finishes with what it began with.
        assert_eq!(answer(&mut open), ("one".into(), true));
        assert_eq!(open.read_to_end(), "");
        let said = admin.ctl_text(&["swap", "default", text(&two)]);
        assert!(said.contains("nothing has changed"), "{said}");
        let said = admin.ctl_json(&["rollback", "default"]);
        assert_ne!(said["digest"], said["before"]);
        assert_eq!(served(&server), "one");
        admin.ctl_text(&["rollback", "default"]);
        assert_eq!(served(&server), "two");
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

/// By coreutils, to be sure.
fn sha256(path: &Path) -> String {
    let output = output(std::process::Command::new("sha256sum").arg(path));
    String::from_utf8(output.stdout).unwrap()[..64].into()
}

#[test]
fn a_bad_version_changes_nothing_and_everyone_is_told() {
    for mode in MODES {
        let (admin, file, server) = names(mode, &[]);
        let bad = admin.beside("bad.wasm");
        let trap = crate::harness::text_fixture("start_traps");
        let good = fs::read(&file).unwrap();
        fs::write(&bad, &good[..good.len() / 2]).unwrap();
        for (guest, reason) in [
            (&*bad, "not a valid component"),
            (Path::new("README.md"), "not WebAssembly"),
            (&*fixture("no_handler"), "does not export"),
            (&*fixture("sockets"), "imports the network"),
            (&*trap, "no instance of it can be made"),
        ] {
            let output = admin.ctl(&["swap", "default", text(guest)]);
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            assert_eq!(output.status.code(), Some(65), "{said}");
            assert!(
                said.contains(reason) && said.contains("nothing has changed"),
                "{said}"
            );
            server.wait_for_log(&["a swap failed", reason]);
        }
        assert_eq!(served(&server), "one");
        let metrics = admin.metrics();
        let refused = "wasinetd_swaps_total{service=\"default\",outcome=\"refused\"} 5";
        assert!(metrics.contains(refused), "{metrics}");
        let output = admin.ctl(&["rollback", "default"]);
        assert_eq!(output.status.code(), Some(69), "{output:?}");
    }
}

#[test]
fn a_hangup_swaps_to_what_the_file_has() {
    for mode in MODES {
        let (admin, file, server) = names(mode, &[]);
        write_version(&file, "two");
        assert_eq!(served(&server), "one");
        server.signal(Signal::HUP);
        server.wait_for_log(&["a new version was given", "swapped"]);
        assert_eq!(served(&server), "two");
        server.signal(Signal::HUP);
        server.wait_for_log(&["reloaded", "unchanged"]);
        fs::write(&file, "nonsense").unwrap();
        server.signal(Signal::HUP);
        server.wait_for_log(&["a swap failed", "not WebAssembly"]);
        fs::remove_file(&file).unwrap();
        server.signal(Signal::HUP);
        server.wait_for_log(&["cannot read the guest"]);
        // The same by a command, which tells what kind of failure it was.
        let reload = || {
            let output = admin.ctl(&["reload"]);
            let said = String::from_utf8(output.stderr).unwrap();
            (output.status.code(), said)
        };
        let (code, said) = reload();
        assert_eq!(code, Some(65), "{said}");
        assert!(said.contains("cannot read the guest"), "{said}");
        fs::write(&file, "nonsense").unwrap();
        let (code, said) = reload();
        assert_eq!(code, Some(65), "{said}");
        assert!(
            said.contains("is refused: ") && said.contains(text(&file)),
            "{said}"
        );
        assert_eq!(served(&server), "two");
    }
}

#[test]
fn a_file_that_is_watched_is_swapped_to_when_it_is_whole() {
    for mode in MODES {
        let (admin, file, server) = names(mode, &["--watch"]);
        let other = admin.beside("other.wasm");
        write_version(&other, "renamed");
        let whole = fs::read(&other).unwrap();
        fs::rename(&other, &file).unwrap();
        server.wait_for_log(&["a new version was given", "swapped"]);
        assert_eq!(served(&server), "renamed");
        // In place, and with a pause in the middle that lasts until the half was tried.
        write_version(&other, "in-place");
        let in_place = fs::read(&other).unwrap();
        let (first, second) = in_place.split_at(in_place.len() / 2);
        fs::write(&file, first).unwrap();
        server.wait_for_log(&["a swap failed", "not a valid component"]);
        assert_eq!(served(&server), "renamed");
        let mut half = fs::OpenOptions::new().append(true).open(&file).unwrap();
        std::io::Write::write_all(&mut half, second).unwrap();
        drop(half);
        while served(&server) != "in-place" {}
        // In place without a cut: what is half of each version is as valid as the whole.
        write_version(&other, "whole");
        let next = fs::read(&other).unwrap();
        let given = || server.log_lines("a new version was given").len();
        while given() < 2 {}
        let mut file_in_place = fs::OpenOptions::new().write(true).open(&file).unwrap();
        let (first, second) = next.split_at(next.len() - 1000);
        std::io::Write::write_all(&mut file_in_place, first).unwrap();
        // Long enough for it to be taken for whole.
        thread::sleep(Duration::from_millis(700));
        assert_eq!(given(), 2, "{server:?}");
        std::io::Write::write_all(&mut file_in_place, second).unwrap();
        drop(file_in_place);
        while served(&server) != "whole" {}
        while given() < 3 {}
        // Beside it, somebody writes without end.
        let busy = AtomicBool::new(true);
        thread::scope(|scope| {
            scope.spawn(|| {
                while busy.load(Ordering::Relaxed) {
                    fs::write(admin.beside("busy.log"), "line").unwrap();
                    thread::sleep(Duration::from_millis(20));
                }
            });
            write_version(&file, "beside");
            while served(&server) != "beside" {}
            busy.store(false, Ordering::Relaxed);
        });
        // A link that is turned round, as deployments do.
        fs::write(&other, whole).unwrap();
        let link = admin.beside("link");
        std::os::unix::fs::symlink(&other, &link).unwrap();
        fs::rename(&link, &file).unwrap();
        while served(&server) != "renamed" {}
        assert_eq!(server.log_lines("a swap failed").len(), 1, "{server:?}");
    }
}

#[test]
fn a_link_to_a_directory_that_leads_elsewhere_is_noticed() {
    let admin = AdminSocket::new();
    let current = admin.beside("current");
    for release in ["one", "two"] {
        fs::create_dir(admin.beside(release)).unwrap();
        write_version(&admin.beside(release).join("guest.wasm"), release);
    }
    let link = |to: &str| {
        let next = admin.beside("next");
        std::os::unix::fs::symlink(admin.beside(to), &next).unwrap();
        fs::rename(&next, &current).unwrap();
    };
    link("one");
    let arguments = ["--admin", &admin.flag, "--watch"];
    let server = Server::start("concurrent", &current.join("guest.wasm"), &arguments);
    assert_eq!(served(&server), "one");
    link("two");
    server.wait_for_log(&["a new version was given", "swapped"]);
    assert_eq!(served(&server), "two");
}

#[test]
fn a_server_that_is_full_is_swapped() {
    for mode in MODES {
        let (admin, file, server) = names(mode, &["--max-connections", "1"]);
        let mut only = server.connect();
        assert_eq!(answer(&mut only), ("one".into(), false));
        write_version(&file, "two");
        admin.ctl_text(&["swap", "default", text(&file)]);
        assert_eq!(answer(&mut only), ("one".into(), true));
        drop(only);
        assert_eq!(served(&server), "two");
    }
}

#[test]
fn a_version_is_asked_before_it_is_served() {
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
            (guest("echo"), "it answered the probe with \\\"GET / HTTP/1"),
            (fixture("sleeps_forever"), "within 1s"),
            (fixture("panic"), "it answered the probe with \\\"half"),
            (fixture("spin"), "within 1s"),
        ] {
            let output = admin.ctl(&["swap", "default", text(&bad)]);
            let said = String::from_utf8_lossy(&output.stderr).replace('"', "\\\"");
            assert_eq!(output.status.code(), Some(65), "{said}");
            assert!(said.contains(reason), "{said} without {reason}");
        }
        assert_eq!(server.connect().get("/").body, page("hello.html"));
        // It is asked at the start as well.
        let mut bad = wasinetd();
        bad.args(["serve", "--listen", "127.0.0.1:0"])
            .args(&probe[4..]);
        bad.args(["--admin", &format!("{}-2", admin.flag)]);
        let ended = output(bad.arg(guest("echo")));
        let said = String::from_utf8_lossy(&ended.stderr).into_owned();
        assert_eq!(ended.status.code(), Some(65), "{said}");
        assert!(said.contains("it answered the probe"), "{said}");
        // It begins as expected, and then ends.
        let mut bad = wasinetd();
        bad.args([
            "serve",
            "--listen",
            "127.0.0.1:0",
            "--probe-expect",
            "half an",
        ]);
        let ended = output(bad.arg(fixture("error")));
        let said = String::from_utf8_lossy(&ended.stderr).into_owned();
        assert_eq!(ended.status.code(), Some(65), "{said}");
        assert!(said.contains(", and ended with: out of"), "{said}");
    }
}

#[test]
fn an_old_version_ends_when_its_time_is_up() {
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
        // The current version has no age, nor has one without a limit.
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

/// Clients of a server that is swapped under them.
pub(crate) struct Load<'a> {
    server: &'a Server,
    stop: AtomicBool,
    answers: AtomicUsize,
}

impl Load<'_> {
    /// Keeps its connection until it is told that it was the last answer.
    fn keep(&self) {
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

    /// Connects for each question.
    fn connect(&self) {
        while !self.stop.load(Ordering::Relaxed) {
            answer(&mut self.server.connect());
            self.answers.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Swaps under the load of so many clients of each kind.
    pub(crate) fn while_swapping(server: &Server, each: usize, swaps: impl FnOnce()) -> usize {
        let load = Load {
            server,
            stop: AtomicBool::new(false),
            answers: AtomicUsize::new(0),
        };
        thread::scope(|scope| {
            let clients: Vec<_> = (0..each)
                .flat_map(|_| [scope.spawn(|| load.keep()), scope.spawn(|| load.connect())])
                .collect();
            swaps();
            load.stop.store(true, Ordering::Relaxed);
            // A client that panics is a failure, with its own message.
            clients
                .into_iter()
                .for_each(|client| client.join().unwrap());
        });
        load.answers.into_inner()
    }
}

#[test]
fn a_hundred_swaps_under_load_lose_nothing() {
    for mode in MODES {
        let (admin, one, server) = names(mode, &[]);
        let two = admin.beside("two.wasm");
        write_version(&two, "two");
        let answers = Load::while_swapping(&server, 4, || {
            for n in 0..100 {
                let next = if n % 2 == 0 { &two } else { &one };
                let said = admin.ctl_json(&["swap", "default", text(next)]);
                assert_ne!(said["digest"], said["before"], "swap {n}");
            }
        });
        assert!(answers > 1_000, "{answers} answers is no load");
        for outcome in ["trap", "error", "reset", "client gone", "limit:"] {
            let lines = server.log_lines(&format!("outcome={outcome}"));
            assert_eq!(lines.len(), 0, "{lines:?}");
        }
    }
}

#[test]
fn what_was_swapped_away_is_freed() {
    for mode in MODES {
        let (admin, file, server) = names(mode, &["--cache", "off"]);
        let swap = |n: usize| {
            write_version(&file, &format!("version-{n}"));
            admin.ctl_text(&["swap", "default", text(&file)]);
        };
        let mut memory = Vec::new();
        Load::while_swapping(&server, 1, || {
            for n in 0..60 {
                swap(n);
                memory.push(server.memory("VmRSS"));
            }
        });
        // What is kept of a version is more than half a MiB. What threads that compile leave behind comes
        // and goes by a multiple of that, so the most of the first is compared with the least of the last.
        let most = memory[3..10].iter().max().unwrap();
        let least = memory[45..].iter().min().unwrap();
        assert!(*least < most + 4 * 1024, "{memory:?} KiB");
        // All but the two last are gone, once their last connections are.
        while admin.versions() > 2 {}
        server.wait_for_log(&["an old version is freed"]);
        let series = admin.metrics();
        let series = series
            .lines()
            .filter(|line| line.starts_with("wasinetd_connections_open{"));
        assert_eq!(series.count(), 3);
    }
}

#[test]
fn hello_asks_its_clients_to_connect_again() {
    for mode in MODES {
        let admin = AdminSocket::new();
        let pages = ["--dir", "static::/static", "--admin", &admin.flag];
        let server = Server::start(mode, &guest("hello"), &pages);
        let mut client = server.connect();
        assert!(!client.get("/").head.contains("Connection: close"));
        admin.ctl_text(&["swap", "default", text(&guest("echo"))]);
        // However long it is idle, its next request is answered.
        while admin.versions() < 2 {}
        thread::sleep(Duration::from_secs(1));
        client.send(request("/"));
        let response = client.response();
        assert!(response.head.contains("Connection: close"), "{response:?}");
        assert_eq!(response.body, page("hello.html"));
        assert_eq!(client.read_to_end(), "");
    }
}
