//! Guests and clients that do harm, over and over.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use socket2::{SockFilter, SockRef};

use crate::client;

/// How many there are of a fault at once.
pub(super) const MANY: usize = 100;

/// All of them are one source.
const SOURCE: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 9);

/// How often each connection is looked after, and in how many parts, so that those that end at once
/// do not come as a burst: that is a fault of its own.
const SWEEP: Duration = Duration::from_millis(50);
const PARTS: usize = 25;

/// A kind of harm.
pub(super) struct Fault {
    pub(super) name: &'static str,
    harm: Harm,
}

enum Harm {
    /// What the fixture `hostile` does when it is told so.
    Guest(&'static str),
    /// A guest that writes, and a client that does not read.
    Deaf,
    /// Nothing is said.
    Silent,
    /// A byte now and then, and never the end of the line.
    Slow,
    /// A reset, at one point of the exchange or another.
    Resets,
    /// One side is closed at once.
    HalfClosed,
    /// Bytes without sense.
    Noise,
    /// No packet reaches it any more.
    Gone,
    /// Many connect at once, and leave.
    Burst,
    /// More than the source may have: those beyond are refused.
    Flood,
}

pub(super) const FAULTS: [Fault; 27] = [
    guest("a guest that computes without end", "spin"),
    guest("one that allocates meanwhile", "spin and allocate"),
    guest("one that takes all memory at once", "one big grow"),
    guest("one that takes it in pieces", "many small grows"),
    guest("one that recurses without end", "recurse"),
    guest("one that traps", "trap"),
    guest("one that panics", "panic"),
    guest("one that answers and traps", "answer and trap"),
    guest("one that returns at once", "return"),
    guest("one that never writes", "never write"),
    guest("one that never reads", "never read"),
    guest("one that writes without end", "write forever"),
    guest("one that opens streams without end", "open streams"),
    guest("one that leaks streams", "leak streams"),
    guest("one that calls the host without end", "call without end"),
    guest("one that prints without end", "print"),
    guest(
        "one that asks for randomness without end",
        "ask for randomness",
    ),
    guest("one that sleeps for a year", "sleep"),
    client("a client that never reads", Harm::Deaf),
    client("one that says nothing", Harm::Silent),
    client("one that sends byte by byte", Harm::Slow),
    client("one that resets", Harm::Resets),
    client("one that closes one side", Harm::HalfClosed),
    client("one that sends nonsense", Harm::Noise),
    client("one that is gone without a word", Harm::Gone),
    client("one that connects in bursts", Harm::Burst),
    client("one that floods its own places", Harm::Flood),
];

const fn guest(name: &'static str, harm: &'static str) -> Fault {
    let harm = Harm::Guest(harm);
    Fault { name, harm }
}

const fn client(name: &'static str, harm: Harm) -> Fault {
    Fault { name, harm }
}

impl Fault {
    /// Has so many of it there until `end`.
    pub(super) fn go_on(&self, address: SocketAddr, many: usize, end: Instant) -> io::Result<()> {
        let many = if let Harm::Flood = self.harm {
            10 * many
        } else {
            many
        };
        let mut slots: Vec<Option<Slot>> = (0..many).map(|_| None).collect();
        let parts = if let Harm::Burst = self.harm {
            1
        } else {
            PARTS
        };
        let mut turns = 0;
        while Instant::now() < end {
            let sweeps = turns / parts;
            for slot in slots.iter_mut().skip(turns % parts).step_by(parts) {
                let over = match slot {
                    Some(open) => self.has_ended(open, sweeps),
                    None => true,
                };
                if over {
                    // What was there is closed first.
                    *slot = None;
                    *slot = self.begin(address, sweeps).ok();
                }
            }
            turns += 1;
            thread::sleep(SWEEP / parts as u32);
        }
        Ok(())
    }

    fn begin(&self, address: SocketAddr, sweeps: usize) -> io::Result<Slot> {
        let mut stream = client::connect_from(SOURCE, address)?;
        stream.set_nonblocking(true)?;
        let begun = sweeps;
        match &self.harm {
            Harm::Guest(line) => stream.write_all(format!("{line}\n").as_bytes())?,
            Harm::Deaf => stream.write_all(b"write forever\n")?,
            Harm::Flood => stream.write_all(b"sleep\n")?,
            Harm::Silent | Harm::Slow | Harm::Burst => {}
            Harm::Resets => {
                let question = b"innocent\n";
                stream.write_all(&question[..sweeps % (question.len() + 1)])?;
                SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
            }
            Harm::HalfClosed => {
                let side = [Shutdown::Read, Shutdown::Write][sweeps % 2];
                stream.shutdown(side)?;
            }
            Harm::Noise => {
                let mut noise = 0x9e37_79b9_7f4a_7c15 ^ sweeps as u64;
                let bytes: Vec<u8> = (0..4096)
                    .map(|_| {
                        noise ^= noise << 13;
                        noise ^= noise >> 7;
                        noise ^= noise << 17;
                        noise as u8
                    })
                    .collect();
                stream.write_all(&bytes)?;
            }
            Harm::Gone => {
                stream.write_all(b"innocent\n")?;
                // Drops every packet (classic BPF: return 0).
                let nothing = [SockFilter::new(0x06, 0, 0, 0)];
                SockRef::from(&stream).attach_filter(&nothing)?;
            }
        }
        Ok(Slot { stream, begun })
    }

    /// Goes on with it. Whether it is over.
    fn has_ended(&self, slot: &mut Slot, sweeps: usize) -> bool {
        let age = SWEEP * (sweeps - slot.begun) as u32;
        match &self.harm {
            Harm::Resets | Harm::Burst => return true,
            // The server knows by then, and has no way to say so.
            Harm::Gone => return age > Duration::from_secs(8),
            Harm::Deaf => return age > Duration::from_secs(2),
            Harm::Slow => {
                // It may have been reset.
                let _ = slot.stream.write(b"x");
            }
            _ => {}
        }
        match slot.stream.read(&mut [0; 4096]) {
            Ok(n) => n == 0,
            Err(error) => error.kind() != ErrorKind::WouldBlock,
        }
    }
}

struct Slot {
    stream: TcpStream,
    /// In which sweep.
    begun: usize,
}
