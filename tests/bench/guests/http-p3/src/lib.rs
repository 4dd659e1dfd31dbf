//! The pages of `guest/hello` as a `wasi:http/service@0.3.0` component.
//!
//! `wasmtime serve` parses and frames HTTP itself and calls this guest once per request. By default
//! an instance handles several requests, concurrently and one after another. Like `guest/hello`,
//! the guest answers `/` with `hello.html` and other paths with `404.html`. It reads the page for
//! each request from the directory granted as `/static`. Methods and `/sleep` are not implemented,
//! because the benchmark only sends GET requests for pages.

#[path = "../../read.rs"]
mod read;

use wasip3::exports::http::handler::Guest;
use wasip3::http::types::{ErrorCode, Fields, Request, Response};
use wasip3::{spawn_local, wit_future, wit_stream};

use read::read;

/// The guest.
pub struct Pages;

// Native linkers do not accept the export names of the component model.
#[cfg(target_family = "wasm")]
wasip3::http::service::export!(Pages);

impl Guest for Pages {
    async fn handle(request: Request) -> Result<Response, ErrorCode> {
        let target = request.get_path_with_query().unwrap_or_default();
        let (status, file) = match target.split('?').next() {
            Some("/") => (200, "hello.html"),
            _ => (404, "404.html"),
        };
        // The host turns an error into status 500.
        let page = read(file).map_err(|error| ErrorCode::InternalError(Some(error.to_string())))?;
        let (mut body, body_reader) = wit_stream::new();
        let (trailers, trailers_reader) = wit_future::new(|| Ok(None));
        let (response, _sent) =
            Response::new(fields(page.len()), Some(body_reader), trailers_reader);
        response
            .set_status_code(status)
            .expect("200 and 404 are status codes");
        // The host reads the body once it has the response, so the guest writes after returning.
        spawn_local(async move {
            // Unsent bytes are ignored, because they mean that the client is gone.
            body.write_all(page).await;
            drop(body);
            let _ = trailers.write(Ok(None)).await;
        });
        Ok(response)
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
