//! Each connection has its own sandbox, and no guest blocks another.

use std::thread;
use std::time::{Duration, Instant};

use crate::harness::{MODES, Server, fixture, guest, page, request, wait_until};

#[test]
fn each_connection_has_its_own_static_variables() {
    for mode in MODES {
        let server = Server::start(mode, &fixture("counter"), &[]);
        for _ in 0..100 {
            let mut client = server.connect();
            client.send("?");
            assert_eq!(client.read_line(), "1");
        }
    }
}

/// The longest time to an answer while other guests sleep or compute.
const SOON: Duration = Duration::from_millis(500);

/// The time for all sleeping guests: five seconds of sleep, and two for the rest.
const ALL_AWAKE: Duration = Duration::from_secs(7);

#[test]
fn one_hundred_sleeping_guests_delay_no_other_client() {
    for mode in MODES {
        let server = Server::start_alone(mode, &guest("hello"), &["--dir", "static::/static"]);
        let start = Instant::now();
        let mut sleepers: Vec<_> = (0..100).map(|_| server.connect()).collect();
        for sleeper in &mut sleepers {
            sleeper.send(request("/sleep"));
        }
        let asked = Instant::now();
        assert_eq!(server.connect().get("/").body, page("hello.html"));
        assert!(
            asked.elapsed() < SOON,
            "the answer took {:?}",
            asked.elapsed()
        );
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
fn spinning_guests_delay_no_other_client() {
    for mode in MODES {
        let server = Server::start_alone(mode, &fixture("spin_or_sleep"), &[]);
        // One spinning guest more than there are cores.
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
        assert!(
            asked.elapsed() < SOON,
            "the answer took {:?}",
            asked.elapsed()
        );
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
    // By chance, one of three threads gets no connection once in about ten thousand runs.
    let server = Server::start_alone("concurrent", &fixture("spin"), &["--threads", "3"]);
    let _spinning: Vec<_> = (0..24)
        .map(|_| {
            let mut client = server.connect();
            client.send("x");
            client
        })
        .collect();
    wait_until("a thread has no connection", || {
        server.busy_threads("connections") >= 3
    });
}
