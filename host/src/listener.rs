//! Listening sockets, as one stream of accepted connections per shard.
//!
//! ```text
//! BoundSockets (bind) → ListeningSockets (listen) → Incoming (accept, one per shard)
//!   → MergedStreams (of all services) → server
//! ```
//!
//! A connection reaches the server as [`Accepted`]. Before that, it has passed the [`Admission`]
//! rules of its source and holds a permit of the [`ConnectionLimit`].

mod accepted;
mod admission;
mod async_listener;
mod backoff;
mod bind;
mod bind_error;
mod connection_limit;
mod drain;
mod incoming;
mod listening;
mod merge;
mod refusals;
mod settings;
mod source;

pub use accepted::{AcceptPermit, Accepted};
pub use admission::{Admission, AdmissionRules};
pub(crate) use backoff::accept_errors;
pub use backoff::register;
pub use bind::BoundSockets;
pub use bind_error::BindError;
pub use connection_limit::ConnectionLimit;
pub use incoming::{Incoming, WhenFull};
pub use listening::{Listener, ListeningSockets};
pub use merge::{MergeHandle, MergedStreams};
pub use settings::SocketSettings;
pub(crate) use source::Source;
pub use source::{SourcePrefix, SourcePrefixError};
