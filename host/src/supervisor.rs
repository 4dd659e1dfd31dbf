//! Keeps the running services equal to the configuration.
//!
//! [`startup`] brings up a server and runs it to its end. A reload takes two steps: everything that can
//! fail ([`plan`]), and then an exchange that cannot ([`apply`]). [`control`] carries out signals and the
//! orders of the admin API, one at a time.

pub mod apply;
pub mod cache_location;
pub mod control;
mod endpoint;
pub mod error;
pub mod file_watch;
pub mod plan;
mod resources;
mod retire;
mod running;
pub mod services;
pub mod serving;
pub mod sizing;
pub mod startup;

pub use cache_location::{CacheLocation, UnusableCache};
pub use error::{ReloadError, StartupError};
pub use running::{FileChange, service_settings};
pub use services::Supervisor;
pub use serving::Signals;
pub use sizing::Sizing;
pub use startup::{Inputs, PreparedServer};
