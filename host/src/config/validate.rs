//! Checks of services against each other and against the server.

use std::collections::HashSet;

use super::file::Mistake;
use super::model::{Behind, ServerConfig, ServiceConfig};
use crate::admin::AdminAddress;
use crate::net::ListenAddress;

/// The tables of a config file, each parsed by itself.
pub struct Validation<'a> {
    /// The services without a mistake of their own.
    pub services: &'a [ServiceConfig],
    /// Names of all services, with or without mistakes.
    pub names: &'a HashSet<String>,
    /// The server, unless its settings have a mistake.
    pub server: Option<&'a ServerConfig>,
}

impl Validation<'_> {
    /// Adds all conflicts to `mistakes`.
    pub fn run(&self, mistakes: &mut Vec<Mistake>) {
        let mut names: HashSet<&str> = HashSet::new();
        for (position, service) in self.services.iter().enumerate() {
            let mut report = |key: &str, text: String| {
                mistakes.push(Mistake {
                    line: service.origin.line_of(key),
                    text: format!("{key}: {text}"),
                });
            };
            if !names.insert(&service.name) {
                let name = &service.name;
                let text = format!("there is a service {name:?} already; choose another name");
                report("name", text);
            }
            match &service.behind {
                Some(behind) => self.check_behind(position, service, behind, &mut report),
                None if service.listener.addresses.is_empty() => {
                    let text =
                        "it is missing; write listen = \"127.0.0.1:7878\", or several in an array";
                    report("listen", text.into());
                }
                None => {}
            }
            self.check_addresses(position, service, &mut report);
            self.check_max_connections(service, &mut report);
        }
    }

    /// A service behind another one needs one that listens and speaks TLS.
    fn check_behind(
        &self,
        position: usize,
        service: &ServiceConfig,
        behind: &Behind,
        report: &mut impl FnMut(&str, String),
    ) {
        let front = &behind.service;
        for key in service.origin.keys.iter().filter(|key| key.of_listener) {
            report(
                &key.name,
                format!("set it for the service {front:?} instead"),
            );
        }
        match self.services.iter().find(|other| other.name == *front) {
            None if self.names.contains(front) => {}
            None => report("behind", format!("there is no service {front:?}")),
            Some(other) if other.behind.is_some() => {
                report(
                    "behind",
                    format!("{front:?} is itself behind another service"),
                );
            }
            Some(other) if other.listener.handshake.tls.is_none() => {
                let text = format!("{front:?} speaks no TLS; give it tls-cert and tls-key");
                report("behind", text);
            }
            Some(_) => {}
        }
        for name in &behind.server_names {
            let claims_name = |other: &&ServiceConfig| {
                other.behind.as_ref().is_some_and(|other| {
                    let mut names = other.server_names.iter();
                    other.service == *front
                        && names.any(|claimed| claimed.eq_ignore_ascii_case(name))
                })
            };
            if let Some(other) = self.services[..position].iter().rfind(claims_name) {
                let text = format!("{name:?} leads to the service {:?} already", other.name);
                report("server-name", text);
            }
        }
    }

    /// An address belongs to one service, and the admin API has its own.
    fn check_addresses(
        &self,
        position: usize,
        service: &ServiceConfig,
        report: &mut impl FnMut(&str, String),
    ) {
        let admin = self.server.and_then(|server| server.admin.as_ref());
        let admin = admin.map(|address| match address {
            AdminAddress::Unix(path) => ListenAddress::Unix(path.clone()),
            AdminAddress::Loopback(address) => ListenAddress::Ip(*address),
        });
        let before = self.services[..position].iter();
        let of_others: Vec<_> = before
            .flat_map(|other| other.listener.addresses.iter().map(move |at| (other, at)))
            .collect();
        for (index, address) in service.listener.addresses.iter().enumerate() {
            if let Some(admin) = &admin
                && address.is_taken_by(admin)
            {
                report(
                    "listen",
                    format!("{address} is the address of the admin API"),
                );
            }
            let own = service.listener.addresses[..index].iter();
            let own = own.map(|at| (service, at));
            for (other, taken) in of_others.iter().copied().chain(own) {
                let shares = |service: &ServiceConfig| service.listener.sockets.reuse_port;
                let both_share = shares(service) && shares(other);
                let name = &other.name;
                if *address == *taken && !address.takes_any_port() {
                    let text = format!("{address} belongs to the service {name:?} already");
                    report("listen", text);
                } else if !both_share && address.is_taken_by(taken) {
                    let text = format!(
                        "{address} conflicts with {taken} of the service {name:?}; choose another port, or listen on one of them only"
                    );
                    report("listen", text);
                }
            }
        }
    }

    /// A service cannot have more connections than the server.
    fn check_max_connections(
        &self,
        service: &ServiceConfig,
        report: &mut impl FnMut(&str, String),
    ) {
        let of_server = self.server.and_then(|server| server.max_connections);
        if let (Some(of_server), Some(of_service)) = (of_server, service.listener.max_connections)
            && of_service > of_server
        {
            let text = format!(
                "{of_service} is more than the {of_server} of all services; lower it, or raise max-connections of the server"
            );
            report("max-connections", text);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::model::OriginKey;
    use super::super::model::tests::{echo, server, tls};
    use super::*;

    fn mistakes(services: &[ServiceConfig], server: &ServerConfig) -> Vec<String> {
        let names = services.iter().map(|service| service.name.clone());
        let mut mistakes = Vec::new();
        let validation = Validation {
            services,
            names: &names.collect(),
            server: Some(server),
        };
        validation.run(&mut mistakes);
        mistakes.into_iter().map(|mistake| mistake.text).collect()
    }

    fn behind(name: &str, front: &str, server_names: &[&str]) -> ServiceConfig {
        let mut service = echo(name, &[]);
        service.behind = Some(Behind {
            service: front.into(),
            server_names: server_names.iter().map(ToString::to_string).collect(),
        });
        service
    }

    #[test]
    fn services_that_do_not_conflict_are_fine() {
        let mut front = echo("front", &["127.0.0.1:1", "127.0.0.1:0", "127.0.0.1:0"]);
        front.listener.handshake.tls = Some(tls());
        let services = [
            front,
            echo("other", &["127.0.0.2:1"]),
            behind("chat", "front", &["a.b"]),
        ];
        assert_eq!(mistakes(&services, &server()), [""; 0]);
    }

    #[test]
    fn names_and_addresses_are_unique() {
        let services = [
            echo("a", &["127.0.0.1:1"]),
            echo("a", &["127.0.0.1:1"]),
            echo("b", &["0.0.0.0:1"]),
            echo("c", &[]),
            echo("d", &["127.0.0.1:9"]),
        ];
        let server = ServerConfig {
            admin: Some("127.0.0.1:9".parse().unwrap()),
            ..server()
        };
        let found = mistakes(&services, &server);
        let expected = [
            "name: there is a service \"a\" already",
            "listen: 127.0.0.1:1 belongs to the service \"a\" already",
            "listen: 0.0.0.0:1 conflicts with 127.0.0.1:1 of the service \"a\"",
            "listen: 0.0.0.0:1 conflicts with 127.0.0.1:1 of the service \"a\"",
            "listen: it is missing",
            "listen: 127.0.0.1:9 is the address of the admin API",
        ];
        assert_eq!(found.len(), expected.len(), "{found:?}");
        for (found, expected) in found.iter().zip(expected) {
            assert!(found.starts_with(expected), "{found}");
        }
    }

    #[test]
    fn a_service_behind_another_one_has_no_listener_settings_and_its_own_names() {
        let mut front = echo("front", &["127.0.0.1:1"]);
        let first = behind("first", "front", &["chat.example"]);
        let mut second = behind("second", "front", &["CHAT.example"]);
        second.origin.keys.push(OriginKey {
            name: "backlog".into(),
            line: 7,
            of_listener: true,
        });
        let third = behind("third", "nobody", &["c.example"]);
        let fourth = behind("fourth", "first", &["d.example"]);
        let services = [front.clone(), first.clone(), second.clone(), third, fourth];
        assert_eq!(
            mistakes(&services, &server()),
            [
                "behind: \"front\" speaks no TLS; give it tls-cert and tls-key",
                "backlog: set it for the service \"front\" instead",
                "behind: \"front\" speaks no TLS; give it tls-cert and tls-key",
                "server-name: \"CHAT.example\" leads to the service \"first\" already",
                "behind: there is no service \"nobody\"",
                "behind: \"first\" is itself behind another service",
            ]
        );
        front.listener.handshake.tls = Some(tls());
        assert_eq!(mistakes(&[front, first], &server()), [""; 0]);
    }

    #[test]
    fn a_service_has_no_more_connections_than_the_server() {
        let mut service = echo("a", &["127.0.0.1:1"]);
        service.listener.max_connections = Some(11);
        let server = ServerConfig {
            max_connections: Some(10),
            ..server()
        };
        let found = mistakes(&[service], &server);
        assert!(
            found[0].starts_with("max-connections: 11 is more than the 10"),
            "{found:?}"
        );
    }
}
