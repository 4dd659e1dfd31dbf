//! Admission of clients: who may connect, how many from one source, and how fast.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use governor::clock::{Clock, DefaultClock};
use governor::{DefaultDirectRateLimiter, DefaultKeyedRateLimiter, Quota, RateLimiter};

use super::source::{Source, SourcePrefix};
use crate::limit::Limit;
use crate::net::{Cidr, Peer};
use crate::sync::lock;

/// Conditions that a client must meet to be served. There are none by default.
#[derive(Clone, Debug, Default)]
pub struct AdmissionRules {
    /// Sources that may connect. Empty allows all.
    pub allow: Vec<Cidr>,
    /// Sources that may not connect, even if allowed.
    ///
    /// Neither list applies to clients of Unix sockets, which file permissions control.
    pub deny: Vec<Cidr>,
    /// Proxies. They are admitted, and the rules apply to the clients that they speak for.
    pub proxies: Vec<Cidr>,
    /// Prefix of the addresses that count as one source.
    pub prefix: SourcePrefix,
    /// Concurrent connections from one source.
    pub connections_per_source: Option<usize>,
    /// New connections per second. After a pause, as many are accepted at once.
    pub rate: Option<NonZeroU32>,
    /// New connections per second from one source.
    pub rate_per_source: Option<NonZeroU32>,
}

/// Applies [`AdmissionRules`] to clients. Clones share their counts.
#[derive(Clone)]
pub struct Admission(Arc<Shared>);

struct Shared {
    rules: AdmissionRules,
    counts: Arc<SourceCounts>,
    rate: Option<Arc<DefaultDirectRateLimiter>>,
    rate_per_source: Option<Arc<DefaultKeyedRateLimiter<Source>>>,
    /// Clients since the rates of idle sources were removed.
    since_sweep: AtomicU32,
}

/// Open connections of each source. A source without connections has no entry.
#[derive(Default)]
pub(super) struct SourceCounts(Mutex<HashMap<Source, usize>>);

/// Clients between two sweeps that remove the rates of idle sources. Arbitrary.
const SWEEP_INTERVAL: u32 = 4096;

impl Admission {
    /// Applies `rules`, with no connection counted yet.
    pub fn new(rules: AdmissionRules) -> Self {
        Self(Arc::new(Shared::new(rules)))
    }

    /// Applies other rules to the same clients.
    ///
    /// Open connections stay counted. A rate that has not changed keeps its state.
    pub fn with(&self, rules: AdmissionRules) -> Self {
        let (old, mut new) = (&self.0, Shared::new(rules));
        new.counts = old.counts.clone();
        if new.rules.rate == old.rules.rate {
            new.rate = old.rate.clone();
        }
        if new.rules.rate_per_source == old.rules.rate_per_source {
            new.rate_per_source = old.rate_per_source.clone();
        }
        Self(Arc::new(new))
    }

    /// Takes one client from the accept rate. If the rate is used up, returns the time to wait.
    pub(super) fn check_rate(&self) -> Result<(), Duration> {
        let Some(rate) = &self.0.rate else {
            return Ok(());
        };
        rate.check()
            .map_err(|not_until| not_until.wait_time_from(DefaultClock::default().now()))
    }

    /// Admits a peer, or returns the limit that refuses it.
    ///
    /// The peer is counted until the permit is dropped.
    pub(super) fn admit(&self, peer: Peer) -> Result<SourcePermit, Limit> {
        if let Peer::Ip(address) = peer {
            let mut proxies = self.0.rules.proxies.iter();
            if proxies.any(|proxy| proxy.contains(address.ip())) {
                return Ok(SourcePermit::Proxy(self.clone()));
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
            let is_in = |networks: &[Cidr]| networks.iter().any(|n| n.contains(address.ip()));
            if is_in(deny) {
                return Err(Limit::Deny);
            }
            if !allow.is_empty() && !is_in(allow) {
                return Err(Limit::Allow);
            }
        }
        let source = prefix.source(peer);
        let permit = match connections_per_source {
            Some(max) => self.count(source, *max)?,
            None => SourcePermit::Uncounted,
        };
        if let Some(rate) = &self.0.rate_per_source {
            if self.0.since_sweep.fetch_add(1, Ordering::Relaxed) == SWEEP_INTERVAL {
                self.0.since_sweep.store(0, Ordering::Relaxed);
                rate.retain_recent();
            }
            rate.check_key(&source)
                .map_err(|_| Limit::AcceptRatePerSource)?;
        }
        Ok(permit)
    }

    fn count(&self, source: Source, max: usize) -> Result<SourcePermit, Limit> {
        let mut counts = lock(&self.0.counts.0);
        let count = counts.entry(source).or_default();
        if *count >= max {
            return Err(Limit::MaxConnectionsPerSource);
        }
        *count += 1;
        Ok(SourcePermit::Counted(self.0.counts.clone(), source))
    }
}

impl Shared {
    fn new(rules: AdmissionRules) -> Self {
        let quota = Quota::per_second;
        let direct = |rate| Arc::new(RateLimiter::direct(quota(rate)));
        let keyed = |rate| Arc::new(RateLimiter::keyed(quota(rate)));
        Self {
            counts: Arc::default(),
            rate: rules.rate.map(direct),
            rate_per_source: rules.rate_per_source.map(keyed),
            since_sweep: AtomicU32::new(0),
            rules,
        }
    }
}

/// A connection's share of the connections of its source. Released when dropped.
pub(super) enum SourcePermit {
    /// Connections per source are not limited.
    Uncounted,
    /// One of the connections of this source.
    Counted(Arc<SourceCounts>, Source),
    /// A connection of a proxy. Its client is not known yet.
    Proxy(Admission),
}

impl SourcePermit {
    /// The source, if connections per source are limited.
    pub(super) fn source(&self) -> Option<Source> {
        match self {
            Self::Counted(_, source) => Some(*source),
            Self::Uncounted | Self::Proxy(_) => None,
        }
    }

    /// Admits the client of a proxy, or returns the limit that refuses it.
    pub(super) fn admit(&mut self, client: Peer) -> Result<(), Limit> {
        if let Self::Proxy(admission) = self {
            *self = admission.admit_client(client)?;
        }
        Ok(())
    }
}

impl Drop for SourcePermit {
    fn drop(&mut self) {
        let Self::Counted(counts, source) = self else {
            return;
        };
        if let Entry::Occupied(mut count) = lock(&counts.0).entry(*source) {
            *count.get_mut() -= 1;
            if *count.get() == 0 {
                count.remove();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, SocketAddr};

    use super::*;

    fn admission(rules: AdmissionRules) -> Admission {
        Admission::new(rules)
    }

    fn peer(text: &str) -> Peer {
        peer_at(text.parse().unwrap())
    }

    fn peer_at(address: IpAddr) -> Peer {
        SocketAddr::new(address, 4711).into()
    }

    fn open_connections(admission: &Admission, source: Source) -> Option<usize> {
        lock(&admission.0.counts.0).get(&source).copied()
    }

    fn counted_sources(admission: &Admission) -> usize {
        lock(&admission.0.counts.0).len()
    }

    fn networks(texts: &[&str]) -> Vec<Cidr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn a_denied_client_is_refused_even_if_allowed() {
        let admission = admission(AdmissionRules {
            allow: networks(&["10.0.0.0/8", "2001:db8::/32"]),
            deny: networks(&["10.1.0.0/16"]),
            ..AdmissionRules::default()
        });
        assert!(admission.admit(peer("10.2.3.4")).is_ok());
        assert!(admission.admit(peer("2001:db8::1")).is_ok());
        assert!(admission.admit(peer("::ffff:10.2.3.4")).is_ok());
        assert_eq!(admission.admit(peer("10.1.3.4")).err(), Some(Limit::Deny));
        assert_eq!(
            admission.admit(peer("::ffff:10.1.3.4")).err(),
            Some(Limit::Deny)
        );
        assert_eq!(admission.admit(peer("192.0.2.1")).err(), Some(Limit::Allow));
    }

    #[test]
    fn a_local_user_is_a_source_and_in_no_network() {
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
    fn clients_with_one_prefix_share_a_count_until_they_leave() {
        let admission = admission(AdmissionRules {
            connections_per_source: Some(2),
            ..AdmissionRules::default()
        });
        let full = Some(Limit::MaxConnectionsPerSource);
        let first = admission.admit(peer("2001:db8:0:1::1")).unwrap();
        let second = admission.admit(peer("2001:db8:0:1:ffff::2")).unwrap();
        assert_eq!(admission.admit(peer("2001:db8:0:1::3")).err(), full);
        assert!(admission.admit(peer("2001:db8:0:2::1")).is_ok());
        assert!(admission.admit(peer("192.0.2.1")).is_ok());
        drop(first);
        let third = admission.admit(peer("2001:db8:0:1::3")).unwrap();
        assert_eq!(admission.admit(peer("2001:db8:0:1::4")).err(), full);
        drop((second, third));
        assert_eq!(counted_sources(&admission), 0);
    }

    #[test]
    fn the_rate_of_one_source_does_not_affect_others() {
        let admission = admission(AdmissionRules {
            rate_per_source: NonZeroU32::new(3),
            connections_per_source: Some(100),
            ..AdmissionRules::default()
        });
        for _ in 0..3 {
            assert!(admission.admit(peer("192.0.2.1")).is_ok());
        }
        assert_eq!(
            admission.admit(peer("192.0.2.1")).err(),
            Some(Limit::AcceptRatePerSource)
        );
        assert!(admission.admit(peer("192.0.2.2")).is_ok());
        // A refused client is not counted.
        assert_eq!(counted_sources(&admission), 0);
    }

    #[test]
    fn rules_apply_to_the_clients_of_a_proxy() {
        let admission = admission(AdmissionRules {
            proxies: networks(&["10.0.0.0/8"]),
            deny: networks(&["10.0.0.0/8", "192.0.2.7"]),
            connections_per_source: Some(1),
            ..AdmissionRules::default()
        });
        let mut permits: Vec<_> = (0..3)
            .map(|_| admission.admit(peer("10.0.0.1")).unwrap())
            .collect();
        assert_eq!(counted_sources(&admission), 0);
        assert_eq!(permits[0].admit(peer("192.0.2.1")), Ok(()));
        assert_eq!(
            permits[1].admit(peer("192.0.2.1")),
            Err(Limit::MaxConnectionsPerSource)
        );
        assert_eq!(permits[1].admit(peer("192.0.2.7")), Err(Limit::Deny));
        // A proxy behind this proxy is a client like any other.
        assert_eq!(permits[1].admit(peer("10.0.0.1")), Err(Limit::Deny));
        assert_eq!(permits[2].admit(peer("192.0.2.2")), Ok(()));
        assert_eq!(counted_sources(&admission), 2);
        drop(permits);
        assert_eq!(counted_sources(&admission), 0);
    }

    #[test]
    fn changed_rules_keep_counts_and_unchanged_rates() {
        let rules = AdmissionRules {
            connections_per_source: Some(2),
            rate_per_source: NonZeroU32::new(2),
            ..AdmissionRules::default()
        };
        let original = admission(rules.clone());
        let first = original.admit(peer("192.0.2.1")).unwrap();
        let fewer = original.with(AdmissionRules {
            connections_per_source: Some(1),
            ..rules.clone()
        });
        let full = Some(Limit::MaxConnectionsPerSource);
        assert_eq!(fewer.admit(peer("192.0.2.1")).err(), full);
        drop(first);
        let second = fewer.admit(peer("192.0.2.1"));
        assert!(second.is_ok());
        // The rate has not changed and is used up.
        let unchanged = fewer.with(rules.clone());
        let too_fast = Some(Limit::AcceptRatePerSource);
        assert_eq!(unchanged.admit(peer("192.0.2.1")).err(), too_fast);
        let faster = unchanged.with(AdmissionRules {
            rate_per_source: NonZeroU32::new(3),
            ..rules
        });
        assert!(faster.admit(peer("192.0.2.1")).is_ok());
    }

    #[test]
    fn clients_that_leave_in_any_order_leave_no_count() {
        // Each client connects from one of few addresses, and an earlier one may leave.
        let clients = bolero::generator::produce::<(u8, u8, Vec<(u8, bool)>)>();
        bolero::check!()
            .with_generator(clients)
            .for_each(|(max, bits, clients)| {
                let max = usize::from(max % 4) + 1;
                let admission = admission(AdmissionRules {
                    prefix: SourcePrefix {
                        v4: bits % 32 + 1,
                        v6: 64,
                    },
                    connections_per_source: Some(max),
                    ..AdmissionRules::default()
                });
                let mut permits = Vec::new();
                for (client, leaves) in clients {
                    let peer = match client >> 6 {
                        3 => Peer::Unix {
                            uid: u32::from(client & 3),
                            pid: i32::from(*client),
                        },
                        host => peer_at(IpAddr::from([10, 0, client & 3, host])),
                    };
                    let source = admission.0.rules.prefix.source(peer);
                    let open = open_connections(&admission, source);
                    match admission.admit(peer) {
                        Ok(permit) => permits.push(permit),
                        Err(limit) => {
                            assert_eq!(limit, Limit::MaxConnectionsPerSource);
                            assert_eq!(open, Some(max));
                        }
                    }
                    if *leaves && !permits.is_empty() {
                        permits.swap_remove(usize::from(*client) % permits.len());
                    }
                }
                drop(permits);
                assert_eq!(counted_sources(&admission), 0);
            });
    }

    #[test]
    fn the_accept_rate_counts_all_clients() {
        let admission = admission(AdmissionRules {
            rate: NonZeroU32::new(2),
            ..AdmissionRules::default()
        });
        assert!(admission.check_rate().is_ok());
        assert!(admission.check_rate().is_ok());
        let wait = admission.check_rate().unwrap_err();
        assert!(
            wait > Duration::ZERO && wait <= Duration::from_millis(500),
            "{wait:?}"
        );
    }
}
