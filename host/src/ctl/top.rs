//! A view of the server that is kept up to date.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use wasinetd::admin::model::{Bucket, Connection, Service, Status};

use super::client::AdminClient;
use super::table::Table;
use super::{CtlError, age, short, size};

/// Moves to the upper left, and clears what is below.
const CLEAR: &str = "\x1b[H\x1b[J";

/// Connections shown: those that have computed most.
const SHOWN: usize = 15;

/// Prints a view each `interval`, `count` times or until it is interrupted.
pub(super) async fn watch(
    client: &AdminClient,
    interval: Duration,
    count: Option<usize>,
) -> Result<(), CtlError> {
    let clear = match io::stdout().is_terminal() {
        true => CLEAR,
        false => "",
    };
    let mut before: Status = client.get("/v1/status").await?;
    let mut asked = Instant::now();
    let mut left = count;
    while left != Some(0) {
        tokio::time::sleep(interval).await;
        let now: Status = client.get("/v1/status").await?;
        let connections: Vec<Connection> = client.get("/v1/connections").await?;
        let view = view(&before, &now, asked.elapsed(), connections);
        asked = Instant::now();
        let written = write!(io::stdout(), "{clear}{view}");
        if written.and_then(|()| io::stdout().flush()).is_err() {
            // Whoever closed the pipe has seen enough.
            return Ok(());
        }
        before = now;
        left = left.map(|left| left - 1);
    }
    Ok(())
}

fn view(before: &Status, now: &Status, time: Duration, mut connections: Vec<Connection>) -> String {
    let mut text = format!(
        "wasinetd {}  {}  up {}  {} of {} connections\n\n",
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
        let earlier = before.services.iter().find(|one| one.name == service.name);
        services.row(rates(earlier, service, time.as_secs_f64()));
    }
    text += &services.to_string();
    let met: Vec<_> = now
        .limits_met
        .iter()
        .map(|limit| format!("{} {}", limit.limit, limit.met))
        .collect();
    if !met.is_empty() {
        text += &format!("\nlimits met: {}\n", met.join(", "));
    }
    connections.sort_by(|one, other| other.cpu.total_cmp(&one.cpu).then(one.id.cmp(&other.id)));
    connections.truncate(SHOWN);
    text + "\n" + &super::connections(connections)
}

fn rates(before: Option<&Service>, now: &Service, seconds: f64) -> [String; 8] {
    let rate = |of: fn(&Service) -> u64| {
        let more = of(now).saturating_sub(before.map_or(0, of));
        more as f64 / seconds
    };
    let current = now
        .versions
        .iter()
        .find(|version| version.state == "current");
    let at = |share| match now.duration_quantile(before, share) {
        None => "-".into(),
        Some(Bucket { seconds: None, .. }) => "more".into(),
        Some(Bucket {
            seconds: Some(seconds),
            ..
        }) => format!("≤{:.1?}", Duration::from_secs_f64(seconds)),
    };
    [
        now.name.clone(),
        current.map_or(String::new(), |version| short(&version.digest).into()),
        now.open.to_string(),
        format!("{:.0}", rate(|service| service.ended)),
        at(0.5),
        at(0.99),
        size(rate(|service| service.received) as u64),
        size(rate(|service| service.sent) as u64),
    ]
}
