//! The cost of a sandbox alone.
//!
//! The transport is in memory: no socket, no kernel, no client.
//! `make bench` runs these benchmarks before it measures whole servers.

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use criterion::{Criterion, criterion_group, criterion_main};
use futures::future::BoxFuture;
use tokio::runtime::{Builder, Runtime};
use wasinetd::limit::Limit;
use wasinetd::net::TransportAddress;
use wasinetd::sandbox::{
    Engine, Grants, Guest, GuestLimits, PoolSize, Requirements, SharedLimits, Transport,
};

/// The allocator of the `wasinetd` binary.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Several slots: the pool chooses among them, as in a server.
const POOL: PoolSize = PoolSize {
    connections: 64,
    stacks: 128,
};

fn guest(name: &str) -> Guest {
    let path = format!(
        "{}/../target/guests/{name}.wasm",
        env!("CARGO_MANIFEST_DIR")
    );
    let component = std::fs::read(&path).unwrap_or_else(|error| {
        panic!("{path}: {error}; run `make build` first");
    });
    let requirements = Requirements::of(&component).expect("the guest is accepted");
    let engine = Engine::new(POOL, &requirements, SharedLimits::default(), None)
        .expect("the address space suffices");
    Guest::new(
        &engine,
        &component,
        Grants::default(),
        GuestLimits::default(),
    )
    .expect("the guest is accepted")
}

fn runtime() -> Runtime {
    Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("the open-file limit allows a reactor")
}

/// A client of an echo server. It sends a message, waits for the echo, and repeats.
struct Client {
    message: [u8; 64],
    rounds_left: u64,
    /// Bytes sent and not echoed yet.
    in_flight: usize,
}

impl Client {
    fn new(rounds: u64) -> Arc<Mutex<Self>> {
        Arc::new(Mutex::new(Self {
            message: [b'x'; 64],
            rounds_left: rounds,
            in_flight: 0,
        }))
    }
}

impl Transport for Client {
    fn id(&self) -> u64 {
        1
    }

    fn remote_address(&self) -> TransportAddress {
        SocketAddr::from(([127, 0, 0, 1], 1)).into()
    }

    fn local_address(&self) -> io::Result<TransportAddress> {
        Ok(SocketAddr::from(([127, 0, 0, 1], 2)).into())
    }

    fn poll_receive(&mut self, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<io::Result<usize>> {
        if self.in_flight > 0 {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        if self.rounds_left == 0 {
            return Poll::Ready(Ok(0));
        }
        self.rounds_left -= 1;
        self.in_flight = self.message.len();
        buf[..self.in_flight].copy_from_slice(&self.message);
        Poll::Ready(Ok(self.in_flight))
    }

    fn poll_receivable(&mut self, _: &mut Context<'_>) -> Poll<()> {
        Poll::Ready(())
    }

    fn poll_send(&mut self, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.in_flight -= bytes.len();
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_sendable(&mut self, _: &mut Context<'_>) -> Poll<()> {
        Poll::Ready(())
    }

    fn close_sending(&mut self) {}

    fn limit_hit(&mut self, limit: Limit) {
        panic!("{limit}");
    }

    fn release(&mut self) {}

    fn is_draining(&self) -> bool {
        false
    }

    fn draining(&self) -> BoxFuture<'static, ()> {
        Box::pin(std::future::pending())
    }

    fn is_replaced(&self) -> bool {
        false
    }

    fn replaced(&self) -> BoxFuture<'static, ()> {
        Box::pin(std::future::pending())
    }
}

fn connection(runtime: &Runtime, guest: &Guest, rounds: u64) -> Duration {
    let started = Instant::now();
    runtime
        .block_on(guest.handle(Client::new(rounds)))
        .expect("the guest succeeds");
    started.elapsed()
}

fn sandbox(criterion: &mut Criterion) {
    let (runtime, echo, hello) = (runtime(), guest("echo"), guest("hello"));
    for (name, guest) in [("echo", &echo), ("hello", &hello)] {
        criterion.bench_function(&format!("instantiate and drop, {name}"), |bencher| {
            bencher.iter(|| {
                runtime
                    .block_on(guest.try_out(Client::new(0)))
                    .expect("the guest starts")
            });
        });
    }
    criterion.bench_function("a connection of one message, echo", |bencher| {
        bencher.iter(|| connection(&runtime, &echo, 1));
    });
    criterion.bench_function("a round trip on an open connection, echo", |bencher| {
        bencher.iter_custom(|rounds| connection(&runtime, &echo, rounds));
    });
}

criterion_group!(benches, sandbox);
criterion_main!(benches);
