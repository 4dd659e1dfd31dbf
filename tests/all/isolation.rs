//! Each connection has a sandbox of its own, and all move on together.

use std::thread;
use std::time::{Duration, Instant};

use crate::harness::{MODES, PATIENCE, Server, fixture, guest, page, request};

#[test]
fn a_static_counter_starts_anew_for_every_connection() {
    for mode in MODES {
        let server = Server::start(mode, &fixture("counter"), &[]);
        for _ in 0..100 {
            let mut client = server.connect();
            client.send("?");
            assert_eq!(client.read_line(), "1");
        }
    }
}

/// How soon a client is answered that asks while others sleep or compute.
const SOON: Duration = Duration::from_millis(500);

/// The sleep of five seconds, and two for everything else.
const ALL_AWAKE: Duration = Duration::from_secs(7);

#[test]
fn one_hundred_sleepers_hold_nobody_up() {
    for mode in MODES {
        let server = Server::start_alone(mode, &guest("hello"), &["--dir", "static::/static"]);
        let start = Instant::now();
        let mut sleepers: Vec<_> = (0..100).map(|_| server.connect()).collect();
        for sleeper in &mut sleepers {
            sleeper.send(request("/sleep"));
        }
        let asked = Instant::now();
        assert_eq!(server.connect().get("/").body, page("hello.html"));
        assert!(asked.elapsed() < SOON, "GET / took {:?}", asked.elapsed());
        for sleeper in &mut sleepers {
            assert_eq!(sleeper.response().body, page("hello.html"));
        }
        assert!(
            start.elapsed() < ALL_AWAKE,
            "all took {:?}",
            start.elapsed()
        );
    }
}

#[test]
fn spinning_guests_hold_nobody_up() {
    for mode in MODES {
        let server = Server::start_alone(mode, &fixture("spin_or_sleep"), &[]);
        // More than there are cores: none is left to those that do not yield.
        let spinning: Vec<_> = (0..thread::available_parallelism().unwrap().get() + 1)
            .map(|_| {
                let mut client = server.connect();
                client.send("spin\n");
                client
            })
            .collect();
        let start = Instant::now();
        let mut sleepers: Vec<_> = (0..100).map(|_| server.connect()).collect();
        for sleeper in &mut sleepers {
            sleeper.send("sleep\n");
        }
        let asked = Instant::now();
        let mut awake = server.connect();
        awake.send("hello\n");
        assert_eq!(awake.read_line(), "awake");
        assert!(asked.elapsed() < SOON, "it took {:?}", asked.elapsed());
        for sleeper in &mut sleepers {
            assert_eq!(sleeper.read_line(), "awake");
        }
        assert!(
            start.elapsed() < ALL_AWAKE,
            "all took {:?}",
            start.elapsed()
        );
        assert_eq!(
            server.log_lines("connection ended").len(),
            0,
            "a spinning guest has ended"
        );
        drop(spinning);
    }
}

#[test]
fn connections_are_spread_over_the_threads() {
    // Chance alone would leave one of three without any once in some ten thousand times.
    let server = Server::start_alone("concurrent", &fixture("spin"), &["--threads", "3"]);
    let _spinning: Vec<_> = (0..24)
        .map(|_| {
            let mut client = server.connect();
            client.send("x");
            client
        })
        .collect();
    let patience = Instant::now() + PATIENCE;
    while server.busy_threads("connections") < 3 {
        assert!(Instant::now() < patience, "a thread has nothing to do");
        thread::yield_now();
    }
}
