//! Errors of the user: each message names the value and the fix, and has an exit code.

use std::net::{SocketAddr, TcpListener};
use std::process::Command;

use socket2::{Domain, Socket, Type};

use crate::harness::{fixture, guest, root, run, wasinetd};

/// Asserts that a command fails with an exit code and a message.
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

/// Asserts that `serve` and `check` refuse a guest.
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
fn missing_guest_is_refused() {
    refuses_guest(
        "no/such.wasm",
        &["\"no/such.wasm\"", "No such file", "give the path"],
    );
}

#[test]
fn guest_that_is_not_wasm_is_refused() {
    refuses_guest(
        "Cargo.toml",
        &["\"Cargo.toml\"", "not WebAssembly", "wasm32-wasip2"],
    );
}

#[test]
fn core_module_is_refused() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), b"\0asm\x01\0\0\0").unwrap();
    let path = file.path().to_str().unwrap();
    refuses_guest(
        path,
        &[path, "core WebAssembly module", "--target wasm32-wasip2"],
    );
}

#[test]
fn truncated_guest_is_refused() {
    let whole = std::fs::read(guest("echo")).unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), &whole[..whole.len() / 2]).unwrap();
    refuses_guest(
        file.path().to_str().unwrap(),
        &["not a valid component", "rebuild"],
    );
}

#[test]
fn component_with_exponential_nesting_is_refused() {
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

/// A component of encoded sections (component model, binary format).
fn component(sections: &[u8]) -> Vec<u8> {
    [b"\0asm\x0d\0\x01\0", sections].concat()
}

/// An encoded section (component model, binary format).
fn section(id: u8, content: &[u8]) -> Vec<u8> {
    let mut bytes = vec![id];
    let mut length = content.len();
    // The length is encoded as LEB128.
    while length >= 0x80 {
        bytes.push(length as u8 | 0x80);
        length >>= 7;
    }
    bytes.push(length as u8);
    bytes.extend_from_slice(content);
    bytes
}

#[test]
fn guest_without_handler_is_refused() {
    refuses_fixture(
        "no_handler",
        &[
            "does not export wasinetd:tcp/handler@0.1.0",
            "wasinetd_guest::export!",
        ],
    );
}

#[test]
fn guest_of_another_interface_version_is_refused() {
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
fn guest_with_too_large_table_is_refused() {
    let text = std::fs::read_to_string(root().join("guest/fixtures/src/table_bomb.wat")).unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    let path = file.path().to_str().unwrap();
    let build = |elements: u32| {
        let text = text.replace("$first 1 ", &format!("$first {elements} "));
        std::fs::write(path, wat::parse_str(text).unwrap()).unwrap();
    };
    build(1_000_001);
    refuses_guest(path, &["1000001 elements", "1000000 are allowed", "fewer"]);
    // Far more elements than a compiler makes, and fewer than the limit.
    build(100_000);
    let accepted = run(wasinetd().args(["check", path]));
    assert_eq!(accepted.status.code(), Some(0), "{accepted:?}");
}

#[test]
fn guest_that_imports_sockets_is_refused() {
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

/// `wasinetd serve` with a valid guest.
fn serve() -> Command {
    let mut command = wasinetd();
    command.arg("serve").arg(guest("hello"));
    command
}

#[test]
fn port_in_use_is_refused() {
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
fn port_of_another_server_with_reuse_port_is_refused() {
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
fn address_of_another_machine_is_refused() {
    refuses(
        serve().args(["--listen", "192.0.2.1:0"]),
        69,
        &["192.0.2.1:0", "0.0.0.0"],
    );
}

#[test]
fn invalid_listen_address_is_refused() {
    for value in ["nonsense", "127.0.0.1", "localhost:80", "127.0.0.1:65536"] {
        refuses(
            serve().args(["--listen", value]),
            64,
            &["--listen", value, "127.0.0.1:7878"],
        );
    }
}

#[test]
fn missing_or_invalid_directory_is_refused() {
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
fn unset_variable_is_refused() {
    let name = "WASINETD_TEST_NOT_SET";
    refuses(
        serve().args(["--env", name]),
        64,
        &["--env", name, "=VALUE"],
    );
    refuses(serve().args(["--env", "=x"]), 64, &["--env", "NAME=VALUE"]);
}

#[test]
fn values_out_of_range_are_refused() {
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
fn max_connections_beyond_capacity_is_refused() {
    refuses(
        serve().args(["--listen", "127.0.0.1:0", "--max-connections", "1000000000"]),
        78,
        &["--max-connections 1000000000 does not fit", "allows"],
    );
}

#[test]
fn help_and_version_succeed() {
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
fn check_reports_guest_requirements_and_capacity() {
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
fn check_names_the_pool_as_the_tightest_limit() {
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
