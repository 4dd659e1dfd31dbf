//! Write a TCP protocol handler that wasinetd runs in a fresh sandbox for each connection.
//!
//! A guest is a `cdylib` with one async function and one macro line. This is a complete echo
//! server:
//!
//! ```
//! use futures::{AsyncReadExt, AsyncWriteExt};
//! use wasinetd_guest::TcpStream;
//!
//! wasinetd_guest::export!(handle_connection);
//!
//! async fn handle_connection(mut stream: TcpStream) -> std::io::Result<()> {
//!     let mut buffer = [0; 4096];
//!     loop {
//!         match stream.read(&mut buffer).await? {
//!             0 => return Ok(()),
//!             n => stream.write_all(&buffer[..n]).await?,
//!         }
//!     }
//! }
//! # fn main() {}
//! ```
//!
//! ```toml
//! [lib]
//! crate-type = ["cdylib"]
//!
//! [dependencies]
//! futures = "0.3"
//! wasinetd-guest = { path = "wasinetd/guest/sdk" }
//! ```
//!
//! Build the component with `cargo build --release --target wasm32-wasip2` and serve it with
//! `wasinetd serve target/wasm32-wasip2/release/NAME.wasm`. `wasinetd new NAME` creates such a
//! crate.
//!
//! # Testing a handler without a sandbox
//!
//! Make the handler generic over [`futures::io::AsyncRead`] and [`futures::io::AsyncWrite`]. A test
//! then passes a mock stream and needs neither wasm nor a socket.
//!
//! ```
//! use futures::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, Cursor};
//! use wasinetd_guest::TcpStream;
//!
//! wasinetd_guest::export!(handle_connection);
//!
//! async fn handle_connection(stream: TcpStream) -> std::io::Result<()> {
//!     shout(stream).await
//! }
//!
//! async fn shout(mut stream: impl AsyncRead + AsyncWrite + Unpin) -> std::io::Result<()> {
//!     let mut text = String::new();
//!     stream.read_to_string(&mut text).await?;
//!     stream.write_all(text.to_uppercase().as_bytes()).await
//! }
//!
//! # fn main() {
//! let mut transcript = b"psst".to_vec();
//! futures::executor::block_on(shout(Cursor::new(&mut transcript))).unwrap();
//! assert_eq!(transcript, b"psstPSST");
//! # }
//! ```
//!
//! # How a connection ends
//!
//! | The handler | The client sees | The host's log has |
//! | --- | --- | --- |
//! | returns `Ok(())` | all written bytes, then the end of the stream (FIN) | `ok` |
//! | returns an error | a reset (RST) | the text of the error, or its kind |
//! | panics | a reset (RST) | the panic message and a backtrace |
//!
//! A client can therefore tell a complete answer from a truncated one. To close only the writing
//! side and go on reading, call [`futures::AsyncWriteExt::close`].

#![deny(missing_docs)]

pub mod fs;
mod half;
mod stream;
mod tls;

use std::io;
use std::time::Duration;

pub use half::{ReadHalf, WriteHalf};
pub use stream::{Address, Drain, TcpStream};
pub use tls::{ClientCertificate, TlsInfo};

/// Items that the [`export!`] macro expands to. Not a public interface.
#[doc(hidden)]
pub mod rt;

/// Sleeps for `duration`. The host serves other connections meanwhile.
///
/// ```no_run
/// # async fn example() {
/// wasinetd_guest::sleep(std::time::Duration::from_secs(5)).await;
/// # }
/// ```
///
/// # Panics
///
/// Panics outside a wasm guest, where there is no host to call. A handler that is also tested
/// natively should take its clock as a parameter.
pub async fn sleep(duration: Duration) {
    let nanoseconds = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
    rt::bindings::wasi::clocks0_3_0::monotonic_clock::wait_for(nanoseconds).await;
}

/// Exports an `async fn(TcpStream) -> std::io::Result<()>` as the handler of this guest.
///
/// Use the macro once, at the top level of the guest's crate. See the [crate documentation](crate).
#[macro_export]
macro_rules! export {
    ($handler:path $(,)?) => {
        const _: () = {
            struct Guest;

            impl $crate::rt::Handler for Guest {
                async fn handle_connection(
                    connection: $crate::rt::Connection,
                ) -> ::core::result::Result<(), $crate::rt::ErrorCode> {
                    $crate::run(connection, $handler).await
                }
            }

            $crate::export_guest!(Guest);
        };
    };
}

/// Calls the handler and returns its result as `wasinetd:tcp/handler` defines it.
///
/// [`export!`] expands to a call of this function. Not a public interface.
#[doc(hidden)]
pub async fn run<F, Fut>(connection: rt::Connection, handler: F) -> Result<(), rt::ErrorCode>
where
    F: FnOnce(TcpStream) -> Fut,
    Fut: Future<Output = io::Result<()>>,
{
    handler(TcpStream::new(connection))
        .await
        .map_err(|error| rt::error_code(&error))
}

/// Exports a type that implements `rt::Handler` itself. Not a public interface.
///
/// Test fixtures use this macro to call the bindings in ways that this crate does not.
#[doc(hidden)]
#[macro_export]
macro_rules! export_guest {
    ($guest:ident) => {
        #[cfg(target_family = "wasm")]
        $crate::rt::export_handler!($guest with_types_in $crate::rt::bindings);

        // Export names of the component model are not valid symbol names on other targets. Guests
        // are compiled there only for their tests, so this line merely marks the handler as used.
        #[cfg(not(target_family = "wasm"))]
        const _: fn() = || _ = <$guest as $crate::rt::Handler>::handle_connection;
    };
}
