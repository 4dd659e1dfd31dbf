//! Tests of the release build of `wasinetd`, driven with curl and raw sockets.
//!
//! Each server listens on a port of its own and says which. Nothing waits for a fixed time: tests
//! wait for what the server prints, or for what arrives on a socket.

mod admin;
mod admission;
mod bad_input;
mod connection_limits;
mod ctl;
mod dashboard;
mod ending;
mod grants;
mod guest_limits;
mod harness;
mod hostile_clients;
mod hostile_guests;
mod http;
mod isolation;
mod limits;
mod load;
mod network;
mod otlp;
mod output;
mod proxy;
mod restart;
mod shutdown;
mod splits;
mod start;
mod swap;
mod tls;
