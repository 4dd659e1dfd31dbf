//! The admin API: HTTP for operators, on a Unix socket or a loopback address.
//!
//! `socket.rs` owns the socket, `http_server.rs` its connections, `api.rs` each request. The answers
//! are in `snapshot.rs` (state), `orders.rs` (changes), `logs.rs` and `dashboard.rs`.

mod address;
mod api;
mod dashboard;
mod endpoint;
mod error;
mod http_server;
mod log_stream;
mod logs;
mod long_running;
pub mod model;
mod orders;
mod response;
mod snapshot;
mod socket;
mod state;

pub use address::AdminAddress;
pub use error::AdminError;
pub use log_stream::LogStream;
pub use socket::Admin;
pub use state::{
    AdminState, ConfiguredLimits, ReloadFailure, ReloadFailureKind, ReloadResult, RestartResult,
};
