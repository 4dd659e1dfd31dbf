//! Tests of the release build of `wasinetd` with real clients.
//!
//! The clients are curl, nc, redis-cli and raw sockets.
//!
//! Each server listens on a free port and prints its address. No test waits for a fixed time for an
//! event: it waits for a line of the server, or for bytes on a socket.

mod admin;
mod admission;
mod bad_input;
mod config;
mod connection_limits;
mod ctl;
mod dashboard;
mod documents;
mod ending;
mod grants;
mod guest_limits;
mod harness;
mod hostile_clients;
mod hostile_guests;
mod http;
mod inetd;
mod isolation;
mod limits;
mod load;
mod network;
mod new;
mod otlp;
mod output;
mod packaging;
mod proxy;
mod reload;
mod restart;
mod shutdown;
mod sockets;
mod splits;
mod start;
mod structure;
mod swap;
mod tls;
