//! The web server of the async Rust book's last chapter, as a guest.
//!
//! `GET /` answers with `hello.html`. `GET /sleep` answers with the same page after five seconds,
//! without delaying other clients. Every other path gets `404.html`. The guest reads the pages from
//! the directory that the operator grants as `/static`.
//!
//! The handler is generic over the stream and the [`Platform`]. The unit tests thus run it on a
//! mock stream, and the benchmark runs it without a sandbox.

mod http;
mod server;

use std::io;
use std::path::Path;
use std::time::Duration;

use wasinetd_guest::{Drain, TcpStream};

pub use server::{Platform, handle};

wasinetd_guest::export!(handle_connection);

/// The directory of the pages in the guest, granted by `--dir HOST::/static`.
const PAGES: &str = "/static";

async fn handle_connection(stream: TcpStream) -> io::Result<()> {
    let sandbox = Sandbox {
        drain: stream.drain(),
    };
    handle(stream, PAGES.as_ref(), &sandbox).await
}

/// The platform of a guest: the wasinetd host.
struct Sandbox {
    drain: Drain,
}

impl Platform for Sandbox {
    async fn sleep(&self, duration: Duration) {
        wasinetd_guest::sleep(duration).await;
    }

    async fn replaced(&self) {
        self.drain.replaced().await;
    }

    async fn draining(&self) {
        self.drain.begun().await;
    }

    fn read_file(&self, path: &Path) -> io::Result<Vec<u8>> {
        wasinetd_guest::fs::read(path)
    }
}
