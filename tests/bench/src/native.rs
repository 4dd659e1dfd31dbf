//! The handlers of `guest/hello` and `guest/echo` without a sandbox: what wasinetd is measured
//! against.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures::io::BufReader;
use hello::Platform;
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::{Builder, Runtime};
use tokio_util::compat::{TokioAsyncReadCompatExt, TokioAsyncWriteCompatExt};

/// How much is received at once to be sent back: as much as a guest's stream does.
const ECHO_BYTES: usize = 64 * 1024;

/// Serves as `arguments` say: `hello` or `echo` on a free port of 127.0.0.1, which it prints, with
/// `one-thread` before it if there is to be only one; or `stdio`, which is `hello` for the one
/// connection that is standard input and output, as inetd hands it to a process.
pub(crate) fn serve(arguments: &[String]) -> io::Result<()> {
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments.as_slice() {
        ["hello"] => threads()?.block_on(listen(hello)),
        ["echo"] => threads()?.block_on(listen(echo)),
        ["one-thread", "hello"] => thread()?.block_on(listen(hello)),
        ["stdio"] => thread()?.block_on(stdio()),
        _ => Err(io::Error::other(format!(
            "not a native server: {arguments:?}"
        ))),
    }
}

fn threads() -> io::Result<Runtime> {
    Builder::new_multi_thread().enable_all().build()
}

fn thread() -> io::Result<Runtime> {
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
            // A client that is gone is no news to a benchmark.
            tokio::spawn(async move { handle(stream).await });
        }
    };
    // As a task it runs on the threads that the connections run on.
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

/// What the handler of `hello` asks for, from tokio and the standard library.
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

    /// In as few system calls as the guest's way takes.
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
    let own = std::env::current_exe().unwrap_or_else(|_| PathBuf::from("target/release/bench"));
    let mut command = vec![own.display().to_string(), "--native".into()];
    command.extend(arguments.iter().map(ToString::to_string));
    command
}
