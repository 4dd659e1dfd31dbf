//! The log over HTTP: its last lines, and the lines that follow.

use std::sync::Arc;

use futures::{StreamExt, stream};
use http_body_util::{BodyExt, StreamBody};
use hyper::StatusCode;
use hyper::body::{Bytes, Frame};
use tokio::sync::broadcast::{self, error::RecvError};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::log_stream::{Chunk, LogStream};
use super::long_running::LongRunning;
use super::response::{Response, failure, text};

/// Largest number of clients that follow the log: each holds a connection for as long as it likes.
pub(super) const MAX_FOLLOWERS: usize = 8;

/// Answers with the last lines of the log.
///
/// The query `id=N` selects the lines of one connection. With `follow=true` new lines follow, without
/// end.
pub(super) fn answer(
    logs: &LogStream,
    query: &str,
    followers: &Arc<Semaphore>,
    long_running: &LongRunning,
) -> Response {
    let id = match parameter(query, "id").map(str::parse) {
        None => None,
        Some(Ok(id)) => Some(id),
        Some(Err(_)) => {
            return failure(
                StatusCode::BAD_REQUEST,
                "id has to be the number of a connection",
            );
        }
    };
    let (history, new_chunks) = logs.follow();
    let history: Vec<_> = history.iter().map(|chunk| chunk.lines_of(id)).collect();
    let history = Bytes::from(history.concat());
    if parameter(query, "follow") != Some("true") {
        return text(StatusCode::OK, history);
    }
    let Ok(permit) = followers.clone().try_acquire_owned() else {
        let error = format!("{MAX_FOLLOWERS} clients follow the log already; try again later");
        return failure(StatusCode::SERVICE_UNAVAILABLE, &error);
    };
    long_running.set();
    let follower = Follower {
        chunks: new_chunks,
        id,
        _permit: permit,
    };
    let frames = stream::iter([history])
        .chain(stream::unfold(follower, Follower::next))
        .filter(|bytes| std::future::ready(!bytes.is_empty()))
        .map(|bytes| Ok(Frame::data(bytes)));
    let mut response = text(StatusCode::OK, Bytes::new());
    *response.body_mut() = StreamBody::new(frames).boxed_unsync();
    response
}

fn parameter<'a>(query: &'a str, name: &str) -> Option<&'a str> {
    query
        .split('&')
        .filter_map(|pair| pair.split_once('='))
        .find_map(|(key, value)| (key == name).then_some(value))
}

/// A client that follows the log.
struct Follower {
    chunks: broadcast::Receiver<Chunk>,
    /// The connection whose lines it asked for.
    id: Option<u64>,
    _permit: OwnedSemaphorePermit,
}

impl Follower {
    async fn next(mut self) -> Option<(Bytes, Self)> {
        let bytes = match self.chunks.recv().await {
            Ok(chunk) => chunk.lines_of(self.id),
            Err(RecvError::Lagged(_)) => {
                "(lines are missing: the log was not read fast enough)\n".into()
            }
            Err(RecvError::Closed) => return None,
        };
        Some((bytes, self))
    }
}
