//! A service's figures, for the metrics.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::{Registry, Unit};

use super::{SWAPS, Service, Services};
use crate::connection::OutcomeKind;
use crate::telemetry::counters::Named;
use crate::telemetry::histogram::Histogram;

/// Adds to `registry` what is counted of `services`.
///
/// There are as many series as services times three versions: the current one, the previous one, and
/// all before as `older`. Nobody makes them more by swapping often.
pub(super) fn register(services: Services, registry: &mut Registry) {
    registry.register_collector(Box::new(ServiceCollector(services)));
}

struct ServiceCollector(Services);

impl fmt::Debug for ServiceCollector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ServiceCollector").finish_non_exhaustive()
    }
}

/// The connections of a version, or of several, under the name that they have in the metrics.
struct Counted {
    service: String,
    version: String,
    open: u64,
    ended: [u64; OutcomeKind::COUNT],
}

impl Service {
    /// Of the current version, the previous one, and those before together.
    fn counted(&self) -> Vec<Counted> {
        let versions = self.versions();
        let counted = |version: String, open, ended| Counted {
            service: self.name.to_string(),
            version,
            open,
            ended,
        };
        let named = [Some(&versions.current), versions.previous.as_ref()];
        let mut all: Vec<_> = named
            .into_iter()
            .flatten()
            .map(|one| &one.version)
            .map(|version| {
                let name = version.guest.digest().short().to_string();
                counted(name, version.stats.open(), version.stats.ended())
            })
            .collect();
        let mut older = counted("older".into(), 0, versions.gone);
        for one in &versions.older {
            older.open += one.version.stats.open();
            let ended = one.ended_as_older();
            older.ended = std::array::from_fn(|kind| older.ended[kind] + ended[kind]);
        }
        all.push(older);
        all
    }
}

impl Collector for ServiceCollector {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        let services = self.0.list();
        let counted: Vec<_> = services.iter().flat_map(|one| one.counted()).collect();
        let help = "Connections that are open";
        let mut family =
            encoder.encode_descriptor("connections_open", help, None, MetricType::Gauge)?;
        for one in &counted {
            let labels = [("service", &*one.service), ("version", &*one.version)];
            ConstGauge::new(one.open as i64).encode(family.encode_family(&labels)?)?;
        }
        let help = "Connections that have ended, and how";
        let mut family =
            encoder.encode_descriptor("connections", help, None, MetricType::Counter)?;
        for one in &counted {
            for (kind, ended) in OutcomeKind::ALL.iter().zip(one.ended) {
                let labels = [
                    ("service", &*one.service),
                    ("version", &*one.version),
                    ("outcome", kind.name()),
                ];
                ConstCounter::new(ended).encode(family.encode_family(&labels)?)?;
            }
        }
        let help = "Attempts to swap a guest, and what came of them";
        let mut family = encoder.encode_descriptor("swaps", help, None, MetricType::Counter)?;
        for service in services.iter() {
            for (name, count) in SWAPS.iter().zip(&service.swaps) {
                let labels = [("service", service.name()), ("outcome", name)];
                let count = ConstCounter::new(count.load(Ordering::Relaxed));
                count.encode(family.encode_family(&labels)?)?;
            }
        }
        encode_measures(&services, &mut encoder)
    }
}

fn encode_measures(services: &[Arc<Service>], encoder: &mut DescriptorEncoder) -> fmt::Result {
    type Of = fn(&Service) -> &Histogram;
    let histograms: [(&str, &str, Unit, Of); 4] = [
        (
            "connection_duration",
            "How long connections were open",
            Unit::Seconds,
            |service| &service.measures.duration,
        ),
        (
            "instantiation_duration",
            "How long it took to make an instance",
            Unit::Seconds,
            |service| &service.measures.instantiation,
        ),
        (
            "connection_cpu",
            "How long the guests of connections computed, by ticks: right on the average",
            Unit::Seconds,
            |service| &service.measures.cpu,
        ),
        (
            "connection_memory",
            "The memory that guests of connections had at most",
            Unit::Bytes,
            |service| &service.measures.memory,
        ),
    ];
    for (name, help, unit, of) in histograms {
        let mut family =
            encoder.encode_descriptor(name, help, Some(&unit), MetricType::Histogram)?;
        for service in services {
            of(service).encode(family.encode_family(&[("service", service.name())])?)?;
        }
    }
    type Sum = fn(&Service) -> u64;
    let sums: [(&str, &str, Sum); 2] = [
        (
            "received",
            "What was received on connections that have ended",
            |service| service.measures.received(),
        ),
        (
            "sent",
            "What was sent on connections that have ended",
            |service| service.measures.sent(),
        ),
    ];
    for (name, help, of) in sums {
        let unit = Some(&Unit::Bytes);
        let mut family = encoder.encode_descriptor(name, help, unit, MetricType::Counter)?;
        for service in services {
            let labels = [("service", service.name())];
            ConstCounter::new(of(service)).encode(family.encode_family(&labels)?)?;
        }
    }
    Ok(())
}
