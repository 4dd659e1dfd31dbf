//! The handler of `guest/hello` on tokio, without a sandbox: what wasinetd is measured against.
//!
//! `native PAGES` listens on a free port of 127.0.0.1 and says which. `native --one-thread PAGES`
//! does the same with all connections on one thread.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use hello::Platform;
use tokio::net::TcpListener;
use tokio::runtime;
use tokio_util::compat::TokioAsyncReadCompatExt;

struct Tokio;

impl Platform for Tokio {
    async fn sleep(&self, duration: Duration) {
        tokio::time::sleep(duration).await;
    }

    fn is_draining(&self) -> bool {
        false
    }

    async fn draining(&self) {
        std::future::pending().await
    }
}

fn main() -> std::io::Result<()> {
    let mut arguments: Vec<String> = std::env::args().skip(1).collect();
    let one_thread = arguments
        .first()
        .is_some_and(|first| first == "--one-thread");
    if one_thread {
        arguments.remove(0);
    }
    let pages: Arc<PathBuf> = Arc::new(arguments.first().map_or("static".into(), PathBuf::from));
    let mut builder = match one_thread {
        true => runtime::Builder::new_current_thread(),
        false => runtime::Builder::new_multi_thread(),
    };
    let runtime = builder.enable_all().build()?;
    runtime.block_on(async { tokio::spawn(serve(pages)).await })?
}

async fn serve(pages: Arc<PathBuf>) -> std::io::Result<()> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
    println!("listening on {}", listener.local_addr()?);
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        let pages = pages.clone();
        tokio::spawn(async move {
            // A client that is gone is no news to a benchmark.
            let _ = hello::handle(stream.compat(), &pages, &Tokio).await;
        });
    }
}
