//! Errors of starting and serving.

use std::io;

/// Why connections cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A thread or a runtime cannot be started.
    #[error(transparent)]
    Start(#[from] StartError),

    /// A thread of a shard has panicked.
    #[error("a thread that serves connections has died")]
    ThreadDied,
}

/// Why the threads of a shard cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The system has no descriptors or threads left for a runtime.
    #[error("cannot start a runtime: {0}")]
    Runtime(#[source] io::Error),

    /// The system has no threads left.
    #[error("cannot start a thread: {0}")]
    Thread(#[source] io::Error),
}
