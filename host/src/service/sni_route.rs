//! From a listener to the service that a connection is for.

use std::sync::Arc;

use arc_swap::ArcSwap;

use super::Service;
use crate::connection::{self, ConnectionRegistry, Handshake, Version};

/// Leads the clients of a listener to its service, or to another one by the name that they have for the
/// server in TLS (RFC 6066, section 3).
pub struct SniRoute {
    front: Handshake,
    service: Arc<Service>,
    named: ArcSwap<Vec<NamedService>>,
}

/// A service for the clients that ask for one of these names.
pub struct NamedService {
    /// As in a certificate: `chat.example`, or `*.example` for all that have one label more.
    pub names: Vec<String>,
    /// The service.
    pub service: Arc<Service>,
}

impl SniRoute {
    /// To `service`, once what is to be done before is.
    pub fn new(front: Handshake, service: Arc<Service>) -> Self {
        Self {
            front,
            service,
            named: ArcSwap::default(),
        }
    }

    /// From now on clients are led to these by their names. The first that fits is taken.
    pub fn set_named(&self, named: Vec<NamedService>) {
        self.named.store(Arc::new(named));
    }
}

impl connection::Route for SniRoute {
    fn handshake(&self) -> &Handshake {
        &self.front
    }

    fn version(&self, server_name: Option<&str>) -> Arc<Version> {
        let Some(name) = server_name else {
            return self.service.current();
        };
        let named = self.named.load();
        let of_name = named.iter().find(|one| is_among(name, &one.names));
        of_name.map_or(&self.service, |one| &one.service).current()
    }

    fn registry(&self) -> &Arc<ConnectionRegistry> {
        &self.service.open
    }
}

/// Whether a name is one of those, in which `*` stands for one label (RFC 9525, section 6.3).
fn is_among(name: &str, names: &[String]) -> bool {
    // Clients send it without, as the RFC says; some do not.
    let name = name.trim_end_matches('.');
    names
        .iter()
        .any(|pattern| match pattern.strip_prefix("*.") {
            Some(rest) => name.split_once('.').is_some_and(|(label, others)| {
                !label.is_empty() && others.eq_ignore_ascii_case(rest)
            }),
            None => name.eq_ignore_ascii_case(pattern),
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_is_one_label() {
        let names = ["chat.example", "*.web.example"].map(String::from);
        for name in [
            "chat.example",
            "CHAT.example",
            "chat.example.",
            "a.web.example",
        ] {
            assert!(is_among(name, &names), "{name}");
        }
        for name in [
            "example",
            "web.example",
            "a.b.web.example",
            ".web.example",
            "xchat.example",
        ] {
            assert!(!is_among(name, &names), "{name}");
        }
    }
}
