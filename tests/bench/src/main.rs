//! Measures wasinetd against a native server with the very same handlers, and against other ways to
//! serve the same page.
//!
//! Machines are noisy: each server is measured in each of several rounds, one after the other, and
//! every ratio is taken within a round. What is printed is the median of the rounds, with the least
//! and the most. Processor time is the server's own, children included. The report and its charts go
//! to `target/bench/`.

mod client;
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

use report::Section;

/// Measures wasinetd and writes target/bench/report.md.
#[derive(Parser)]
struct Args {
    /// How often each server is measured
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,

    /// How long each measurement takes, in seconds
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    seconds: u32,

    /// What to measure; repeat it for more [default: everything]
    #[arg(long, value_enum)]
    only: Vec<Suite>,

    /// Let good and hostile clients and guests loose for so many minutes instead, and check that the
    /// good ones are served and nothing is lost
    #[arg(long, value_name = "MINUTES", value_parser = clap::value_parser!(u32).range(1..))]
    soak: Option<u32>,

    /// Serve as a process under measurement instead
    #[arg(long, hide = true, num_args = 1..)]
    native: Vec<String>,
}

/// One kind of work.
#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Suite {
    /// The same page by HTTP, from all servers there are
    Http,
    /// Bytes back and forth: throughput and latency
    Streams,
    /// Connections that are open and do little
    Idle,
    /// Guests that compute without end, and an innocent one
    Spinning,
    /// Guests that are swapped under load, and servers that are started again
    Swaps,
    /// More connections, more threads, larger guests
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

/// How long and how often to measure.
#[derive(Clone, Copy)]
struct Effort {
    rounds: u32,
    seconds: u32,
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
    machine::allow_open_files();
    let mut sections = Vec::new();
    for suite in Suite::value_variants() {
        if args.only.is_empty() || args.only.contains(suite) {
            let section = suite.measure(effort)?;
            println!("{section}");
            sections.push(section);
        }
    }
    report::write(
        Path::new("target/bench"),
        &machine::describe(effort),
        &sections,
    )
}
