//! Requests to the admin API: authorization and routing.

use std::sync::Arc;
use std::time::Instant;

use hyper::body::Incoming;
use hyper::header::{AUTHORIZATION, CACHE_CONTROL, HeaderValue, X_CONTENT_TYPE_OPTIONS};
use hyper::{Method, Request, StatusCode};
use sha2::{Digest, Sha256};
use tokio::sync::Semaphore;

use super::endpoint::{self, Endpoint};
use super::long_running::LongRunning;
use super::response::{Response, failure, json, method_not_allowed, not_found, text, unauthorized};
use super::state::AdminState;
use super::{dashboard, logs, orders, snapshot};

/// Answers requests to the admin API.
pub(super) struct Api {
    state: AdminState,
    began: Instant,
    /// Digest of the token. `None` if the permissions of the socket suffice.
    token: Option<[u8; 32]>,
    followers: Arc<Semaphore>,
    /// One permit: a second swap is refused instead of waiting with its guest in memory.
    swaps: Arc<Semaphore>,
}

impl Api {
    pub(super) fn new(state: AdminState, token: Option<&str>) -> Self {
        Self {
            state,
            began: Instant::now(),
            token: token.map(|token| Sha256::digest(token).into()),
            followers: Arc::new(Semaphore::new(logs::MAX_FOLLOWERS)),
            swaps: Arc::new(Semaphore::new(1)),
        }
    }

    /// Answers one request. `long_running` is set while the answer has no deadline.
    pub(super) async fn answer(
        &self,
        request: Request<Incoming>,
        long_running: &LongRunning,
    ) -> Response {
        let mut response = self.route(request, long_running).await;
        let headers = response.headers_mut();
        // The state changes from one moment to the next.
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
        response
    }

    async fn route(&self, request: Request<Incoming>, long_running: &LongRunning) -> Response {
        let path = request.uri().path().trim_matches('/').to_string();
        let segments: Vec<&str> = path.split('/').collect();
        if let Some(response) = self.public(&segments) {
            return if matches!(*request.method(), Method::GET | Method::HEAD) {
                response
            } else {
                method_not_allowed(endpoint::READ)
            };
        }
        if !self.is_authorized(&request) {
            return unauthorized();
        }
        let Some(endpoint) = Endpoint::find(&segments) else {
            return not_found(&format!("there is no such path; use {}", endpoint::ALL));
        };
        let mut methods = endpoint.methods().split(", ");
        if !methods.any(|method| request.method() == method) {
            return method_not_allowed(endpoint.methods());
        }
        self.call(endpoint, request, long_running).await
    }

    async fn call(
        &self,
        endpoint: Endpoint<'_>,
        request: Request<Incoming>,
        long_running: &LongRunning,
    ) -> Response {
        let state = &self.state;
        match endpoint {
            Endpoint::Metrics => snapshot::metrics(state),
            Endpoint::Status => json(&snapshot::status(state, self.began.elapsed())),
            Endpoint::Connections => json(&snapshot::connections(state)),
            Endpoint::Limits => json(&snapshot::limits(state)),
            Endpoint::Logs => {
                let query = request.uri().query().unwrap_or_default();
                logs::answer(&state.logs, query, &self.followers, long_running)
            }
            Endpoint::Connection(id) => orders::kill(state, id),
            Endpoint::Drain => orders::drain(state),
            Endpoint::Reload => orders::reload(state, long_running).await,
            Endpoint::Restart => orders::restart(state, long_running).await,
            Endpoint::Swap(name) | Endpoint::Rollback(name) => {
                let Some(service) = state.services.get(name) else {
                    return not_found(&orders::no_service(state, name));
                };
                let Ok(permit) = self.swaps.clone().try_acquire_owned() else {
                    let busy = "another swap is under way; try again later";
                    return failure(StatusCode::SERVICE_UNAVAILABLE, busy);
                };
                if matches!(endpoint, Endpoint::Swap(_)) {
                    orders::swap(service, request, permit, long_running).await
                } else {
                    orders::roll_back(&service).await
                }
            }
        }
    }

    /// Endpoints without authorization: health, and the dashboard, which asks for the token itself.
    fn public(&self, segments: &[&str]) -> Option<Response> {
        match segments {
            ["healthz"] => Some(text(StatusCode::OK, "ok\n")),
            ["readyz"] if self.state.lifecycle.is_draining() => {
                Some(text(StatusCode::SERVICE_UNAVAILABLE, "draining\n"))
            }
            ["readyz"] => Some(text(StatusCode::OK, "ready\n")),
            [name] => dashboard::file(name),
            _ => None,
        }
    }

    /// Whether the request carries the token, if the API has one.
    ///
    /// Compares digests: the time of the comparison tells nothing about the token.
    fn is_authorized(&self, request: &Request<Incoming>) -> bool {
        let Some(token) = &self.token else {
            return true;
        };
        request
            .headers()
            .get(AUTHORIZATION)
            .and_then(|value| value.to_str().ok()?.strip_prefix("Bearer "))
            .is_some_and(|value| Sha256::digest(value.trim())[..] == token[..])
    }
}
