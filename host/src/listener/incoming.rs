//! The accept loop of one shard.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use futures::Stream;
use futures::future::BoxFuture;

use super::accepted::{AcceptPermit, Accepted};
use super::admission::Admission;
use super::async_listener::AsyncListener;
use super::backoff::Backoff;
use super::bind_error::BindError;
use super::connection_limit::{ConnectionLimit, ConnectionPermit, PermitQueue};
use super::drain;
use super::listening::Listener;
use super::refusals::Refusals;
use crate::lifecycle::Lifecycle;
use crate::limit::Limit;
use crate::net::{Peer, StreamSocket};

/// Accepted connections of some listeners, as a stream that outlives every error.
///
/// With [`WhenFull::Wait`], a permit is taken before `accept`, so that the clients of a full server
/// stay in the kernel's backlog. The permit is released when no client waits: an idle listener
/// never holds a permit that another listener could use.
///
/// The stream ends when the server drains. Before that, it accepts every client with an established
/// connection, because such a client may have sent its request already.
pub struct Incoming<T> {
    listeners: Vec<AsyncListener>,
    /// The listener to ask first. It rotates, so that a busy one does not starve the others.
    next: usize,
    /// Route of all connections.
    route: T,
    connection_limit: ConnectionLimit,
    permit_queue: PermitQueue,
    lifecycle: Lifecycle,
    when_full: WhenFull,
    admission: Admission,
    /// The accept rate allows the next client.
    rate_checked: bool,
    refusals: Refusals,
    backoff: Backoff,
    phase: Phase,
    /// Clients that wait for a permit while the server drains.
    without_permit: VecDeque<(StreamSocket, Peer)>,
    /// Clients that a draining server may still accept from shared sockets.
    shared_left: usize,
    ended: BoxFuture<'static, ()>,
}

/// Treatment of clients while the server is full.
#[derive(Clone, Debug, PartialEq)]
pub enum WhenFull {
    /// Clients wait in the kernel's backlog.
    Wait,
    /// Clients are sent this text, and their connections are closed.
    Close(Vec<u8>),
}

enum Phase {
    /// Until the future resolves, because the server drains.
    Accepting(BoxFuture<'static, ()>),
    /// New handshakes are refused. Until the future resolves, because those under way are complete.
    RefusingHandshakes(BoxFuture<'static, ()>),
    /// The clients left in the backlog are the last.
    DrainingBacklog,
    Closed,
}

/// Most clients that a draining server accepts from shared sockets.
///
/// As many as fit into the default backlog. The socket stays open, so clients come without end.
const MAX_SHARED_LEFT: usize = 4096;

/// Most clients held without a permit while the server drains.
///
/// They use file descriptors that connections with a permit may need.
const MAX_WITHOUT_PERMIT: usize = 64;

/// Most clients refused in one poll.
///
/// A refusal is cheap, but a flood of them must not starve the connections that are served.
const MAX_REFUSED_PER_POLL: usize = 64;

impl<T> Incoming<T> {
    /// Accepts clients from `listeners` until `lifecycle` drains, within the given limits.
    ///
    /// Call this within the tokio runtime that polls the stream.
    ///
    /// # Errors
    ///
    /// [`BindError::Resources`] if the runtime cannot watch a listener.
    pub fn new(
        listeners: Vec<Listener>,
        route: T,
        connection_limit: ConnectionLimit,
        when_full: WhenFull,
        admission: Admission,
        lifecycle: &Lifecycle,
    ) -> Result<Self, BindError> {
        let (draining, ended) = (lifecycle.clone(), lifecycle.clone());
        let files: Vec<_> = listeners.iter().filter_map(Listener::file).collect();
        let listeners = listeners
            .into_iter()
            .map(AsyncListener::new)
            .collect::<Result<_, _>>()
            .map_err(|source| BindError::Resources {
                stage: "watching a listener",
                source,
            })?;
        Ok(Self {
            listeners,
            next: 0,
            route,
            permit_queue: connection_limit.queue(),
            connection_limit,
            lifecycle: lifecycle.clone(),
            when_full,
            admission,
            rate_checked: false,
            refusals: Refusals::default(),
            backoff: Backoff::default(),
            phase: Phase::Accepting(Box::pin(async move {
                // Only when first polled: if a later step of the startup fails, the files must stay
                // with their previous owner.
                files.iter().for_each(|file| file.take_over());
                draining.draining().await;
            })),
            without_permit: VecDeque::new(),
            shared_left: MAX_SHARED_LEFT,
            ended: Box::pin(async move { ended.ended().await }),
        })
    }

    /// Advances through the phases that end without a client.
    ///
    /// This comes first in each poll, because a server that is full or busy must drain too.
    fn poll_phase(&mut self, cx: &mut Context<'_>) {
        if let Phase::Accepting(draining) = &mut self.phase
            && draining.as_mut().poll(cx).is_ready()
        {
            self.phase = self.begin_drain();
        }
        if let Phase::RefusingHandshakes(completed) = &mut self.phase
            && completed.as_mut().poll(cx).is_ready()
        {
            self.phase = Phase::DrainingBacklog;
        }
        if self.ended.as_mut().poll(cx).is_ready() {
            self.phase = Phase::Closed;
        }
    }

    /// The first phase of the drain.
    fn begin_drain(&self) -> Phase {
        let listeners = || self.listeners.iter().map(AsyncListener::listener);
        if self.lifecycle.has_new_owner() {
            // The new owner accepts the clients in the backlog.
            if self.lifecycle.is_handed_over_to_process() {
                let files = listeners().filter_map(Listener::file);
                files.for_each(|file| file.hand_over());
            }
            return Phase::Closed;
        }
        listeners().for_each(drain::refuse_clients);
        let ports: Vec<u16> = listeners().filter_map(Listener::port).collect();
        if ports.is_empty() {
            Phase::DrainingBacklog
        } else {
            Phase::RefusingHandshakes(Box::pin(drain::handshakes_completed(ports)))
        }
    }

    /// Asks each listener once for a client. None if no client waits.
    fn poll_accept(&mut self, cx: &mut Context<'_>) -> Option<io::Result<(StreamSocket, Peer)>> {
        for _ in 0..self.listeners.len() {
            let listener = &self.listeners[self.next];
            self.next = (self.next + 1) % self.listeners.len();
            let accepted = match self.phase {
                Phase::DrainingBacklog => {
                    if listener.listener().is_shared() {
                        if self.shared_left == 0 {
                            continue;
                        }
                        self.shared_left -= 1;
                    }
                    // The reactor may not know yet of a client that the kernel has.
                    listener.listener().accept()
                }
                _ => listener.poll_accept(cx),
            };
            if let Poll::Ready(result) = accepted {
                return Some(result);
            }
        }
        None
    }

    /// Accepts the clients left in the backlog, with or without a permit. Closes the listeners when
    /// none is left.
    ///
    /// Listeners are closed before all clients have a permit: the next server must not wait for the
    /// port of a full one.
    fn drain_backlog(&mut self, cx: &mut Context<'_>) {
        while self.without_permit.len() < MAX_WITHOUT_PERMIT
            && !self.listeners.is_empty()
            && !self.backoff.is_pausing()
        {
            match self.poll_accept(cx) {
                Some(Ok(client)) => self.without_permit.push_back(client),
                Some(Err(error)) => self.backoff.accept_failed(&error),
                None => self.listeners.clear(),
            }
        }
    }

    /// Ready when the accept rate allows the next client.
    fn poll_rate(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        while !self.rate_checked {
            match self.admission.check_rate() {
                Ok(()) => self.rate_checked = true,
                Err(wait) => {
                    self.refusals.delayed(wait);
                    self.backoff.pause(wait);
                    ready!(self.backoff.poll_ready(cx));
                }
            }
        }
        Poll::Ready(())
    }

    /// Admits a client, or refuses it.
    fn admit(
        &mut self,
        stream: StreamSocket,
        peer: Peer,
        permit: Option<ConnectionPermit>,
    ) -> Option<Accepted<T>>
    where
        T: Clone,
    {
        let permit = permit.or_else(|| self.connection_limit.try_acquire());
        match (self.admission.admit(peer), permit) {
            (Ok(source_permit), Some(connection_permit)) => {
                return Some(Accepted {
                    route: self.route.clone(),
                    stream,
                    peer,
                    permit: AcceptPermit::new(source_permit, connection_permit),
                });
            }
            (Ok(_), None) => {
                if let WhenFull::Close(banner) = &self.when_full {
                    stream.finish_with(banner);
                }
                self.refusals.refused(Limit::MaxConnections, peer);
            }
            // Dropping the stream resets the connection.
            (Err(limit), _) => self.refusals.refused(limit, peer),
        }
        None
    }
}

impl<T: Clone + Unpin> Stream for Incoming<T> {
    type Item = Accepted<T>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Accepted<T>>> {
        let this = self.get_mut();
        this.poll_phase(cx);
        for _ in 0..MAX_REFUSED_PER_POLL {
            if matches!(this.phase, Phase::Closed) {
                this.listeners.clear();
                return Poll::Ready(None);
            }
            ready!(this.backoff.poll_ready(cx));
            let is_draining_backlog = matches!(this.phase, Phase::DrainingBacklog);
            if is_draining_backlog {
                this.drain_backlog(cx);
                if this.without_permit.is_empty() {
                    if this.listeners.is_empty() {
                        this.phase = Phase::Closed;
                    }
                    continue;
                }
            }
            let permit = match this.when_full {
                WhenFull::Wait => Some(ready!(this.permit_queue.poll_acquire(cx))),
                // Nothing waits for a permit: a client without one is told so.
                WhenFull::Close(_) => None,
            };
            // The rate does not delay the last clients, which a reset would hit soon.
            if !is_draining_backlog {
                ready!(this.poll_rate(cx));
            }
            let waiting = this.without_permit.pop_front().map(Ok);
            match waiting.or_else(|| this.poll_accept(cx)) {
                Some(Ok((stream, peer))) => {
                    this.backoff.accept_succeeded();
                    this.rate_checked = false;
                    if let Some(accepted) = this.admit(stream, peer, permit) {
                        return Poll::Ready(Some(accepted));
                    }
                }
                Some(Err(error)) => this.backoff.accept_failed(&error),
                None => return Poll::Pending,
            }
        }
        // More clients may wait. Connections that are served come first.
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::net::{SocketAddr, TcpStream};
    use std::sync::Arc;
    use std::time::Duration;

    use futures::StreamExt;
    use tokio::sync::Semaphore;
    use tokio::time::timeout;

    use super::*;
    use crate::lifecycle::Controller;
    use crate::listener::admission::AdmissionRules;
    use crate::listener::bind::BoundSockets;
    use crate::listener::settings::SocketSettings;
    use crate::net::ListenAddress;

    /// An accept loop on a free port, with room for one connection.
    fn accept_one_at_a_time(
        controller: &Controller,
        when_full: WhenFull,
        rules: AdmissionRules,
    ) -> (SocketAddr, Incoming<()>) {
        let address = "127.0.0.1:0".parse().unwrap();
        let bound = BoundSockets::new(&address, 1, &SocketSettings::default()).unwrap();
        let listening = bound.listen().unwrap();
        let ListenAddress::Ip(address) = listening.address else {
            panic!("{} is no IP address", listening.address);
        };
        let listeners = listening.by_shard(1).unwrap().remove(0);
        let limit = ConnectionLimit::new(Arc::new(Semaphore::new(10)), 1);
        let admission = Admission::new(rules);
        let lifecycle = controller.lifecycle();
        let incoming = Incoming::new(listeners, (), limit, when_full, admission, &lifecycle);
        (address, incoming.unwrap())
    }

    async fn waits(incoming: &mut Incoming<()>) -> bool {
        timeout(Duration::from_millis(50), incoming.next())
            .await
            .is_err()
    }

    #[tokio::test]
    async fn a_client_of_a_full_server_waits_for_a_permit() {
        let controller = Controller::default();
        let rules = AdmissionRules::default();
        let (address, mut incoming) = accept_one_at_a_time(&controller, WhenFull::Wait, rules);
        let first = TcpStream::connect(address).unwrap();
        let accepted = incoming.next().await.unwrap();
        assert_eq!(accepted.peer, first.local_addr().unwrap().into());
        let second = TcpStream::connect(address).unwrap();
        assert!(waits(&mut incoming).await);
        drop(accepted);
        let accepted = incoming.next().await.unwrap();
        assert_eq!(accepted.peer, second.local_addr().unwrap().into());
    }

    #[tokio::test]
    async fn a_client_of_a_full_server_is_sent_the_banner() {
        let controller = Controller::default();
        let when_full = WhenFull::Close(b"full".to_vec());
        let rules = AdmissionRules::default();
        let (address, mut incoming) = accept_one_at_a_time(&controller, when_full, rules);
        let _first = TcpStream::connect(address).unwrap();
        let _accepted = incoming.next().await.unwrap();
        let mut second = TcpStream::connect(address).unwrap();
        assert!(waits(&mut incoming).await);
        let mut banner = String::new();
        second.read_to_string(&mut banner).unwrap();
        assert_eq!(banner, "full");
    }

    #[tokio::test]
    async fn a_denied_client_is_reset() {
        let controller = Controller::default();
        let rules = AdmissionRules {
            deny: vec!["127.0.0.0/8".parse().unwrap()],
            ..AdmissionRules::default()
        };
        let (address, mut incoming) = accept_one_at_a_time(&controller, WhenFull::Wait, rules);
        let mut client = TcpStream::connect(address).unwrap();
        assert!(waits(&mut incoming).await);
        let error = client.read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    }

    #[tokio::test]
    async fn clients_in_the_backlog_are_accepted_before_the_drain_ends() {
        let controller = Controller::default();
        let rules = AdmissionRules::default();
        let (address, mut incoming) = accept_one_at_a_time(&controller, WhenFull::Wait, rules);
        let clients = [(); 2].map(|()| TcpStream::connect(address).unwrap());
        controller.drain();
        for client in &clients {
            let accepted = incoming.next().await.unwrap();
            assert_eq!(accepted.peer, client.local_addr().unwrap().into());
        }
        assert!(incoming.next().await.is_none());
        assert!(TcpStream::connect(address).is_err());
    }

    #[tokio::test]
    async fn sockets_with_a_new_owner_keep_their_backlog() {
        let controller = Controller::default();
        let rules = AdmissionRules::default();
        let (address, mut incoming) = accept_one_at_a_time(&controller, WhenFull::Wait, rules);
        let _client = TcpStream::connect(address).unwrap();
        controller.hand_over_in_process();
        assert!(incoming.next().await.is_none());
    }
}
