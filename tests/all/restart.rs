//! `ctl restart` and SIGUSR2: a new process takes over without losing a connection.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Instant;

use rustix::process::{Pid, Signal};

use crate::harness::{
    AdminSocket, MODES, PATIENCE, Server, Successor, guest, page, program, request, wait_until,
};

/// Copies the program to a path where the test can replace it.
fn install(admin: &AdminSocket) -> std::path::PathBuf {
    let installed = admin.beside("wasinetd");
    std::fs::copy(program(), &installed).unwrap();
    installed
}

/// The id of the process that answers on the admin socket.
fn serving_pid(admin: &AdminSocket) -> u64 {
    admin.ctl_json(&["status"])["pid"].as_u64().unwrap()
}

#[test]
fn a_new_process_takes_over_under_load() {
    for mode in MODES {
        let admin = AdminSocket::new();
        let program = install(&admin);
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
            wait_until("clients get too few answers", || {
                answers.load(Ordering::Relaxed) >= 100
            });
            // An upgrade replaces the program by another file.
            std::fs::remove_file(&program).unwrap();
            install(&admin);
            let before = serving_pid(&admin);
            let message = admin.ctl_text(&["restart"]);
            assert!(message.contains("has taken over"), "{message}");
            // The connection from before stays with the old process, which waits for its end. The
            // guest closes idle connections soon once it drains.
            kept.send(request("/"));
            assert_eq!(kept.response().body, page("hello.html"));
            let after = serving_pid(&admin);
            assert_ne!(after, before);
            let successor = Successor(Pid::from_raw(after as i32).unwrap());
            let at_restart = answers.load(Ordering::Relaxed);
            wait_until("clients get too few answers after the restart", || {
                answers.load(Ordering::Relaxed) >= at_restart + 200
            });
            stop.store(true, Ordering::Relaxed);
            clients
                .into_iter()
                .for_each(|client| client.join().unwrap());
            successor
        });
        drop(kept);
        assert_eq!(server.wait_for_exit().code(), Some(0), "{server:?}");
        // The admin socket belongs to the new process.
        assert_eq!(
            serving_pid(&admin),
            successor.0.as_raw_nonzero().get() as u64
        );
        admin.ctl_text(&["drain"]);
        wait_until("the admin socket stays", || !admin.path().exists());
    }
}

/// Replaces a program by a shell script that gets the same arguments.
fn install_script(program: &std::path::Path, script: &str) {
    let next = program.with_extension("next");
    std::fs::write(&next, format!("#!/bin/sh\n{script}\n")).unwrap();
    std::fs::set_permissions(&next, PermissionsExt::from_mode(0o755)).unwrap();
    std::fs::rename(&next, program).unwrap();
}

#[test]
fn a_successor_that_fails_to_start_changes_nothing() {
    let real = program();
    for mode in MODES {
        let admin = AdminSocket::new();
        let program = install(&admin);
        let arguments = ["--admin", &admin.flag];
        let server = Server::start_program(&program, mode, &guest("echo"), &arguments);
        // One successor exits at once, the other after it has inherited the sockets.
        let late = format!("exec {} \"$@\" --cache /proc/nowhere", real.display());
        for (script, code) in [("exit 3", "exit status: 3"), (&late, "exit status: 78")] {
            install_script(&program, script);
            let output = admin.ctl(&["restart"]);
            let message = String::from_utf8_lossy(&output.stderr).into_owned();
            assert_eq!(output.status.code(), Some(69), "{message}");
            assert!(
                message.contains("nothing has changed") && message.contains(code),
                "{message}"
            );
        }
        std::fs::remove_file(&program).unwrap();
        server.signal(Signal::USR2);
        server.wait_for_log(&["no new process has taken over", "cannot start"]);
        let mut client = server.connect();
        client.send("still there");
        assert_eq!(client.read(11), "still there");
        assert_eq!(admin.ctl_json(&["status"])["phase"], "serving");
        // Another server cannot bind the same address by mistake.
        let address = server.address().to_string();
        let mut other = crate::harness::wasinetd();
        other
            .args(["serve", "--listen", &address])
            .arg(guest("echo"));
        assert_eq!(crate::harness::output(&mut other).status.code(), Some(69));
    }
}

#[test]
fn a_stop_during_a_restart_stops_the_server() {
    let real = program();
    for mode in MODES {
        let admin = AdminSocket::new();
        let program = install(&admin);
        let arguments = ["--admin", &admin.flag];
        let mut server = Server::start_program(&program, mode, &guest("echo"), &arguments);
        let mut client = server.connect();
        client.send("a");
        assert_eq!(client.read(1), "a");
        // The script creates one file when it starts, and continues when the other file exists.
        let (started, go_on) = (admin.beside("started"), admin.beside("go-on"));
        let script = format!(
            "touch {}; while ! test -e {}; do sleep 0.05; done; exec {} \"$@\"",
            started.display(),
            go_on.display(),
            real.display()
        );
        install_script(&program, &script);
        server.signal(Signal::USR2);
        wait_until("the successor does not start", || started.exists());
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
fn two_simultaneous_restarts_start_one_successor_and_keep_the_swapped_guest() {
    for mode in MODES {
        let admin = AdminSocket::new();
        let arguments = ["--admin", &admin.flag];
        // The server runs through a symbolic link, which is pointed to another program later.
        let program = install(&admin);
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
                .map(|restart| restart.join().unwrap().status.code())
                .collect()
        });
        let successor = Successor(Pid::from_raw(serving_pid(&admin) as i32).unwrap());
        assert!(outcomes.contains(&Some(0)), "{outcomes:?}");
        server.wait_for_log(&["a new process has taken over"]);
        let mut new = server.connect();
        new.send("?\n");
        assert_eq!(new.read(16), "swapped_________");
        kept.send("?\n");
        assert_eq!(kept.read(16), "swapped_________");
        drop(kept);
        assert_eq!(server.wait_for_exit().code(), Some(0), "{server:?}");
        // The second restart did not cut the drain short, and there is only one successor.
        assert_eq!(server.log_lines("a second time").len(), 0, "{server:?}");
        let takeovers = server.log_lines("a new process has taken over").len();
        assert_eq!(takeovers, 1, "{server:?}");
        drop(successor);
    }
}

/// The receiving end of sd_notify(3).
struct ServiceManager(UnixDatagram);

impl ServiceManager {
    fn next(&self) -> String {
        let mut message = [0; 4096];
        let n = self.0.recv(&mut message).expect("a message comes");
        String::from_utf8_lossy(&message[..n]).into_owned()
    }

    /// Waits for a message that contains `part` and returns it.
    fn wait_for(&self, part: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let message = self.next();
            if message.contains(part) {
                return message;
            }
            assert!(Instant::now() < deadline, "no message contains {part}");
        }
    }
}

#[test]
fn the_service_manager_is_notified() {
    for mode in MODES {
        let admin = AdminSocket::new();
        let path = admin.beside("notify");
        let manager = ServiceManager(UnixDatagram::bind(&path).unwrap());
        manager.0.set_read_timeout(Some(PATIENCE)).unwrap();
        let program = install(&admin);
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
        // The new process continues the watchdog, and the old one does not report that it stops.
        manager.wait_for("WATCHDOG=1");
        admin.ctl_text(&["drain"]);
        manager.wait_for("STOPPING=1");
    }
}
