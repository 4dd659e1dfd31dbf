//! Configs and clients that the tests of reloads share.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::config::{Config, connect};
use crate::harness::{Client, Server, free_address, guest, wait_until};

/// The config of a service with the guest at `path` and these addresses.
pub(super) fn service_at(name: &str, path: &Path, listen: &[String], more: &str) -> String {
    format!("[[service]]\nname = {name:?}\nlisten = {listen:?}\nguest = {path:?}\n{more}\n")
}

/// The config of an echo service.
pub(crate) fn echo_at(name: &str, listen: &[String], more: &str) -> String {
    service_at(name, &guest("echo"), listen, more)
}

/// Serves version `version-0` of the guest `named_version`.
///
/// Returns the config, the address, the guest's file and the server.
pub(super) fn serve_version_0(more: &str) -> (Config, SocketAddr, PathBuf, Server) {
    let config = Config::new("");
    let file = config.guest("names.wasm", "version-0");
    let at = free_address();
    config.write(&service_at("names", &file, &[at.to_string()], more));
    let server = Server::start_config(&config.path, 1);
    (config, at, file, server)
}

/// The permission bits of the file at `path`.
pub(super) fn permissions(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().permissions().mode() & 0o777
}

/// Connects a client and checks that the echo service answers.
pub(super) fn connect_served(address: SocketAddr) -> Client {
    let mut client = connect(address);
    client.send("a");
    assert_eq!(client.read(1), "a");
    client
}

/// Waits until no server listens at the address.
pub(super) fn wait_until_closed(address: SocketAddr) {
    wait_until(&format!("{address} is still open"), || {
        Client::connect(address).is_err()
    });
}
