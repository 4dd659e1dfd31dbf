//! Liveness of the threads that serve connections, for a watchdog.

use tokio::runtime::Handle;

/// Checks that runtimes still make progress.
pub struct Liveness(Vec<Handle>);

impl Liveness {
    /// Checks these runtimes.
    pub fn new(runtimes: Vec<Handle>) -> Self {
        Self(runtimes)
    }

    /// Resolves when each runtime has run a task. A runtime that has ended counts as alive.
    pub async fn check(&self) {
        for runtime in &self.0 {
            // Fails if the runtime has ended, as it does after a drain.
            let _ = runtime.spawn(async {}).await;
        }
    }
}
