//! Files that a reload reads: granted directories, watched guests, and the config itself.

use std::fs;

use crate::config::{Config, connect, listens, service};
use crate::harness::{Server, guest, run, wasinetd, write_version};
use crate::swap::answer;

use super::helpers::echo_at;

#[test]
fn a_reload_grants_a_replaced_directory() {
    let config = Config::new("");
    let pages = config.admin.beside("pages");
    let fill = |text: &str| {
        fs::create_dir(&pages).unwrap();
        fs::write(pages.join("hello.html"), text).unwrap();
    };
    fill("before");
    let dir = format!("dir = '{}::/static'", pages.display());
    config.write(&service("hello", guest("hello"), &dir));
    let server = Server::start_config(&config.path, 1);
    assert_eq!(server.connect().get("/").body, "before");
    fs::rename(&pages, config.admin.beside("old")).unwrap();
    fill("after");
    assert_eq!(config.reload(), "changed: hello");
    assert_eq!(server.connect().get("/").body, "after");
    assert_eq!(config.reload(), "nothing has changed");
}

#[test]
fn files_stay_watched_after_successful_and_failed_reloads() {
    let config = Config::new("");
    let files = ["one.wasm", "two.wasm"].map(|file| config.guest(file, "first"));
    let watched_service = |n: usize| {
        let file = files[n].clone();
        service(["one", "two"][n], file, "watch = true")
    };
    config.write(&watched_service(0));
    let server = Server::start_config(&config.path, 1);
    config.write(&format!("{}{}", watched_service(0), watched_service(1)));
    assert_eq!(config.reload(), "added: two");
    config.write("not = 'a setting'");
    assert!(!config.admin.ctl(&["reload"]).status.success());
    for (n, file) in files.iter().enumerate() {
        write_version(file, "second");
        let service = format!("service=\"{}\"", ["one", "two"][n]);
        server.wait_for_log(&["guest version changed", &service, "outcome=\"swapped\""]);
    }
    assert_eq!(answer(&mut server.connect()).0, "second");
    assert_eq!(answer(&mut connect(listens(&server, "two"))).0, "second");
}

#[test]
fn check_reports_conflicting_services() {
    let config = Config::new("");
    let rejection = |text: &str| {
        config.write(text);
        let output = run(wasinetd().args(["check", "--config"]).arg(&config.path));
        assert_eq!(output.status.code(), Some(78), "{text}");
        String::from_utf8(output.stderr).unwrap()
    };
    let at = |name: &str, listen: &str, more: &str| echo_at(name, &[listen.into()], more);
    let overlapping = at("a", "0.0.0.0:7", "") + &at("b", "127.0.0.1:7", "");
    assert!(rejection(&overlapping).contains(":10: listen: 127.0.0.1:7 conflicts with 0.0.0.0:7"));
    let admin = format!("unix:{}", config.admin.path().display());
    assert!(rejection(&at("a", &admin, "")).contains("is the address of the admin API"));
    let over_total = rejection(&format!(
        "max-connections = 5\n{}",
        at("a", "127.0.0.1:7", "max-connections = 6")
    ));
    assert!(
        over_total.contains(":8: max-connections: 6 is more than the 5 of all services"),
        "{over_total}"
    );
    let missing = rejection(&at("a", "127.0.0.1:7", "allow = []\ntls-cert = 'c'"));
    assert!(missing.contains(":8: missing: tls-key"), "{missing}");
    // A mistake in a service does not make the check report that the service is missing.
    let guest = guest("echo");
    let behind = |name: &str| {
        format!(
            "[[service]]\nname = {name:?}\nguest = {guest:?}\nbehind = 'front'\nserver-name = 'A.example'\n"
        )
    };
    let front = at("front", "127.0.0.1:7", "idle-timeout = 5");
    let single = rejection(&format!("{front}{}", behind("b")));
    assert!(
        single.contains("idle-timeout") && !single.contains("no service"),
        "{single}"
    );
    let duplicate = rejection(&format!("{front}{}{}", behind("b"), behind("c")));
    assert!(
        duplicate.contains("server-name: \"A.example\" leads to the service \"b\" already"),
        "{duplicate}"
    );
}
