//! The dashboard: a page for browsers, and its files.

use hyper::StatusCode;
use hyper::header::{CONTENT_SECURITY_POLICY, HeaderValue};

use super::response::{Response, with_type};

/// Name, media type and content of each file. The page loads nothing else.
const FILES: [(&str, &str, &str); 3] = [
    ("", "text/html", include_str!("dashboard/index.html")),
    (
        "dashboard.js",
        "text/javascript",
        include_str!("dashboard/dashboard.js"),
    ),
    (
        "dashboard.css",
        "text/css",
        include_str!("dashboard/dashboard.css"),
    ),
];

/// The page loads files of this server only. Other pages cannot embed it.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; \
    connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// A file of the dashboard, by its path without slashes.
pub(super) fn file(name: &str) -> Option<Response> {
    let (_, media_type, content) = FILES.iter().find(|(file, ..)| *file == name)?;
    let media_type = format!("{media_type}; charset=utf-8");
    let mut response = with_type(StatusCode::OK, &media_type, (*content).into());
    let policy = HeaderValue::from_static(POLICY);
    response
        .headers_mut()
        .insert(CONTENT_SECURITY_POLICY, policy);
    Some(response)
}
