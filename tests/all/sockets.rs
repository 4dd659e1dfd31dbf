//! Listening sockets: Unix sockets, passed sockets, and socket options.

mod helpers;
mod passed;
mod setup;
mod unix;
mod unix_paths;
