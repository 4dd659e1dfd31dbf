//! The service manager: socket activation, and notifications about this process.

pub mod activation;
pub mod notify;
