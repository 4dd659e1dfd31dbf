//! Orders of operators: kill, drain, reload, restart, swap and rollback.

use std::sync::Arc;

use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use hyper::{Request, StatusCode};
use tokio::sync::{OwnedSemaphorePermit, oneshot};
use tracing::info;

use super::long_running::LongRunning;
use super::model;
use super::response::{Response, failure, failure_with_exit_code, json, not_found};
use super::state::{AdminState, ReloadFailure, ReloadFailureKind};
use crate::service::{Service, SwapError, SwapReport};

/// Largest component that a swap accepts.
const MAX_COMPONENT_BYTES: usize = 256 << 20;

/// The answer to an order that comes too late.
const DRAINING: &str = "the server is draining already";

/// Resets the connection with this number.
pub(super) fn kill(state: &AdminState, id: &str) -> Response {
    match id.parse::<u64>() {
        Ok(id) if state.open.kill(id) => {
            info!(id, "connection killed by an operator");
            json(&())
        }
        _ => not_found(&format!(
            "connection {id:?} is not open; see the list of connections"
        )),
    }
}

/// Starts draining. Repeating the order has no effect.
pub(super) fn drain(state: &AdminState) -> Response {
    info!("drain requested by an operator");
    // A full channel holds such an order already.
    let _ = state.drain.try_send(());
    json(&())
}

/// Upgrades the server to a new process, which takes over.
pub(super) async fn restart(state: &AdminState, long_running: &LongRunning) -> Response {
    let (done, result) = oneshot::channel();
    let result = long_running.during(async {
        let _ = state.restarts.send(done).await;
        result.await
    });
    match result.await {
        Ok(Ok(pid)) => json(&pid),
        Ok(Err(error)) => failure(StatusCode::CONFLICT, &error),
        // A draining server drops orders.
        Err(_) => failure(StatusCode::CONFLICT, DRAINING),
    }
}

/// Applies changes of the config file, or of the guest's file.
pub(super) async fn reload(state: &AdminState, long_running: &LongRunning) -> Response {
    let (done, result) = oneshot::channel();
    let result = long_running.during(async {
        let _ = state.reloads.send(done).await;
        result.await
    });
    match result.await {
        Ok(Ok(changes)) => json(&changes),
        Ok(Err(failure)) => reload_failure(failure),
        Err(_) if state.lifecycle.is_handed_over_to_process() => failure(
            StatusCode::CONFLICT,
            "a new process has taken over, and reads the config file itself; see its log",
        ),
        Err(_) => failure(StatusCode::CONFLICT, DRAINING),
    }
}

fn reload_failure(failure: ReloadFailure) -> Response {
    let status = match failure.kind {
        ReloadFailureKind::Refused => StatusCode::UNPROCESSABLE_ENTITY,
        ReloadFailureKind::Draining => StatusCode::CONFLICT,
        ReloadFailureKind::Internal => StatusCode::INTERNAL_SERVER_ERROR,
    };
    failure_with_exit_code(status, failure.text, Some(failure.exit_code))
}

/// Swaps the guest of `service`. The body of the request is the new component.
pub(super) async fn swap(
    service: Arc<Service>,
    request: Request<Incoming>,
    permit: OwnedSemaphorePermit,
    long_running: &LongRunning,
) -> Response {
    let body = Limited::new(request.into_body(), MAX_COMPONENT_BYTES);
    let component = match body.collect().await {
        Ok(body) => body.to_bytes(),
        Err(error) => {
            let error = format!(
                "cannot receive the guest: {error}; send at most {MAX_COMPONENT_BYTES} bytes"
            );
            return failure(StatusCode::BAD_REQUEST, &error);
        }
    };
    // A task of its own: a swap goes on even if its client disconnects.
    let swapping = tokio::spawn(async move {
        let result = service.swap(component).await;
        drop(permit);
        result
    });
    let result = long_running.during(swapping).await;
    swapped(result.unwrap_or_else(|error| Err(SwapError::Internal(error.to_string()))))
}

/// Makes the previous version of `service` the current one again.
pub(super) async fn roll_back(service: &Service) -> Response {
    swapped(service.roll_back().await)
}

fn swapped(result: Result<SwapReport, SwapError>) -> Response {
    match result {
        Ok(report) => json(&model::Swapped {
            digest: report.digest.to_string(),
            before: report.before.to_string(),
            took: report.took.as_secs_f64(),
        }),
        Err(error) => {
            let status = match error {
                SwapError::Refused(_) => StatusCode::UNPROCESSABLE_ENTITY,
                SwapError::NoPrevious | SwapError::Draining => StatusCode::CONFLICT,
                SwapError::Internal(_) => StatusCode::INTERNAL_SERVER_ERROR,
            };
            failure(status, &error.to_string())
        }
    }
}

/// Tells that a service does not exist, and lists the existing ones.
pub(super) fn no_service(state: &AdminState, name: &str) -> String {
    let services = state.services.list();
    let names: Vec<_> = services.iter().map(|service| service.name()).collect();
    format!(
        "there is no service {name:?}; the services are: {}",
        names.join(", ")
    )
}
