//! `top`: a view of the server that is updated at intervals.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use wasinetd::admin::model::{Bucket, Connection, Service, Status};

use super::client::AdminClient;
use super::error::CtlError;
use super::format::{age, short_digest, size};
use super::table::Table;
use super::view;

/// Moves the cursor to the upper left, then clears the screen.
const CLEAR: &str = "\x1b[H\x1b[J";

/// Largest number of connections in a view: those with the most CPU time. Arbitrary: fits a terminal.
const MAX_CONNECTIONS: usize = 15;

/// Prints a view each `interval`: `count` times, or without end.
pub(super) async fn watch(
    client: &AdminClient,
    interval: Duration,
    count: Option<usize>,
) -> Result<(), CtlError> {
    let clear = if io::stdout().is_terminal() {
        CLEAR
    } else {
        ""
    };
    let mut before: Status = client.get("/v1/status").await?;
    let mut before_at = Instant::now();
    let mut views_left = count;
    while views_left != Some(0) {
        tokio::time::sleep(interval).await;
        let now: Status = client.get("/v1/status").await?;
        let connections: Vec<Connection> = client.get("/v1/connections").await?;
        let view = view(&before, &now, before_at.elapsed(), connections);
        before_at = Instant::now();
        let written = write!(io::stdout(), "{clear}{view}");
        if written.and_then(|()| io::stdout().flush()).is_err() {
            // The reader has closed the pipe.
            return Ok(());
        }
        before = now;
        views_left = views_left.map(|views| views - 1);
    }
    Ok(())
}

fn view(
    before: &Status,
    now: &Status,
    elapsed: Duration,
    mut connections: Vec<Connection>,
) -> String {
    let mut text = format!(
        "wasinetd {}  {}  up {}  {} of {} connections open\n\n",
        now.version,
        now.phase,
        age(now.uptime),
        now.open,
        now.max_connections
    );
    let mut services = Table::new([
        "SERVICE", "VERSION", ">OPEN", ">ENDED/s", ">p50", ">p99", ">IN/s", ">OUT/s",
    ]);
    for service in &now.services {
        let earlier = before
            .services
            .iter()
            .find(|earlier| earlier.name == service.name);
        services.row(rates(earlier, service, elapsed.as_secs_f64()));
    }
    text += &services.to_string();
    if !now.limits_met.is_empty() {
        text += &format!("\n{}", view::limits_hit(&now.limits_met));
    }
    connections.sort_by(|a, b| b.cpu.total_cmp(&a.cpu).then(a.id.cmp(&b.id)));
    connections.truncate(MAX_CONNECTIONS);
    text + "\n" + &view::connections(connections)
}

fn rates(before: Option<&Service>, now: &Service, seconds: f64) -> [String; 8] {
    let rate = |field: fn(&Service) -> u64| {
        let increase = field(now).saturating_sub(before.map_or(0, field));
        increase as f64 / seconds
    };
    let current = now
        .versions
        .iter()
        .find(|version| version.state == "current");
    let duration = |quantile| match now.duration_quantile(before, quantile) {
        None => "-".into(),
        // Beyond the last bound of the histogram, some hours.
        Some(Bucket { seconds: None, .. }) => "more".into(),
        Some(Bucket {
            seconds: Some(seconds),
            ..
        }) => format!("≤{:.1?}", Duration::from_secs_f64(seconds)),
    };
    [
        now.name.clone(),
        current.map_or(String::new(), |version| {
            short_digest(&version.digest).into()
        }),
        now.open.to_string(),
        format!("{:.0}", rate(|service| service.ended)),
        duration(0.5),
        duration(0.99),
        size(rate(|service| service.received) as u64),
        size(rate(|service| service.sent) as u64),
    ]
}
