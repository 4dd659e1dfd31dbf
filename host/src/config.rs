//! The configuration: read from TOML, resolved into plain structs, validated and loaded.
//!
//! [`mod@file`] reads a config file without knowing a single setting. [`model`] is the result of
//! resolving a file or a command line: plain structs, the same for both. [`validate`] checks services
//! against each other, and [`load`] opens everything that a configuration names on disk.

pub mod file;
pub mod limit_values;
pub mod load;
pub mod model;
pub mod validate;

pub use file::{ConfigError, Mistake, Mistakes};
pub use load::{LoadCause, LoadError, LoadedService, load_all};
pub use model::{HandlerConfig, ListenerConfig, ResolvedConfig, ServerConfig, ServiceConfig};
