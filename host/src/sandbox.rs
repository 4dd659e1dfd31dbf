//! Sandboxes for guests. This module alone uses wasmtime.
//!
//! A server makes one [`Engine`], and one [`Guest`] for each version of a component. Each
//! connection then gets a store, an instance and one call ([`Guest::handle`]). The sandbox knows
//! neither listeners nor configuration: a connection is a [`Transport`].
//!
//! | step | files |
//! | --- | --- |
//! | a component is admitted | `requirements`, `imports`, `cache`, `admission` |
//! | the engine shares slots, memory and time | `engine`, `pool`, `limits`, `fairness` |
//! | a connection gets its store | `store`, `grants`, `output` |
//! | the guest runs, and calls the host | `guest`, `linker`, `host_*` |
//! | a call fails | `trap` |

mod admission;
mod cache;
mod digest;
mod engine;
mod fairness;
mod grants;
mod guest;
mod host_network;
mod host_tcp;
mod host_wasi;
mod imports;
mod limits;
mod linker;
mod output;
mod pool;
mod requirements;
mod store;
mod transport;
mod trap;

pub use cache::{Cache, CacheError};
pub use digest::Digest;
pub use engine::{Engine, EngineError};
pub use grants::{Access, DirGrant, Grants};
pub use guest::{Failure, Guest};
pub use host_network::destination::{Destination, DestinationError};
pub use imports::Report;
pub use limits::{FREE_MEMORY, GuestLimits, SharedLimits};
pub use pool::{HOST_STACK_BYTES, PoolSize};
pub use requirements::{Refusal, Requirements};
pub use transport::{ClientCertificate, TlsInfo, Transport};
pub use trap::Trap;
