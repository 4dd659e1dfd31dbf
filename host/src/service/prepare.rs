//! From the bytes of a component to a guest that is known to work.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use rayon::ThreadPoolBuilder;
use tokio::runtime;
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::{ServiceSettings, SwapError};
use crate::sandbox::{Engine, Failure, Guest};
use crate::service::probe::{Probe, ProbeTransport};

/// How long a new version may take until it is ready. Compiling a guest takes less than a second, of
/// hundreds of MB some ten.
const READY: Duration = Duration::from_secs(120);

/// How long an instance may take to be made.
const INSTANTIATED: Duration = Duration::from_secs(5);

/// By how much less of the processor making a version ready gets than serving (`nice(2)`): a tenth of
/// what a thread gets that serves, where there is not enough for both.
const NICENESS: i32 = 10;

/// Makes a guest, an instance of it, and asks it what it is to be asked. A guest of the same component
/// that is `known` already spares compiling it.
pub(super) fn load(
    engine: &Engine,
    settings: &ServiceSettings,
    component: &[u8],
    known: Option<&Guest>,
) -> Result<Arc<Guest>, String> {
    let (grants, limits) = (settings.grants.clone(), settings.sandbox.clone());
    let guest = match known {
        Some(known) => known.within(grants, limits),
        None => Guest::new(engine, component, grants, limits),
    };
    let guest = guest.map_err(|refusal| refusal.to_string())?;
    // Of its own: a guest that computes or blocks is to hold up nobody.
    let runtime = runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| format!("it cannot be tried: {error}"))?;
    let tried = runtime.block_on(async {
        try_out(&guest).await?;
        match &settings.probe {
            Some(probe) => ask(&guest, probe).await,
            None => Ok(()),
        }
    });
    // What it has begun on another thread, such as opening a file that hangs, is not waited for.
    runtime.shutdown_background();
    tried.map(|()| Arc::new(guest))
}

/// Whether it comes as far as an instance.
async fn try_out(guest: &Guest) -> Result<(), String> {
    let nobody = ProbeTransport::transport(&Probe::NOTHING);
    match timeout(INSTANTIATED, guest.try_out(nobody)).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(failure)) => Err(format!(
            "no instance of it can be made: {}; look what it does before its handler is called",
            text(failure)
        )),
        Err(_) => Err(format!(
            "no instance of it is made within {INSTANTIATED:?}; look what it does before its handler is called"
        )),
    }
}

/// Whether it answers a probe as it is to.
async fn ask(guest: &Guest, probe: &Probe) -> Result<(), String> {
    let asked = ProbeTransport::transport(probe);
    let handling = guest.handle(asked.clone());
    let answered = ProbeTransport::answered(asked.clone());
    let ended = tokio::select! {
        biased;
        () = answered => return ProbeTransport::verdict(&asked),
        ended = handling => Ok(ended),
        () = tokio::time::sleep(probe.timeout) => Err(()),
    };
    let got = ProbeTransport::verdict(&asked);
    let wrong = match (got, ended) {
        (Ok(()), _) => return Ok(()),
        (Err(wrong), Ok(Ok(()))) => format!("{wrong}, and ended"),
        (Err(wrong), Ok(Err(failure))) => format!("{wrong}, and ended with: {}", text(failure)),
        (Err(wrong), Err(())) => format!("{wrong}, within {:?}", probe.timeout),
    };
    Err(wrong)
}

fn text(failure: Failure) -> String {
    match failure {
        Failure::Guest(text) | Failure::NotStarted(text) => text,
        Failure::Trap(trap) => trap.reason,
    }
}

/// Runs `work` on threads that make way for those that serve.
pub(super) async fn off_the_way<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, String> + Send + 'static,
) -> Result<T, SwapError> {
    let (done, result) = oneshot::channel();
    let thread = move || {
        // Those that it begins are as nice.
        let _ = rustix::process::nice(NICENESS);
        // wasmtime compiles on the threads that it is called on. The usual ones have compiled the
        // first guest, when there was nobody to make way for.
        let result = match ThreadPoolBuilder::new().build() {
            Ok(pool) => pool.install(work),
            Err(_) => work(),
        };
        // Whoever asked may have given up.
        let _ = done.send(result);
    };
    thread::Builder::new()
        .name("swap".into())
        .spawn(thread)
        .map_err(|error| SwapError::Internal(error.to_string()))?;
    match timeout(READY, result).await {
        Ok(Ok(result)) => result.map_err(SwapError::Refused),
        Ok(Err(_)) => Err(SwapError::Internal("the thread for it has died".into())),
        Err(_) => Err(SwapError::Internal(format!("it took more than {READY:?}"))),
    }
}
