//! The state of the server, as the admin API shows it.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use hyper::StatusCode;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use prometheus_client::encoding::text::encode;

use super::model;
use super::response::{Response, failure, text};
use super::state::AdminState;
use crate::connection::{ConnectionRecord, OutcomeKind};
use crate::limit::Limit;
use crate::listener;
use crate::service::{Service, VersionState, VersionStatus};
use crate::telemetry::counters::Named;

/// Media type of metrics in the OpenMetrics text format.
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The status of the server, which started `uptime` ago.
pub(super) fn status(state: &AdminState, uptime: Duration) -> model::Status {
    let services = state.services.list();
    let phase = if state.lifecycle.is_draining() {
        "draining"
    } else {
        "serving"
    };
    model::Status {
        version: env!("CARGO_PKG_VERSION").into(),
        pid: std::process::id(),
        since: rfc3339(state.since),
        uptime: uptime.as_secs_f64(),
        phase: phase.into(),
        // Connections of removed services included.
        open: state.open.count() as u64,
        max_connections: state.max_connections as u64,
        accept_errors: listener::accept_errors(),
        services: services.iter().map(service_status).collect(),
        limits_met: Limit::ALL
            .into_iter()
            .map(|limit| model::LimitHits {
                limit: limit.name().into(),
                met: limit.hits(),
            })
            .filter(|hits| hits.met > 0)
            .collect(),
    }
}

/// The open connections, the oldest first.
pub(super) fn connections(state: &AdminState) -> Vec<model::Connection> {
    let connection = |record: &Arc<ConnectionRecord>| model::Connection {
        id: record.id,
        peer: record.peer.to_string(),
        service: record.version.service.to_string(),
        version: record.version.guest.digest().short().into(),
        age: record.began.elapsed().as_secs_f64(),
        received: record.usage.received(),
        sent: record.usage.sent(),
        cpu: record.usage.computed().as_secs_f64(),
        memory: record.usage.memory(),
    };
    state.open.list().iter().map(connection).collect()
}

/// All limits with their values.
pub(super) fn limits(state: &AdminState) -> Vec<model::Limit> {
    let configured = (state.limits)();
    Limit::ALL
        .into_iter()
        .map(|limit| model::Limit {
            limit: limit.name().into(),
            value: limit_value(limit, &configured),
            met: limit.hits(),
        })
        .collect()
}

/// The value of a limit. If services have different values, each with its service.
fn limit_value(limit: Limit, configured: &[(String, Vec<(Limit, String)>)]) -> String {
    let values: Vec<_> = configured
        .iter()
        .filter_map(|(service, limits)| {
            let (_, value) = limits.iter().find(|(other, _)| *other == limit)?;
            Some((service, value))
        })
        .collect();
    match values.first() {
        Some((_, first)) if values.iter().all(|(_, value)| value == first) => (*first).clone(),
        _ => values
            .iter()
            .map(|(service, value)| format!("{service}: {value}"))
            .collect::<Vec<_>>()
            .join(", "),
    }
}

/// All metrics, for Prometheus.
pub(super) fn metrics(state: &AdminState) -> Response {
    let mut metrics = String::new();
    // Writing to a string does not fail, but a collector might.
    if encode(&mut metrics, &state.registry).is_err() {
        return failure(
            StatusCode::INTERNAL_SERVER_ERROR,
            "the metrics cannot be encoded",
        );
    }
    let mut response = text(StatusCode::OK, metrics);
    let media_type = HeaderValue::from_static(OPEN_METRICS);
    response.headers_mut().insert(CONTENT_TYPE, media_type);
    response
}

fn service_status(service: &Arc<Service>) -> model::Service {
    let versions = service.status();
    let stats = service.stats();
    let durations = stats.duration.buckets();
    model::Service {
        name: service.name().into(),
        open: versions.iter().map(|version| version.open).sum(),
        ended: durations.iter().map(|(_, count)| count).sum(),
        received: stats.received(),
        sent: stats.sent(),
        durations: durations
            .into_iter()
            .map(|(bound, count)| model::Bucket {
                seconds: bound.is_finite().then_some(bound),
                count,
            })
            .collect(),
        versions: versions.into_iter().map(version_status).collect(),
    }
}

fn version_status(version: VersionStatus) -> model::Version {
    let state = match version.state {
        VersionState::Current => "current",
        VersionState::Previous => "previous",
        VersionState::Old => "old",
    };
    model::Version {
        digest: version.digest.to_string(),
        state: state.into(),
        since: rfc3339(version.since),
        open: version.open,
        ended: OutcomeKind::ALL
            .iter()
            .zip(version.ended)
            .filter(|(_, count)| *count > 0)
            .map(|(outcome, count)| model::Outcome {
                outcome: outcome.name().into(),
                count,
            })
            .collect(),
    }
}

fn rfc3339(time: SystemTime) -> String {
    humantime::format_rfc3339_seconds(time).to_string()
}
