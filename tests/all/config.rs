//! Servers of a config file: many services, all mistakes at once, and changes while they serve.

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::thread;

use rustix::process::Signal;
use serde_json::Value;

use crate::harness::{
    AdminSocket, Client, Server, fixture, guest, has_program, root, run, wasinetd, wat_fixture,
    write_version,
};
use crate::swap::{Load, answer};

/// A config file, in a directory that is gone with it.
pub(crate) struct Config {
    pub(crate) admin: AdminSocket,
    pub(crate) path: PathBuf,
}

impl Config {
    /// One with an admin socket, and what else is said in `text`.
    pub(crate) fn new(text: &str) -> Self {
        let admin = AdminSocket::new();
        let config = Self {
            path: admin.beside("wasinetd.toml"),
            admin,
        };
        config.write(text);
        config
    }

    pub(crate) fn write(&self, text: &str) {
        let admin = &self.admin.flag;
        let text = format!("admin = {admin:?}\nthreads = 2\n{text}");
        fs::write(&self.path, text).unwrap();
    }

    pub(crate) fn reload(&self) -> String {
        self.admin.ctl_text(&["reload"]).trim_end().into()
    }

    /// A file beside it, with a version of the guest `names`.
    pub(crate) fn guest(&self, file: &str, version: &str) -> PathBuf {
        let file = self.admin.beside(file);
        write_version(&file, version);
        file
    }
}

/// A service of the guest at `path`, on any port.
pub(crate) fn service(name: &str, path: PathBuf, more: &str) -> String {
    format!(
        "[[service]]\nname = {name:?}\nlisten = '127.0.0.1:0'\nguest = {path:?}\nmax-connections-per-source = 'off'\n{more}\n"
    )
}

pub(crate) fn connect(address: SocketAddr) -> Client {
    Client::connect(address).unwrap()
}

pub(crate) fn echoes(address: SocketAddr) {
    let mut client = connect(address);
    client.send("hello");
    assert_eq!(client.read(5), "hello");
}

/// Where a service listens since a reload.
pub(crate) fn listens(server: &Server, service: &str) -> SocketAddr {
    let line = server.wait_for_log(&["listening", &format!("service=\"{service}\"")]);
    let address = line.split("address=").nth(1).unwrap();
    address.split(' ').next().unwrap().parse().unwrap()
}

#[test]
fn each_service_has_its_own_guest_and_limits() {
    let web = service("web", guest("hello"), "dir = 'pages::/static'");
    let full = "max-connections = 1\nwhen-full = 'close'\nfull-banner = 'full'\ndispatch = 'spawn'";
    let small = service("small", guest("echo"), full);
    let bytes = service("bytes", guest("echo"), "max-bytes-in = '4B'");
    let config = Config::new(&format!("{web}{small}{bytes}"));
    // Beside the config file, whatever directory the server is started in.
    fs::create_dir(config.admin.beside("pages")).unwrap();
    fs::write(config.admin.beside("pages/hello.html"), "of the file").unwrap();
    let server = Server::start_config(&config.path, 3);
    let [web, small, bytes] = server.addresses() else {
        panic!("{server:?}")
    };
    assert_eq!(connect(*web).get("/").body, "of the file");
    let mut only = connect(*small);
    only.send("a");
    assert_eq!(only.read(1), "a");
    assert_eq!(connect(*small).read_to_end(), "full");
    // The others have places of their own, and limits.
    echoes_four(*bytes);
    let mut client = connect(*bytes);
    client.send("12345");
    assert!(client.read_all().1.is_err());
    server.wait_for_log(&["service=\"bytes\"", "limit: max-bytes-in"]);
    drop(only);
    server.wait_for_log(&["service=\"small\"", "outcome=ok"]);
    echoes(*small);
    let status = config.admin.ctl_json(&["status"]);
    let names: Vec<_> = status["services"].as_array().unwrap().iter().collect();
    let names: Vec<_> = names
        .iter()
        .map(|one| one["name"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["web", "small", "bytes"]);
    let limits = config.admin.ctl_json(&["limits"]);
    let of = |name: &str| {
        let mut limits = limits.as_array().unwrap().iter();
        limits.find(|limit| limit["limit"] == name).unwrap()["value"].clone()
    };
    assert_eq!(of("max-bytes-in"), "web: off, small: off, bytes: 4B");
    assert_eq!(of("idle-timeout"), "1m");
    let metrics = config.admin.metrics();
    assert!(
        metrics.contains("wasinetd_connections_open{service=\"small\""),
        "{metrics}"
    );
}

fn echoes_four(address: SocketAddr) {
    let mut client = connect(address);
    client.send("1234");
    assert_eq!(client.read(4), "1234");
}

#[test]
fn places_are_shared_by_all_services() {
    let one = service(
        "one",
        guest("echo"),
        "when-full = 'close'\nfull-banner = 'full'",
    );
    let two = service(
        "two",
        guest("echo"),
        "when-full = 'close'\nfull-banner = 'full'",
    );
    let config = Config::new(&format!("max-connections = 2\n{one}{two}"));
    let server = Server::start_config(&config.path, 2);
    let [one, two] = server.addresses() else {
        panic!("{server:?}")
    };
    let mut both = [*one, *two].map(connect);
    for client in &mut both {
        client.send("a");
        assert_eq!(client.read(1), "a");
    }
    assert_eq!(connect(*one).read_to_end(), "full");
    assert_eq!(connect(*two).read_to_end(), "full");
}

#[test]
fn all_mistakes_are_told_at_once_with_their_lines() {
    let config = Config::new(
        "admn = 'x'\ndrain-timeout = '5'\n[[service]]\nname = 'a b'\nlisten = 'localhost'\nidle-timout = '5s'\n[[service]]\nname = 'b'\nguest = 'g.wasm'\ndispatch = 'both'\nwatch = 'yes'\n",
    );
    for command in ["check", "serve"] {
        let mut command_ = wasinetd();
        let output = run(command_.args([command, "--config"]).arg(&config.path));
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(78), "{said}");
        assert_eq!(String::from_utf8(output.stdout).unwrap(), "");
        let path = config.path.display();
        for (line, what) in [
            (3, "admn is no setting of the server; admin is"),
            (4, "drain-timeout = \"5\": time unit needed"),
            (5, "guest is missing"),
            (6, "name = \"a b\": not a name"),
            (7, "listen = \"localhost\": not an"),
            (8, "idle-timout is no setting of a service; idle-timeout is"),
            (12, "dispatch = \"both\": write one of spawn, concurrent"),
            (13, "watch = 'yes': write true or false"),
        ] {
            assert!(
                said.contains(&format!("{path}:{line}: {what}")),
                "{line}: {what}\n{said}"
            );
        }
        assert_eq!(said.lines().count(), 8, "{said}");
    }
}

#[test]
fn what_the_file_names_has_to_be_there() {
    let one =
        "[[service]]\nname = 'a'\nlisten = '127.0.0.1:1'\nguest = 'none.wasm'\ndir = 'none'\n";
    let two = format!(
        "[[service]]\nname = 'a'\nlisten = '127.0.0.1:1'\nguest = {:?}\n",
        fixture("no_handler")
    );
    let said = |text: &str| {
        let config = Config::new(text);
        let output = run(wasinetd().args(["check", "--config"]).arg(&config.path));
        assert_eq!(output.status.code(), Some(78));
        String::from_utf8(output.stderr).unwrap()
    };
    let names = said(&format!("{one}{two}"));
    assert!(
        names.contains(":9: name: there is a service \"a\" already"),
        "{names}"
    );
    assert!(
        names.contains(":10: listen: 127.0.0.1:1 is the service \"a\"'s already"),
        "{names}"
    );
    let files = said(one);
    assert!(
        files.contains(":6: guest: cannot read the guest"),
        "{files}"
    );
    assert!(
        files.contains(":7: dir: cannot grant the directory"),
        "{files}"
    );
    let refused = said(&two);
    assert!(refused.contains(":6: guest: "), "{refused}");
    assert!(
        refused.contains("no_handler.wasm\" is refused"),
        "{refused}"
    );
    let none = said("");
    assert!(none.contains("there is no service"), "{none}");
    let output = run(wasinetd().args(["serve", "--config", "/nowhere.toml"]));
    assert_eq!(output.status.code(), Some(78));
    let output = run(wasinetd().args(["serve", "--config", "x.toml", "--watch"]));
    assert_eq!(output.status.code(), Some(64));
}

#[test]
fn a_reload_applies_the_difference() {
    let stays = service("stays", guest("echo"), "");
    let goes = service("goes", guest("echo"), "");
    let config = Config::new(&format!("{stays}{goes}"));
    let server = Server::start_config(&config.path, 2);
    let [at_stays, at_goes] = server.addresses() else {
        panic!("{server:?}")
    };
    assert_eq!(config.reload(), "nothing has changed");
    let mut clients = [*at_stays, *at_goes].map(connect);
    for client in &mut clients {
        client.send("a");
        assert_eq!(client.read(1), "a");
    }
    // Another limit for the first, one service less, one more.
    let stays = service("stays", guest("echo"), "max-bytes-in = '4B'");
    let comes = service("comes", guest("hello"), "dispatch = 'spawn'");
    config.write(&format!("{comes}{stays}"));
    assert_eq!(
        config.reload(),
        "added: comes; changed: stays; removed: goes"
    );
    let at_comes = listens(&server, "comes");
    connect(at_comes).get("/nowhere");
    // Connections that are open have what they had.
    for client in &mut clients {
        client.send("still the same");
        assert_eq!(client.read(14), "still the same");
    }
    echoes_four(*at_stays);
    let mut client = connect(*at_stays);
    client.send("12345");
    assert!(client.read_all().1.is_err());
    // Who comes before its threads have heard of it is served.
    while Client::connect(*at_goes).is_ok() {}
    // Its last connection is the end of it.
    drop(clients);
    server.wait_for_log(&["a service that was removed has ended", "goes"]);
    let metrics = config.admin.metrics();
    assert!(!metrics.contains("service=\"goes\""), "{metrics}");
}

#[test]
fn an_address_may_become_another_services() {
    let names = |name: &str, guest: PathBuf, listen: &str| {
        format!("[[service]]\nname = {name:?}\nlisten = [{listen}]\nguest = {guest:?}\n")
    };
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let fixed = free.local_addr().unwrap();
    drop(free);
    let fixed = format!("'{fixed}'");
    let config = Config::new(&names("one", guest("echo"), &fixed));
    let server = Server::start_config(&config.path, 1);
    let address = server.address();
    let mut before = connect(address);
    before.send("a");
    assert_eq!(before.read(1), "a");
    let other = names("one", guest("echo"), "'127.0.0.1:0'");
    config.write(&format!("{other}{}", names("two", guest("hello"), &fixed)));
    assert_eq!(config.reload(), "added: two; changed: one");
    connect(address).get("/nowhere");
    echoes(listens(&server, "one"));
    before.send("b");
    assert_eq!(before.read(1), "b");
}

#[test]
fn a_bad_file_changes_nothing() {
    let good = service("one", guest("echo"), "");
    let config = Config::new(&good);
    let holder = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = holder.local_addr().unwrap();
    let server = Server::start_config(&config.path, 1);
    let more = service("more", guest("echo"), "");
    let clash = format!(
        "[[service]]\nname = 'clash'\nlisten = '{taken}'\nguest = {:?}\n",
        guest("echo")
    );
    let bad_guest = service("bad", wat_fixture("start_traps"), "");
    for (bad, reason) in [
        (format!("{more}idle = 1"), "idle is no setting"),
        (
            format!("{more}{clash}"),
            "toml:11: listen: cannot listen on",
        ),
        // One mistake does not hide another.
        (
            format!("{more}{clash}{bad_guest}"),
            "toml:11: listen: cannot listen on",
        ),
        (
            format!("{more}{clash}{bad_guest}"),
            "toml:16: guest: the guest",
        ),
        (
            format!("{more}{bad_guest}"),
            "no instance of it can be made",
        ),
        (
            format!(
                "{more}{}",
                service("one", guest("echo"), "max-memory = '128MiB'")
            ),
            "restart",
        ),
    ] {
        config.write(&bad);
        let output = config.admin.ctl(&["reload"]);
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(78), "{said} for {bad}");
        assert!(said.contains(reason), "{said} without {reason}");
        let status = config.admin.ctl_json(&["status"]);
        assert_eq!(status["services"].as_array().unwrap().len(), 1, "{status}");
        echoes(server.address());
    }
    drop(holder);
    // A hangup does the same.
    config.write(&format!("{good}{more}"));
    server.signal(Signal::HUP);
    echoes(listens(&server, "more"));
}

#[test]
fn what_is_set_of_the_server_waits_for_a_restart() {
    let config = Config::new(&service("one", guest("echo"), ""));
    let _server = Server::start_config(&config.path, 1);
    config.write(&format!(
        "drain-timeout = '7s'\n{}",
        service("one", guest("echo"), "")
    ));
    let said = config.reload();
    assert!(said.contains("needs a restart"), "{said}");
}

#[test]
fn reloads_under_load_lose_nothing() {
    let config = Config::new("");
    let file = config.admin.beside("names.wasm");
    write_version(&file, "one");
    let text = |n: usize| {
        let dispatch = ["spawn", "concurrent"][n % 2];
        let more = format!("idle-timeout = '{}s'\ndispatch = '{dispatch}'", 60 + n);
        let other = format!("other-{}", n / 2);
        let names = service("names", file.clone(), &more);
        format!("{names}{}", service(&other, guest("echo"), ""))
    };
    config.write(&text(0));
    let server = Server::start_config(&config.path, 2);
    let answers = Load::while_swapping(&server, 3, || {
        for n in 1..30 {
            write_version(&file, &format!("version-{n}"));
            config.write(&text(n));
            let said = config.reload();
            assert!(said.contains("changed: names"), "{n}: {said}");
        }
    });
    assert!(answers > 500, "{answers} answers is no load");
    let bad = |line: &&String| line.contains("service=\"names\"") && !line.contains("outcome=ok");
    let lines = server.log_lines("connection ended");
    let bad: Vec<_> = lines.iter().filter(bad).collect();
    assert!(bad.is_empty(), "{bad:?}");
}

#[test]
fn guests_are_watched_and_swapped_by_the_name_of_their_service() {
    let config = Config::new("");
    let files = ["one.wasm", "two.wasm"].map(|file| config.guest(file, "first"));
    let services = || {
        let [one, two] = &files;
        service("one", one.clone(), "watch = true") + &service("two", two.clone(), "")
    };
    config.write(&services());
    let server = Server::start_config(&config.path, 2);
    let names = || {
        let addresses = server.addresses().iter();
        addresses
            .map(|at| answer(&mut connect(*at)).0)
            .collect::<Vec<_>>()
    };
    assert_eq!(names(), ["first", "first"]);
    for file in &files {
        write_version(file, "second");
    }
    server.wait_for_log(&["a new version was given", "service=\"one\"", "swapped"]);
    assert_eq!(names(), ["second", "first"]);
    let third = config.guest("third.wasm", "third");
    let third = third.to_str().unwrap();
    config.admin.ctl_text(&["swap", "two", third]);
    assert_eq!(names(), ["second", "third"]);
    // A new process serves the same, whatever the files have by now.
    let pid = config.admin.ctl_text(&["restart"]);
    let pid = pid.split(' ').nth(1).unwrap().parse().unwrap();
    let names = names();
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::kill_process(pid, Signal::TERM).unwrap();
    assert_eq!(names, ["second", "third"]);
}

#[test]
fn the_schema_knows_every_key() {
    let output = run(wasinetd().arg("schema"));
    assert_eq!(output.status.code(), Some(0));
    let schema: Value = serde_json::from_slice(&output.stdout).unwrap();
    let service = &schema["properties"]["service"]["items"];
    assert_eq!(service["required"], serde_json::json!(["name", "guest"]));
    assert_eq!(service["properties"]["watch"]["type"], "boolean");
    assert_eq!(service["properties"]["idle-timeout"]["default"], "60s");
    assert_eq!(schema["additionalProperties"], false);
    let help = run(wasinetd().args(["serve", "--help"]));
    let help = String::from_utf8(help.stdout).unwrap();
    let flags = help
        .lines()
        .filter_map(|line| line.trim_start().strip_prefix("--"));
    let flags = flags.map(|flag| flag.split([' ', '=']).next().unwrap());
    let mut known = 0;
    for flag in flags.filter(|flag| !["config"].contains(flag)) {
        let tables = [&schema, service].map(|table| &table["properties"][flag]);
        assert!(tables.iter().any(|key| key.is_object()), "{flag}");
        known += 1;
    }
    assert!(known > 40, "{known} flags in\n{help}");
}

#[test]
fn the_example_is_served_as_a_whole() {
    let example = root().join("host/wasinetd.example.toml");
    let output = run(wasinetd().args(["check", "--config"]).arg(&example));
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(0), "{said}");
    // On ports of its own.
    let text = fs::read_to_string(&example).unwrap();
    let mut rest = &*text;
    let mut moved = String::new();
    while let Some(at) = rest.find("127.0.0.1:") {
        let (before, after) = rest.split_at(at);
        moved += before;
        moved += "127.0.0.1:0";
        let after = &after["127.0.0.1:".len()..];
        rest = after.trim_start_matches(|c: char| c.is_ascii_digit());
    }
    moved += rest;
    let top = root().display().to_string();
    let config = Config::new(&moved.replace("\"../", &format!("\"{top}/")));
    let server = Server::start_config(&config.path, 8);
    let [hello, echo, discard, daytime, qotd, chargen, ident, _] = server.addresses() else {
        panic!("{server:?}")
    };
    assert_eq!(connect(*hello).get("/").status(), "200 OK");
    echoes(*echo);
    let mut client = connect(*discard);
    client.send("into the void");
    client.finish();
    assert_eq!(client.read_to_end(), "");
    assert!(connect(*daytime).read_to_end().contains("20"));
    assert!(connect(*qotd).read_to_end().len() > 10);
    assert_eq!(connect(*chargen).read(74).len(), 74);
    let mut client = connect(*ident);
    client.send("6193, 23\r\n");
    assert!(client.read(9).starts_with("6193"));
    if !has_program("redis-cli", "redis-tools") {
        return;
    }
    let mut command = std::process::Command::new("redis-cli");
    let port = server.addresses()[7].port().to_string();
    let output = crate::harness::output(command.args(["-p", &port, "PING"]));
    assert_eq!(String::from_utf8(output.stdout).unwrap(), "PONG\n");
}

/// Certificate and key in a new directory beside the config file.
fn certificate(config: &Config, name: &str) -> [PathBuf; 2] {
    let directory = config.admin.beside(name);
    fs::create_dir(&directory).unwrap();
    let mut command = wasinetd();
    command.arg("cert").arg(&directory).args(["--name", name]);
    assert!(crate::harness::output(&mut command).status.success());
    ["cert.pem", "key.pem"].map(|file| directory.join(file))
}

#[test]
fn a_service_has_those_who_ask_for_its_name() {
    let config = Config::new("");
    let [cert_a, key_a] = certificate(&config, "a.example");
    let [cert_b, key_b] = certificate(&config, "b.example");
    for name in ["first", "behind"] {
        fs::create_dir(config.admin.beside(name)).unwrap();
        fs::write(config.admin.beside(name).join("hello.html"), name).unwrap();
    }
    let tls = format!(
        "dir = 'first::/static'\ntls-cert = [{cert_a:?}, {cert_b:?}]\ntls-key = [{key_a:?}, {key_b:?}]"
    );
    let first = service("first", guest("hello"), &tls);
    let behind = |name: &str| {
        format!(
            "[[service]]\nname = 'behind'\nbehind = 'first'\nserver-name = '{name}'\nguest = {:?}\ndir = 'behind::/static'\n",
            guest("hello")
        )
    };
    config.write(&format!("{first}{}", behind("b.example")));
    let server = Server::start_config(&config.path, 1);
    let ask = |name: &str, certificate: &PathBuf| {
        let address = server.address();
        let mut curl = std::process::Command::new("curl");
        curl.args(["--silent", "--show-error", "--max-time", "20", "--cacert"])
            .arg(certificate)
            .args(["--resolve", &format!("{name}:{}:127.0.0.1", address.port())])
            .arg(format!("https://{name}:{}/", address.port()));
        let output = crate::harness::output(&mut curl);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}\n{server:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    assert_eq!(ask("a.example", &cert_a), "first");
    assert_eq!(ask("b.example", &cert_b), "behind");
    server.wait_for_log(&["connection ended", "service=\"behind\"", "b.example"]);
    // A reload leads them elsewhere, with the certificates that there are.
    config.write(&format!("{first}{}", behind("a.example")));
    assert_eq!(config.reload(), "changed: behind");
    assert_eq!(ask("a.example", &cert_a), "behind");
    assert_eq!(ask("b.example", &cert_b), "first");
    // What the listener decides is not for those behind it to say.
    config.write(&format!(
        "{first}{}max-connections = 3\n",
        behind("a.example")
    ));
    let said = config.admin.ctl(&["reload"]).stderr;
    let said = String::from_utf8(said).unwrap();
    assert!(
        said.contains("max-connections: it is for the service \"first\" to say"),
        "{said}"
    );
}

#[test]
fn services_drain_together() {
    for stop in [Signal::TERM, Signal::INT] {
        let config = Config::new(&format!(
            "{}{}",
            service("one", guest("echo"), ""),
            service("two", guest("echo"), "dispatch = 'spawn'")
        ));
        let mut server = Server::start_config(&config.path, 2);
        let addresses = server.addresses().to_vec();
        let clients: Vec<Client> = addresses.iter().map(|at| connect(*at)).collect();
        let ended = thread::scope(|scope| {
            let clients = scope.spawn(move || {
                clients
                    .into_iter()
                    .map(|mut client| {
                        client.send("bye");
                        assert_eq!(client.read(3), "bye");
                        client.finish();
                        client.read_to_end()
                    })
                    .collect::<String>()
            });
            server.signal(stop);
            clients.join().unwrap()
        });
        assert_eq!(ended, "");
        assert_eq!(server.wait().code(), Some(0));
        for address in addresses {
            assert!(Client::connect(address).is_err());
        }
    }
}
