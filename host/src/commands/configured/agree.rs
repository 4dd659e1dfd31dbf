//! What the services of a config file have to be to each other.

use std::collections::HashSet;

use wasinetd::admin;
use wasinetd::config::Mistake;
use wasinetd::net::ListenAddress;

use super::ServiceSpec;
use crate::cli::ServerTable;

/// What there is in a config file.
pub(super) struct Validation<'a> {
    /// The services that nothing is wrong with by themselves.
    pub(super) services: &'a [ServiceSpec],
    /// The names of all services.
    pub(super) named: &'a HashSet<String>,
    /// What is said of the server, if nothing is wrong with that.
    pub(super) server: Option<&'a ServerTable>,
}

/// What a service that is behind another one has no say in.
const OF_THE_LISTENER: [&str; 25] = [
    "dispatch",
    "max-connections",
    "allow",
    "deny",
    "max-connections-per-source",
    "source-prefix",
    "accept-rate",
    "accept-rate-per-source",
    "when-full",
    "full-banner",
    "keepalive",
    "backlog",
    "reuse-port",
    "unix-mode",
    "unix-owner",
    "proxy-from",
    "tls-cert",
    "tls-key",
    "tls-ocsp",
    "tls-alpn",
    "tls-min-version",
    "tls-client-ca",
    "tls-client-auth",
    "handshake-timeout",
    "max-handshakes",
];

impl Validation<'_> {
    /// Adds to `mistakes` what is wrong between them.
    pub(super) fn validate(&self, mistakes: &mut Vec<Mistake>) {
        let mut names: HashSet<&str> = HashSet::new();
        for (n, spec) in self.services.iter().enumerate() {
            let mut wrong = |key: &str, text: String| {
                mistakes.push(Mistake {
                    line: spec.line(key),
                    text: format!("{key}: {text}"),
                });
            };
            if !names.insert(&spec.name) {
                let name = &spec.name;
                let text = format!("there is a service {name:?} already; choose another");
                wrong("name", text);
            }
            match &spec.behind {
                Some((other, names)) => self.behind(n, spec, other, names, &mut wrong),
                None if spec.args.listen.is_empty() => {
                    let text =
                        "it is missing; write listen = \"127.0.0.1:7878\", or several in an array";
                    wrong("listen", text.into());
                }
                None => {}
            }
            self.listen(n, spec, &mut wrong);
            let most = self.server.and_then(|server| server.max_connections);
            if let (Some(most), Some(of_service)) = (most, spec.args.max_connections)
                && of_service > most
            {
                let text = format!(
                    "{of_service} is more than the {most} of all services; lower it, or raise max-connections of the server"
                );
                wrong("max-connections", text);
            }
        }
    }

    /// A service may be behind one that listens, and speaks TLS.
    fn behind(
        &self,
        n: usize,
        spec: &ServiceSpec,
        other: &str,
        names: &[String],
        wrong: &mut impl FnMut(&str, String),
    ) {
        for key in OF_THE_LISTENER {
            if spec.table.get(key).is_some() {
                wrong(key, format!("it is for the service {other:?} to say"));
            }
        }
        let mut others = self.services.iter();
        match others.find(|one| one.name == *other) {
            None if self.named.contains(other) => {}
            None => wrong("behind", format!("there is no service {other:?}")),
            Some(one) if one.behind.is_some() => {
                wrong("behind", format!("{other:?} is behind another one itself"));
            }
            Some(one) if !one.args.front.speaks_tls() => {
                let text = format!("{other:?} speaks no TLS; give it tls-cert and tls-key");
                wrong("behind", text);
            }
            Some(_) => {}
        }
        for name in names {
            let has_it = |one: &&ServiceSpec| {
                one.behind.as_ref().is_some_and(|(before, names)| {
                    before == other && names.iter().any(|one| one.eq_ignore_ascii_case(name))
                })
            };
            if let Some(one) = self.services[..n].iter().rfind(has_it) {
                let text = format!("{name:?} leads to the service {:?} already", one.name);
                wrong("server-name", text);
            }
        }
    }

    /// A service has its addresses for itself.
    fn listen(&self, n: usize, spec: &ServiceSpec, wrong: &mut impl FnMut(&str, String)) {
        let admin = self.server.and_then(|server| server.server.admin.as_ref());
        let admin = admin.map(|address| match address {
            admin::AdminAddress::Unix(path) => ListenAddress::Unix(path.clone()),
            admin::AdminAddress::Loopback(address) => ListenAddress::Ip(*address),
        });
        for (m, address) in spec.args.listen.iter().enumerate() {
            if admin
                .as_ref()
                .is_some_and(|admin| address.is_taken_by(admin))
            {
                wrong(
                    "listen",
                    format!("{address} is where operators connect to (admin)"),
                );
            }
            let of_others = self.services[..n].iter();
            let of_others =
                of_others.flat_map(|one| one.args.listen.iter().map(move |at| (one, at)));
            let own = spec.args.listen[..m].iter().map(|at| (spec, at));
            for (other, at) in of_others.chain(own) {
                let shares = |spec: &ServiceSpec| spec.args.socket_settings().reuse_port;
                let share = shares(spec) && shares(other);
                if *address == *at && !address.takes_any_port() {
                    let text = format!("{address} is the service {:?}'s already", other.name);
                    wrong("listen", text);
                } else if !share && address.is_taken_by(at) {
                    let text = format!(
                        "{address} is not free beside {at} of the service {:?}; choose another port, or listen at one of them",
                        other.name
                    );
                    wrong("listen", text);
                }
            }
        }
    }
}
