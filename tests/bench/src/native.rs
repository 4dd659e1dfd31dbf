//! The native baseline: the handlers of `guest/hello` and `guest/echo` without a sandbox.

use std::io;
use std::path::Path;
use std::time::Duration;

use futures::io::BufReader;
use hello::Platform;
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::{Builder, Runtime};
use tokio_util::compat::{TokioAsyncReadCompatExt, TokioAsyncWriteCompatExt};

use crate::build;

/// The size of the echo buffer, the same as in the guest SDK.
const ECHO_BYTES: usize = 64 * 1024;

/// Runs the native server that `arguments` name.
///
/// `hello` and `echo` listen on a free port of 127.0.0.1 and print the address. `one-thread` before
/// the name limits the server to one thread. `stdio` is `hello` for a single connection on standard
/// input and output, as inetd passes it to a process.
pub(crate) fn serve(arguments: &[String]) -> io::Result<()> {
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments.as_slice() {
        ["hello"] => multi_thread()?.block_on(listen(hello)),
        ["echo"] => multi_thread()?.block_on(listen(echo)),
        ["one-thread", "hello"] => one_thread()?.block_on(listen(hello)),
        ["stdio"] => one_thread()?.block_on(stdio()),
        _ => Err(io::Error::other(format!(
            "unknown native server: {arguments:?}"
        ))),
    }
}

fn multi_thread() -> io::Result<Runtime> {
    Builder::new_multi_thread().enable_all().build()
}

fn one_thread() -> io::Result<Runtime> {
    Builder::new_current_thread().enable_all().build()
}

async fn listen<F>(handle: fn(TcpStream) -> F) -> io::Result<()>
where
    F: Future<Output = io::Result<()>> + Send + 'static,
{
    let accept = async move {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        println!("listening on {}", listener.local_addr()?);
        loop {
            let (stream, _) = listener.accept().await?;
            stream.set_nodelay(true)?;
            // Connection errors do not matter here: the load generator reports its own.
            tokio::spawn(async move { handle(stream).await });
        }
    };
    // As a task, the accept loop runs on a worker thread like the connections.
    tokio::spawn(accept).await?
}

async fn hello(stream: TcpStream) -> io::Result<()> {
    hello::handle(stream.compat(), Path::new("static"), &Tokio).await
}

async fn echo(stream: TcpStream) -> io::Result<()> {
    let (reader, writer) = stream.into_split();
    let reader = BufReader::with_capacity(ECHO_BYTES, reader.compat());
    echo::echo(reader, writer.compat_write()).await
}

async fn stdio() -> io::Result<()> {
    use std::os::fd::AsFd;

    let socket = io::stdin().as_fd().try_clone_to_owned()?;
    let stream = std::net::TcpStream::from(socket);
    stream.set_nonblocking(true)?;
    stream.set_nodelay(true)?;
    hello(TcpStream::from_std(stream)?).await
}

/// The platform of `hello` on tokio and the standard library.
struct Tokio;

impl Platform for Tokio {
    async fn sleep(&self, duration: Duration) {
        tokio::time::sleep(duration).await;
    }

    async fn replaced(&self) {
        std::future::pending().await
    }

    async fn draining(&self) {
        std::future::pending().await
    }

    /// Reads with as few system calls as `wasinetd_guest::fs::read` makes host calls.
    fn read_file(&self, path: &Path) -> io::Result<Vec<u8>> {
        use std::io::Read;

        const STEP: usize = 4 * 1024;
        let mut file = std::fs::File::open(path)?;
        let mut bytes = Vec::new();
        loop {
            let old = bytes.len();
            bytes.resize(old + STEP, 0);
            let n = file.read(&mut bytes[old..])?;
            bytes.truncate(old + n);
            if n < STEP {
                return Ok(bytes);
            }
        }
    }
}

/// The command that runs this program as a native server.
pub(crate) fn command(arguments: &[&str]) -> Vec<String> {
    let own = build::program("bench");
    let mut command = vec![own.display().to_string(), "--native".into()];
    command.extend(arguments.iter().map(ToString::to_string));
    command
}
