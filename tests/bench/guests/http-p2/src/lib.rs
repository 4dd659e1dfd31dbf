//! The pages of `guest/hello` as a `wasi:http/proxy@0.2` component.
//!
//! A peer for the benchmark: `wasmtime serve` parses and frames HTTP itself and calls this with
//! each request, in an instance of its own. Like `guest/hello` it answers `/` with `hello.html` and
//! anything else with `404.html`, read at each request from the directory that is granted as
//! `/static`. It looks at no method, and there is no `/sleep`: only GET of pages is measured.

#[path = "../../read.rs"]
mod read;

use std::io::Write;

use wasip2::exports::http::incoming_handler::Guest;
use wasip2::http::types::{
    ErrorCode, Fields, IncomingRequest, OutgoingBody, OutgoingResponse, ResponseOutparam,
};

use read::read;

/// What the host calls.
pub struct Pages;

// What it exports has names that no native linker takes.
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
            // The host answers an error with status 500.
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
        // The host begins to send here. A body that is written before this has to fit into what the
        // host buffers.
        ResponseOutparam::set(out, Ok(response));
        send(body, &page);
    }
}

/// What the host does not say by itself: it adds the date.
fn fields(length: usize) -> Fields {
    let fields = [
        ("Content-Type", b"text/html; charset=utf-8".to_vec()),
        // With it the host frames the body by its length and not in chunks.
        ("Content-Length", length.to_string().into_bytes()),
    ];
    Fields::from_list(&fields.map(|(name, value)| (name.to_owned(), value)))
        .expect("the fields are well-formed")
}

/// Sends all of the body. A client that has gone away ends it early, and there is no one left to
/// tell.
fn send(body: OutgoingBody, page: &[u8]) {
    let mut stream = body.write().expect("the stream is taken once");
    let written = stream.write_all(page);
    // The stream is the body's child: it has to be gone when the body is finished.
    drop(stream);
    if written.is_ok() {
        let _ = OutgoingBody::finish(body, None);
    }
}
