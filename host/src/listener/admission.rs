//! Who may connect, how many at once from one source, and how fast.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::IpAddr;
use std::num::NonZeroU32;
use std::str::FromStr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use governor::clock::{Clock, DefaultClock};
use governor::{DefaultDirectRateLimiter, DefaultKeyedRateLimiter, Quota, RateLimiter};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::limit::Limit;
use crate::net::Cidr;
use crate::net::Peer;

/// What is asked of clients before they are served. By default nothing is.
#[derive(Clone, Debug, Default)]
pub struct AdmissionRules {
    /// The only sources that may connect, unless there are none.
    pub allow: Vec<Cidr>,
    /// Sources that may not connect, whether allowed or not. Neither concerns the clients of Unix sockets,
    /// whom the permissions of a file let in.
    pub deny: Vec<Cidr>,
    /// Proxies: they are let in, and it is their clients of whom all of this is asked.
    pub proxies: Vec<Cidr>,
    /// What counts as one source.
    pub prefix: SourcePrefix,
    /// Connections at once from one source.
    pub connections_per_source: Option<usize>,
    /// Connections begun in a second, and at once after a pause.
    pub rate: Option<NonZeroU32>,
    /// The same, from one source.
    pub rate_per_source: Option<NonZeroU32>,
}

/// How many leading bits of an address tell sources apart.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SourcePrefix {
    /// Of an IPv4 address.
    pub v4: u8,
    /// Of an IPv6 address.
    pub v6: u8,
}

impl Default for SourcePrefix {
    /// One IPv4 address, and the IPv6 network of one site (RFC 6177), which has as many addresses
    /// as it likes.
    fn default() -> Self {
        Self { v4: 32, v6: 64 }
    }
}

/// What is wrong with the text of a [`Prefix`].
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[error("not a number from 1 to 32 and one from 1 to 128, such as 32,64")]
pub struct SourcePrefixError;

impl FromStr for SourcePrefix {
    type Err = SourcePrefixError;

    fn from_str(text: &str) -> Result<Self, SourcePrefixError> {
        let bits = |text: &str, most| {
            let bits = text.parse().ok();
            bits.filter(|bits| (1..=most).contains(bits))
                .ok_or(SourcePrefixError)
        };
        let (v4, v6) = text.split_once(',').ok_or(SourcePrefixError)?;
        Ok(Self {
            v4: bits(v4, 32)?,
            v6: bits(v6, 128)?,
        })
    }
}

impl SourcePrefix {
    /// The source that `peer` belongs to.
    fn source(self, peer: Peer) -> Source {
        match peer {
            Peer::Ip(address) => Source::Network(self.of(address.ip())),
            Peer::Unix { uid, .. } => Source::User(uid),
        }
    }

    /// The network that `address` belongs to.
    fn of(self, address: IpAddr) -> IpNet {
        match address.to_canonical() {
            IpAddr::V4(address) => Ipv4Net::new_assert(address, self.v4.min(32)).trunc().into(),
            IpAddr::V6(address) => Ipv6Net::new_assert(address, self.v6.min(128))
                .trunc()
                .into(),
        }
    }
}

/// Those who count as one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Source {
    Network(IpNet),
    /// A user of this machine.
    User(u32),
}

/// Applies [`Rules`] to clients. Clones share what they count.
#[derive(Clone)]
pub struct Admission(Arc<Shared>);

struct Shared {
    rules: AdmissionRules,
    counted: Arc<Counted>,
    rate: Option<Arc<DefaultDirectRateLimiter>>,
    rate_per_source: Option<Arc<DefaultKeyedRateLimiter<Source>>>,
    /// Clients since sources that have long been quiet were forgotten.
    since_sweep: AtomicU32,
}

/// How many are connected of each source.
#[derive(Default)]
pub(super) struct Counted(Mutex<HashMap<Source, usize>>);

/// How many clients there are between two sweeps of the sources whose rate is known.
const SWEEP: u32 = 4096;

impl Admission {
    /// With nobody counted yet.
    pub fn new(rules: AdmissionRules) -> Self {
        Self(Arc::new(Shared::new(rules)))
    }

    /// The same clients, by other rules: those who are counted still are, and who came too fast for a
    /// rate that has not changed still does.
    pub fn with(&self, rules: AdmissionRules) -> Self {
        let (before, mut new) = (&self.0, Shared::new(rules));
        new.counted = before.counted.clone();
        if new.rules.rate == before.rules.rate {
            new.rate = before.rate.clone();
        }
        if new.rules.rate_per_source == before.rules.rate_per_source {
            new.rate_per_source = before.rate_per_source.clone();
        }
        Self(Arc::new(new))
    }

    /// Takes leave to accept one more client. Or says how long to wait for it.
    pub(super) fn take_turn(&self) -> Result<(), Duration> {
        let Some(rate) = &self.0.rate else {
            return Ok(());
        };
        rate.check()
            .map_err(|not_until| not_until.wait_time_from(DefaultClock::default().now()))
    }

    /// Lets in who has connected, and counts it until the place is dropped. Or says which limit is in
    /// its way.
    pub(super) fn admit(&self, peer: Peer) -> Result<SourcePermit, Limit> {
        if let Peer::Ip(address) = peer {
            let mut proxies = self.0.rules.proxies.iter();
            if proxies.any(|proxy| proxy.contains(address.ip())) {
                return Ok(SourcePermit::OfProxy(self.clone()));
            }
        }
        self.admit_client(peer)
    }

    fn admit_client(&self, peer: Peer) -> Result<SourcePermit, Limit> {
        let AdmissionRules {
            allow,
            deny,
            prefix,
            connections_per_source,
            ..
        } = &self.0.rules;
        if let Peer::Ip(address) = peer {
            let among = |networks: &[Cidr]| networks.iter().any(|n| n.contains(address.ip()));
            if among(deny) {
                return Err(Limit::Deny);
            }
            if !allow.is_empty() && !among(allow) {
                return Err(Limit::Allow);
            }
        }
        let source = prefix.source(peer);
        let place = match connections_per_source {
            Some(most) => self.place(source, *most)?,
            None => SourcePermit::Uncounted,
        };
        if let Some(rate) = &self.0.rate_per_source {
            if self.0.since_sweep.fetch_add(1, Ordering::Relaxed) == SWEEP {
                self.0.since_sweep.store(0, Ordering::Relaxed);
                rate.retain_recent();
            }
            rate.check_key(&source)
                .map_err(|_| Limit::AcceptRatePerSource)?;
        }
        Ok(place)
    }

    fn place(&self, source: Source, most: usize) -> Result<SourcePermit, Limit> {
        let mut open = self.0.counted.lock();
        let count = open.entry(source).or_default();
        if *count >= most {
            return Err(Limit::MaxConnectionsPerSource);
        }
        *count += 1;
        Ok(SourcePermit::Counted(self.0.counted.clone(), source))
    }
}

impl Shared {
    fn new(rules: AdmissionRules) -> Self {
        let quota = Quota::per_second;
        let direct = |rate| Arc::new(RateLimiter::direct(quota(rate)));
        let keyed = |rate| Arc::new(RateLimiter::keyed(quota(rate)));
        Self {
            counted: Arc::default(),
            rate: rules.rate.map(direct),
            rate_per_source: rules.rate_per_source.map(keyed),
            since_sweep: AtomicU32::new(0),
            rules,
        }
    }
}

impl Counted {
    fn lock(&self) -> MutexGuard<'_, HashMap<Source, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A client's place among those of its source. Given back when it is dropped.
pub(super) enum SourcePermit {
    /// Nobody counts.
    Uncounted,
    /// One of those of this source.
    Counted(Arc<Counted>, Source),
    /// A proxy's: it is not known yet whose it is.
    OfProxy(Admission),
}

impl SourcePermit {
    /// Whose it is, where that counts.
    pub(super) fn source(&self) -> Option<Source> {
        match self {
            Self::Counted(_, source) => Some(*source),
            Self::Uncounted | Self::OfProxy(_) => None,
        }
    }

    /// Lets in the client that a proxy speaks for.
    pub(super) fn admit(&mut self, client: Peer) -> Result<(), Limit> {
        if let Self::OfProxy(admission) = self {
            *self = admission.admit_client(client)?;
        }
        Ok(())
    }
}

impl Drop for SourcePermit {
    fn drop(&mut self) {
        let Self::Counted(counted, source) = self else {
            return;
        };
        if let Entry::Occupied(mut count) = counted.lock().entry(*source) {
            *count.get_mut() -= 1;
            if *count.get() == 0 {
                count.remove();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;

    fn admission(rules: AdmissionRules) -> Admission {
        Admission::new(rules)
    }

    fn address(text: &str) -> Peer {
        from(text.parse().unwrap())
    }

    fn from(address: IpAddr) -> Peer {
        SocketAddr::new(address, 4711).into()
    }

    fn networks(texts: &[&str]) -> Vec<Cidr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn who_is_denied_is_denied_though_allowed() {
        let admission = admission(AdmissionRules {
            allow: networks(&["10.0.0.0/8", "2001:db8::/32"]),
            deny: networks(&["10.1.0.0/16"]),
            ..AdmissionRules::default()
        });
        assert!(admission.admit(address("10.2.3.4")).is_ok());
        assert!(admission.admit(address("2001:db8::1")).is_ok());
        assert!(admission.admit(address("::ffff:10.2.3.4")).is_ok());
        assert_eq!(
            admission.admit(address("10.1.3.4")).err(),
            Some(Limit::Deny)
        );
        assert_eq!(
            admission.admit(address("::ffff:10.1.3.4")).err(),
            Some(Limit::Deny)
        );
        assert_eq!(
            admission.admit(address("192.0.2.1")).err(),
            Some(Limit::Allow)
        );
    }

    #[test]
    fn a_user_is_a_source_and_of_no_network() {
        let admission = admission(AdmissionRules {
            allow: networks(&["192.0.2.0/24"]),
            deny: networks(&["0.0.0.0/0", "::/0"]),
            connections_per_source: Some(1),
            ..AdmissionRules::default()
        });
        let user = |uid, pid| Peer::Unix { uid, pid };
        let first = admission.admit(user(1000, 1)).unwrap();
        assert_eq!(
            admission.admit(user(1000, 2)).err(),
            Some(Limit::MaxConnectionsPerSource)
        );
        assert!(admission.admit(user(1001, 1)).is_ok());
        drop(first);
        assert!(admission.admit(user(1000, 2)).is_ok());
    }

    #[test]
    fn a_source_is_a_prefix_and_forgotten_when_it_is_gone() {
        let admission = admission(AdmissionRules {
            connections_per_source: Some(2),
            ..AdmissionRules::default()
        });
        let full = Some(Limit::MaxConnectionsPerSource);
        let first = admission.admit(address("2001:db8:0:1::1")).unwrap();
        let second = admission.admit(address("2001:db8:0:1:ffff::2")).unwrap();
        assert_eq!(admission.admit(address("2001:db8:0:1::3")).err(), full);
        assert!(admission.admit(address("2001:db8:0:2::1")).is_ok());
        assert!(admission.admit(address("192.0.2.1")).is_ok());
        drop(first);
        let third = admission.admit(address("2001:db8:0:1::3")).unwrap();
        assert_eq!(admission.admit(address("2001:db8:0:1::4")).err(), full);
        drop((second, third));
        assert!(admission.0.counted.lock().is_empty());
    }

    #[test]
    fn a_source_begins_so_many_and_others_are_not_concerned() {
        let admission = admission(AdmissionRules {
            rate_per_source: NonZeroU32::new(3),
            connections_per_source: Some(100),
            ..AdmissionRules::default()
        });
        for _ in 0..3 {
            assert!(admission.admit(address("192.0.2.1")).is_ok());
        }
        assert_eq!(
            admission.admit(address("192.0.2.1")).err(),
            Some(Limit::AcceptRatePerSource)
        );
        assert!(admission.admit(address("192.0.2.2")).is_ok());
        // Who was refused has no place.
        assert!(admission.0.counted.lock().is_empty());
    }

    #[test]
    fn it_is_the_clients_of_a_proxy_who_are_let_in_or_not() {
        let admission = admission(AdmissionRules {
            proxies: networks(&["10.0.0.0/8"]),
            deny: networks(&["10.0.0.0/8", "192.0.2.7"]),
            connections_per_source: Some(1),
            ..AdmissionRules::default()
        });
        let mut places: Vec<_> = (0..3)
            .map(|_| admission.admit(address("10.0.0.1")).unwrap())
            .collect();
        assert!(admission.0.counted.lock().is_empty());
        assert_eq!(places[0].admit(address("192.0.2.1")), Ok(()));
        assert_eq!(
            places[1].admit(address("192.0.2.1")),
            Err(Limit::MaxConnectionsPerSource)
        );
        assert_eq!(places[1].admit(address("192.0.2.7")), Err(Limit::Deny));
        // What a proxy says of itself is not believed of another: this is a client.
        assert_eq!(places[1].admit(address("10.0.0.1")), Err(Limit::Deny));
        assert_eq!(places[2].admit(address("192.0.2.2")), Ok(()));
        assert_eq!(admission.0.counted.lock().len(), 2);
        drop(places);
        assert!(admission.0.counted.lock().is_empty());
    }

    #[test]
    fn other_rules_are_for_the_same_clients() {
        let rules = AdmissionRules {
            connections_per_source: Some(2),
            rate_per_source: NonZeroU32::new(2),
            ..AdmissionRules::default()
        };
        let before = admission(rules.clone());
        let first = before.admit(address("192.0.2.1")).unwrap();
        let fewer = before.with(AdmissionRules {
            connections_per_source: Some(1),
            ..rules.clone()
        });
        let full = Some(Limit::MaxConnectionsPerSource);
        assert_eq!(fewer.admit(address("192.0.2.1")).err(), full);
        drop(first);
        let second = fewer.admit(address("192.0.2.1"));
        assert!(second.is_ok());
        // The rate is the one that it was, and used up.
        let more = fewer.with(rules.clone());
        let fast = Some(Limit::AcceptRatePerSource);
        assert_eq!(more.admit(address("192.0.2.1")).err(), fast);
        let faster = more.with(AdmissionRules {
            rate_per_source: NonZeroU32::new(3),
            ..rules
        });
        assert!(faster.admit(address("192.0.2.1")).is_ok());
    }

    #[test]
    fn a_prefix_is_two_numbers_of_bits() {
        assert_eq!("24,48".parse(), Ok(SourcePrefix { v4: 24, v6: 48 }));
        for text in ["", "24", "0,64", "33,64", "32,0", "32,129", "32,64,", "a,b"] {
            assert_eq!(
                text.parse::<SourcePrefix>(),
                Err(SourcePrefixError),
                "{text}"
            );
        }
    }

    #[test]
    fn whoever_comes_and_goes_leaves_nothing_behind() {
        // Clients of few addresses come, and go in any order.
        let clients = bolero::generator::produce::<(u8, u8, Vec<(u8, bool)>)>();
        bolero::check!()
            .with_generator(clients)
            .for_each(|(most, bits, clients)| {
                let most = usize::from(most % 4) + 1;
                let admission = admission(AdmissionRules {
                    prefix: SourcePrefix {
                        v4: bits % 32 + 1,
                        v6: 64,
                    },
                    connections_per_source: Some(most),
                    ..AdmissionRules::default()
                });
                let mut places = Vec::new();
                for (client, leaves) in clients {
                    let address = match client >> 6 {
                        3 => Peer::Unix {
                            uid: u32::from(client & 3),
                            pid: i32::from(*client),
                        },
                        host => from(IpAddr::from([10, 0, client & 3, host])),
                    };
                    let of_source = admission
                        .0
                        .counted
                        .lock()
                        .get(&admission.0.rules.prefix.source(address))
                        .copied();
                    match admission.admit(address) {
                        Ok(place) => places.push(place),
                        Err(limit) => {
                            assert_eq!(limit, Limit::MaxConnectionsPerSource);
                            assert_eq!(of_source, Some(most));
                        }
                    }
                    if *leaves && !places.is_empty() {
                        places.swap_remove(usize::from(*client) % places.len());
                    }
                }
                drop(places);
                assert!(admission.0.counted.lock().is_empty());
            });
    }

    #[test]
    fn all_together_begin_so_many() {
        let admission = admission(AdmissionRules {
            rate: NonZeroU32::new(2),
            ..AdmissionRules::default()
        });
        assert!(admission.take_turn().is_ok());
        assert!(admission.take_turn().is_ok());
        let wait = admission.take_turn().unwrap_err();
        assert!(
            wait > Duration::ZERO && wait <= Duration::from_millis(500),
            "{wait:?}"
        );
    }
}
