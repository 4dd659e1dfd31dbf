//! The internet super-server for WebAssembly components.
//!
//! Connections flow one way through this crate:
//!
//! ```text
//! listener (sockets → Stream) → server (dispatch, drain) → connection (accounting, ending)
//!   → sandbox (store, instance, call) → guest
//! ```
//!
//! No module knows those before it. [`sandbox`] is the only one that knows wasmtime; [`server`]
//! knows neither sockets nor sandboxes. The library never reads arguments, environment or signals:
//! the `wasinetd` binary does.

#![deny(missing_docs)]

pub mod admin;
pub mod capacity;
pub mod config;
pub mod connection;
mod error;
pub mod lifecycle;
pub mod limit;
pub mod listener;
pub mod net;
pub mod sandbox;
pub mod server;
pub mod service;
pub mod sync;
pub mod telemetry;

pub use error::Error;
