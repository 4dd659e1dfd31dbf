//! What packages are made of.

use std::path::Path;
use std::process::Command;

use crate::harness::{Server, curl, page, root, run, wasinetd};

fn completions(shell: &str) -> String {
    let output = run(wasinetd().args(["completions", shell]));
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).expect("it is text")
}

#[test]
fn bash_completes_commands_flags_and_values() {
    let directory = tempfile::tempdir().unwrap();
    let script = directory.path().join("wasinetd");
    std::fs::write(&script, completions("bash")).unwrap();
    let complete = |words: &[&str]| -> Vec<String> {
        let last = words.len() - 1;
        let mut bash = Command::new("bash");
        bash.args([
            "--norc",
            "-c",
            // As bash itself calls it.
            r#"source "$1"; shift
            function=$(complete -p wasinetd | sed 's/.*-F \([^ ]*\).*/\1/')
            COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMP_LINE="$*" COMP_POINT=${#COMP_LINE}
            "$function" wasinetd "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
            printf '%s\n' "${COMPREPLY[@]}""#,
            "bash",
        ]);
        assert!(last > 0);
        let output = run(bash.arg(&script).args(words));
        assert!(output.status.success(), "{output:?}");
        let text = String::from_utf8(output.stdout).unwrap();
        text.lines().map(str::to_owned).collect()
    };
    assert_eq!(complete(&["wasinetd", "ser"]), ["serve"]);
    assert_eq!(
        complete(&["wasinetd", "serve", "--drain-t"]),
        ["--drain-timeout"]
    );
    assert_eq!(
        complete(&["wasinetd", "serve", "--log-format", ""]),
        ["text", "json"]
    );
    assert_eq!(complete(&["wasinetd", "ctl", "roll"]), ["rollback"]);
}

#[test]
fn every_shell_has_completions() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = completions(shell);
        for word in ["serve", "completions", "rollback", "drain-timeout"] {
            assert!(script.contains(word), "{shell}: {word}");
        }
    }
    let output = run(wasinetd().args(["completions", "csh"]));
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(64), "{said}");
    assert!(said.contains("zsh"), "{said}");
}

/// What is in a package, by the paths that it has there, and where it is here.
const INSTALLED: [(&str, &str); 3] = [
    ("/usr/bin/", "target/release/"),
    ("/usr/lib/wasinetd/guests/", "target/guests/"),
    ("/usr/share/wasinetd/static", "static"),
];

/// An argument with a path here for one in a package.
fn here(argument: &str) -> String {
    INSTALLED
        .iter()
        .fold(argument.to_owned(), |argument, (there, here)| {
            argument.replace(there, &format!("{}/{here}", root().display()))
        })
}

/// Serves with the arguments of a package, on a free port, and asks for a page.
fn serves_hello(arguments: &[String]) {
    let mut arguments: Vec<_> = arguments.iter().map(|argument| here(argument)).collect();
    let listen = arguments.iter().position(|argument| argument == "--listen");
    // The server that is started has one of its own.
    arguments.drain(listen.map_or(0..0, |at| at..at + 2));
    let guest = arguments.pop().expect("a guest comes last");
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    let server = Server::start("concurrent", Path::new(&guest), &arguments);
    assert_eq!(curl(&server, "/", &[]), page("hello.html"));
}

fn text(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

#[test]
fn the_container_serves_hello() {
    let file = text("Containerfile");
    let instruction = |name: &str| {
        let line = file
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .unwrap_or_else(|| panic!("there is a line of {name}"));
        serde_json::from_str::<Vec<String>>(line).expect("it is JSON")
    };
    assert_eq!(instruction("ENTRYPOINT "), ["/usr/bin/wasinetd"]);
    let mut command = instruction("CMD ");
    assert_eq!(command.remove(0), "serve");
    let listen = command.windows(2).find(|pair| pair[0] == "--listen");
    let (_, port) = listen.unwrap()[1].rsplit_once(':').unwrap();
    assert!(file.contains(&format!("\nEXPOSE {port}\n")), "{port}");
    // How operators reach it is what `ctl` takes there, also to see whether all is well.
    let admin = command.iter().position(|argument| argument == "--admin");
    let admin = admin.expect("operators can connect");
    let address = command.drain(admin..admin + 2).next_back().unwrap();
    assert!(file.contains(&format!("\nENV WASINETD_ADMIN={address}\n")));
    assert_eq!(
        instruction("HEALTHCHECK CMD "),
        ["/usr/bin/wasinetd", "ctl", "status"]
    );
    serves_hello(&command);

    // What is copied is there, and goes where it is looked for.
    let copies = file.lines().filter_map(|line| line.strip_prefix("COPY "));
    let mut counted = 0;
    for copy in copies.filter(|copy| *copy != ". .") {
        let built = copy.strip_prefix("--from=build /src/");
        let (from, to) = built.unwrap_or(copy).rsplit_once(' ').unwrap();
        let directory = from.split('*').next().unwrap();
        assert!(root().join(directory).exists(), "{from}");
        let known = |(there, here): &(&str, &str)| to.starts_with(there) && from.starts_with(here);
        assert!(INSTALLED.iter().any(known), "{copy}");
        counted += 1;
    }
    assert_eq!(counted, INSTALLED.len());
}

/// The image has glibc and libgcc, and no more.
#[test]
fn the_program_needs_no_libraries_but_those_of_the_system() {
    let output = run(Command::new("ldd").arg(here("/usr/bin/wasinetd")));
    let libraries = String::from_utf8(output.stdout).unwrap();
    assert!(libraries.contains("libc.so.6"), "{libraries}");
    for line in libraries.lines() {
        let name = line.split_whitespace().next().unwrap();
        let name = name.rsplit('/').next().unwrap();
        let known = ["linux-vdso.", "ld-linux", "libc.", "libm.", "libgcc_s."];
        assert!(
            known.iter().any(|known| name.starts_with(known)),
            "{libraries}"
        );
    }
}

#[test]
fn the_service_of_the_package_serves_hello() {
    // systemd.exec(5), EnvironmentFile=.
    let settings = text("host/systemd/wasinetd.default");
    let setting = |name: &str| {
        let line = settings.lines().find_map(|line| line.strip_prefix(name));
        line.expect("it is set").trim_matches('"').to_owned()
    };
    let options = setting("OPTIONS=");
    let options = options.split_whitespace().map(str::to_owned);
    let arguments: Vec<_> = options.chain([setting("GUEST=")]).collect();
    serves_hello(&arguments);
}

#[test]
fn what_the_debian_package_has_is_there() {
    let output = run(
        Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()))
            .args(["metadata", "--no-deps", "--offline", "--format-version=1"])
            .current_dir(root()),
    );
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    let host = packages
        .iter()
        .find(|package| package["name"] == "wasinetd")
        .unwrap();
    let deb = &host["metadata"]["deb"];
    let mut installed = Vec::new();
    for asset in deb["assets"].as_array().unwrap() {
        let [from, to] = [0, 1].map(|at| asset[at].as_str().unwrap());
        let directory = from.split('*').next().unwrap();
        // `make deb` makes those of target/package when all else is there.
        let made = from.starts_with("../target/package/");
        let there = match from.strip_prefix("target/release/") {
            Some(_) => root().join(from),
            None => root().join("host").join(directory),
        };
        assert!(made || there.exists(), "{from}");
        installed.push(format!("/{to}"));
    }
    let needed = [
        "/usr/bin/",
        "/usr/lib/wasinetd/guests/",
        "/etc/default/wasinetd",
    ];
    for path in needed {
        assert!(installed.iter().any(|to| to == path), "{path}");
    }
    for file in deb["conf-files"].as_array().unwrap() {
        assert!(installed.iter().any(|to| file == to), "{file}");
    }
    let scripts = root()
        .join("host")
        .join(deb["maintainer-scripts"].as_str().unwrap());
    for script in ["postinst", "prerm", "postrm"] {
        let script = std::fs::read_to_string(scripts.join(script)).unwrap();
        assert!(script.contains("\n#DEBHELPER#\n"), "{script}");
    }
}

/// The units are taken by systemd, where it is installed, and the service is locked up.
#[test]
fn systemd_takes_the_units() {
    if run(Command::new("sh").args(["-c", "command -v systemd-analyze"]))
        .stdout
        .is_empty()
    {
        eprintln!(
            "left out: there is no systemd-analyze to show the units to; apt-get install systemd"
        );
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = directory.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let verify = |paths: &[&Path]| {
        let mut command = Command::new("systemd-analyze");
        let output = run(command.args(["verify", "--man=no"]).args(paths));
        String::from_utf8(output.stderr).unwrap()
    };
    let service = text("host/systemd/wasinetd.service")
        .replace("/usr/bin/wasinetd", &here("/usr/bin/wasinetd"));
    let socket = text("host/systemd/wasinetd.socket");
    let units = [
        write("wasinetd.service", &service),
        write("wasinetd.socket", &socket),
    ];
    let of_ours = |said: &str| {
        said.lines()
            .filter(|line| line.contains("wasinetd"))
            .count()
    };
    let said = verify(&[&units[0], &units[1]]);
    assert_eq!(of_ours(&said), 0, "{said}");

    let mut security = Command::new("systemd-analyze");
    // From 0, which can do nothing, to 100, which can do all.
    security.args(["security", "--offline=true", "--threshold=20"]);
    let output = run(security.arg(&units[0]));
    assert!(output.status.success(), "{output:?}");

    let wrong = socket.replace("Backlog=4096", "Backlogs=4096");
    let said = verify(&[&write("wasinetd.socket", &wrong)]);
    assert!(said.contains("Backlogs"), "{said}");
}
