//! TLS, tested with curl, openssl, sslscan and a client that is written by hand.

mod authority;
mod certificates;
mod client_certificates;
mod end_of_stream;
mod handshake;
mod limits;
mod observe;
mod reload;
