//! The pages of `guest/hello` as a `wasi:http/service@0.3.0` component.
//!
//! A peer for the benchmark: `wasmtime serve` parses and frames HTTP itself and calls this with
//! each request, by default several at a time and one after another in the same instance. Like
//! `guest/hello` it answers `/` with `hello.html` and anything else with `404.html`, read at each
//! request from the directory that is granted as `/static`. It looks at no method, and there is no
//! `/sleep`: only GET of pages is measured.

#[path = "../../read.rs"]
mod read;

use wasip3::exports::http::handler::Guest;
use wasip3::http::types::{ErrorCode, Fields, Request, Response};
use wasip3::{spawn_local, wit_future, wit_stream};

use read::read;

/// What the host calls.
pub struct Pages;

// What it exports has names that no native linker takes.
#[cfg(target_family = "wasm")]
wasip3::http::service::export!(Pages);

impl Guest for Pages {
    async fn handle(request: Request) -> Result<Response, ErrorCode> {
        let target = request.get_path_with_query().unwrap_or_default();
        let (status, file) = match target.split('?').next() {
            Some("/") => (200, "hello.html"),
            _ => (404, "404.html"),
        };
        // The host answers an error with status 500.
        let page = read(file).map_err(|error| ErrorCode::InternalError(Some(error.to_string())))?;
        let (mut body, body_reader) = wit_stream::new();
        let (trailers, trailers_reader) = wit_future::new(|| Ok(None));
        let (response, _sent) =
            Response::new(fields(page.len()), Some(body_reader), trailers_reader);
        response
            .set_status_code(status)
            .expect("200 and 404 are status codes");
        // The host reads the body once it has the response, so it is written after returning.
        spawn_local(async move {
            // What is left was for a client that has gone away: there is no one to tell.
            body.write_all(page).await;
            drop(body);
            let _ = trailers.write(Ok(None)).await;
        });
        Ok(response)
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
