//! Write a TCP protocol handler that wasinetd runs in a fresh sandbox for each connection.
//!
//! A guest is a `cdylib` with one async function and one macro line. This is all of a guest that
//! sends back what it receives:
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
//! `cargo build --release --target wasm32-wasip2` makes a component of it, and
//! `wasinetd serve target/wasm32-wasip2/release/NAME.wasm` serves it.
//!
//! # Handlers that can be tested without a sandbox
//!
//! A handler that is generic over [`futures::io::AsyncRead`] and [`futures::io::AsyncWrite`] needs
//! neither wasm nor a socket to be tested: hand it a mock stream.
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
//! Returning `Ok(())` delivers all that was written and closes the connection. Returning an error,
//! or panicking, resets it, so that a client can tell a broken answer from a whole one; the
//! host's log has the error's text, or its kind if that says it all. [`futures::AsyncWriteExt::close`] closes only the writing
//! side.

#![deny(missing_docs)]

pub mod fs;
mod half;
mod stream;
mod tls;

use std::time::Duration;

pub use half::{ReadHalf, WriteHalf};
pub use stream::{Address, Drain, TcpStream};
pub use tls::{ClientCertificate, TlsInfo};

/// What the [`export!`] macro expands to. Not a public interface.
#[doc(hidden)]
pub mod rt;

/// Waits for `duration`, while the host serves other connections.
///
/// ```no_run
/// # async fn example() {
/// wasinetd_guest::sleep(std::time::Duration::from_secs(5)).await;
/// # }
/// ```
///
/// # Panics
///
/// Panics outside of a wasm guest: there is no host to ask. Hand the clock to a generic handler as
/// a parameter where it is to be tested natively.
pub async fn sleep(duration: Duration) {
    let nanoseconds = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
    rt::bindings::wasi::clocks0_3_0::monotonic_clock::wait_for(nanoseconds).await;
}

/// Exports an `async fn(TcpStream) -> std::io::Result<()>` as the handler of this guest.
///
/// Write it once, at the top level of the guest's crate. See the [crate documentation](crate).
#[macro_export]
macro_rules! export {
    ($handler:path $(,)?) => {
        const _: () = {
            struct Guest;

            impl $crate::rt::Handler for Guest {
                async fn handle_connection(
                    connection: $crate::rt::Connection,
                ) -> ::core::result::Result<(), $crate::rt::ErrorCode> {
                    $crate::rt::run(connection, $handler).await
                }
            }

            $crate::export_guest!(Guest);
        };
    };
}

/// Exports a type that implements `rt::Handler` by hand, as the fixtures do that use the bindings
/// in ways this crate does not. Not a public interface.
#[doc(hidden)]
#[macro_export]
macro_rules! export_guest {
    ($guest:ident) => {
        #[cfg(target_family = "wasm")]
        $crate::rt::export_handler!($guest with_types_in $crate::rt::bindings);

        // The names that the component model exports by are no symbol names on other targets,
        // where a guest is compiled only to be tested: there it counts as used, no more.
        #[cfg(not(target_family = "wasm"))]
        const _: fn() = || _ = <$guest as $crate::rt::Handler>::handle_connection;
    };
}
