//! Measures wasinetd against a native server with the same handlers, and against other HTTP
//! servers.
//!
//! Machines are noisy. The benchmark therefore measures all servers in turn in each of several
//! rounds, computes ratios within a round, and prints the median, minimum and maximum over the
//! rounds. CPU time is that of the server and its child processes. The report and its charts go to
//! `target/bench/`.

mod build;
mod client;
mod effort;
mod growth;
mod http;
mod idle;
mod machine;
mod native;
mod report;
mod samples;
mod server;
mod soak;
mod spinning;
mod streams;
mod swaps;
mod wrk;

use std::path::Path;

use clap::{Parser, ValueEnum};

use effort::Effort;
use report::Section;

/// Measures wasinetd and writes target/bench/report.md
#[derive(Parser)]
#[command(
    after_help = "The measured server is the program `wasinetd` in the directory of this one, \
    such as target/dist. The environment variable WASINETD names another one."
)]
struct Args {
    /// Number of rounds; each round measures every server once
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,

    /// Duration of each measurement, in seconds
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    seconds: u32,

    /// Suite to measure; may be repeated [default: all suites]
    #[arg(long, value_enum)]
    only: Vec<Suite>,

    /// Run a soak test for this long instead: well-behaved clients beside hostile clients and
    /// guests; fails if a well-behaved client is not served or the server leaks resources
    #[arg(long, value_name = "MINUTES", value_parser = clap::value_parser!(u32).range(1..))]
    soak: Option<u32>,

    /// Run as a native server (used by the benchmark itself)
    #[arg(long, hide = true, num_args = 1..)]
    native: Vec<String>,
}

/// A group of measurements.
#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Suite {
    /// The same page over HTTP, from wasinetd and other servers
    Http,
    /// Echo: throughput and latency
    Streams,
    /// Idle connections: memory, and the cost beside active ones
    Idle,
    /// Latency beside guests that compute without end
    Spinning,
    /// Swapping guests under load, and starting servers
    Swaps,
    /// Cost by number of connections, number of threads and size of the guest
    Growth,
}

impl Suite {
    fn measure(self, effort: Effort) -> Result<Section, String> {
        match self {
            Self::Http => http::measure(effort),
            Self::Streams => streams::measure(effort),
            Self::Idle => idle::measure(effort),
            Self::Spinning => spinning::measure(effort),
            Self::Swaps => swaps::measure(effort),
            Self::Growth => growth::measure(effort),
        }
    }
}

fn main() -> Result<(), String> {
    let args = Args::parse();
    if !args.native.is_empty() {
        return native::serve(&args.native).map_err(|error| error.to_string());
    }
    if let Some(minutes) = args.soak {
        return soak::run(minutes);
    }
    let effort = Effort {
        rounds: args.rounds,
        seconds: args.seconds,
    };
    machine::raise_open_file_limit();
    let header = format!("{}\n{}", machine::describe(effort), build::describe());
    println!("{header}\n");
    let mut sections = Vec::new();
    for suite in Suite::value_variants() {
        if args.only.is_empty() || args.only.contains(suite) {
            let section = suite.measure(effort)?;
            println!("{section}");
            sections.push(section);
        }
    }
    report::write(Path::new("target/bench"), &header, &sections)
}
