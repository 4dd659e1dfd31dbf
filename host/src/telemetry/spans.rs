//! A span for each connection, sent to an OpenTelemetry collector.
//!
//! The protocol is OTLP over HTTP. Off by default: a connection then costs only the check for a
//! sender.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1::handshake;
use hyper::header::{HOST, HeaderValue};
use hyper::{Request, Response, Uri};
use hyper_util::rt::TokioIo;
use opentelemetry::trace::{Span, SpanKind, Status, TraceContextExt, Tracer, TracerProvider};
use opentelemetry::{Context, KeyValue};
use opentelemetry_http::{HttpClient, HttpError};
use opentelemetry_otlp::{SpanExporter, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{SdkTracer, SdkTracerProvider};
use tokio::net::TcpStream;
use tokio::runtime;
use tracing::{info, warn};

/// Time limit for a request to the collector, and for the final flush.
const SEND_TIMEOUT: Duration = Duration::from_secs(5);

/// Limit for the response of the collector, in bytes.
const MAX_RESPONSE_BYTES: usize = 64 << 10;

/// Sends the spans of connections to a collector.
pub struct SpanSender {
    provider: SdkTracerProvider,
    tracer: SdkTracer,
}

/// The span of a connection that has ended.
pub(crate) struct ConnectionSpan {
    pub(crate) attributes: Vec<KeyValue>,
    pub(crate) duration: Duration,
    /// Time to instantiate the guest, if the connection got an instance.
    pub(crate) instantiation: Option<Duration>,
    /// Description of the error status, if the connection failed.
    pub(crate) wrong: Option<&'static str>,
}

impl SpanSender {
    /// Sends spans to the collector at `endpoint`, such as `http://127.0.0.1:4318`.
    ///
    /// A separate thread sends them in batches, and drops spans if it cannot keep up.
    ///
    /// # Errors
    ///
    /// Fails if `endpoint` is no valid URL.
    pub fn to_collector(endpoint: &str) -> Result<Self, String> {
        let exporter = SpanExporter::builder()
            .with_http()
            .with_http_client(CollectorClient::default())
            .with_endpoint(format!("{}/v1/traces", endpoint.trim_end_matches('/')))
            .with_timeout(SEND_TIMEOUT)
            .build()
            .map_err(|error| error.to_string())?;
        let resource = Resource::builder_empty()
            .with_service_name("wasinetd")
            .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
            .build();
        let provider = SdkTracerProvider::builder()
            .with_batch_exporter(exporter)
            .with_resource(resource)
            .build();
        let tracer = provider.tracer("wasinetd");
        Ok(Self { provider, tracer })
    }

    /// Records the span of a connection that has ended just now.
    pub(crate) fn ended(&self, connection: ConnectionSpan) {
        let now = SystemTime::now();
        let began = now.checked_sub(connection.duration).unwrap_or(now);
        let span = self.tracer.span_builder("connection");
        let mut span = span
            .with_kind(SpanKind::Server)
            .with_start_time(began)
            .with_attributes(connection.attributes)
            .start_with_context(&self.tracer, &Context::new());
        if let Some(wrong) = connection.wrong {
            span.set_status(Status::error(wrong));
        }
        let context = Context::new().with_span(span);
        if let Some(duration) = connection.instantiation {
            let child = self.tracer.span_builder("instantiate");
            let mut child = child
                .with_start_time(began)
                .start_with_context(&self.tracer, &context);
            child.end_with_timestamp(began + duration);
        }
        context.span().end_with_timestamp(now);
    }

    /// Sends the remaining spans. No span may follow.
    pub fn close(&self) {
        // If the collector is gone, the spans are lost.
        let _ = self.provider.shutdown_with_timeout(SEND_TIMEOUT);
    }
}

impl fmt::Debug for SpanSender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("SpanSender").finish_non_exhaustive()
    }
}

/// HTTP client of the exporter, on the thread that batches spans.
///
/// It uses hyper, as the admin API does. The clients that the exporter offers would add a second
/// HTTP library.
#[derive(Debug, Default)]
struct CollectorClient {
    /// The last request failed, and the log says so.
    failed: AtomicBool,
}

impl CollectorClient {
    /// Logs the first failure in a row, and the next success.
    fn log_change(&self, result: &Result<Response<Bytes>, HttpError>) {
        let error = match result {
            Ok(response) if response.status().is_success() => None,
            Ok(response) => Some(response.status().to_string()),
            Err(error) => Some(error.to_string()),
        };
        let failed = error.is_some();
        if self.failed.swap(failed, Ordering::Relaxed) == failed {
            return;
        }
        match error {
            Some(error) => warn!(%error, "cannot send spans to the collector"),
            None => info!("sending spans to the collector again"),
        }
    }
}

impl HttpClient for CollectorClient {
    fn send_bytes<'a, 'b>(
        &'a self,
        request: Request<Bytes>,
    ) -> Pin<Box<dyn Future<Output = Result<Response<Bytes>, HttpError>> + Send + 'b>>
    where
        'a: 'b,
        Self: 'b,
    {
        Box::pin(async move {
            let runtime = runtime::Builder::new_current_thread()
                .enable_all()
                .build()?;
            let result = runtime
                .block_on(async { tokio::time::timeout(SEND_TIMEOUT, send(request)).await? });
            self.log_change(&result);
            result
        })
    }
}

async fn send(request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
    let (mut parts, body) = request.into_parts();
    let authority = parts.uri.authority().ok_or("the endpoint has no host")?;
    // A URL has brackets around an IPv6 address, the resolver takes none.
    let host = authority.host().trim_matches(['[', ']']);
    let stream = TcpStream::connect((host, authority.port_u16().unwrap_or(80))).await?;
    let (mut sender, connection) = handshake(TokioIo::new(stream)).await?;
    // The task ends with the runtime.
    tokio::spawn(connection);
    let host = HeaderValue::from_str(authority.as_str())?;
    parts.headers.insert(HOST, host);
    parts.uri = match parts.uri.path_and_query() {
        Some(path) => Uri::from(path.clone()),
        None => Uri::from_static("/"),
    };
    let request = Request::from_parts(parts, Full::new(body));
    let (parts, body) = sender.send_request(request).await?.into_parts();
    let body = Limited::new(body, MAX_RESPONSE_BYTES).collect().await?;
    Ok(Response::from_parts(parts, body.to_bytes()))
}
