//! The connections of services that come and go, as one stream.

use std::pin::Pin;
use std::task::{Context, Poll};

use futures::Stream;
use futures::stream::FusedStream;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

/// Several streams as one. It ends when all have, and nobody can add one any more.
///
/// All are asked at each turn, which costs little for as many as a server has services. A
/// [`SelectAll`](futures::stream::SelectAll) would give each a waker, which costs more for the one that
/// most servers have.
pub struct MergedStreams<S> {
    streams: Vec<S>,
    /// The one to ask first, so that a busy one does not starve the others.
    next: usize,
    /// None when nobody can add one any more.
    joining: Option<UnboundedReceiver<S>>,
}

/// Adds streams to a [`Gathered`].
pub struct MergeHandle<S>(UnboundedSender<S>);

impl<S> Clone for MergeHandle<S> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<S> MergeHandle<S> {
    /// Adds a stream. It is dropped if the other end is gone.
    pub fn add(&self, stream: S) {
        // Then nobody is served any more.
        let _ = self.0.send(stream);
    }
}

impl<S> MergedStreams<S> {
    /// None yet, and where they are added.
    pub fn new() -> (MergeHandle<S>, Self) {
        let (joining, joined) = unbounded_channel();
        let gathered = Self {
            streams: Vec::new(),
            next: 0,
            joining: Some(joined),
        };
        (MergeHandle(joining), gathered)
    }

    fn poll_joining(&mut self, cx: &mut Context<'_>) {
        while let Some(joining) = &mut self.joining {
            match joining.poll_recv(cx) {
                Poll::Ready(Some(stream)) => self.streams.push(stream),
                Poll::Ready(None) => self.joining = None,
                Poll::Pending => return,
            }
        }
    }
}

impl<S: Stream + Unpin> Stream for MergedStreams<S> {
    type Item = S::Item;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<S::Item>> {
        let this = self.get_mut();
        this.poll_joining(cx);
        let mut left = this.streams.len();
        while left > 0 {
            left -= 1;
            if this.next >= this.streams.len() {
                this.next = 0;
            }
            match Pin::new(&mut this.streams[this.next]).poll_next(cx) {
                Poll::Ready(Some(item)) => {
                    this.next += 1;
                    return Poll::Ready(Some(item));
                }
                // In their order: one that was asked is not to take the turn of one that was not.
                Poll::Ready(None) => drop(this.streams.remove(this.next)),
                Poll::Pending => this.next += 1,
            }
        }
        match this.is_terminated() {
            true => Poll::Ready(None),
            false => Poll::Pending,
        }
    }
}

impl<S: Stream + Unpin> FusedStream for MergedStreams<S> {
    fn is_terminated(&self) -> bool {
        self.streams.is_empty() && self.joining.is_none()
    }
}

#[cfg(test)]
mod tests {
    use futures::StreamExt;
    use futures::executor::block_on;
    use futures::stream::{self, BoxStream};

    use super::*;

    fn endless(of: u32) -> BoxStream<'static, u32> {
        stream::repeat(of).boxed()
    }

    #[test]
    fn none_starves_the_others() {
        let (joining, gathered) = MergedStreams::new();
        for n in 0..3 {
            joining.add(endless(n));
        }
        let some: Vec<u32> = block_on(gathered.take(6).collect());
        assert_eq!(some, [0, 1, 2, 0, 1, 2]);
    }

    #[test]
    fn all_are_asked_though_one_ends() {
        let mut cx = Context::from_waker(std::task::Waker::noop());
        for (first, ends) in (0..4).flat_map(|first| (0..4).map(move |ends| (first, ends))) {
            let (joining, mut gathered) = MergedStreams::new();
            let asked = std::rc::Rc::new(std::cell::RefCell::new(Vec::new()));
            for n in 0..4 {
                let asked = asked.clone();
                joining.add(stream::poll_fn(move |_| {
                    asked.borrow_mut().push(n);
                    match n == ends {
                        true => Poll::Ready(None::<()>),
                        false => Poll::Pending,
                    }
                }));
            }
            gathered.next = first;
            assert_eq!(gathered.poll_next_unpin(&mut cx), Poll::Pending);
            let mut asked = asked.take();
            asked.sort_unstable();
            assert_eq!(asked, [0, 1, 2, 3], "{ends} ends, {first} is the first");
        }
    }

    #[test]
    fn it_ends_when_all_have_and_none_can_be_added() {
        let (joining, mut gathered) = MergedStreams::new();
        let mut cx = Context::from_waker(std::task::Waker::noop());
        assert_eq!(gathered.poll_next_unpin(&mut cx), Poll::Pending);
        joining.add(stream::iter([1]).boxed());
        assert_eq!(gathered.poll_next_unpin(&mut cx), Poll::Ready(Some(1)));
        assert_eq!(gathered.poll_next_unpin(&mut cx), Poll::Pending);
        joining.add(stream::iter([2]).boxed());
        drop(joining);
        assert_eq!(block_on(gathered.collect::<Vec<_>>()), [2]);
    }
}
