//! Property test: no split of reads and writes, by guest or client, changes the bytes.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::panic::AssertUnwindSafe;
use std::thread;

use bolero::generator::produce;

use crate::harness::{MODES, Server, fixture};

/// Generated conversations per dispatch mode.
const CASES: usize = 500;

/// The longest piece that a client sends, chosen by the seed.
const LONGEST: [usize; 4] = [3, 300, 5_000, 50_000];

/// The size of the client's read buffer, chosen by the seed.
const READ_SIZES: [usize; 3] = [64, 3_000, 100_000];

#[test]
fn bytes_survive_any_split_of_reads_and_writes() {
    for mode in MODES {
        let server = AssertUnwindSafe(Server::start(mode, &fixture("splits"), &[]));
        let case = produce::<(u64, Vec<u16>)>();
        bolero::check!()
            .with_iterations(CASES)
            .with_generator(case)
            .for_each(|(seed, pieces)| {
                // Captures the whole wrapper: the server inside is not unwind-safe.
                let server = &server;
                converse(server, *seed, pieces);
            });
    }
}

fn converse(server: &Server, seed: u64, pieces: &[u16]) {
    let longest = LONGEST[seed as usize % LONGEST.len()];
    let pieces: Vec<Vec<u8>> = pieces
        .iter()
        .map(|length| usize::from(*length) % longest + 1)
        .enumerate()
        .map(|(n, length)| (0..length).map(|i| (n * 31 + i * 7) as u8).collect())
        .collect();
    // Small reads make the guest's writes wait.
    let read_size = READ_SIZES[seed as usize / 4 % READ_SIZES.len()];
    let mut client = server.connect();
    let mut receiving = client.0.try_clone().expect("descriptors are available");
    let received = thread::scope(|scope| {
        let reader = scope.spawn(move || {
            let (mut bytes, mut buffer): (Vec<u8>, _) = (Vec::new(), vec![0; read_size]);
            loop {
                match receiving.read(&mut buffer) {
                    Ok(0) => return Ok(bytes),
                    Ok(n) => bytes.extend(&buffer[..n]),
                    Err(error) => return Err(error),
                }
            }
        });
        client.send(format!("{seed}\n"));
        for piece in &pieces {
            client.0.write_all(piece).expect("the server takes it");
            if piece.len() % 3 == 0 {
                thread::yield_now();
            }
        }
        client
            .0
            .shutdown(Shutdown::Write)
            .expect("the connection is open");
        reader.join().expect("the reader does not panic")
    });
    let received = received.unwrap_or_else(|error| panic!("{error}\n{server:?}"));
    assert!(received == pieces.concat(), "seed {seed}\n{server:?}");
}
