//! Zero-downtime upgrade: a new process of the installed program takes over.
//!
//! The parent starts a child that inherits its listening sockets, and describes them in an environment
//! variable ([`message`]). Once the child serves, it says so on a pipe, and only then does the parent drain. Both hold the very
//! same sockets: whichever process accepts next gets the waiting client, and no client is refused in
//! between. Guests travel as files in memory, because their files on disk may have changed since.

pub mod child;
pub mod message;
pub mod parent;

pub use child::InheritedFds;
pub use parent::{
    HandedOver, HandedOverSocket, NewProcess, Upgrade, UpgradeError, installed_program,
};
