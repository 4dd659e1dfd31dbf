//! Figures of a server process, from proc(5).

use std::path::PathBuf;
use std::time::Duration;

use super::Server;

/// The length of a clock tick in milliseconds.
const TICK: u64 = 10;

impl Server {
    fn proc(&self, name: &str) -> PathBuf {
        format!("/proc/{}/{name}", self.child.id()).into()
    }

    /// The number of open sockets.
    pub(crate) fn open_sockets(&self) -> usize {
        let files = std::fs::read_dir(self.proc("fd")).expect("the server runs");
        files
            .filter_map(|file| std::fs::read_link(file.ok()?.path()).ok())
            .filter(|target| target.to_string_lossy().starts_with("socket:"))
            .count()
    }

    /// The number of threads with this name and 100 ms of CPU time.
    pub(crate) fn busy_threads(&self, name: &str) -> usize {
        std::fs::read_dir(self.proc("task"))
            .expect("the server runs")
            .flatten()
            .filter_map(|task| std::fs::read_to_string(task.path().join("stat")).ok())
            .filter_map(|stat| {
                let fields = stat.split_once(&format!("({name})"))?.1;
                // The user time.
                fields.split_whitespace().nth(11)?.parse().ok()
            })
            .filter(|ticks: &u64| ticks * TICK >= 100)
            .count()
    }

    /// The CPU time so far, user and system.
    pub(crate) fn cpu_time(&self) -> Duration {
        let stat = std::fs::read_to_string(self.proc("stat")).expect("the server runs");
        let (_, fields) = stat.rsplit_once(") ").expect("the name is in parentheses");
        let times = fields.split_whitespace().skip(11).take(2);
        let ticks: u64 = times
            .map(|ticks| ticks.parse::<u64>().expect("ticks are a number"))
            .sum();
        Duration::from_millis(ticks * TICK)
    }

    /// A figure of `/proc/PID/status` in KiB, such as `VmRSS`.
    pub(crate) fn memory(&self, name: &str) -> u64 {
        let status = std::fs::read_to_string(self.proc("status")).expect("the server runs");
        status
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
            .and_then(|value| value.split_whitespace().next()?.parse().ok())
            .unwrap_or_else(|| panic!("no {name} in {status}"))
    }
}
