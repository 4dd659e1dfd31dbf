//! Config files: several services, error reports, and reloads of a running server.

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::thread;

use rustix::process::Signal;
use serde_json::Value;

use crate::harness::{
    AdminSocket, Client, Server, fixture, free_address, guest, has_program, output, root, run,
    wait_until, wasinetd, wat_fixture, write_version,
};
use crate::swap::{Load, answer};

/// A config file in a temporary directory.
pub(crate) struct Config {
    /// The admin socket that the file names.
    pub(crate) admin: AdminSocket,
    pub(crate) path: PathBuf,
}

impl Config {
    /// Writes a config file with an admin socket and `text`.
    pub(crate) fn new(text: &str) -> Self {
        let admin = AdminSocket::new();
        let config = Self {
            path: admin.beside("wasinetd.toml"),
            admin,
        };
        config.write(text);
        config
    }

    /// Replaces the content of the file.
    pub(crate) fn write(&self, text: &str) {
        let admin = &self.admin.flag;
        let text = format!("admin = {admin:?}\nthreads = 2\n{text}");
        fs::write(&self.path, text).unwrap();
    }

    /// Runs `wasinetd ctl reload`, which must succeed, and returns its output.
    pub(crate) fn reload(&self) -> String {
        self.admin.ctl_text(&["reload"]).trim_end().into()
    }

    /// Writes a version of the guest `named_version` next to the config file.
    pub(crate) fn guest(&self, file: &str, version: &str) -> PathBuf {
        let file = self.admin.beside(file);
        write_version(&file, version);
        file
    }
}

/// A service on a free port, with a guest and further settings.
pub(crate) fn service(name: &str, path: PathBuf, settings: &str) -> String {
    format!(
        "[[service]]\nname = {name:?}\nlisten = '127.0.0.1:0'\nguest = {path:?}\n\
        max-connections-per-source = 'off'\n{settings}\n"
    )
}

pub(crate) fn connect(address: SocketAddr) -> Client {
    Client::connect(address).unwrap()
}

/// Asserts that the server at `address` is an echo.
pub(crate) fn echoes(address: SocketAddr) {
    let mut client = connect(address);
    client.send("hello");
    assert_eq!(client.read(5), "hello");
}

/// Finds the address of a service that a reload added.
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
    // Paths are relative to the config file, not to the working directory.
    fs::create_dir(config.admin.beside("pages")).unwrap();
    fs::write(
        config.admin.beside("pages/hello.html"),
        "from the config directory",
    )
    .unwrap();
    let server = Server::start_config(&config.path, 3);
    let [web, small, bytes] = server.addresses() else {
        panic!("{server:?}")
    };
    assert_eq!(connect(*web).get("/").body, "from the config directory");
    let mut first = connect(*small);
    first.send("a");
    assert_eq!(first.read(1), "a");
    assert_eq!(connect(*small).read_to_end(), "full");
    // The other services have limits of their own.
    echoes_four(*bytes);
    let mut client = connect(*bytes);
    client.send("12345");
    assert!(client.read_all().1.is_err());
    server.wait_for_log(&["service=\"bytes\"", "limit: max-bytes-in"]);
    drop(first);
    server.wait_for_log(&["service=\"small\"", "outcome=ok"]);
    echoes(*small);
    let status = config.admin.ctl_json(&["status"]);
    let services = status["services"].as_array().unwrap().iter();
    let names: Vec<_> = services
        .map(|service| service["name"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["web", "small", "bytes"]);
    let limits = config.admin.ctl_json(&["limits"]);
    let value = |name: &str| {
        let mut limits = limits.as_array().unwrap().iter();
        limits.find(|limit| limit["limit"] == name).unwrap()["value"].clone()
    };
    assert_eq!(value("max-bytes-in"), "web: off, small: off, bytes: 4B");
    assert_eq!(value("idle-timeout"), "1m");
    let metrics = config.admin.metrics();
    assert!(
        metrics.contains("wasinetd_connections_open{service=\"small\""),
        "{metrics}"
    );
}

/// Like [`echoes`], with four bytes, as many as `max-bytes-in` allows here.
fn echoes_four(address: SocketAddr) {
    let mut client = connect(address);
    client.send("1234");
    assert_eq!(client.read(4), "1234");
}

#[test]
fn services_share_max_connections() {
    let banner = "when-full = 'close'\nfull-banner = 'full'";
    let [one, two] = ["one", "two"].map(|name| service(name, guest("echo"), banner));
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
fn all_config_mistakes_are_reported_at_once_with_lines() {
    let config = Config::new(
        "admn = 'x'\ndrain-timeout = '5'\n\
        [[service]]\nname = 'a b'\nlisten = 'localhost'\nidle-timout = '5s'\n\
        [[service]]\nname = 'b'\nguest = 'g.wasm'\ndispatch = 'both'\nwatch = 'yes'\n",
    );
    for subcommand in ["check", "serve"] {
        let mut command = wasinetd();
        let output = run(command.args([subcommand, "--config"]).arg(&config.path));
        let report = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(78), "{report}");
        assert_eq!(String::from_utf8(output.stdout).unwrap(), "");
        let path = config.path.display();
        for (line, message) in [
            (3, "admn is no setting of the server; did you mean admin?"),
            (4, "drain-timeout = \"5\": time unit needed"),
            (5, "guest is missing"),
            (6, "name = \"a b\": not a name"),
            (7, "listen = \"localhost\": not an"),
            (
                8,
                "idle-timout is no setting of a service; did you mean idle-timeout?",
            ),
            (12, "dispatch = \"both\": write one of spawn, concurrent"),
            (13, "watch = 'yes': write true or false"),
        ] {
            assert!(
                report.contains(&format!("{path}:{line}: {message}")),
                "{line}: {message}\n{report}"
            );
        }
        assert_eq!(report.lines().count(), 8, "{report}");
    }
}

#[test]
fn config_must_name_existing_files_and_free_addresses() {
    let one =
        "[[service]]\nname = 'a'\nlisten = '127.0.0.1:1'\nguest = 'none.wasm'\ndir = 'none'\n";
    let two = format!(
        "[[service]]\nname = 'a'\nlisten = '127.0.0.1:1'\nguest = {:?}\n",
        fixture("no_handler")
    );
    let report = |text: &str| {
        let config = Config::new(text);
        let output = run(wasinetd().args(["check", "--config"]).arg(&config.path));
        assert_eq!(output.status.code(), Some(78));
        String::from_utf8(output.stderr).unwrap()
    };
    let taken = report(&format!("{one}{two}"));
    assert!(
        taken.contains(":9: name: there is a service \"a\" already"),
        "{taken}"
    );
    assert!(
        taken.contains(":10: listen: 127.0.0.1:1 belongs to the service \"a\" already"),
        "{taken}"
    );
    let missing = report(one);
    assert!(
        missing.contains(":6: guest: cannot read the guest"),
        "{missing}"
    );
    assert!(
        missing.contains(":7: dir: cannot grant the directory"),
        "{missing}"
    );
    let refused = report(&two);
    assert!(refused.contains(":6: guest: "), "{refused}");
    assert!(
        refused.contains("no_handler.wasm\" is refused"),
        "{refused}"
    );
    let empty = report("");
    assert!(empty.contains("there is no service"), "{empty}");
    let output = run(wasinetd().args(["serve", "--config", "/nowhere.toml"]));
    assert_eq!(output.status.code(), Some(78));
    let output = run(wasinetd().args(["serve", "--config", "x.toml", "--watch"]));
    assert_eq!(output.status.code(), Some(64));
}

#[test]
fn reload_applies_only_the_changes() {
    let stays = service("stays", guest("echo"), "");
    let goes = service("goes", guest("echo"), "");
    let config = Config::new(&format!("{stays}{goes}"));
    let server = Server::start_config(&config.path, 2);
    let [stays_address, goes_address] = server.addresses() else {
        panic!("{server:?}")
    };
    assert_eq!(config.reload(), "nothing has changed");
    let mut clients = [*stays_address, *goes_address].map(connect);
    for client in &mut clients {
        client.send("a");
        assert_eq!(client.read(1), "a");
    }
    // One service gets a limit, one is removed, and one is added.
    let stays = service("stays", guest("echo"), "max-bytes-in = '4B'");
    let comes = service("comes", guest("hello"), "dispatch = 'spawn'");
    config.write(&format!("{comes}{stays}"));
    assert_eq!(
        config.reload(),
        "added: comes; changed: stays; removed: goes"
    );
    connect(listens(&server, "comes")).get("/nowhere");
    // Open connections keep the limits that they began with.
    for client in &mut clients {
        client.send("still the same");
        assert_eq!(client.read(14), "still the same");
    }
    echoes_four(*stays_address);
    let mut client = connect(*stays_address);
    client.send("12345");
    assert!(client.read_all().1.is_err());
    // Until its threads stop listening, the removed service accepts clients.
    wait_until("the removed service still listens", || {
        Client::connect(*goes_address).is_err()
    });
    // The service ends with its last connection.
    drop(clients);
    server.wait_for_log(&["a removed service has ended", "goes"]);
    let metrics = config.admin.metrics();
    assert!(!metrics.contains("service=\"goes\""), "{metrics}");
}

#[test]
fn reload_moves_an_address_to_another_service() {
    let service = |name: &str, guest: PathBuf, listen: &str| {
        format!("[[service]]\nname = {name:?}\nlisten = [{listen}]\nguest = {guest:?}\n")
    };
    let fixed = format!("'{}'", free_address());
    let config = Config::new(&service("one", guest("echo"), &fixed));
    let server = Server::start_config(&config.path, 1);
    let address = server.address();
    let mut open = connect(address);
    open.send("a");
    assert_eq!(open.read(1), "a");
    let moved = service("one", guest("echo"), "'127.0.0.1:0'");
    config.write(&format!(
        "{moved}{}",
        service("two", guest("hello"), &fixed)
    ));
    assert_eq!(config.reload(), "added: two; changed: one");
    connect(address).get("/nowhere");
    echoes(listens(&server, "one"));
    open.send("b");
    assert_eq!(open.read(1), "b");
}

#[test]
fn reload_of_a_bad_file_changes_nothing() {
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
        // Both mistakes are reported.
        (
            format!("{more}{clash}{bad_guest}"),
            "toml:11: listen: cannot listen on",
        ),
        (
            format!("{more}{clash}{bad_guest}"),
            "toml:16: guest: the guest",
        ),
        (format!("{more}{bad_guest}"), "cannot instantiate the guest"),
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
        let report = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(78), "{report} for {bad}");
        assert!(report.contains(reason), "no {reason} in {report}");
        let status = config.admin.ctl_json(&["status"]);
        assert_eq!(status["services"].as_array().unwrap().len(), 1, "{status}");
        echoes(server.address());
    }
    drop(holder);
    // SIGHUP reloads the file as well.
    config.write(&format!("{good}{more}"));
    server.signal(Signal::HUP);
    echoes(listens(&server, "more"));
}

#[test]
fn server_wide_settings_need_a_restart() {
    let config = Config::new(&service("one", guest("echo"), ""));
    let _server = Server::start_config(&config.path, 1);
    config.write(&format!(
        "drain-timeout = '7s'\n{}",
        service("one", guest("echo"), "")
    ));
    let report = config.reload();
    assert!(report.contains("need a restart"), "{report}");
}

#[test]
fn reloads_under_load_lose_no_request() {
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
            let report = config.reload();
            assert!(report.contains("changed: names"), "{n}: {report}");
        }
    });
    assert!(answers > 500, "only {answers} answers");
    let bad = |line: &&String| line.contains("service=\"names\"") && !line.contains("outcome=ok");
    let lines = server.log_lines("connection ended");
    let bad: Vec<_> = lines.iter().filter(bad).collect();
    assert!(bad.is_empty(), "{bad:?}");
}

#[test]
fn guests_are_watched_and_swapped_per_service() {
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
            .map(|address| answer(&mut connect(*address)).0)
            .collect::<Vec<_>>()
    };
    assert_eq!(names(), ["first", "first"]);
    for file in &files {
        write_version(file, "second");
    }
    server.wait_for_log(&["guest version changed", "service=\"one\"", "swapped"]);
    assert_eq!(names(), ["second", "first"]);
    let third = config.guest("third.wasm", "third");
    let third = third.to_str().unwrap();
    config.admin.ctl_text(&["swap", "two", third]);
    assert_eq!(names(), ["second", "third"]);
    // A new process serves the same versions, although one file has another version.
    let pid = config.admin.ctl_text(&["restart"]);
    let pid = pid.split(' ').nth(1).unwrap().parse().unwrap();
    let names = names();
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::kill_process(pid, Signal::TERM).unwrap();
    assert_eq!(names, ["second", "third"]);
}

#[test]
fn schema_contains_every_key() {
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
    let mut known_flags = 0;
    for flag in flags.filter(|flag| !["config"].contains(flag)) {
        let tables = [&schema, service].map(|table| &table["properties"][flag]);
        assert!(tables.iter().any(|key| key.is_object()), "{flag}");
        known_flags += 1;
    }
    assert!(known_flags > 40, "{known_flags} flags in\n{help}");
}

#[test]
fn example_config_is_served() {
    let example = root().join("host/wasinetd.example.toml");
    let checked = run(wasinetd().args(["check", "--config"]).arg(&example));
    let report = String::from_utf8(checked.stderr).unwrap();
    assert_eq!(checked.status.code(), Some(0), "{report}");
    let example = on_free_ports(&fs::read_to_string(&example).unwrap());
    let root = root().display().to_string();
    let config = Config::new(&example.replace("\"../", &format!("\"{root}/")));
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
    let output = output(command.args(["-p", &port, "PING"]));
    assert_eq!(String::from_utf8(output.stdout).unwrap(), "PONG\n");
}

/// Replaces the port of each loopback address by zero.
fn on_free_ports(text: &str) -> String {
    let mut parts = text.split("127.0.0.1:");
    let mut moved = parts.next().unwrap_or_default().to_string();
    for part in parts {
        moved += "127.0.0.1:0";
        moved += part.trim_start_matches(|c: char| c.is_ascii_digit());
    }
    moved
}

/// Makes a certificate and its key in a new directory.
fn certificate(config: &Config, name: &str) -> [PathBuf; 2] {
    let directory = config.admin.beside(name);
    fs::create_dir(&directory).unwrap();
    let mut command = wasinetd();
    command.arg("cert").arg(&directory).args(["--name", name]);
    assert!(output(&mut command).status.success());
    ["cert.pem", "key.pem"].map(|file| directory.join(file))
}

#[test]
fn services_are_selected_by_server_name() {
    let config = Config::new("");
    let [cert_a, key_a] = certificate(&config, "a.example");
    let [cert_b, key_b] = certificate(&config, "b.example");
    for name in ["first", "behind"] {
        fs::create_dir(config.admin.beside(name)).unwrap();
        fs::write(config.admin.beside(name).join("hello.html"), name).unwrap();
    }
    let tls = format!(
        "dir = 'first::/static'\n\
        tls-cert = [{cert_a:?}, {cert_b:?}]\ntls-key = [{key_a:?}, {key_b:?}]"
    );
    let first = service("first", guest("hello"), &tls);
    let behind = |name: &str| {
        format!(
            "[[service]]\nname = 'behind'\nbehind = 'first'\nserver-name = '{name}'\n\
            guest = {:?}\ndir = 'behind::/static'\n",
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
        let output = output(&mut curl);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{errors}\n{server:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    assert_eq!(ask("a.example", &cert_a), "first");
    assert_eq!(ask("b.example", &cert_b), "behind");
    server.wait_for_log(&["connection ended", "service=\"behind\"", "b.example"]);
    // A reload routes the names to other services and keeps the certificates.
    config.write(&format!("{first}{}", behind("a.example")));
    assert_eq!(config.reload(), "changed: behind");
    assert_eq!(ask("a.example", &cert_a), "behind");
    assert_eq!(ask("b.example", &cert_b), "first");
    // A service behind another one cannot set limits of the listener.
    config.write(&format!(
        "{first}{}max-connections = 3\n",
        behind("a.example")
    ));
    let report = config.admin.ctl(&["reload"]).stderr;
    let report = String::from_utf8(report).unwrap();
    assert!(
        report.contains("max-connections: set it for the service \"first\" instead"),
        "{report}"
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
        let clients: Vec<Client> = addresses.iter().map(|address| connect(*address)).collect();
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
