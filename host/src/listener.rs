//! Listening sockets as one stream of accepted connections.

mod admission;
mod bind;
mod connection_limit;
mod drain;
mod merge;

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::sync::LazyLock;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use futures::Stream;
use futures::future::BoxFuture;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::registry::Registry;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::Sleep;
use tracing::{debug, info, warn};

use crate::Error;
use crate::lifecycle::Lifecycle;
use crate::limit::Limit;
use crate::net::{Peer, StreamSocket};
pub(crate) use admission::Source;
use admission::SourcePermit;
pub use admission::{Admission, AdmissionRules, SourcePrefix, SourcePrefixError};
pub use bind::{BoundSockets, Listener, ListeningSockets, SocketSettings};
pub use connection_limit::ConnectionLimit;
use connection_limit::{ConnectionPermit, PermitQueue};
pub use merge::{MergeHandle, MergedStreams};

/// How long to wait after a failed `accept`. A failure lasts (EMFILE, ENOBUFS) and would be met
/// again at once, at the cost of a whole core; the wait doubles up to the second figure.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(1));

/// An accepted connection, and its place among those that may be open at once.
pub struct Accepted<T> {
    /// Whom it is for.
    pub to: T,
    /// The socket, which does not block. It is not known to any runtime yet: where the connection
    /// is to be handled is not decided.
    pub stream: StreamSocket,
    /// The client.
    pub peer: Peer,
    /// Given back when it is dropped.
    pub place: AcceptPermit,
}

/// A connection's place among all, and among those of its source.
///
/// The source's is given back first: whoever comes by the other is not to be refused for it.
pub struct AcceptPermit {
    of_source: SourcePermit,
    _taken: ConnectionPermit,
}

impl AcceptPermit {
    /// The source that the client is one of, where that counts.
    pub(crate) fn source(&self) -> Option<Source> {
        self.of_source.source()
    }

    /// Lets in the client that a proxy speaks for, or says which limit is in its way. To be called for
    /// the connections of proxies (see [`Rules::proxies`]) when it is known whom they are for.
    ///
    /// # Errors
    ///
    /// The limit. The connection is to be reset.
    pub fn admit(&mut self, client: Peer) -> Result<(), Limit> {
        self.of_source.admit(client)
    }
}

/// What becomes of clients while the server is full.
#[derive(Clone, Debug, PartialEq)]
pub enum WhenFull {
    /// They wait in the kernel's backlog.
    Wait,
    /// They are sent this, and their connection is closed.
    Close(Vec<u8>),
}

/// The connections of some listeners, as a stream that outlives every error.
///
/// Where clients are to wait, a place is taken before `accept`, so that a full server leaves them in the
/// kernel's backlog. It is given back when no client waits: an idle listener holds no place that another could use.
///
/// Once the server drains, the stream ends: without losing a client whose connection the kernel
/// has completed for us, because that client may have sent its request already.
pub struct Incoming<T> {
    listeners: Vec<AsyncFd<Listener>>,
    /// The listener to ask first, so that a busy one does not starve the others.
    next: usize,
    /// Whom all of them are for.
    to: T,
    places: ConnectionLimit,
    line: PermitQueue,
    lifecycle: Lifecycle,
    when_full: WhenFull,
    admission: Admission,
    /// Leave to accept a client was taken, and none has come yet.
    has_turn: bool,
    refusals: Refusals,
    backoff: Option<Pin<Box<Sleep>>>,
    delay: Duration,
    phase: Phase,
    /// Those who were accepted in the last phase, and have no place yet.
    waiting: VecDeque<(StreamSocket, Peer)>,
    /// How many more clients are accepted in the last phase at sockets that others go on with.
    left_to_share: usize,
    ended: BoxFuture<'static, ()>,
}

/// How many clients of a socket that others have open as well are accepted when the server drains: those
/// who may have waited for it, and not all who come meanwhile.
const LEFT_TO_SHARE: usize = 4096;

/// How many clients are held in the last phase that have no place: more files than for these are not to be
/// taken from those who have one.
const IN_HAND: usize = 64;

/// How often `accept` failed for a reason that lasts, since the process began.
static ACCEPT_ERRORS: LazyLock<Counter> = LazyLock::new(Counter::default);

/// Adds to `registry` what goes wrong with accepting.
pub fn register(registry: &mut Registry) {
    registry.register(
        "accept_errors",
        "How often accepting a connection failed for want of something",
        ACCEPT_ERRORS.clone(),
    );
}

/// How often accepting failed.
pub(crate) fn accept_errors() -> u64 {
    ACCEPT_ERRORS.get()
}

enum Phase {
    Serving(BoxFuture<'static, ()>),
    /// New handshakes are refused, those under way may complete.
    Closing(BoxFuture<'static, ()>),
    /// What is left in the backlog is the last.
    Sweeping,
    Closed,
}

impl<T> Incoming<T> {
    /// Accepts from `listeners`, for `to`, whom `admission` lets in, at most as many at once as there are
    /// `places`, until `lifecycle` drains. To be called within the tokio runtime that it is to be
    /// polled in.
    ///
    /// # Errors
    ///
    /// [`Error::Internal`] when the system has no more files for the runtime.
    pub fn new(
        listeners: Vec<Listener>,
        to: T,
        places: ConnectionLimit,
        when_full: WhenFull,
        admission: Admission,
        lifecycle: &Lifecycle,
    ) -> Result<Self, Error> {
        let (draining, ended) = (lifecycle.clone(), lifecycle.clone());
        let files: Vec<_> = listeners.iter().filter_map(Listener::file).collect();
        let listeners = listeners
            .into_iter()
            .map(watch)
            .collect::<Result<_, _>>()
            .map_err(|error| Error::internal("watching a listener", error))?;
        Ok(Self {
            listeners,
            next: 0,
            to,
            line: places.line(),
            places,
            lifecycle: lifecycle.clone(),
            when_full,
            admission,
            has_turn: false,
            refusals: Refusals::default(),
            backoff: None,
            delay: BACKOFF.0,
            phase: Phase::Serving(Box::pin(async move {
                // Not before it is polled: what can fail on the way to that is to leave things as they are.
                files.iter().for_each(|file| file.take_over());
                draining.draining().await;
            })),
            waiting: VecDeque::new(),
            left_to_share: LEFT_TO_SHARE,
            ended: Box::pin(async move { ended.ended().await }),
        })
    }

    /// Asks each listener once. None when no client waits at any.
    fn poll_accept(&mut self, cx: &mut Context<'_>) -> Option<io::Result<(StreamSocket, Peer)>> {
        for _ in 0..self.listeners.len() {
            let listener = &self.listeners[self.next];
            self.next = (self.next + 1) % self.listeners.len();
            let accepted = match self.phase {
                // Clients come there without end.
                Phase::Sweeping if listener.get_ref().is_shared() => {
                    if self.left_to_share == 0 {
                        continue;
                    }
                    self.left_to_share -= 1;
                    listener.get_ref().accept()
                }
                // The reactor may not have seen yet what the kernel has: ask the kernel.
                Phase::Sweeping => listener.get_ref().accept(),
                _ => poll_accept(listener, cx),
            };
            if let Poll::Ready(result) = accepted {
                return Some(result);
            }
        }
        None
    }

    /// Accepts who is left, whether there is a place or not, and closes the sockets when nobody is: nobody
    /// is to wait for a port that a full server has given up.
    fn sweep(&mut self, cx: &mut Context<'_>) {
        while self.waiting.len() < IN_HAND && !self.listeners.is_empty() && self.backoff.is_none() {
            match self.poll_accept(cx) {
                Some(Ok(client)) => self.waiting.push_back(client),
                Some(Err(error)) => self.failed(&error),
                None => self.listeners.clear(),
            }
        }
    }

    /// Moves on from the phases that end by themselves. It is asked first, and not only when nobody
    /// waits: a server that is full or busy has to stop as well.
    fn poll_phase(&mut self, cx: &mut Context<'_>) {
        if let Phase::Serving(draining) = &mut self.phase
            && draining.as_mut().poll(cx).is_ready()
        {
            let listeners = || self.listeners.iter().map(AsyncFd::get_ref);
            if self.lifecycle.has_new_owner() {
                // Who waits is accepted by our successor, at the same sockets.
                if self.lifecycle.is_handed_over_to_process() {
                    let files = listeners().filter_map(Listener::file);
                    files.for_each(|file| file.hand_over());
                }
                self.phase = Phase::Closed;
                return;
            }
            listeners().for_each(drain::refuse_clients);
            let ports: Vec<u16> = listeners().filter_map(Listener::port).collect();
            self.phase = match ports.is_empty() {
                true => Phase::Sweeping,
                false => Phase::Closing(Box::pin(drain::handshakes_completed(ports))),
            };
        }
        if let Phase::Closing(completed) = &mut self.phase
            && completed.as_mut().poll(cx).is_ready()
        {
            self.phase = Phase::Sweeping;
        }
        if self.ended.as_mut().poll(cx).is_ready() {
            self.phase = Phase::Closed;
        }
    }

    /// Waits before the next `accept` when the last one failed for a reason that lasts.
    fn failed(&mut self, error: &io::Error) {
        if is_clients_fault(error) {
            debug!(%error, "a client was gone before it was accepted");
            return;
        }
        ACCEPT_ERRORS.inc();
        warn!(%error, retry_in = ?self.delay, "cannot accept connections");
        self.backoff = Some(Box::pin(tokio::time::sleep(self.delay)));
        self.delay = (self.delay * 2).min(BACKOFF.1);
    }

    /// Ready when the next client may be accepted, as fast as clients are to be.
    fn poll_turn(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        while !self.has_turn {
            match self.admission.take_turn() {
                Ok(()) => self.has_turn = true,
                Err(wait) => {
                    self.refusals.hold_up(wait);
                    let pause = self.backoff.insert(Box::pin(tokio::time::sleep(wait)));
                    ready!(pause.as_mut().poll(cx));
                    self.backoff = None;
                }
            }
        }
        Poll::Ready(())
    }

    /// Tells a client that the server is full.
    fn close(&mut self, stream: &StreamSocket, peer: Peer) {
        if let WhenFull::Close(banner) = &self.when_full {
            // What the client has sent is taken: closing a socket with something unread resets it,
            // and the banner with it. Neither waits; a client that sends on may miss it.
            stream.answer(banner);
        }
        self.refusals.add(Limit::MaxConnections, peer);
    }

    fn accepted(&mut self) {
        if self.delay > BACKOFF.0 {
            info!("accepting connections again");
            self.delay = BACKOFF.0;
        }
    }
}

/// How many clients are refused in a turn, at most: to refuse costs little, and is not to take what
/// is left from those who are served.
const REFUSED: usize = 64;

impl<T: Clone + Unpin> Stream for Incoming<T> {
    type Item = Accepted<T>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Accepted<T>>> {
        let this = self.get_mut();
        this.poll_phase(cx);
        for _ in 0..REFUSED {
            if matches!(this.phase, Phase::Closed) {
                this.listeners.clear();
                return Poll::Ready(None);
            }
            if let Some(backoff) = &mut this.backoff {
                ready!(backoff.as_mut().poll(cx));
                this.backoff = None;
            }
            if matches!(this.phase, Phase::Sweeping) {
                this.sweep(cx);
                if this.waiting.is_empty() {
                    if this.listeners.is_empty() {
                        this.phase = Phase::Closed;
                    }
                    continue;
                }
            }
            let place = match this.when_full {
                WhenFull::Wait => Some(ready!(this.line.poll_take(cx))),
                // Nobody stands in line for a place here: who comes and has none is told so.
                WhenFull::Close(_) => None,
            };
            // The last ones are not held up: they are known, and soon reset.
            if !matches!(this.phase, Phase::Sweeping) {
                ready!(this.poll_turn(cx));
            }
            let waiting = this.waiting.pop_front().map(Ok);
            match waiting.or_else(|| this.poll_accept(cx)) {
                Some(Ok((stream, peer))) => {
                    this.accepted();
                    this.has_turn = false;
                    let place = place.or_else(|| this.places.try_take());
                    let admitted = this.admission.admit(peer);
                    match (admitted, place) {
                        (Ok(of_source), Some(taken)) => {
                            return Poll::Ready(Some(Accepted {
                                to: this.to.clone(),
                                stream,
                                peer,
                                place: AcceptPermit {
                                    of_source,
                                    _taken: taken,
                                },
                            }));
                        }
                        (Ok(_), None) => this.close(&stream, peer),
                        (Err(limit), _) => {
                            stream.reset_when_dropped();
                            this.refusals.add(limit, peer);
                        }
                    }
                }
                Some(Err(error)) => this.failed(&error),
                None => return Poll::Pending,
            }
        }
        // There may be more, after everyone else's turn.
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

/// Counts clients that are refused or held up, for a line in the log once in a while: a flood of
/// clients is not to become a flood of lines.
#[derive(Default)]
struct Refusals {
    last_line: Option<Instant>,
    since: u64,
}

/// The least time between two lines about refusals.
const BETWEEN_LINES: Duration = Duration::from_secs(1);

impl Refusals {
    /// A client is refused.
    fn add(&mut self, limit: Limit, peer: Peer) {
        limit.count();
        self.since += 1;
        if self.is_line_due() {
            warn!(
                %limit,
                %peer,
                refused = self.since,
                "refused a client, the last of so many since the last such line"
            );
            self.since = 0;
        }
    }

    /// Clients have to wait, for they come too fast.
    fn hold_up(&mut self, wait: Duration) {
        Limit::AcceptRate.count();
        if self.is_line_due() {
            warn!(limit = %Limit::AcceptRate, ?wait, "clients come too fast: they wait");
        }
    }

    fn is_line_due(&mut self) -> bool {
        let due = self
            .last_line
            .is_none_or(|last| last.elapsed() >= BETWEEN_LINES);
        if due {
            self.last_line = Some(Instant::now());
        }
        due
    }
}

/// Whether `error` is about one client only. Linux passes errors that a new connection already has
/// on through `accept` (accept(2), "Error handling").
fn is_clients_fault(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::Interrupted
    )
}

fn watch(listener: Listener) -> io::Result<AsyncFd<Listener>> {
    // SAFETY: a `Listener` has the same file from its beginning to its end, and closes it only
    // when it is dropped, which `AsyncFd` does after it has ceased to watch it.
    let watched = unsafe { AsyncFd::register_with_interest(listener, Interest::READABLE) };
    watched.map_err(Into::into)
}

fn poll_accept(
    listener: &AsyncFd<Listener>,
    cx: &mut Context<'_>,
) -> Poll<io::Result<(StreamSocket, Peer)>> {
    loop {
        let mut ready = ready!(listener.poll_read_ready(cx))?;
        match listener.get_ref().accept() {
            // It is shut down, perhaps by another shard that has the same one: nobody comes any more,
            // and to the reactor it is ready for ever.
            Poll::Pending if ready.ready().is_read_closed() => return Poll::Pending,
            // The next round waits until it is ready again.
            Poll::Pending => ready.clear_ready(),
            result => return result,
        }
    }
}
