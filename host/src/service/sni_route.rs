//! Routes: from a listener and a TLS server name to a service.

use std::sync::Arc;

use arc_swap::ArcSwap;

use super::state::Service;
use crate::connection::{self, ConnectionRegistry, Handshake, Version};

/// Route from a listener to a service, by TLS server name.
///
/// The name is that of the server name indication (RFC 6066, section 3). Clients without a matching
/// name reach the listener's own service.
pub struct SniRoute {
    handshake: Handshake,
    service: Arc<Service>,
    named: ArcSwap<Vec<NamedService>>,
}

/// A service for clients that ask for one of its names.
pub struct NamedService {
    /// Names as in a certificate: `chat.example`, or `*.example` for any one label more.
    pub names: Vec<String>,
    /// The service.
    pub service: Arc<Service>,
}

impl SniRoute {
    /// A route to `service`, after `handshake`.
    pub fn new(handshake: Handshake, service: Arc<Service>) -> Self {
        Self {
            handshake,
            service,
            named: ArcSwap::default(),
        }
    }

    /// Replaces the services that clients reach by name. The first match wins.
    pub fn set_named(&self, named: Vec<NamedService>) {
        self.named.store(Arc::new(named));
    }
}

impl connection::Route for SniRoute {
    fn handshake(&self) -> &Handshake {
        &self.handshake
    }

    fn version(&self, server_name: Option<&str>) -> Arc<Version> {
        let Some(name) = server_name else {
            return self.service.current();
        };
        let named = self.named.load();
        let matching = named.iter().find(|named| matches_any(name, &named.names));
        matching
            .map_or(&self.service, |named| &named.service)
            .current()
    }

    fn registry(&self) -> &Arc<ConnectionRegistry> {
        &self.service.shared.registry
    }
}

/// Whether `name` matches a pattern. `*` is one label (RFC 9525, section 6.3).
fn matches_any(name: &str, patterns: &[String]) -> bool {
    // RFC 6066 has clients omit the last dot. Some send it.
    let name = name.trim_end_matches('.');
    patterns
        .iter()
        .any(|pattern| match pattern.strip_prefix("*.") {
            Some(parent) => name.split_once('.').is_some_and(|(label, rest)| {
                !label.is_empty() && rest.eq_ignore_ascii_case(parent)
            }),
            None => name.eq_ignore_ascii_case(pattern),
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wildcard_matches_exactly_one_label() {
        let patterns = ["chat.example", "*.web.example"].map(String::from);
        for name in [
            "chat.example",
            "CHAT.example",
            "chat.example.",
            "a.web.example",
        ] {
            assert!(matches_any(name, &patterns), "{name}");
        }
        for name in [
            "example",
            "web.example",
            "a.b.web.example",
            ".web.example",
            "xchat.example",
        ] {
            assert!(!matches_any(name, &patterns), "{name}");
        }
    }
}
