//! Figures of a process, from proc(5).

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

/// The length of a clock tick in milliseconds.
const TICK: u64 = 10;

fn path(pid: u32, name: &str) -> PathBuf {
    format!("/proc/{pid}/{name}").into()
}

/// The number of open sockets.
pub(super) fn open_sockets(pid: u32) -> usize {
    fs::read_dir(path(pid, "fd"))
        .expect("the process runs")
        .filter_map(|file| fs::read_link(file.ok()?.path()).ok())
        .filter(|target| target.to_string_lossy().starts_with("socket:"))
        .count()
}

/// The number of threads with this name and 100 ms of user time.
pub(super) fn busy_threads(pid: u32, name: &str) -> usize {
    fs::read_dir(path(pid, "task"))
        .expect("the process runs")
        .flatten()
        .filter_map(|task| fs::read_to_string(task.path().join("stat")).ok())
        .filter_map(|stat| {
            let fields = stat.split_once(&format!("({name})"))?.1;
            fields.split_whitespace().nth(11)?.parse().ok()
        })
        .filter(|ticks: &u64| ticks * TICK >= 100)
        .count()
}

/// The CPU time so far, user and system.
pub(super) fn cpu_time(pid: u32) -> Duration {
    let stat = fs::read_to_string(path(pid, "stat")).expect("the process runs");
    let (_, fields) = stat.rsplit_once(") ").expect("the name is in parentheses");
    let times = fields.split_whitespace().skip(11).take(2);
    let ticks: u64 = times
        .map(|ticks| ticks.parse::<u64>().expect("ticks are a number"))
        .sum();
    Duration::from_millis(ticks * TICK)
}

/// A figure of `status` in KiB, such as `VmRSS`.
pub(super) fn memory(pid: u32, name: &str) -> u64 {
    let status = fs::read_to_string(path(pid, "status")).expect("the process runs");
    status
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
        .and_then(|value| value.split_whitespace().next()?.parse().ok())
        .unwrap_or_else(|| panic!("no {name} in {status}"))
}
