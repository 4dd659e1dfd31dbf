//! Outbound connections and name lookups of guests.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures::future::{BoxFuture, FutureExt, Shared};
use tracing::{debug, warn};
use wasmtime_wasi::WasiCtx;
use wasmtime_wasi::sockets::{SocketAddrUse, WasiSocketsCtx};

use super::destination::{self, Destination};
use crate::limit::Limit;
use crate::sandbox::transport::SharedTransport;
use crate::sync::lock;

/// How long the answer to a name is reused.
///
/// Arbitrary: the system's resolver does not tell the time to live. Long enough that many guests
/// cost one lookup.
const ANSWER_LIFETIME: Duration = Duration::from_secs(10);

/// The number of addresses of a name that are considered.
const MAX_ADDRESSES: usize = 64;

/// The most looked-up addresses that a guest may connect to.
const MAX_LEARNED: usize = 256;

/// The outbound connections of one connection's guest.
#[derive(Clone)]
pub(crate) struct Outbound {
    destinations: Arc<Destinations>,
    /// The addresses that this guest learned from lookups.
    learned: Arc<Mutex<Vec<SocketAddr>>>,
    transport: SharedTransport,
}

impl Outbound {
    pub(crate) fn new(destinations: &Arc<Destinations>, transport: &SharedTransport) -> Self {
        Self {
            destinations: destinations.clone(),
            learned: Arc::default(),
            transport: transport.clone(),
        }
    }

    /// Makes the context of `wasi:sockets`.
    pub(crate) fn sockets(&self) -> WasiSocketsCtx {
        let this = self.clone();
        let mut context = WasiCtx::builder()
            .allow_tcp(!self.destinations.is_empty())
            .allow_udp(false)
            .allow_ip_name_lookup(false)
            .socket_addr_check(move |address, purpose| {
                let allowed = this.allows(address, purpose);
                Box::pin(std::future::ready(allowed))
            })
            .build();
        std::mem::take(context.sockets())
    }

    fn allows(&self, address: SocketAddr, purpose: SocketAddrUse) -> bool {
        match purpose {
            // wasmtime-wasi binds each socket before it connects. The kernel chooses address and
            // port then. Guests cannot bind sockets themselves.
            SocketAddrUse::TcpBind => address.ip().is_unspecified() && address.port() == 0,
            SocketAddrUse::TcpConnect => {
                let allowed = self.may_connect(address);
                if !allowed {
                    self.note_refusal();
                }
                allowed
            }
            _ => false,
        }
    }

    fn may_connect(&self, address: SocketAddr) -> bool {
        let canonical = SocketAddr::new(address.ip().to_canonical(), address.port());
        self.destinations
            .all
            .iter()
            .any(|destination| destination.covers(canonical))
            || lock(&self.learned).contains(&canonical)
    }

    /// Looks up the addresses of `name` that the guest may connect to.
    pub(super) fn look_up(
        &self,
        name: &str,
    ) -> impl Future<Output = Result<Vec<IpAddr>, LookupError>> + use<> {
        // An address needs no lookup, and the guest learns nothing that would allow it.
        let address = name.parse::<IpAddr>().ok();
        let answer = match address {
            Some(_) => None,
            None => destination::normalize_name(name)
                .and_then(|name| {
                    let names = &self.destinations.names;
                    names.iter().find(|granted| granted.name == name)
                })
                .map(GrantedName::look_up),
        };
        let this = self.clone();
        async move {
            if let Some(address) = address {
                return Ok(vec![address]);
            }
            let answer = match answer {
                Some(answer) => answer.await,
                None => Err(LookupError::Denied),
            };
            if answer == Err(LookupError::Denied) {
                this.note_refusal();
            }
            Ok(this.learn(&answer?))
        }
    }

    /// Lets the guest connect to `found`.
    ///
    /// Returns the addresses without their ports.
    fn learn(&self, found: &[SocketAddr]) -> Vec<IpAddr> {
        let mut learned = lock(&self.learned);
        // The oldest addresses make room for the new ones.
        let surplus = (learned.len() + found.len()).saturating_sub(MAX_LEARNED);
        let surplus = surplus.min(learned.len());
        learned.drain(..surplus);
        let mut addresses = Vec::new();
        for address in found {
            if !learned.contains(address) {
                learned.push(*address);
            }
            if !addresses.contains(&address.ip()) {
                addresses.push(address.ip());
            }
        }
        addresses
    }

    /// Records that the guest wanted more than its grants allow.
    pub(super) fn note_refusal(&self) {
        lock(&self.transport).limit_hit(Limit::AllowConnect);
    }
}

/// The destinations of a grant, and the names among them.
#[derive(Default)]
pub(crate) struct Destinations {
    all: Vec<Destination>,
    names: Vec<GrantedName>,
}

impl Destinations {
    pub(crate) fn new(destinations: Vec<Destination>) -> Self {
        let mut names: Vec<GrantedName> = Vec::new();
        for destination in &destinations {
            let Some(name) = destination.name() else {
                continue;
            };
            match names.iter_mut().find(|granted| granted.name == name) {
                Some(granted) => granted.destinations.push(destination.clone()),
                None => names.push(GrantedName {
                    name: name.into(),
                    destinations: vec![destination.clone()],
                    last: Mutex::default(),
                }),
            }
        }
        Self {
            all: destinations,
            names,
        }
    }

    /// Whether the grant has no destination.
    pub(crate) fn is_empty(&self) -> bool {
        self.all.is_empty()
    }
}

/// The permitted addresses of a name, or why there are none.
type Answer = Result<Arc<[SocketAddr]>, LookupError>;

/// An [`Answer`] that several guests wait for.
type SharedAnswer = Shared<BoxFuture<'static, Answer>>;

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum LookupError {
    /// The name is not granted, or all of its addresses are forbidden.
    Denied,
    /// The resolver does not know the name, or does not answer.
    Unknown,
}

/// A name that guests may look up.
struct GrantedName {
    name: String,
    destinations: Vec<Destination>,
    last: Mutex<Option<Lookup>>,
}

/// A lookup by the system's resolver.
///
/// The resolver blocks a thread until it answers. A name has one lookup at a time, however many
/// guests ask, and the lookup goes on if those guests end.
struct Lookup {
    began: Instant,
    answer: SharedAnswer,
}

impl GrantedName {
    fn look_up(&self) -> SharedAnswer {
        let mut last = lock(&self.last);
        if let Some(Lookup { began, answer }) = &*last {
            // A shared future notices its completion only when somebody polls it.
            let is_complete = answer.clone().now_or_never().is_some();
            if !is_complete || began.elapsed() < ANSWER_LIFETIME {
                return answer.clone();
            }
        }
        let task = tokio::spawn(resolve(self.name.clone(), self.destinations.clone()));
        let answer = async { task.await.unwrap_or(Err(LookupError::Unknown)) };
        let answer = answer.boxed().shared();
        *last = Some(Lookup {
            began: Instant::now(),
            answer: answer.clone(),
        });
        answer
    }
}

async fn resolve(name: String, destinations: Vec<Destination>) -> Answer {
    let addresses: Vec<IpAddr> = match tokio::net::lookup_host((name.as_str(), 0)).await {
        Ok(addresses) => addresses
            .map(|address| address.ip())
            .take(MAX_ADDRESSES)
            .collect(),
        Err(error) => {
            debug!(name, %error, "cannot resolve a name that guests may connect to");
            return Err(LookupError::Unknown);
        }
    };
    let permitted = permitted(&destinations, &addresses);
    if permitted.is_empty() {
        warn!(
            name,
            ?addresses,
            fix = "allow-connect NAME:PORT/CIDR, if the name may lead there",
            "guests may not connect to any address of a granted name: none is public or in its network"
        );
        return Err(LookupError::Denied);
    }
    Ok(permitted.into())
}

/// The permitted ones of `addresses`, each with the ports of its `destinations`.
fn permitted(destinations: &[Destination], addresses: &[IpAddr]) -> Vec<SocketAddr> {
    let sockets = |address: &IpAddr| {
        let address = *address;
        destinations
            .iter()
            .filter_map(move |destination| destination.permit(address))
    };
    addresses.iter().flat_map(sockets).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn destinations(texts: &[&str]) -> Vec<Destination> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    /// The permitted addresses of a resolver's answer, as text.
    fn permitted_of(destinations_of_name: &[&str], answer: &[&str]) -> Vec<String> {
        let addresses: Vec<IpAddr> = answer.iter().map(|text| text.parse().unwrap()).collect();
        permitted(&destinations(destinations_of_name), &addresses)
            .iter()
            .map(ToString::to_string)
            .collect()
    }

    #[test]
    fn dns_rebinding_does_not_lead_inside() {
        // First a real address, then the addresses that an attacker who owns the name would choose.
        assert_eq!(
            permitted_of(&["db.example.com:80"], &["8.8.8.8"]),
            ["8.8.8.8:80"]
        );
        let inside = ["127.0.0.1", "10.0.0.1", "169.254.169.254", "::1", "fd00::1"];
        assert!(permitted_of(&["db.example.com:80"], &inside).is_empty());
        assert_eq!(
            permitted_of(&["db.example.com:80"], &["10.0.0.1", "8.8.8.8"]),
            ["8.8.8.8:80"]
        );
        assert_eq!(
            permitted_of(&["db:80/10.0.0.0/8", "db:81"], &["10.0.0.1", "8.8.8.8"]),
            ["10.0.0.1:80", "8.8.8.8:81"]
        );
    }

    #[tokio::test]
    async fn many_guests_share_one_lookup() {
        let granted = Destinations::new(destinations(&["localhost:80/127.0.0.0/8"]));
        let first = granted.names[0].look_up();
        let second = granted.names[0].look_up();
        assert!(first.ptr_eq(&second));
        let answer = first.await.unwrap();
        assert_eq!(*answer, ["127.0.0.1:80".parse().unwrap()]);
        assert!(granted.names[0].look_up().ptr_eq(&second));
    }
}
