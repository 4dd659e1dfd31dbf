//! A new process takes over, and nobody notices.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Instant;

use rustix::process::{Pid, Signal};

use crate::harness::{AdminSocket, MODES, PATIENCE, Server, Successor, guest, page, request, root};

/// A copy of the program, which can be replaced.
fn installed(admin: &AdminSocket) -> std::path::PathBuf {
    let program = admin.beside("wasinetd");
    std::fs::copy(root().join("target/release/wasinetd"), &program).unwrap();
    program
}

fn serving(admin: &AdminSocket) -> u64 {
    admin.ctl_json(&["status"])["pid"].as_u64().unwrap()
}

#[test]
fn a_new_process_takes_over_under_load() {
    for mode in MODES {
        let admin = AdminSocket::new();
        let program = installed(&admin);
        let arguments = ["--dir", "static::/static", "--admin", &admin.flag];
        let mut server = Server::start_program(&program, mode, &guest("hello"), &arguments);
        let mut kept = server.connect();
        assert_eq!(kept.get("/").status(), "200 OK");
        let (stop, answers) = (AtomicBool::new(false), AtomicUsize::new(0));
        let successor = thread::scope(|scope| {
            let clients: Vec<_> = (0..4)
                .map(|_| {
                    scope.spawn(|| {
                        while !stop.load(Ordering::Relaxed) {
                            let mut client = server.connect();
                            assert_eq!(client.get("/").body, page("hello.html"));
                            answers.fetch_add(1, Ordering::Relaxed);
                        }
                    })
                })
                .collect();
            while answers.load(Ordering::Relaxed) < 100 {}
            // As an upgrade does: the program is another file by now.
            std::fs::remove_file(&program).unwrap();
            installed(&admin);
            let before = serving(&admin);
            let said = admin.ctl_text(&["restart"]);
            assert!(said.contains("has taken over"), "{said}");
            let now = serving(&admin);
            assert_ne!(now, before);
            let successor = Successor(Pid::from_raw(now as i32).unwrap());
            let at_restart = answers.load(Ordering::Relaxed);
            while answers.load(Ordering::Relaxed) < at_restart + 200 {}
            stop.store(true, Ordering::Relaxed);
            clients
                .into_iter()
                .for_each(|client| client.join().unwrap());
            successor
        });
        // Who was there stays with the old one, which waits.
        kept.send(request("/"));
        assert_eq!(kept.response().body, page("hello.html"));
        drop(kept);
        assert_eq!(server.wait_for_exit().code(), Some(0), "{server:?}");
        // What is at the path of the socket is the new one's by now.
        assert_eq!(serving(&admin), successor.0.as_raw_nonzero().get() as u64);
        admin.ctl_text(&["drain"]);
        let gone = Instant::now();
        while admin.path().exists() && gone.elapsed() < PATIENCE {}
        assert!(!admin.path().exists());
    }
}

/// Puts a program in place of another that does this with its arguments.
fn install_script(program: &std::path::Path, script: &str) {
    let next = program.with_extension("next");
    std::fs::write(&next, format!("#!/bin/sh\n{script}\n")).unwrap();
    std::fs::set_permissions(&next, PermissionsExt::from_mode(0o755)).unwrap();
    std::fs::rename(&next, program).unwrap();
}

#[test]
fn a_successor_that_does_not_serve_changes_nothing() {
    let real = root().join("target/release/wasinetd");
    for mode in MODES {
        let admin = AdminSocket::new();
        let program = installed(&admin);
        let arguments = ["--admin", &admin.flag];
        let server = Server::start_program(&program, mode, &guest("echo"), &arguments);
        // One that does nothing, and one that fails when it has the sockets already.
        let late = format!("exec {} \"$@\" --cache /proc/nowhere", real.display());
        for (script, code) in [("exit 3", "exit status: 3"), (&late, "exit status: 78")] {
            install_script(&program, script);
            let output = admin.ctl(&["restart"]);
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            assert_eq!(output.status.code(), Some(69), "{said}");
            assert!(
                said.contains("nothing has changed") && said.contains(code),
                "{said}"
            );
        }
        std::fs::remove_file(&program).unwrap();
        server.signal(Signal::USR2);
        server.wait_for_log(&["no new process has taken over", "cannot be started"]);
        let mut client = server.connect();
        client.send("still there");
        assert_eq!(client.read(11), "still there");
        assert_eq!(admin.ctl_json(&["status"])["phase"], "serving");
        // A server of the same address that is started by mistake is refused all the same.
        let address = server.address().to_string();
        let mut other = crate::harness::wasinetd();
        other
            .args(["serve", "--listen", &address])
            .arg(guest("echo"));
        assert_eq!(crate::harness::output(&mut other).status.code(), Some(69));
    }
}

#[test]
fn a_stop_while_a_successor_starts_is_a_stop() {
    let real = root().join("target/release/wasinetd");
    for mode in MODES {
        let admin = AdminSocket::new();
        let program = installed(&admin);
        let arguments = ["--admin", &admin.flag];
        let mut server = Server::start_program(&program, mode, &guest("echo"), &arguments);
        let mut client = server.connect();
        client.send("a");
        assert_eq!(client.read(1), "a");
        // It says that it has begun, and goes on when it is told.
        let (began, go_on) = (admin.beside("began"), admin.beside("go-on"));
        let script = format!(
            "touch {}; while ! test -e {}; do sleep 0.05; done; exec {} \"$@\"",
            began.display(),
            go_on.display(),
            real.display()
        );
        install_script(&program, &script);
        server.signal(Signal::USR2);
        while !began.exists() {}
        server.signal(Signal::TERM);
        server.wait_for_log(&["no new process has taken over", "drains"]);
        std::fs::write(&go_on, "").unwrap();
        client.send("b");
        assert_eq!(client.read(1), "b");
        client.finish();
        assert_eq!(client.read_to_end(), "");
        assert_eq!(server.wait().code(), Some(0), "{server:?}");
        assert!(crate::harness::Client::connect(server.address()).is_err());
    }
}

#[test]
fn two_restarts_at_once_have_one_successor_and_what_was_swapped_stays() {
    for mode in MODES {
        let admin = AdminSocket::new();
        let arguments = ["--admin", &admin.flag];
        // By a link, which leads to another program by then.
        let program = installed(&admin);
        let link = admin.beside("link");
        std::os::unix::fs::symlink(&program, &link).unwrap();
        let mut server = Server::start_program(&link, mode, &guest("echo"), &arguments);
        let names = admin.beside("names.wasm");
        crate::harness::write_version(&names, "swapped");
        admin.ctl_text(&["swap", "default", names.to_str().unwrap()]);
        let mut kept = server.connect();
        kept.send("?\n");
        kept.read(16 * 500 + 1);
        let second = admin.beside("second");
        std::fs::rename(&program, &second).unwrap();
        std::fs::remove_file(&link).unwrap();
        std::os::unix::fs::symlink(&second, &link).unwrap();
        let outcomes: Vec<_> = thread::scope(|scope| {
            let both = [(); 2].map(|()| scope.spawn(|| admin.ctl(&["restart"])));
            both.into_iter()
                .map(|one| one.join().unwrap().status.code())
                .collect()
        });
        let successor = Successor(Pid::from_raw(serving(&admin) as i32).unwrap());
        assert!(outcomes.contains(&Some(0)), "{outcomes:?}");
        server.wait_for_log(&["a new process has taken over"]);
        let mut new = server.connect();
        new.send("?\n");
        assert_eq!(new.read(16), "swapped_________");
        kept.send("?\n");
        assert_eq!(kept.read(16), "swapped_________");
        drop(kept);
        assert_eq!(server.wait_for_exit().code(), Some(0), "{server:?}");
        // Nobody was hurried, and there is one.
        assert_eq!(server.log_lines("a second time").len(), 0, "{server:?}");
        let taken = server.log_lines("a new process has taken over").len();
        assert_eq!(taken, 1, "{server:?}");
        drop(successor);
    }
}

/// What a service manager is told.
struct Manager(UnixDatagram);

impl Manager {
    fn next(&self) -> String {
        let mut message = [0; 4096];
        let n = self.0.recv(&mut message).expect("something is said");
        String::from_utf8_lossy(&message[..n]).into_owned()
    }

    /// Waits until this is said, and returns it with what is said with it.
    fn wait_for(&self, what: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let said = self.next();
            if said.contains(what) {
                return said;
            }
            assert!(Instant::now() < deadline, "{what} is never said");
        }
    }
}

#[test]
fn the_service_manager_is_told() {
    for mode in MODES {
        let admin = AdminSocket::new();
        let path = admin.beside("notify");
        let manager = Manager(UnixDatagram::bind(&path).unwrap());
        manager.0.set_read_timeout(Some(PATIENCE)).unwrap();
        let program = installed(&admin);
        let environment = [
            ("NOTIFY_SOCKET", path.to_str().unwrap()),
            ("WATCHDOG_USEC", "200000"),
        ];
        let arguments = ["--admin", &admin.flag];
        let server =
            Server::start_with_env(&program, &environment, mode, &guest("echo"), &arguments);
        assert!(manager.next().starts_with("READY=1"));
        manager.wait_for("WATCHDOG=1");
        manager.wait_for("WATCHDOG=1");
        server.signal(Signal::HUP);
        assert!(manager.wait_for("RELOADING=1").contains("MONOTONIC_USEC="));
        manager.wait_for("READY=1");
        admin.ctl_text(&["restart"]);
        let pid = manager.wait_for("MAINPID=");
        let pid = pid
            .trim()
            .strip_prefix("MAINPID=")
            .unwrap()
            .parse()
            .unwrap();
        let _successor = Successor(Pid::from_raw(pid).unwrap());
        // The new one goes on with the watchdog, and the old one says nothing of an end.
        manager.wait_for("WATCHDOG=1");
        admin.ctl_text(&["drain"]);
        manager.wait_for("STOPPING=1");
    }
}
