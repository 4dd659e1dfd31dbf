//! The value of each limit, as its flag would take it.

use std::time::Duration;

use super::model::ServiceConfig;
use crate::limit::Limit;
use crate::net::Cidr;
use crate::sandbox::SharedLimits;

/// The values of all limits of a service with at most `max_connections` open connections.
pub fn limit_values(
    service: &ServiceConfig,
    shared: &SharedLimits,
    max_connections: usize,
) -> Vec<(Limit, String)> {
    let value = |limit| (limit, limit_value(limit, service, shared, max_connections));
    Limit::ALL.into_iter().map(value).collect()
}

fn limit_value(
    limit: Limit,
    service: &ServiceConfig,
    shared: &SharedLimits,
    max_connections: usize,
) -> String {
    let guest = &service.handler.guest_limits;
    let connection = &service.handler.connection_limits;
    let handshake = &service.listener.handshake;
    let rules = service.listener.admission_rules(max_connections);
    match limit {
        Limit::MaxMemory => size(guest.memory),
        Limit::MaxTotalMemory => size(shared.total_memory),
        Limit::CpuTime => duration(guest.cpu_time),
        Limit::Stack => size(shared.stack),
        Limit::MaxHandles => guest.handles.to_string(),
        Limit::MaxOpenFiles => guest.open_files.to_string(),
        Limit::MaxCallSize => size(guest.call_size),
        Limit::MaxOutput => size(guest.output),
        Limit::AllowConnect => format!("{} destinations", service.handler.allow_connect.len()),
        Limit::HandshakeTimeout => duration(handshake.timeout),
        Limit::MaxHandshakes => handshake.max_handshakes.to_string(),
        Limit::IdleTimeout => or_off(connection.idle, duration),
        Limit::FirstByteTimeout => or_off(connection.first_byte, duration),
        Limit::WriteTimeout => or_off(connection.write, duration),
        Limit::Keepalive => or_off(service.listener.sockets.keepalive, duration),
        Limit::MaxLifetime => or_off(connection.lifetime, duration),
        Limit::MaxOldVersionAge => or_off(service.handler.swap.max_old_version_age, duration),
        Limit::MaxBytesIn => or_off(connection.bytes_in, bytes),
        Limit::MaxBytesOut => or_off(connection.bytes_out, bytes),
        Limit::MaxConnections => max_connections.to_string(),
        Limit::MaxConnectionsPerSource => or_off(rules.connections_per_source, |n| n.to_string()),
        Limit::AcceptRate => or_off(rules.rate, |rate| rate.to_string()),
        Limit::AcceptRatePerSource => or_off(rules.rate_per_source, |rate| rate.to_string()),
        Limit::Allow => networks(&rules.allow, "everyone"),
        Limit::Deny => networks(&rules.deny, "nobody"),
    }
}

fn or_off<T>(value: Option<T>, text: impl Fn(T) -> String) -> String {
    value.map_or_else(|| "off".into(), text)
}

fn duration(value: Duration) -> String {
    humantime::format_duration(value).to_string()
}

fn bytes(value: u64) -> String {
    usize::try_from(value).map_or_else(|_| format!("{value}B"), size)
}

/// A size in the largest unit that needs no rounding.
fn size(bytes: usize) -> String {
    let units = [(1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    let fits = |(unit, _): &&(usize, &str)| bytes > 0 && bytes.is_multiple_of(*unit);
    match units.iter().find(fits) {
        Some((unit, name)) => format!("{}{name}", bytes / unit),
        None => format!("{bytes}B"),
    }
}

fn networks(networks: &[Cidr], none: &str) -> String {
    match networks {
        [] => none.into(),
        some => some
            .iter()
            .map(Cidr::to_string)
            .collect::<Vec<_>>()
            .join(","),
    }
}

#[cfg(test)]
mod tests {
    use super::super::model::PerSource;
    use super::super::model::tests::echo;
    use super::*;

    #[test]
    fn sizes_are_never_rounded() {
        for (bytes, text) in [
            (0, "0B"),
            (1, "1B"),
            (1 << 10, "1KiB"),
            ((1 << 10) + 1, "1025B"),
            (64 << 20, "64MiB"),
            (3 << 30, "3GiB"),
        ] {
            assert_eq!(size(bytes), text);
        }
    }

    #[test]
    fn values_read_like_flags() {
        let mut service = echo("a", &[]);
        service.listener.admission.deny = vec!["10.0.0.0/8".parse().unwrap()];
        let values = limit_values(&service, &SharedLimits::default(), 9);
        let value = |limit| {
            let found = values.iter().find(|(of, _)| *of == limit);
            found.map(|(_, value)| value.as_str()).unwrap_or_default()
        };
        assert_eq!(values.len(), Limit::ALL.len());
        assert_eq!(value(Limit::MaxConnections), "9");
        assert_eq!(value(Limit::MaxConnectionsPerSource), "5");
        assert_eq!(value(Limit::Allow), "everyone");
        assert_eq!(value(Limit::Deny), "10.0.0.0/8");
        assert_eq!(value(Limit::AcceptRate), "off");
        service.listener.admission.connections_per_source = PerSource::Unlimited;
        let values = limit_values(&service, &SharedLimits::default(), 9);
        assert!(values.contains(&(Limit::MaxConnectionsPerSource, "off".into())));
    }
}
