//! The machine that is measured on.

use std::fs;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::Effort;

/// The machine and the effort, in a line.
pub(crate) fn describe(effort: Effort) -> String {
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    let cpuinfo = read("/proc/cpuinfo");
    let model = cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
        .map_or("unknown processor", |(_, model)| model);
    let meminfo = read("/proc/meminfo");
    let memory = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB"))
        .and_then(|kib| kib.parse::<u64>().ok())
        .unwrap_or(0);
    format!(
        "{} cores ({model}), {} GiB, Linux {}; load and servers on the same machine, over loopback; \
         medians of {} rounds of {} s, with the least and the most.",
        cores(),
        memory / (1 << 20),
        read("/proc/sys/kernel/osrelease").trim(),
        effort.rounds,
        effort.seconds,
    )
}

pub(crate) fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Raises the soft limit on open files, which clients need as well, to the hard one.
pub(crate) fn allow_open_files() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    // Where it fails, the work that needs it says so.
    let _ = setrlimit(Resource::Nofile, raised);
}
