//! Services, and the versions of the guests that handle their connections.
//!
//! A connection starts with the current version and keeps it. A new version is prepared in the
//! background (`prepare.rs`) and becomes the current one by one exchange of a pointer (`swap.rs`).
//! The replaced version drains.

mod metrics;
mod prepare;
mod probe;
mod service_list;
mod settings;
mod sni_route;
mod state;
mod swap;
mod swap_outcome;
mod versions;

pub use metrics::register;
pub use probe::Probe;
pub use service_list::Services;
pub use settings::ServiceSettings;
pub use sni_route::{NamedService, SniRoute};
pub use state::Service;
pub use swap::{PreparedVersion, SwapLock};
pub use swap_outcome::{SwapError, SwapReport};
pub use versions::{VersionState, VersionStatus};
