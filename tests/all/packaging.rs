//! Packages: shell completions, the container, the Debian package and the systemd units.

use std::path::Path;
use std::process::Command;

use crate::harness::{Server, curl, page, root, run, wasinetd};

fn completions(shell: &str) -> String {
    let output = run(wasinetd().args(["completions", shell]));
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).expect("the output is UTF-8")
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
            // Calls the function in the same way as bash.
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
fn every_supported_shell_has_completions() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = completions(shell);
        for word in ["serve", "completions", "rollback", "drain-timeout"] {
            assert!(script.contains(word), "{shell}: {word}");
        }
    }
    let output = run(wasinetd().args(["completions", "csh"]));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(64), "{stderr}");
    assert!(stderr.contains("zsh"), "{stderr}");
}

/// Directories of an installed package, and where their files are in this repository.
const INSTALLED: [(&str, &str); 3] = [
    ("/usr/bin/", "target/quick/"),
    ("/usr/lib/wasinetd/guests/", "target/guests/"),
    ("/usr/share/wasinetd/static", "static"),
];

/// Replaces the paths of an installed package by paths in this repository.
fn local(argument: &str) -> String {
    INSTALLED
        .iter()
        .fold(argument.to_owned(), |argument, (installed, local)| {
            argument.replace(installed, &format!("{}/{local}", root().display()))
        })
}

/// Serves with the arguments of a package, but on a free port, and requests a page.
fn assert_serves_hello(arguments: &[String]) {
    let mut arguments: Vec<_> = arguments.iter().map(|argument| local(argument)).collect();
    let listen = arguments.iter().position(|argument| argument == "--listen");
    // `Server::start` passes its own address.
    arguments.drain(listen.map_or(0..0, |index| index..index + 2));
    let guest = arguments.pop().expect("the guest is the last argument");
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
            .unwrap_or_else(|| panic!("there is no {name} line"));
        serde_json::from_str::<Vec<String>>(line).expect("the arguments are JSON")
    };
    assert_eq!(instruction("ENTRYPOINT "), ["/usr/bin/wasinetd"]);
    let mut command = instruction("CMD ");
    assert_eq!(command.remove(0), "serve");
    let listen = command.windows(2).find(|pair| pair[0] == "--listen");
    let (_, port) = listen.unwrap()[1].rsplit_once(':').unwrap();
    assert!(file.contains(&format!("\nEXPOSE {port}\n")), "{port}");
    // `ctl` and the health check use the admin address that the server is started with.
    let admin = command.iter().position(|argument| argument == "--admin");
    let admin = admin.expect("the server has an admin address");
    let address = command.drain(admin..admin + 2).next_back().unwrap();
    assert!(file.contains(&format!("\nENV WASINETD_ADMIN={address}\n")));
    assert_eq!(
        instruction("HEALTHCHECK CMD "),
        ["/usr/bin/wasinetd", "ctl", "status"]
    );
    assert_serves_hello(&command);

    // The copied files exist, and go to the paths where the server looks for them.
    let copies = file.lines().filter_map(|line| line.strip_prefix("COPY "));
    let mut checked = 0;
    for copy in copies.filter(|copy| *copy != ". .") {
        let built = copy.strip_prefix("--from=build /src/");
        let (from, to) = built.unwrap_or(copy).rsplit_once(' ').unwrap();
        // The container has an optimized build of the same program.
        let from = from.replace("target/dist/", "target/quick/");
        let directory = from.split('*').next().unwrap();
        assert!(root().join(directory).exists(), "{from}");
        let known = |(installed, local): &(&str, &str)| {
            to.starts_with(installed) && from.starts_with(local)
        };
        assert!(INSTALLED.iter().any(known), "{copy}");
        checked += 1;
    }
    assert_eq!(checked, INSTALLED.len());
}

/// The container image has only glibc and libgcc.
#[test]
fn the_binary_links_only_system_libraries() {
    let output = run(Command::new("ldd").arg(local("/usr/bin/wasinetd")));
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
fn the_packaged_service_serves_hello() {
    // The format is that of EnvironmentFile= in systemd.exec(5).
    let settings = text("host/systemd/wasinetd.default");
    let setting = |name: &str| {
        let line = settings.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap_or_else(|| panic!("{name} is missing"))
            .trim_matches('"')
            .to_owned()
    };
    let options = setting("OPTIONS=");
    let options = options.split_whitespace().map(str::to_owned);
    let arguments: Vec<_> = options.chain([setting("GUEST=")]).collect();
    assert_serves_hello(&arguments);
}

#[test]
fn every_asset_of_the_debian_package_exists() {
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
        // `make deb` generates the files in target/package.
        let generated = from.starts_with("../target/package/");
        // cargo-deb puts the directory of the chosen profile in place of this prefix.
        let path = match from.strip_prefix("target/release/") {
            Some(program) => root().join("target/quick").join(program),
            None => root().join("host").join(directory),
        };
        assert!(generated || path.exists(), "{from}");
        installed.push(format!("/{to}"));
    }
    let required = [
        "/usr/bin/",
        "/usr/lib/wasinetd/guests/",
        "/etc/default/wasinetd",
    ];
    for path in required {
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

/// systemd finds no mistake in the units and rates the service as well sandboxed.
#[test]
fn systemd_accepts_the_units() {
    if run(Command::new("sh").args(["-c", "command -v systemd-analyze"]))
        .stdout
        .is_empty()
    {
        eprintln!("skipped: systemd-analyze is not installed; apt-get install systemd");
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
        .replace("/usr/bin/wasinetd", &local("/usr/bin/wasinetd"));
    let socket = text("host/systemd/wasinetd.socket");
    let units = [
        write("wasinetd.service", &service),
        write("wasinetd.socket", &socket),
    ];
    // systemd-analyze also reports other units of the system.
    let own_messages = |stderr: &str| {
        stderr
            .lines()
            .filter(|line| line.contains("wasinetd"))
            .count()
    };
    let stderr = verify(&[&units[0], &units[1]]);
    assert_eq!(own_messages(&stderr), 0, "{stderr}");

    let mut security = Command::new("systemd-analyze");
    // The scale is from 0, fully sandboxed, to 100, unrestricted.
    security.args(["security", "--offline=true", "--threshold=20"]);
    let output = run(security.arg(&units[0]));
    assert!(output.status.success(), "{output:?}");

    let misspelled = socket.replace("Backlog=4096", "Backlogs=4096");
    let stderr = verify(&[&write("wasinetd.socket", &misspelled)]);
    assert!(stderr.contains("Backlogs"), "{stderr}");
}
