//! Each mistake is named with its value and its fix, and has its exit code.

use std::net::{SocketAddr, TcpListener};
use std::process::Command;

use socket2::{Domain, Socket, Type};

use crate::harness::{fixture, guest, root, run, wasinetd};

/// Runs a command that should fail, and checks its code and message.
fn refuses(command: &mut Command, code: i32, parts: &[&str]) {
    let output = run(command);
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{command:?}\n{message}");
    for part in parts {
        assert!(
            message.contains(part),
            "no {part:?} in the message of {command:?}\n{message}"
        );
    }
    assert!(
        output.stdout.is_empty(),
        "{command:?} printed to standard output"
    );
}

/// Both commands that read a guest, on a port that is never taken.
fn refuses_guest(path: &str, parts: &[&str]) {
    refuses(
        wasinetd().args(["serve", "--listen", "127.0.0.1:0", path]),
        65,
        parts,
    );
    refuses(wasinetd().args(["check", path]), 65, parts);
}

fn refuses_fixture(name: &str, parts: &[&str]) {
    refuses_guest(fixture(name).to_str().unwrap(), parts);
}

#[test]
fn a_guest_that_is_missing() {
    refuses_guest(
        "no/such.wasm",
        &["\"no/such.wasm\"", "No such file", "give the path"],
    );
}

#[test]
fn a_guest_that_is_not_wasm() {
    refuses_guest(
        "Cargo.toml",
        &["\"Cargo.toml\"", "not WebAssembly", "wasm32-wasip2"],
    );
}

#[test]
fn a_guest_that_is_a_core_module() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), b"\0asm\x01\0\0\0").unwrap();
    let path = file.path().to_str().unwrap();
    refuses_guest(
        path,
        &[path, "core WebAssembly module", "--target wasm32-wasip2"],
    );
}

#[test]
fn a_guest_that_is_cut_off() {
    let whole = std::fs::read(guest("echo")).unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), &whole[..whole.len() / 2]).unwrap();
    refuses_guest(
        file.path().to_str().unwrap(),
        &["not a valid component", "rebuild"],
    );
}

#[test]
fn a_component_that_nests_without_end() {
    // Each level instantiates the one inside it twice: 2^30 instances in a few hundred bytes.
    let bomb = (0..30).fold(component(&[]), |inner, _| {
        let inner_section = section(4, &inner);
        let two_instances = section(5, &[2, 0, 0, 0, 0, 0, 0]);
        component(&[inner_section, two_instances].concat())
    });
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), bomb).unwrap();
    refuses_guest(
        file.path().to_str().unwrap(),
        &["component instances", "at most", "fewer parts"],
    );
}

/// A component of the given sections (component model, binary format).
fn component(sections: &[u8]) -> Vec<u8> {
    [b"\0asm\x0d\0\x01\0", sections].concat()
}

fn section(id: u8, content: &[u8]) -> Vec<u8> {
    let mut bytes = vec![id];
    let mut length = content.len();
    // LEB128.
    while length >= 0x80 {
        bytes.push(length as u8 | 0x80);
        length >>= 7;
    }
    bytes.push(length as u8);
    bytes.extend_from_slice(content);
    bytes
}

#[test]
fn a_guest_without_a_handler() {
    refuses_fixture(
        "no_handler",
        &[
            "does not export wasinetd:tcp/handler@0.1.0",
            "wasinetd_guest::export!",
        ],
    );
}

#[test]
fn a_guest_of_another_version() {
    refuses_fixture(
        "other_version",
        &[
            "wasinetd:tcp/handler@0.2.0",
            "speaks wasinetd:tcp@0.1.0",
            "rebuild",
        ],
    );
}

#[test]
fn a_guest_with_a_table_that_is_too_large() {
    let text = std::fs::read_to_string(root().join("guest/fixtures/src/table_bomb.wat")).unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    let path = file.path().to_str().unwrap();
    let build = |elements: u32| {
        let text = text.replace("$first 1 ", &format!("$first {elements} "));
        std::fs::write(path, wat::parse_str(text).unwrap()).unwrap();
    };
    build(1_000_001);
    refuses_guest(path, &["1000001 elements", "1000000 are allowed", "fewer"]);
    // Far more than a compiler makes, and less than that.
    build(100_000);
    let accepted = run(wasinetd().args(["check", path]));
    assert_eq!(accepted.status.code(), Some(0), "{accepted:?}");
}

#[test]
fn a_guest_that_wants_the_network() {
    refuses_fixture(
        "sockets",
        &[
            "wasi:sockets/tcp@0.2",
            "not granted",
            "allow-connect HOST:PORT",
            "remove",
        ],
    );
}

fn serve() -> Command {
    let mut command = wasinetd();
    command.arg("serve").arg(guest("hello"));
    command
}

#[test]
fn a_port_that_is_taken() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    for threads in ["1", "2"] {
        refuses(
            serve().args(["--threads", threads, "--listen", &address]),
            69,
            &[&address, "--listen", "in use", "choose another"],
        );
    }
}

#[test]
fn a_port_that_another_server_would_share() {
    let taken = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    taken.set_reuse_address(true).unwrap();
    taken.set_reuse_port(true).unwrap();
    taken
        .bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into())
        .unwrap();
    taken.listen(1).unwrap();
    let address = taken.local_addr().unwrap().as_socket().unwrap().to_string();
    for threads in ["1", "2"] {
        refuses(
            serve().args(["--threads", threads, "--listen", &address]),
            69,
            &[&address, "in use"],
        );
    }
}

#[test]
fn an_address_of_another_machine() {
    refuses(
        serve().args(["--listen", "192.0.2.1:0"]),
        69,
        &["192.0.2.1:0", "0.0.0.0"],
    );
}

#[test]
fn an_address_that_is_none() {
    for value in ["nonsense", "127.0.0.1", "localhost:80", "127.0.0.1:65536"] {
        refuses(
            serve().args(["--listen", value]),
            64,
            &["--listen", value, "127.0.0.1:7878"],
        );
    }
}

#[test]
fn a_directory_that_is_missing_or_none() {
    for flag in ["--dir", "--dir-rw"] {
        let listen = ["--listen", "127.0.0.1:0"];
        let missing = ["\"no/such\"", "No such file", "create it"];
        refuses(
            serve().args(listen).args([flag, "no/such::/x"]),
            78,
            &missing,
        );
        refuses(
            serve().args(listen).args([flag, "Cargo.toml"]),
            78,
            &[flag, "not a directory"],
        );
        let twice = [flag, "static::/x", "--dir", "wit::/x/"];
        refuses(
            serve().args(listen).args(twice),
            78,
            &["another directory", "/x"],
        );
        refuses(
            serve().args(listen).args([flag, "::/x"]),
            64,
            &[flag, "HOST::GUEST"],
        );
    }
}

#[test]
fn a_variable_that_is_not_set() {
    let name = "WASINETD_TEST_NOT_SET";
    refuses(
        serve().args(["--env", name]),
        64,
        &["--env", name, "=VALUE"],
    );
    refuses(serve().args(["--env", "=x"]), 64, &["--env", "NAME=VALUE"]);
}

#[test]
fn values_that_are_out_of_range() {
    refuses(
        serve().args(["--drain-timeout", "soon"]),
        64,
        &["--drain-timeout", "soon", "500ms"],
    );
    refuses(
        serve().args(["--max-connections", "0"]),
        64,
        &["--max-connections", "above zero"],
    );
    refuses(
        serve().args(["--dispatch", "magic"]),
        64,
        &["--dispatch", "magic", "concurrent"],
    );
    refuses(
        serve().args(["--threads", "0"]),
        64,
        &["--threads", "0", "above zero"],
    );
    refuses(
        serve().args(["--log-format", "xml"]),
        64,
        &["--log-format", "xml", "json"],
    );
    for value in ["db.example.com", "10.0.0.1:0", "10.0.0.1:1/10.0.0.0/8"] {
        refuses(
            serve().args(["--allow-connect", value]),
            64,
            &["--allow-connect", value],
        );
    }
    for value in ["1500ms", "0s", "10h"] {
        refuses(
            serve().args(["--keepalive", value]),
            64,
            &["--keepalive", value, "whole seconds", "off"],
        );
    }
    refuses(&mut wasinetd(), 64, &["Usage"]);
}

#[test]
fn more_connections_than_fit() {
    refuses(
        serve().args(["--listen", "127.0.0.1:0", "--max-connections", "1000000000"]),
        78,
        &["--max-connections 1000000000 does not fit", "allows"],
    );
}

#[test]
fn help_and_version_are_no_mistakes() {
    for arguments in [
        ["--help"].as_slice(),
        &["serve", "--help"],
        &["check", "--help"],
        &["--version"],
    ] {
        let output = run(wasinetd().args(arguments));
        assert_eq!(output.status.code(), Some(0), "{arguments:?}");
        assert!(
            !output.stdout.is_empty() && output.stderr.is_empty(),
            "{arguments:?}"
        );
    }
}

#[test]
fn check_says_what_a_good_guest_is_made_of_and_how_many_fit() {
    let output = run(wasinetd().arg("check").arg(guest("hello")));
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{text}");
    for part in [
        "hello.wasm: accepted",
        "wasinetd:tcp/types@0.1.0",
        "wasinetd:tcp/handler@0.1.0",
        "core instances: ",
        "memories: 1 (",
        "open files",
        "vm.max_map_count",
        "address space",
        "pool",
        "the tight one is ",
        "to lift it: ",
    ] {
        assert!(text.contains(part), "no {part:?} in\n{text}");
    }
}

#[test]
fn check_names_the_pool_when_it_is_the_tight_one() {
    let output = run(wasinetd()
        .args(["check", "--max-connections", "7"])
        .arg(guest("echo")));
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("connections that fit at once: 7\n"), "{text}");
    assert!(
        text.contains("the tight one is pool (max-connections)"),
        "{text}"
    );
}
