//! Hostile guests and clients.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use fastrand::Rng;
use socket2::{SockFilter, SockRef};

use super::well_behaved::REQUEST;
use crate::client;

/// The number of concurrent connections with a fault.
pub(super) const CONNECTIONS: usize = 100;

/// The source address of all hostile clients.
const SOURCE: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 9);

/// The time in which each connection is checked once.
const SWEEP: Duration = Duration::from_millis(50);

/// The steps of a sweep. Each step checks a part of the connections, because replacing all of them
/// at once would be a burst, which is a fault of its own.
const STEPS: usize = 25;

/// A kind of hostile guest or client.
pub(super) struct Fault {
    pub(super) name: &'static str,
    behavior: Behavior,
}

enum Behavior {
    /// The client asks the fixture `hostile` for this harm.
    Guest(&'static str),
    /// The guest writes and the client never reads.
    NeverReads,
    /// The client sends nothing.
    Silent,
    /// The client sends single bytes and never ends its line.
    Slow,
    /// The client resets the connection at different points of the exchange.
    Resets,
    /// The client closes one direction at once.
    HalfClosed,
    /// The client sends random bytes.
    Noise,
    /// The client disappears: no packet reaches it any more.
    Vanishes,
    /// Many clients connect at once and leave.
    Burst,
    /// One source opens more connections than its limit.
    Flood,
}

pub(super) const FAULTS: [Fault; 27] = [
    guest("guest computes without end", "spin"),
    guest("guest computes and allocates", "spin and allocate"),
    guest("guest takes all memory at once", "one big grow"),
    guest("guest takes all memory in pieces", "many small grows"),
    guest("guest recurses without end", "recurse"),
    guest("guest traps", "trap"),
    guest("guest panics", "panic"),
    guest("guest answers and traps", "answer and trap"),
    guest("guest returns at once", "return"),
    guest("guest never writes", "never write"),
    guest("guest never reads", "never read"),
    guest("guest writes without end", "write forever"),
    guest("guest opens streams without end", "open streams"),
    guest("guest leaks streams", "leak streams"),
    guest("guest makes endless host calls", "call without end"),
    guest("guest prints without end", "print"),
    guest("guest reads endless random bytes", "ask for randomness"),
    guest("guest sleeps for a year", "sleep"),
    client("client never reads", Behavior::NeverReads),
    client("client sends nothing", Behavior::Silent),
    client("client sends byte by byte", Behavior::Slow),
    client("client resets", Behavior::Resets),
    client("client closes one direction", Behavior::HalfClosed),
    client("client sends random bytes", Behavior::Noise),
    client("client vanishes", Behavior::Vanishes),
    client("clients connect in bursts", Behavior::Burst),
    client("clients exceed the limit per source", Behavior::Flood),
];

const fn guest(name: &'static str, harm: &'static str) -> Fault {
    let behavior = Behavior::Guest(harm);
    Fault { name, behavior }
}

const fn client(name: &'static str, behavior: Behavior) -> Fault {
    Fault { name, behavior }
}

impl Fault {
    /// Keeps `count` connections with this fault open until `end`. Replaces those that end.
    pub(super) fn run(&self, address: SocketAddr, count: usize, end: Instant) -> io::Result<()> {
        let count = match self.behavior {
            Behavior::Flood => 10 * count,
            _ => count,
        };
        let steps = match self.behavior {
            Behavior::Burst => 1,
            _ => STEPS,
        };
        let mut connections: Vec<Option<Connection>> = (0..count).map(|_| None).collect();
        let mut step = 0;
        while Instant::now() < end {
            let sweep = step / steps;
            for connection in connections.iter_mut().skip(step % steps).step_by(steps) {
                let ended = match connection {
                    Some(open) => self.continue_on(open, sweep),
                    None => true,
                };
                if ended {
                    // Close the old connection before opening the new one.
                    *connection = None;
                    *connection = self.open(address, sweep).ok();
                }
            }
            step += 1;
            thread::sleep(SWEEP / steps as u32);
        }
        Ok(())
    }

    fn open(&self, address: SocketAddr, sweep: usize) -> io::Result<Connection> {
        let mut stream = client::connect_from(SOURCE, address)?;
        stream.set_nonblocking(true)?;
        match &self.behavior {
            Behavior::Guest(harm) => stream.write_all(format!("{harm}\n").as_bytes())?,
            Behavior::NeverReads => stream.write_all(b"write forever\n")?,
            Behavior::Flood => stream.write_all(b"sleep\n")?,
            Behavior::Silent | Behavior::Slow | Behavior::Burst => {}
            Behavior::Resets => {
                stream.write_all(&REQUEST[..sweep % (REQUEST.len() + 1)])?;
                SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
            }
            Behavior::HalfClosed => {
                let direction = [Shutdown::Read, Shutdown::Write][sweep % 2];
                stream.shutdown(direction)?;
            }
            Behavior::Noise => {
                let mut bytes = [0; 4096];
                Rng::with_seed(sweep as u64).fill(&mut bytes);
                stream.write_all(&bytes)?;
            }
            Behavior::Vanishes => {
                stream.write_all(REQUEST)?;
                // This filter drops every packet (classic BPF: return 0).
                let drop_all = [SockFilter::new(0x06, 0, 0, 0)];
                SockRef::from(&stream).attach_filter(&drop_all)?;
            }
        }
        Ok(Connection {
            stream,
            first_sweep: sweep,
        })
    }

    /// Continues the behavior on a connection. Returns whether the connection has ended.
    fn continue_on(&self, connection: &mut Connection, sweep: usize) -> bool {
        let age = SWEEP * (sweep - connection.first_sweep) as u32;
        match &self.behavior {
            Behavior::Resets | Behavior::Burst => return true,
            // The server has ended the connection by then, but its reset cannot arrive.
            Behavior::Vanishes => return age > Duration::from_secs(8),
            Behavior::NeverReads => return age > Duration::from_secs(2),
            Behavior::Slow => {
                // An error means a reset, which the read below finds.
                let _ = connection.stream.write(b"x");
            }
            _ => {}
        }
        match connection.stream.read(&mut [0; 4096]) {
            Ok(n) => n == 0,
            Err(error) => error.kind() != ErrorKind::WouldBlock,
        }
    }
}

struct Connection {
    stream: TcpStream,
    /// The sweep in which the connection was opened.
    first_sweep: usize,
}
