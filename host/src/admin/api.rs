//! The answers of the admin endpoint.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Instant, SystemTime};

use futures::{StreamExt, stream};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, Limited, StreamBody};
use hyper::body::{Bytes, Frame, Incoming};
use hyper::header::{
    ALLOW, AUTHORIZATION, CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderValue,
    WWW_AUTHENTICATE, X_CONTENT_TYPE_OPTIONS,
};
use hyper::{Method, Request, Response, StatusCode};
use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;
use serde::Serialize;
use sha2::{Digest as _, Sha256};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tracing::info;

use super::log_stream::{LogStream, Piece};
use super::model;
use crate::Error;
use crate::connection::{ConnectionRegistry, OUTCOMES};
use crate::lifecycle::Lifecycle;
use crate::limit::Limit;
use crate::listener;
use crate::service::{Service, Services, SwapError, SwapReport, VersionState, VersionStatus};

/// The media type of OpenMetrics' text.
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The most bytes of a guest that is sent to be swapped to.
const GUEST_BYTES: usize = 256 << 20;

/// Followers of the log at once: each holds a connection for as long as it likes.
const FOLLOWERS: usize = 8;

/// The page for people, and what it consists of. Nothing of it comes from elsewhere.
const PAGES: [(&str, &str, &str); 3] = [
    ("/", "text/html", include_str!("dashboard/index.html")),
    (
        "/dashboard.js",
        "text/javascript",
        include_str!("dashboard/dashboard.js"),
    ),
    (
        "/dashboard.css",
        "text/css",
        include_str!("dashboard/dashboard.css"),
    ),
];

/// What a page of ours may load, and who may show it: only ours, and nobody.
const PAGE_POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; \
    connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// What an operator sees and works on.
pub struct AdminState {
    /// All figures.
    pub registry: Registry,
    /// The services.
    pub services: Services,
    /// The connections of all of them.
    pub open: Arc<ConnectionRegistry>,
    /// The server's.
    pub lifecycle: Lifecycle,
    /// How many connections may be open.
    pub max_connections: usize,
    /// What each limit is set to, for each service by its name.
    pub limits: LimitsSet,
    /// What is logged.
    pub logs: LogStream,
    /// Where to ask for a drain.
    pub drain: mpsc::Sender<()>,
    /// Where to ask for a new process that takes over, with where to say what came of it.
    pub restarts: mpsc::Sender<oneshot::Sender<RestartResult>>,
    /// Where to ask for what is served to be read again, with where to say what came of it.
    pub reloads: mpsc::Sender<oneshot::Sender<ReloadResult>>,
    /// When the server began.
    pub since: SystemTime,
}

/// Tells what each limit is set to, for each service by its name.
pub type LimitsSet = Box<dyn Fn() -> Vec<(String, Vec<(Limit, String)>)> + Send + Sync>;

/// The number of the process that has taken over, or why there is none.
pub type RestartResult = Result<u32, String>;

/// What has changed by a reload, or why nothing has.
pub type ReloadResult = Result<String, Error>;

/// Answers operators.
pub(super) struct Api {
    operated: AdminState,
    began: Instant,
    /// The digest of what an operator has to show. None where nobody else gets here.
    token: Option<[u8; 32]>,
    followers: Arc<Semaphore>,
    /// Whoever swaps. Another one is told so, and not kept waiting with a guest in memory.
    swaps: Arc<Semaphore>,
}

type Body = UnsyncBoxBody<Bytes, Infallible>;
type Answer = Response<Body>;

impl Api {
    pub(super) fn new(operated: AdminState, token: Option<&str>) -> Self {
        Self {
            operated,
            began: Instant::now(),
            token: token.map(|token| Sha256::digest(token).into()),
            followers: Arc::new(Semaphore::new(FOLLOWERS)),
            swaps: Arc::new(Semaphore::new(1)),
        }
    }

    /// Answers one request. `takes_long` is set while it may.
    pub(super) async fn answer(
        &self,
        request: Request<Incoming>,
        takes_long: &AtomicBool,
    ) -> Answer {
        let mut answer = self.route(request, takes_long).await;
        let headers = answer.headers_mut();
        // Figures of a moment ago are no figures.
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
        answer
    }

    async fn route(&self, request: Request<Incoming>, takes_long: &AtomicBool) -> Answer {
        let path = request.uri().path().trim_matches('/').to_string();
        let parts: Vec<&str> = path.split('/').collect();
        let read = matches!(*request.method(), Method::GET | Method::HEAD);
        if let Some(answer) = self.public(&parts) {
            return if read {
                answer
            } else {
                not_allowed("GET, HEAD")
            };
        }
        if !self.may(&request) {
            let mut answer = failure(
                StatusCode::UNAUTHORIZED,
                "show the token: Authorization: Bearer TOKEN",
            );
            let scheme = HeaderValue::from_static("Bearer");
            answer.headers_mut().insert(WWW_AUTHENTICATE, scheme);
            return answer;
        }
        let method = request.method().clone();
        let (allowed, answer) = match parts[..] {
            ["metrics"] => ("GET, HEAD", read.then(|| self.metrics())),
            ["v1", "status"] => ("GET, HEAD", read.then(|| json(&self.status()))),
            ["v1", "connections"] => ("GET, HEAD", read.then(|| json(&self.connections()))),
            ["v1", "limits"] => ("GET, HEAD", read.then(|| json(&self.limits()))),
            ["v1", "logs"] => (
                "GET",
                (method == Method::GET).then(|| self.logs(&request, takes_long)),
            ),
            ["v1", "connections", id] => {
                ("DELETE", (method == Method::DELETE).then(|| self.kill(id)))
            }
            _ if method != Method::POST => match parts[..] {
                ["v1", "drain" | "reload" | "restart"]
                | ["v1", "services", _, "swap" | "rollback"] => ("POST", None),
                _ => return nowhere(),
            },
            ["v1", "drain"] => ("POST", Some(self.drain())),
            ["v1", "restart"] => ("POST", Some(self.restart(takes_long).await)),
            ["v1", "reload"] => ("POST", Some(self.reload(takes_long).await)),
            ["v1", "services", name, action @ ("swap" | "rollback")] => {
                let Some(service) = self.operated.services.get(name) else {
                    return failure(StatusCode::NOT_FOUND, &self.no_service(name));
                };
                let Ok(place) = self.swaps.clone().try_acquire_owned() else {
                    return failure(StatusCode::SERVICE_UNAVAILABLE, "another swap is under way");
                };
                let swapped = match action {
                    "swap" => swap(&service, request, place, takes_long).await,
                    _ => Ok(service.roll_back().await),
                };
                (
                    "POST",
                    Some(swapped.map_or_else(|answer| answer, answer_swap)),
                )
            }
            _ => return nowhere(),
        };
        answer.unwrap_or_else(|| not_allowed(allowed))
    }

    /// What anyone may ask who gets here: whether we live, and the page that asks for a token.
    fn public(&self, parts: &[&str]) -> Option<Answer> {
        match parts {
            ["healthz"] => Some(text(StatusCode::OK, "ok\n")),
            ["readyz"] if self.operated.lifecycle.is_draining() => {
                Some(text(StatusCode::SERVICE_UNAVAILABLE, "draining\n"))
            }
            ["readyz"] => Some(text(StatusCode::OK, "ready\n")),
            [name] => PAGES
                .iter()
                .find(|(path, ..)| path.trim_start_matches('/') == *name)
                .map(|(_, media_type, content)| page(media_type, content)),
            _ => None,
        }
    }

    /// Whether the request shows the token, if one is wanted. Digests are compared: how far they are
    /// equal says nothing about the token.
    fn may(&self, request: &Request<Incoming>) -> bool {
        let Some(token) = &self.token else {
            return true;
        };
        let shown = request.headers().get(AUTHORIZATION);
        shown
            .and_then(|shown| shown.to_str().ok()?.strip_prefix("Bearer "))
            .is_some_and(|shown| Sha256::digest(shown.trim())[..] == token[..])
    }

    fn no_service(&self, name: &str) -> String {
        let services = self.operated.services.list();
        let names: Vec<_> = services.iter().map(|service| service.name()).collect();
        format!(
            "there is no service {name:?}; there is: {}",
            names.join(", ")
        )
    }

    fn metrics(&self) -> Answer {
        let mut figures = String::new();
        // A string takes everything.
        if encode(&mut figures, &self.operated.registry).is_err() {
            return failure(
                StatusCode::INTERNAL_SERVER_ERROR,
                "the figures are not text",
            );
        }
        let mut answer = text(StatusCode::OK, figures);
        let media_type = HeaderValue::from_static(OPEN_METRICS);
        answer.headers_mut().insert(CONTENT_TYPE, media_type);
        answer
    }

    fn status(&self) -> model::Status {
        let operated = &self.operated;
        let services: Vec<_> = operated
            .services
            .list()
            .iter()
            .map(service_status)
            .collect();
        model::Status {
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            since: time(operated.since),
            uptime: self.began.elapsed().as_secs_f64(),
            phase: match operated.lifecycle.is_draining() {
                true => "draining".into(),
                false => "serving".into(),
            },
            // Those of services that are gone from the config file among them.
            open: operated.open.count() as u64,
            max_connections: operated.max_connections as u64,
            accept_errors: listener::accept_errors(),
            services,
            limits_met: Limit::ALL
                .into_iter()
                .map(|limit| model::LimitMet {
                    limit: limit.name().into(),
                    met: limit.hits(),
                })
                .filter(|limit| limit.met > 0)
                .collect(),
        }
    }

    fn connections(&self) -> Vec<model::Connection> {
        let open = self.operated.open.list();
        let connection = |entry: &Arc<crate::connection::ConnectionRecord>| model::Connection {
            id: entry.id,
            peer: entry.peer.to_string(),
            service: entry.version.service.to_string(),
            version: entry.version.guest.digest().short().into(),
            age: entry.began.elapsed().as_secs_f64(),
            received: entry.used.received(),
            sent: entry.used.sent(),
            cpu: entry.used.computed().as_secs_f64(),
            memory: entry.used.memory(),
        };
        open.iter().map(connection).collect()
    }

    /// What limits are set to, for each service by its name where that is not the same for all.
    fn limits(&self) -> Vec<model::Limit> {
        let set = (self.operated.limits)();
        let value = |limit: &Limit| {
            let of_services = set.iter().filter_map(|(service, limits)| {
                let (_, value) = limits.iter().find(|(other, _)| other == limit)?;
                Some((service, value))
            });
            let values: Vec<_> = of_services.collect();
            match values.first() {
                Some((_, first)) if values.iter().all(|(_, value)| value == first) => {
                    (*first).clone()
                }
                _ => values
                    .iter()
                    .map(|(service, value)| format!("{service}: {value}"))
                    .collect::<Vec<_>>()
                    .join(", "),
            }
        };
        Limit::ALL
            .iter()
            .map(|limit| model::Limit {
                limit: limit.name().into(),
                value: value(limit),
                met: limit.hits(),
            })
            .collect()
    }

    fn kill(&self, id: &str) -> Answer {
        match id.parse::<u64>() {
            Ok(id) if self.operated.open.kill(id) => {
                info!(id, "an operator ends a connection");
                json(&())
            }
            _ => failure(
                StatusCode::NOT_FOUND,
                &format!("there is no connection {id:?} open; see the list of connections"),
            ),
        }
    }

    fn drain(&self) -> Answer {
        info!("an operator asks to drain");
        // One that is on its way already is as good.
        let _ = self.operated.drain.try_send(());
        json(&())
    }

    async fn restart(&self, takes_long: &AtomicBool) -> Answer {
        let (done, obeyed) = oneshot::channel();
        takes_long.store(true, Ordering::Relaxed);
        let _ = self.operated.restarts.send(done).await;
        let obeyed = obeyed.await;
        takes_long.store(false, Ordering::Relaxed);
        match obeyed {
            Ok(Ok(pid)) => json(&pid),
            Ok(Err(error)) => failure(StatusCode::CONFLICT, &error),
            // Nobody obeys any more when the server drains.
            Err(_) => failure(StatusCode::CONFLICT, "the server drains already"),
        }
    }

    async fn reload(&self, takes_long: &AtomicBool) -> Answer {
        let (done, reloaded) = oneshot::channel();
        takes_long.store(true, Ordering::Relaxed);
        let _ = self.operated.reloads.send(done).await;
        let reloaded = reloaded.await;
        takes_long.store(false, Ordering::Relaxed);
        match reloaded {
            Ok(Ok(changes)) => json(&changes),
            Ok(Err(error)) => not_reloaded(&error),
            Err(_) if self.operated.lifecycle.is_handed_over() => failure(
                StatusCode::CONFLICT,
                "a new process has taken over meanwhile, which reads the config file again; see its log",
            ),
            Err(_) => failure(StatusCode::CONFLICT, "the server drains already"),
        }
    }

    /// What was logged last, and what follows if that is wanted.
    fn logs(&self, request: &Request<Incoming>, takes_long: &AtomicBool) -> Answer {
        let query = request.uri().query().unwrap_or_default();
        let parameter = |name| {
            let mut pairs = query.split('&').filter_map(|pair| pair.split_once('='));
            pairs.find(|(key, _)| *key == name).map(|(_, value)| value)
        };
        let id = match parameter("id").map(str::parse) {
            None => None,
            Some(Ok(id)) => Some(id),
            Some(Err(_)) => {
                return failure(
                    StatusCode::BAD_REQUEST,
                    "the id is not a connection's number",
                );
            }
        };
        let (before, follows) = self.operated.logs.follow();
        let before: Vec<_> = before.iter().map(|piece| piece.of(id)).collect();
        let mut answer = text(StatusCode::OK, before.concat());
        if parameter("follow") == Some("true") {
            let Ok(place) = self.followers.clone().try_acquire_owned() else {
                let busy = format!("{FOLLOWERS} follow the log already");
                return failure(StatusCode::SERVICE_UNAVAILABLE, &busy);
            };
            takes_long.store(true, Ordering::Relaxed);
            let before = stream::iter([Bytes::from(before.concat())]);
            let follows = stream::unfold((follows, place), move |state| next(state, id));
            let frames = before
                .chain(follows)
                .filter(|bytes| std::future::ready(!bytes.is_empty()))
                .map(|bytes| Ok(Frame::data(bytes)));
            *answer.body_mut() = StreamBody::new(frames).boxed_unsync();
        }
        answer
    }
}

type Following = (
    tokio::sync::broadcast::Receiver<Piece>,
    OwnedSemaphorePermit,
);

/// What is logged next, of one connection or all.
async fn next((mut follows, place): Following, id: Option<u64>) -> Option<(Bytes, Following)> {
    let bytes = match follows.recv().await {
        Ok(piece) => piece.of(id),
        Err(RecvError::Lagged(_)) => "(some lines are left out: they came too fast)\n".into(),
        Err(RecvError::Closed) => return None,
    };
    Some((bytes, (follows, place)))
}

/// Swaps to the component in the request's body. The outer error is an answer already.
async fn swap(
    service: &Arc<Service>,
    request: Request<Incoming>,
    place: OwnedSemaphorePermit,
    takes_long: &AtomicBool,
) -> Result<Result<SwapReport, SwapError>, Answer> {
    let body = Limited::new(request.into_body(), GUEST_BYTES)
        .collect()
        .await;
    let component = body.map_err(|error| {
        failure(
            StatusCode::BAD_REQUEST,
            &format!("the guest was not received: {error}; send at most {GUEST_BYTES} bytes"),
        )
    })?;
    // A task: whoever asks and goes does not undo half of it.
    let service = service.clone();
    let swapping = tokio::spawn(async move {
        let swapped = service.swap(component.to_bytes()).await;
        drop(place);
        swapped
    });
    takes_long.store(true, Ordering::Relaxed);
    let swapped = swapping.await;
    takes_long.store(false, Ordering::Relaxed);
    Ok(swapped.unwrap_or_else(|error| Err(SwapError::Internal(error.to_string()))))
}

fn answer_swap(swapped: Result<SwapReport, SwapError>) -> Answer {
    match swapped {
        Ok(swapped) => json(&model::Swapped {
            digest: swapped.digest.to_string(),
            before: swapped.before.to_string(),
            took: swapped.took.as_secs_f64(),
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

fn not_reloaded(error: &Error) -> Answer {
    let status = match error {
        Error::Internal { .. } => StatusCode::INTERNAL_SERVER_ERROR,
        Error::Draining => StatusCode::CONFLICT,
        _ => StatusCode::UNPROCESSABLE_ENTITY,
    };
    failed(status, error.to_string(), Some(error.exit_code()))
}

fn service_status(service: &Arc<Service>) -> model::Service {
    let versions = service.status();
    let measures = service.stats();
    let durations = measures.duration.buckets();
    model::Service {
        name: service.name().into(),
        open: versions.iter().map(|version| version.open).sum(),
        ended: durations.iter().map(|(_, count)| count).sum(),
        received: measures.received(),
        sent: measures.sent(),
        durations: durations
            .into_iter()
            .map(|(bound, count)| model::Bucket {
                seconds: bound.is_finite().then_some(bound),
                count,
            })
            .collect(),
        versions: versions.into_iter().map(version_status).collect(),
    }
}

fn version_status(version: VersionStatus) -> model::Version {
    model::Version {
        digest: version.digest.to_string(),
        state: match version.state {
            VersionState::Current => "current".into(),
            VersionState::Previous => "previous".into(),
            VersionState::Old => "old".into(),
        },
        since: time(version.since),
        open: version.open,
        ended: OUTCOMES
            .iter()
            .zip(version.ended)
            .filter(|(_, count)| *count > 0)
            .map(|(outcome, count)| model::Outcome {
                outcome: (*outcome).into(),
                count,
            })
            .collect(),
    }
}

fn time(time: SystemTime) -> String {
    humantime::format_rfc3339_seconds(time).to_string()
}

fn text(status: StatusCode, body: impl Into<Bytes>) -> Answer {
    with_type(status, "text/plain; charset=utf-8", body.into())
}

fn json(value: &impl Serialize) -> Answer {
    // What is not a number or text to JSON is not among our answers.
    let body = serde_json::to_vec(value).unwrap_or_default();
    with_type(StatusCode::OK, "application/json", body.into())
}

fn failure(status: StatusCode, error: &str) -> Answer {
    failed(status, error.into(), None)
}

fn failed(status: StatusCode, error: String, exit_code: Option<u8>) -> Answer {
    let mut answer = json(&model::Failure { error, exit_code });
    *answer.status_mut() = status;
    answer
}

fn not_allowed(allowed: &'static str) -> Answer {
    let mut answer = failure(StatusCode::METHOD_NOT_ALLOWED, &format!("use {allowed}"));
    let allowed = HeaderValue::from_static(allowed);
    answer.headers_mut().insert(ALLOW, allowed);
    answer
}

fn nowhere() -> Answer {
    failure(
        StatusCode::NOT_FOUND,
        "there are /, /healthz, /readyz, /metrics, /v1/status, /v1/connections, /v1/limits, /v1/logs, \
         and to be posted to /v1/drain, /v1/reload, /v1/restart, /v1/services/NAME/swap and /rollback",
    )
}

fn page(media_type: &str, content: &'static str) -> Answer {
    let media_type = format!("{media_type}; charset=utf-8");
    let mut answer = with_type(StatusCode::OK, &media_type, content.into());
    let policy = HeaderValue::from_static(PAGE_POLICY);
    answer.headers_mut().insert(CONTENT_SECURITY_POLICY, policy);
    answer
}

fn with_type(status: StatusCode, media_type: &str, body: Bytes) -> Answer {
    let mut answer = Response::new(Full::new(body).boxed_unsync());
    *answer.status_mut() = status;
    if let Ok(media_type) = HeaderValue::from_str(media_type) {
        answer.headers_mut().insert(CONTENT_TYPE, media_type);
    }
    answer
}
