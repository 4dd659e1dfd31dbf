//! Preparing a guest: compile it, instantiate it, and send it the probe.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use rayon::ThreadPoolBuilder;
use tokio::runtime;
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::probe::{Probe, ProbeTransport};
use super::settings::ServiceSettings;
use super::swap_outcome::SwapError;
use crate::sandbox::{Engine, Failure, Guest};

/// Longest time for preparing a version. Compiling takes less than a second for most guests, and
/// some ten seconds for a guest of hundreds of MB.
const PREPARE_TIMEOUT: Duration = Duration::from_secs(120);

/// Longest time for creating an instance.
const INSTANTIATE_TIMEOUT: Duration = Duration::from_secs(5);

/// Niceness of the threads that prepare a version (`nice(2)`). Where CPU time is short, each gets a
/// tenth of the time of a thread that serves.
const NICENESS: i32 = 10;

/// Loads the guest of `component` and tests it.
///
/// The test creates one instance, and sends the probe if there is one.
///
/// `compiled` is a guest of the same component: its code is used instead of compiling again.
///
/// # Errors
///
/// Returns the reason if the guest is refused.
pub(super) fn load_guest(
    engine: &Engine,
    settings: &ServiceSettings,
    component: &[u8],
    compiled: Option<&Guest>,
) -> Result<Arc<Guest>, String> {
    let (grants, limits) = (settings.grants.clone(), settings.sandbox.clone());
    let guest = match compiled {
        Some(compiled) => compiled.within(grants, limits),
        None => Guest::new(engine, component, grants, limits),
    };
    let guest = guest.map_err(|refusal| refusal.to_string())?;
    // A runtime of its own: a guest that computes or blocks must not hold up other tasks.
    let runtime = runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| format!("cannot start a runtime to test the guest: {error}"))?;
    let tested = runtime.block_on(async {
        instantiate(&guest).await?;
        match &settings.probe {
            Some(probe) => send_probe(&guest, probe).await,
            None => Ok(()),
        }
    });
    // A blocking operation of the guest, such as opening a file that hangs, may never return.
    runtime.shutdown_background();
    tested.map(|()| Arc::new(guest))
}

/// Creates an instance and drops it again.
async fn instantiate(guest: &Guest) -> Result<(), String> {
    const FIX: &str = "check the code that runs before its handler is called";
    let transport = ProbeTransport::new(&Probe::NOTHING);
    match timeout(INSTANTIATE_TIMEOUT, guest.try_out(transport)).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(failure)) => Err(format!(
            "cannot instantiate the guest: {}; {FIX}",
            reason(failure)
        )),
        Err(_) => Err(format!(
            "cannot instantiate the guest within {INSTANTIATE_TIMEOUT:?}; {FIX}"
        )),
    }
}

/// Sends the probe, and waits for the expected answer.
async fn send_probe(guest: &Guest, probe: &Probe) -> Result<(), String> {
    let transport = ProbeTransport::new(probe);
    let handling = guest.handle(transport.clone());
    let answered = ProbeTransport::answered(transport.clone());
    let ended = tokio::select! {
        biased;
        () = answered => return ProbeTransport::verdict(&transport),
        ended = handling => Some(ended),
        () = tokio::time::sleep(probe.timeout) => None,
    };
    // The guest may have ended, or its time may have run out, just after the answer.
    let Err(mismatch) = ProbeTransport::verdict(&transport) else {
        return Ok(());
    };
    Err(match ended {
        Some(Ok(())) => format!("{mismatch}, and ended"),
        Some(Err(failure)) => format!("{mismatch}, and ended with: {}", reason(failure)),
        None => format!("{mismatch}, within {:?}", probe.timeout),
    })
}

fn reason(failure: Failure) -> String {
    match failure {
        Failure::Guest(text) | Failure::NotStarted(text) => text,
        Failure::Trap(trap) => trap.reason,
    }
}

/// Runs `work` on threads of low priority, to keep the server responsive.
///
/// # Errors
///
/// [`SwapError::Refused`] if `work` fails, [`SwapError::Internal`] if it cannot run or takes too long.
pub(super) async fn in_background<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, String> + Send + 'static,
) -> Result<T, SwapError> {
    let (done, result) = oneshot::channel();
    let thread = move || {
        // Threads that this one starts inherit the niceness.
        let _ = rustix::process::nice(NICENESS);
        // wasmtime compiles on the rayon pool of the calling thread. The global pool has started
        // already, at normal priority.
        let result = match ThreadPoolBuilder::new().build() {
            Ok(pool) => pool.install(work),
            Err(_) => work(),
        };
        // The caller may have given up.
        let _ = done.send(result);
    };
    thread::Builder::new()
        .name("swap".into())
        .spawn(thread)
        .map_err(|error| SwapError::Internal(format!("cannot start a thread: {error}")))?;
    match timeout(PREPARE_TIMEOUT, result).await {
        Ok(Ok(result)) => result.map_err(SwapError::Refused),
        Ok(Err(_)) => Err(SwapError::Internal("its thread panicked".into())),
        Err(_) => Err(SwapError::Internal(format!(
            "it took more than {PREPARE_TIMEOUT:?}"
        ))),
    }
}
