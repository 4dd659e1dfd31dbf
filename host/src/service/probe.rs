//! The probe: a request that a new version has to answer before clients reach it.

use std::future::poll_fn;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use futures::future::BoxFuture;

use crate::limit::Limit;
use crate::net::TransportAddress;
use crate::sandbox::Transport;
use crate::sync::lock;

/// A request, and the start of the expected answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Probe {
    /// Bytes that the guest receives.
    pub send: Vec<u8>,
    /// First bytes of the guest's answer.
    pub expect: Vec<u8>,
    /// Longest time until those bytes have arrived.
    pub timeout: Duration,
}

impl Probe {
    /// No request, and any answer.
    pub(super) const NOTHING: Self = Self {
        send: Vec::new(),
        expect: Vec::new(),
        timeout: Duration::ZERO,
    };
}

/// A connection from the host itself that carries a probe.
pub(super) struct ProbeTransport {
    request: Vec<u8>,
    /// Bytes of the request that the guest has received.
    received: usize,
    expected: Vec<u8>,
    /// Start of the answer, at most as long as `expected`.
    answer: Vec<u8>,
    waker: Option<Waker>,
}

impl ProbeTransport {
    pub(super) fn new(probe: &Probe) -> Arc<Mutex<Self>> {
        Arc::new(Mutex::new(Self {
            request: probe.send.clone(),
            received: 0,
            expected: probe.expect.clone(),
            answer: Vec::new(),
            waker: None,
        }))
    }

    /// Waits until the answer is complete or differs from the expected one.
    pub(super) async fn answered(transport: Arc<Mutex<Self>>) {
        poll_fn(|cx| {
            let mut transport = lock(&transport);
            if transport.is_answered() {
                return Poll::Ready(());
            }
            transport.waker = Some(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }

    fn is_answered(&self) -> bool {
        let n = self.answer.len().min(self.expected.len());
        n == self.expected.len() || self.answer[..n] != self.expected[..n]
    }

    /// Whether the answer starts as expected. The error says how it starts instead.
    pub(super) fn verdict(transport: &Mutex<Self>) -> Result<(), String> {
        let transport = lock(transport);
        if transport.answer.starts_with(&transport.expected) {
            return Ok(());
        }
        Err(format!(
            "the guest answered the probe with \"{}\" instead of \"{}\"",
            transport.answer.escape_ascii(),
            transport.expected.escape_ascii()
        ))
    }
}

impl Transport for ProbeTransport {
    /// No client has this number: those of connections start at 1.
    fn id(&self) -> u64 {
        0
    }

    fn remote_address(&self) -> TransportAddress {
        SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into()
    }

    fn local_address(&self) -> io::Result<TransportAddress> {
        Ok(self.remote_address())
    }

    fn poll_receive(&mut self, _: &mut Context<'_>, buf: &mut [u8]) -> Poll<io::Result<usize>> {
        let rest = &self.request[self.received..];
        if rest.is_empty() {
            // The host closes nothing before the answer.
            return Poll::Pending;
        }
        let n = rest.len().min(buf.len());
        buf[..n].copy_from_slice(&rest[..n]);
        self.received += n;
        Poll::Ready(Ok(n))
    }

    fn poll_receivable(&mut self, _: &mut Context<'_>) -> Poll<()> {
        if self.received < self.request.len() {
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    }

    fn poll_send(&mut self, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let room = self.expected.len() - self.answer.len();
        self.answer.extend(&bytes[..room.min(bytes.len())]);
        if self.is_answered()
            && let Some(waker) = self.waker.take()
        {
            waker.wake();
        }
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_sendable(&mut self, _: &mut Context<'_>) -> Poll<()> {
        Poll::Ready(())
    }

    fn close_sending(&mut self) {}

    fn limit_hit(&mut self, _: Limit) {}

    fn release(&mut self) {}

    fn is_draining(&self) -> bool {
        false
    }

    fn draining(&self) -> BoxFuture<'static, ()> {
        Box::pin(std::future::pending())
    }

    fn is_replaced(&self) -> bool {
        false
    }

    fn replaced(&self) -> BoxFuture<'static, ()> {
        Box::pin(std::future::pending())
    }
}
