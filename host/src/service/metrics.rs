//! Metrics of services.

use std::fmt;
use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::{Registry, Unit};

use super::service_list::Services;
use super::state::Service;
use super::swap_outcome::SwapOutcome;
use crate::connection::OutcomeKind;
use crate::sync::lock;
use crate::telemetry::counters::Named;
use crate::telemetry::histogram::Histogram;

/// Adds the metrics of `services` to `registry`.
///
/// Each service has three series per metric of versions: the current version, the previous one, and
/// `older` for all before. So frequent swaps do not add series.
pub fn register(services: Services, registry: &mut Registry) {
    registry.register_collector(Box::new(ServiceCollector(services)));
}

struct ServiceCollector(Services);

impl fmt::Debug for ServiceCollector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ServiceCollector").finish_non_exhaustive()
    }
}

impl Collector for ServiceCollector {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        let services = self.0.list();
        encode_connections(&services, &mut encoder)?;
        encode_swaps(&services, &mut encoder)?;
        encode_histograms(&services, &mut encoder)?;
        encode_sums(&services, &mut encoder)
    }
}

/// Connections of one version, or of all older versions together.
struct ConnectionCounts {
    service: String,
    /// Value of the label `version`.
    version: String,
    open: u64,
    ended: [u64; OutcomeKind::COUNT],
}

/// Counts of the current version, the previous one, and all older ones together.
fn connection_counts(service: &Service) -> Vec<ConnectionCounts> {
    let versions = lock(&service.versions);
    let counts = |version: String, open, ended| ConnectionCounts {
        service: service.name().to_string(),
        version,
        open,
        ended,
    };
    let named = [Some(&versions.current), versions.previous.as_ref()];
    let mut all: Vec<_> = named
        .into_iter()
        .flatten()
        .map(|installed| &installed.version)
        .map(|version| {
            let name = version.guest.digest().short().to_string();
            counts(name, version.stats.open(), version.stats.ended())
        })
        .collect();
    let mut older = counts("older".into(), 0, versions.ended_on_freed);
    for installed in &versions.older {
        older.open += installed.version.stats.open();
        let ended = installed.ended_since_old();
        older.ended = std::array::from_fn(|kind| older.ended[kind] + ended[kind]);
    }
    all.push(older);
    all
}

fn encode_connections(services: &[Arc<Service>], encoder: &mut DescriptorEncoder) -> fmt::Result {
    let counted: Vec<_> = services
        .iter()
        .flat_map(|service| connection_counts(service))
        .collect();
    let help = "Open connections";
    let mut family =
        encoder.encode_descriptor("connections_open", help, None, MetricType::Gauge)?;
    for counts in &counted {
        let labels = [("service", &*counts.service), ("version", &*counts.version)];
        ConstGauge::new(counts.open as i64).encode(family.encode_family(&labels)?)?;
    }
    let help = "Ended connections, by outcome";
    let mut family = encoder.encode_descriptor("connections", help, None, MetricType::Counter)?;
    for counts in &counted {
        for (kind, ended) in OutcomeKind::ALL.iter().zip(counts.ended) {
            let labels = [
                ("service", &*counts.service),
                ("version", &*counts.version),
                ("outcome", kind.name()),
            ];
            ConstCounter::new(ended).encode(family.encode_family(&labels)?)?;
        }
    }
    Ok(())
}

fn encode_swaps(services: &[Arc<Service>], encoder: &mut DescriptorEncoder) -> fmt::Result {
    let help = "Attempts to swap a guest, by outcome";
    let mut family = encoder.encode_descriptor("swaps", help, None, MetricType::Counter)?;
    for service in services {
        for &outcome in SwapOutcome::ALL {
            let labels = [("service", service.name()), ("outcome", outcome.name())];
            let count = ConstCounter::new(service.swaps.get(outcome));
            count.encode(family.encode_family(&labels)?)?;
        }
    }
    Ok(())
}

fn encode_histograms(services: &[Arc<Service>], encoder: &mut DescriptorEncoder) -> fmt::Result {
    type Select = fn(&Service) -> &Histogram;
    let histograms: [(&str, &str, Unit, Select); 4] = [
        (
            "connection_duration",
            "Time that a connection was open",
            Unit::Seconds,
            |service| &service.stats().duration,
        ),
        (
            "instantiation_duration",
            "Time to create the guest instance of a connection",
            Unit::Seconds,
            |service| &service.stats().instantiation,
        ),
        (
            "connection_cpu",
            "CPU time of the guest of a connection, sampled by clock ticks: correct on average",
            Unit::Seconds,
            |service| &service.stats().cpu,
        ),
        (
            "connection_memory",
            "Largest memory of the guest of a connection",
            Unit::Bytes,
            |service| &service.stats().memory,
        ),
    ];
    for (name, help, unit, select) in histograms {
        let mut family =
            encoder.encode_descriptor(name, help, Some(&unit), MetricType::Histogram)?;
        for service in services {
            let labels = [("service", service.name())];
            select(service).encode(family.encode_family(&labels)?)?;
        }
    }
    Ok(())
}

fn encode_sums(services: &[Arc<Service>], encoder: &mut DescriptorEncoder) -> fmt::Result {
    type Select = fn(&Service) -> u64;
    let sums: [(&str, &str, Select); 2] = [
        (
            "received",
            "Bytes received on ended connections",
            |service| service.stats().received(),
        ),
        ("sent", "Bytes sent on ended connections", |service| {
            service.stats().sent()
        }),
    ];
    for (name, help, select) in sums {
        let unit = Some(&Unit::Bytes);
        let mut family = encoder.encode_descriptor(name, help, unit, MetricType::Counter)?;
        for service in services {
            let labels = [("service", service.name())];
            ConstCounter::new(select(service)).encode(family.encode_family(&labels)?)?;
        }
    }
    Ok(())
}
