//! A span for each connection, sent to whoever collects them (OpenTelemetry, OTLP over HTTP).
//!
//! Off by default: a connection then looks whether there is anything to do, and there is not.

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

/// How long a collector may take for what it is sent at once, and how long for the last of it.
const COLLECTED: Duration = Duration::from_secs(5);

/// The most bytes of a collector's answer that are looked at.
const ANSWER_BYTES: usize = 64 << 10;

/// Where spans go.
pub struct SpanSender {
    provider: SdkTracerProvider,
    tracer: SdkTracer,
}

/// What is told of a connection that has ended.
pub(crate) struct ConnectionSpan {
    pub(crate) attributes: Vec<KeyValue>,
    pub(crate) duration: Duration,
    /// How long it took to make its instance, if there was one.
    pub(crate) instantiation: Option<Duration>,
    /// What was wrong, if anything was.
    pub(crate) wrong: Option<&'static str>,
}

impl SpanSender {
    /// Sends spans to the collector at `endpoint`, such as `http://127.0.0.1:4318`. A thread of its own
    /// does so; when there are more than can be sent, some are left out.
    ///
    /// # Errors
    ///
    /// Says what is wrong with the endpoint.
    pub fn to_collector(endpoint: &str) -> Result<Self, String> {
        let exporter = SpanExporter::builder()
            .with_http()
            .with_http_client(CollectorClient::default())
            .with_endpoint(format!("{}/v1/traces", endpoint.trim_end_matches('/')))
            .with_timeout(COLLECTED)
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

    /// Tells of a connection that has ended just now.
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
        if let Some(took) = connection.instantiation {
            let part = self.tracer.span_builder("instantiate");
            let mut part = part
                .with_start_time(began)
                .start_with_context(&self.tracer, &context);
            part.end_with_timestamp(began + took);
        }
        context.span().end_with_timestamp(now);
    }

    /// Sends what was not sent yet. There will be no more.
    pub fn close(&self) {
        // A collector that is gone has lost them.
        let _ = self.provider.shutdown_with_timeout(COLLECTED);
    }
}

impl fmt::Debug for SpanSender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Spans").finish_non_exhaustive()
    }
}

/// Sends by the HTTP that operators are answered by, on the thread of the library that batches spans:
/// its own clients would bring a second HTTP, or want a runtime of their own.
#[derive(Debug, Default)]
struct CollectorClient {
    /// The last attempt failed, which the log says.
    failed: AtomicBool,
}

impl CollectorClient {
    fn note(&self, sent: &Result<Response<Bytes>, HttpError>) {
        let wrong = match sent {
            Ok(response) if response.status().is_success() => None,
            Ok(response) => Some(response.status().to_string()),
            Err(error) => Some(error.to_string()),
        };
        let failed = wrong.is_some();
        if self.failed.swap(failed, Ordering::Relaxed) == failed {
            return;
        }
        match wrong {
            Some(error) => warn!(%error, "spans cannot be sent to the collector of --otlp"),
            None => info!("spans are sent to the collector again"),
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
            let sent =
                runtime.block_on(async { tokio::time::timeout(COLLECTED, send(request)).await? });
            self.note(&sent);
            sent
        })
    }
}

async fn send(request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
    let (mut parts, body) = request.into_parts();
    let authority = parts.uri.authority().ok_or("the endpoint has no host")?;
    // An IPv6 address has brackets in a URL, and none for a resolver.
    let host = authority.host().trim_matches(['[', ']']);
    let stream = TcpStream::connect((host, authority.port_u16().unwrap_or(80))).await?;
    let (mut sender, connection) = handshake(TokioIo::new(stream)).await?;
    // It ends with the runtime.
    tokio::spawn(connection);
    let host = HeaderValue::from_str(authority.as_str())?;
    parts.headers.insert(HOST, host);
    parts.uri = match parts.uri.path_and_query() {
        Some(path) => Uri::from(path.clone()),
        None => Uri::from_static("/"),
    };
    let request = Request::from_parts(parts, Full::new(body));
    let (parts, body) = sender.send_request(request).await?.into_parts();
    let body = Limited::new(body, ANSWER_BYTES).collect().await?;
    Ok(Response::from_parts(parts, body.to_bytes()))
}
