//! The machine that runs the benchmark.

use std::fs;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::effort::Effort;

/// Describes the machine and the effort in one line.
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
        "{} cores ({model}), {} GiB, Linux {}. Load generator and servers share the machine and \
         use loopback. Values are medians of {} rounds of {} s, with minimum and maximum.",
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

/// Raises the soft limit on open files to the hard limit, because clients need many.
pub(crate) fn raise_open_file_limit() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    // If this fails, opening connections reports the error.
    let _ = setrlimit(Resource::Nofile, raised);
}
