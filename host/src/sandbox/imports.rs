//! The interfaces that a guest may import and must export.

use std::fmt;

use super::requirements::{Refusal, Requirements};

/// The package of our WIT.
const PACKAGE: &str = "wasinetd:tcp";

/// The version of our WIT.
///
/// A guest of another minor version does not fit while the major version is 0 (Semantic
/// Versioning).
const VERSION: &str = "0.1.0";

/// The WASI packages that every guest may import.
const WASI: [&str; 5] = [
    "wasi:cli",
    "wasi:clocks",
    "wasi:filesystem",
    "wasi:io",
    "wasi:random",
];

/// The versions of [`WASI`].
const WASI_VERSIONS: [&str; 2] = ["0.2", "0.3"];

/// The package that a guest may import if it may connect somewhere.
///
/// Version 0.3 is not linked: between two of its streams the host would move bytes in one turn
/// without end.
const WASI_NETWORK: &str = "wasi:sockets";
const WASI_NETWORK_VERSION: &str = "0.2";

/// The interfaces and the requirements of a guest.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    /// Names of the imported interfaces.
    pub imports: Vec<String>,
    /// Names of the exported interfaces.
    pub exports: Vec<String>,
    /// The resources that an instance takes.
    pub requirements: Requirements,
}

impl Report {
    /// Refuses a guest with a forbidden import or without a handler.
    pub(super) fn check(&self, may_connect: bool) -> Result<(), Refusal> {
        self.check_version()?;
        self.check_imports(may_connect)?;
        self.check_handler()
    }

    fn check_version(&self) -> Result<(), Refusal> {
        let names = self.imports.iter().chain(&self.exports);
        for name in names.map(|name| InterfaceName::parse(name)) {
            if name.package == PACKAGE && !name.is_compatible(VERSION) {
                return Err(Refusal::new(format!(
                    "it was built against {name}, and this wasinetd speaks {PACKAGE}@{VERSION}; rebuild it against that version, or run a wasinetd that speaks {name}"
                )));
            }
        }
        Ok(())
    }

    fn check_imports(&self, may_connect: bool) -> Result<(), Refusal> {
        let forbidden: Vec<&str> = self
            .imports
            .iter()
            .map(String::as_str)
            .filter(|name| !InterfaceName::parse(name).is_allowed(may_connect))
            .collect();
        if forbidden.is_empty() {
            return Ok(());
        }
        let names = forbidden.join(", ");
        let wants_network = forbidden
            .iter()
            .any(|name| InterfaceName::parse(name).is_network());
        Err(Refusal::new(if wants_network && !may_connect {
            format!(
                "it imports the network, which is not granted: {names}; grant destinations with allow-connect HOST:PORT, or remove the code that needs the network"
            )
        } else {
            format!(
                "it imports interfaces that this host does not offer: {names}; remove the code that needs them (a guest may import {PACKAGE}, {})",
                WASI.join(", ")
            )
        }))
    }

    fn check_handler(&self) -> Result<(), Refusal> {
        let has_handler = self
            .exports
            .iter()
            .map(|name| InterfaceName::parse(name))
            .any(|name| name.package == PACKAGE && name.interface == "handler");
        if has_handler {
            return Ok(());
        }
        let exports = if self.exports.is_empty() {
            "none".into()
        } else {
            self.exports.join(", ")
        };
        Err(Refusal::new(format!(
            "it does not export {PACKAGE}/handler@{VERSION} (its exports: {exports}); export a handler with `wasinetd_guest::export!` in a crate of type cdylib"
        )))
    }
}

/// The refusal of a component that wasmtime cannot link.
pub(super) fn mismatch(error: wasmtime::Error) -> Refusal {
    Refusal::new(format!(
        "it does not fit the world {PACKAGE}/connection-handler@{VERSION}: {error:#}; rebuild it against the WIT of this version"
    ))
}

/// The name of an interface, such as `wasi:cli/environment@0.2.0`.
struct InterfaceName<'a> {
    package: &'a str,
    interface: &'a str,
    version: &'a str,
}

impl<'a> InterfaceName<'a> {
    /// Parses a name. A name of another form becomes an unknown package.
    fn parse(name: &'a str) -> Self {
        let (path, version) = name.split_once('@').unwrap_or((name, ""));
        let (package, interface) = path.split_once('/').unwrap_or((path, ""));
        Self {
            package,
            interface,
            version,
        }
    }

    /// Whether major and minor version are equal to those of `version`.
    fn is_compatible(&self, version: &str) -> bool {
        let major_and_minor = |version: &'_ str| {
            let mut parts = version.split('.').map(String::from);
            (parts.next(), parts.next())
        };
        major_and_minor(self.version) == major_and_minor(version)
    }

    fn is_allowed(&self, may_connect: bool) -> bool {
        self.package == PACKAGE
            || (WASI.contains(&self.package) && self.is_known_wasi_version())
            || (may_connect && self.is_network())
    }

    fn is_network(&self) -> bool {
        self.package == WASI_NETWORK && self.is_compatible(WASI_NETWORK_VERSION)
    }

    fn is_known_wasi_version(&self) -> bool {
        WASI_VERSIONS
            .iter()
            .any(|version| self.is_compatible(version))
    }
}

impl fmt::Display for InterfaceName<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}@{}", self.package, self.interface, self.version)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(imports: &[&str], exports: &[&str], may_connect: bool) -> Result<(), String> {
        let names = |names: &[&str]| names.iter().map(|name| (*name).into()).collect();
        let report = Report {
            imports: names(imports),
            exports: names(exports),
            requirements: Requirements::default(),
        };
        report
            .check(may_connect)
            .map_err(|refusal| refusal.to_string())
    }

    const HANDLER: &[&str] = &["wasinetd:tcp/handler@0.1.0"];

    #[test]
    fn linked_interfaces_are_allowed_and_others_are_refused() {
        for name in [
            "wasinetd:tcp/types@0.1.3",
            "wasi:cli/environment@0.2.0",
            "wasi:cli/environment@0.3.0",
            "wasi:io/streams@0.2.12",
        ] {
            assert_eq!(check(&[name], HANDLER, false), Ok(()), "{name}");
        }
        for name in [
            "wasi:cli/environment@0.4.0",
            "wasi:http/types@0.2.0",
            "wasi:sockets/types@0.3.0",
            "unknown",
        ] {
            let refusal = check(&[name], HANDLER, true).unwrap_err();
            assert!(refusal.contains(name), "{refusal}");
            assert!(refusal.contains("does not offer"), "{refusal}");
        }
    }

    #[test]
    fn the_network_needs_a_grant() {
        let imports = ["wasi:sockets/tcp@0.2.12"];
        let refusal = check(&imports, HANDLER, false).unwrap_err();
        assert!(refusal.contains("allow-connect"), "{refusal}");
        assert_eq!(check(&imports, HANDLER, true), Ok(()));
    }

    #[test]
    fn a_guest_needs_a_handler_of_this_version() {
        let refusal = check(&[], &[], false).unwrap_err();
        assert!(refusal.contains("its exports: none"), "{refusal}");
        let refusal = check(&[], &["wasinetd:tcp/handler@0.2.0"], false).unwrap_err();
        assert!(refusal.contains("speaks wasinetd:tcp@0.1.0"), "{refusal}");
    }
}
