//! Answers of the server as text.

use std::time::Duration;

use wasinetd::admin::model;

use super::format::{age, short_digest, size};
use super::table::Table;

pub(super) fn status(status: model::Status) -> String {
    let mut text = format!(
        "wasinetd {} (process {}), {} since {}, {} of {} connections open\n",
        status.version, status.pid, status.phase, status.since, status.open, status.max_connections,
    );
    let mut versions = Table::new([
        "SERVICE", "VERSION", "STATE", "SINCE", ">OPEN", ">ENDED", "NOT OK",
    ]);
    for service in &status.services {
        for version in &service.versions {
            versions.row(version_row(&service.name, version));
        }
    }
    text += &versions.to_string();
    text + &limits_hit(&status.limits_met)
}

fn version_row(service: &str, version: &model::Version) -> [String; 7] {
    let not_ok: Vec<_> = version
        .ended
        .iter()
        .filter(|ended| ended.outcome != "ok")
        .map(|ended| format!("{} {}", ended.count, ended.outcome))
        .collect();
    let ended: u64 = version.ended.iter().map(|ended| ended.count).sum();
    [
        service.into(),
        short_digest(&version.digest).into(),
        version.state.clone(),
        version.since.clone(),
        version.open.to_string(),
        ended.to_string(),
        not_ok.join(", "),
    ]
}

/// A line about the limits that were hit. Empty if none was.
pub(super) fn limits_hit(limits: &[model::LimitHits]) -> String {
    if limits.is_empty() {
        return String::new();
    }
    let limits: Vec<_> = limits
        .iter()
        .map(|hits| format!("{} {}", hits.limit, hits.met))
        .collect();
    format!("limits hit: {}\n", limits.join(", "))
}

pub(super) fn connections(connections: Vec<model::Connection>) -> String {
    let mut table = Table::new([
        ">ID", "PEER", "SERVICE", "VERSION", ">AGE", ">IN", ">OUT", ">CPU", ">MEMORY",
    ]);
    for connection in connections {
        table.row([
            connection.id.to_string(),
            connection.peer,
            connection.service,
            connection.version,
            age(connection.age),
            size(connection.received),
            size(connection.sent),
            format!("{:.2}s", connection.cpu),
            size(connection.memory),
        ]);
    }
    table.to_string()
}

pub(super) fn limits(limits: Vec<model::Limit>) -> String {
    let mut table = Table::new(["LIMIT", ">VALUE", ">HITS"]);
    for limit in limits {
        table.row([limit.limit, limit.value, limit.met.to_string()]);
    }
    table.to_string()
}

pub(super) fn swapped(swapped: model::Swapped) -> String {
    let current = short_digest(&swapped.digest);
    let before = short_digest(&swapped.before);
    if current == before {
        return format!("{current} is the current version already; nothing has changed\n");
    }
    let took = Duration::from_secs_f64(swapped.took);
    format!("{current} has replaced {before} (in {took:.1?})\n")
}
