//! The internet super-server for WebAssembly components.
//!
//! A connection takes one way through this crate:
//!
//! ```text
//! listener (permit, accept) → server (dispatch, drain) → connection (handshake, limits, end)
//!   → sandbox (store, instance, call) → guest
//! ```
//!
//! Beside it, the control plane keeps the running services equal to the configuration: [`config`] →
//! [`supervisor`] → [`service`].
//!
//! Imports point one way as well. [`net`], [`lifecycle`], [`limit`], [`sync`] and [`telemetry`] are the
//! base. [`listener`] and [`sandbox`] build on it and do not know each other. Then come
//! [`connection`], [`service`], [`admin`] and the control plane. [`server`] knows neither sockets nor
//! sandboxes, and only [`sandbox`] names wasmtime. No modules import each other in a circle.
//!
//! The library reads no arguments, waits for no signals, prints nothing, and names no flag and no exit
//! code: the `wasinetd` binary does. Only [`systemd`] and [`upgrade`] read the environment, by which a
//! parent process passes sockets.

#![deny(missing_docs)]

pub mod admin;
pub mod capacity;
pub mod config;
pub mod connection;
pub mod lifecycle;
pub mod limit;
pub mod listener;
pub mod net;
pub mod sandbox;
pub mod server;
pub mod service;
pub mod supervisor;
pub mod sync;
pub mod systemd;
pub mod telemetry;
pub mod upgrade;
