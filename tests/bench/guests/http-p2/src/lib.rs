//! The pages of `guest/hello` as a `wasi:http/proxy@0.2` component.
//!
//! `wasmtime serve` parses and frames HTTP itself and calls this guest once per request, in a fresh
//! instance. Like `guest/hello`, the guest answers `/` with `hello.html` and other paths with
//! `404.html`. It reads the page for each request from the directory granted as `/static`. Methods
//! and `/sleep` are not implemented, because the benchmark only sends GET requests for pages.

#[path = "../../read.rs"]
mod read;

use std::io::Write;

use wasip2::exports::http::incoming_handler::Guest;
use wasip2::http::types::{
    ErrorCode, Fields, IncomingRequest, OutgoingBody, OutgoingResponse, ResponseOutparam,
};

use read::read;

/// The guest.
pub struct Pages;

// Native linkers do not accept the export names of the component model.
#[cfg(target_family = "wasm")]
wasip2::http::proxy::export!(Pages);

impl Guest for Pages {
    fn handle(request: IncomingRequest, out: ResponseOutparam) {
        let target = request.path_with_query().unwrap_or_default();
        let (status, file) = match target.split('?').next() {
            Some("/") => (200, "hello.html"),
            _ => (404, "404.html"),
        };
        let page = match read(file) {
            Ok(page) => page,
            // The host turns an error into status 500.
            Err(error) => {
                let code = ErrorCode::InternalError(Some(error.to_string()));
                return ResponseOutparam::set(out, Err(code));
            }
        };
        let response = OutgoingResponse::new(fields(page.len()));
        response
            .set_status_code(status)
            .expect("200 and 404 are status codes");
        let body = response.body().expect("the body is taken once");
        // From here on the host sends. A body written earlier would have to fit into its buffer.
        ResponseOutparam::set(out, Ok(response));
        send(body, &page);
    }
}

/// The header fields, except the date, which the host adds.
fn fields(length: usize) -> Fields {
    let fields = [
        ("Content-Type", b"text/html; charset=utf-8".to_vec()),
        // Without a length the host would use chunked encoding.
        ("Content-Length", length.to_string().into_bytes()),
    ];
    Fields::from_list(&fields.map(|(name, value)| (name.to_owned(), value)))
        .expect("the fields are well-formed")
}

/// Sends the whole body. Errors are ignored, because they mean that the client is gone.
fn send(body: OutgoingBody, page: &[u8]) {
    let mut stream = body.write().expect("the stream is taken once");
    let written = stream.write_all(page);
    // The stream is a child resource of the body and has to be dropped first.
    drop(stream);
    if written.is_ok() {
        let _ = OutgoingBody::finish(body, None);
    }
}
