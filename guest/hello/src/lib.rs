//! The server of the async Rust book's last chapter, as a guest.
//!
//! `GET /` answers with `hello.html`, `GET /sleep` with the same page after five seconds without
//! holding anyone up, and anything else with `404.html`. The pages are read from the directory
//! that the operator grants as `/static`.
//!
//! The handler is generic over the stream and over what it asks of its surroundings, so that the
//! same code is unit-tested with a mock stream and measured without a sandbox.

mod http;
mod server;

use std::io;
use std::path::Path;
use std::time::Duration;

use wasinetd_guest::{Drain, TcpStream};

pub use server::{Platform, handle};

wasinetd_guest::export!(handle_connection);

/// Where the operator grants the pages: `--dir HOST::/static`.
const PAGES: &str = "/static";

async fn handle_connection(stream: TcpStream) -> io::Result<()> {
    let sandbox = Sandbox {
        drain: stream.drain(),
    };
    handle(stream, PAGES.as_ref(), &sandbox).await
}

/// The surroundings that a guest has.
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
