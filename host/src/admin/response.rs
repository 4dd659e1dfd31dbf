//! Responses of the admin API.

use std::convert::Infallible;

use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use hyper::StatusCode;
use hyper::body::Bytes;
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue, WWW_AUTHENTICATE};
use serde::Serialize;

use super::model;

/// A response whose body may be a stream.
pub(super) type Response = hyper::Response<UnsyncBoxBody<Bytes, Infallible>>;

pub(super) fn json(value: &impl Serialize) -> Response {
    // Serialization fails only for maps with other keys than strings. The model has none.
    let body = serde_json::to_vec(value).unwrap_or_default();
    with_type(StatusCode::OK, "application/json", body.into())
}

pub(super) fn text(status: StatusCode, body: impl Into<Bytes>) -> Response {
    with_type(status, "text/plain; charset=utf-8", body.into())
}

/// A failure with its reason, for people.
pub(super) fn failure(status: StatusCode, error: &str) -> Response {
    failure_with_exit_code(status, error.into(), None)
}

/// A failure with an exit code for `ctl`, if the status does not suffice.
pub(super) fn failure_with_exit_code(
    status: StatusCode,
    error: String,
    exit_code: Option<u8>,
) -> Response {
    let mut response = json(&model::Failure { error, exit_code });
    *response.status_mut() = status;
    response
}

pub(super) fn not_found(error: &str) -> Response {
    failure(StatusCode::NOT_FOUND, error)
}

pub(super) fn method_not_allowed(allowed: &'static str) -> Response {
    let mut response = failure(StatusCode::METHOD_NOT_ALLOWED, &format!("use {allowed}"));
    let allowed = HeaderValue::from_static(allowed);
    response.headers_mut().insert(ALLOW, allowed);
    response
}

pub(super) fn unauthorized() -> Response {
    let mut response = failure(
        StatusCode::UNAUTHORIZED,
        "send the token in this header: Authorization: Bearer TOKEN",
    );
    let scheme = HeaderValue::from_static("Bearer");
    response.headers_mut().insert(WWW_AUTHENTICATE, scheme);
    response
}

pub(super) fn with_type(status: StatusCode, media_type: &str, body: Bytes) -> Response {
    let mut response = Response::new(Full::new(body).boxed_unsync());
    *response.status_mut() = status;
    if let Ok(media_type) = HeaderValue::from_str(media_type) {
        response.headers_mut().insert(CONTENT_TYPE, media_type);
    }
    response
}
