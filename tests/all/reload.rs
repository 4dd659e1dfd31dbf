//! Reloads, and restarts with another config file: limits, clients, addresses and watched files.

mod addresses;
mod files;
mod helpers;
mod limits;
mod successor;

pub(crate) use helpers::echo_at;
