//! The connections of services that come and go, merged into one stream.

use std::pin::Pin;
use std::task::{Context, Poll};

use futures::Stream;
use futures::stream::FusedStream;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

/// Several streams, merged into one.
///
/// The stream ends when all merged streams have ended and the last [`MergeHandle`] is dropped.
///
/// Each poll asks every stream, which is cheap for the number of services a server has. A
/// [`SelectAll`](futures::stream::SelectAll) has a waker for each stream, which costs more for the
/// single stream that most servers have.
pub struct MergedStreams<S> {
    streams: Vec<S>,
    /// The stream to ask first. It rotates, so that a busy one does not starve the others.
    next: usize,
    /// New streams. None if all handles are dropped.
    added: Option<UnboundedReceiver<S>>,
}

/// Adds streams to a [`MergedStreams`].
pub struct MergeHandle<S>(UnboundedSender<S>);

impl<S> Clone for MergeHandle<S> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<S> MergeHandle<S> {
    /// Adds a stream. Drops it if the [`MergedStreams`] is gone.
    pub fn add(&self, stream: S) {
        // The shard has ended in that case, and serves no connection any more.
        let _ = self.0.send(stream);
    }
}

impl<S> MergedStreams<S> {
    /// An empty merge, and the handle to add streams to it.
    pub fn new() -> (MergeHandle<S>, Self) {
        let (sender, receiver) = unbounded_channel();
        let merged = Self {
            streams: Vec::new(),
            next: 0,
            added: Some(receiver),
        };
        (MergeHandle(sender), merged)
    }

    fn poll_added(&mut self, cx: &mut Context<'_>) {
        while let Some(added) = &mut self.added {
            match added.poll_recv(cx) {
                Poll::Ready(Some(stream)) => self.streams.push(stream),
                Poll::Ready(None) => self.added = None,
                Poll::Pending => return,
            }
        }
    }
}

impl<S: Stream + Unpin> Stream for MergedStreams<S> {
    type Item = S::Item;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<S::Item>> {
        let this = self.get_mut();
        this.poll_added(cx);
        for _ in 0..this.streams.len() {
            if this.next >= this.streams.len() {
                this.next = 0;
            }
            match Pin::new(&mut this.streams[this.next]).poll_next(cx) {
                Poll::Ready(Some(item)) => {
                    this.next += 1;
                    return Poll::Ready(Some(item));
                }
                // Not `swap_remove`: the last stream has not been asked yet in this poll.
                Poll::Ready(None) => drop(this.streams.remove(this.next)),
                Poll::Pending => this.next += 1,
            }
        }
        if this.is_terminated() {
            Poll::Ready(None)
        } else {
            Poll::Pending
        }
    }
}

impl<S: Stream + Unpin> FusedStream for MergedStreams<S> {
    fn is_terminated(&self) -> bool {
        self.streams.is_empty() && self.added.is_none()
    }
}

#[cfg(test)]
mod tests {
    use futures::StreamExt;
    use futures::executor::block_on;
    use futures::stream::{self, BoxStream};

    use super::*;

    fn endless(item: u32) -> BoxStream<'static, u32> {
        stream::repeat(item).boxed()
    }

    #[test]
    fn no_stream_starves_the_others() {
        let (handle, merged) = MergedStreams::new();
        for n in 0..3 {
            handle.add(endless(n));
        }
        let items: Vec<u32> = block_on(merged.take(6).collect());
        assert_eq!(items, [0, 1, 2, 0, 1, 2]);
    }

    #[test]
    fn all_streams_are_polled_even_if_one_ends() {
        let mut cx = Context::from_waker(std::task::Waker::noop());
        for (first, ending) in (0..4).flat_map(|first| (0..4).map(move |ending| (first, ending))) {
            let (handle, mut merged) = MergedStreams::new();
            let polled = std::rc::Rc::new(std::cell::RefCell::new(Vec::new()));
            for n in 0..4 {
                let polled = polled.clone();
                handle.add(stream::poll_fn(move |_| {
                    polled.borrow_mut().push(n);
                    match n == ending {
                        true => Poll::Ready(None::<()>),
                        false => Poll::Pending,
                    }
                }));
            }
            merged.next = first;
            assert_eq!(merged.poll_next_unpin(&mut cx), Poll::Pending);
            let mut polled = polled.take();
            polled.sort_unstable();
            assert_eq!(
                polled,
                [0, 1, 2, 3],
                "stream {ending} ends, stream {first} is first"
            );
        }
    }

    #[test]
    fn the_merge_ends_when_all_streams_ended_and_the_handle_is_dropped() {
        let (handle, mut merged) = MergedStreams::new();
        let mut cx = Context::from_waker(std::task::Waker::noop());
        assert_eq!(merged.poll_next_unpin(&mut cx), Poll::Pending);
        handle.add(stream::iter([1]).boxed());
        assert_eq!(merged.poll_next_unpin(&mut cx), Poll::Ready(Some(1)));
        assert_eq!(merged.poll_next_unpin(&mut cx), Poll::Pending);
        handle.add(stream::iter([2]).boxed());
        drop(handle);
        assert_eq!(block_on(merged.collect::<Vec<_>>()), [2]);
    }
}
