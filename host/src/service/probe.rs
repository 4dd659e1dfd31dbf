//! What a guest is asked before it is served.

use std::future::poll_fn;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use futures::future::BoxFuture;

use crate::limit::Limit;
use crate::net::TransportAddress;
use crate::sandbox::Transport;

/// A question, and how the answer begins.
#[derive(Clone, Debug)]
pub struct Probe {
    /// What the guest receives.
    pub send: Vec<u8>,
    /// What it sends first.
    pub expect: Vec<u8>,
    /// How long it may take for that.
    pub timeout: Duration,
}

impl Probe {
    /// No question and any answer.
    pub(super) const NOTHING: Self = Self {
        send: Vec::new(),
        expect: Vec::new(),
        timeout: Duration::ZERO,
    };
}

/// The connection from the host itself that a probe is sent on.
pub(super) struct ProbeTransport {
    question: Vec<u8>,
    /// What of the question was received.
    received: usize,
    expected: Vec<u8>,
    /// What was answered, as far as it is of interest.
    answer: Vec<u8>,
    waker: Option<Waker>,
}

impl ProbeTransport {
    pub(super) fn transport(probe: &Probe) -> Arc<Mutex<Self>> {
        Arc::new(Mutex::new(Self {
            question: probe.send.clone(),
            received: 0,
            expected: probe.expect.clone(),
            answer: Vec::new(),
            waker: None,
        }))
    }

    fn lock(asked: &Mutex<Self>) -> MutexGuard<'_, Self> {
        asked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for as much of an answer as is expected.
    pub(super) async fn answered(asked: Arc<Mutex<Self>>) {
        poll_fn(|cx| {
            let mut asked = Self::lock(&asked);
            if asked.is_answered() {
                return Poll::Ready(());
            }
            asked.waker = Some(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }

    fn is_answered(&self) -> bool {
        let n = self.answer.len().min(self.expected.len());
        n == self.expected.len() || self.answer[..n] != self.expected[..n]
    }

    /// Whether the answer begins as expected, or how it begins.
    pub(super) fn verdict(asked: &Mutex<Self>) -> Result<(), String> {
        let asked = Self::lock(asked);
        if asked.answer.starts_with(&asked.expected) {
            return Ok(());
        }
        Err(format!(
            "it answered the probe with \"{}\" where \"{}\" is expected",
            asked.answer.escape_ascii(),
            asked.expected.escape_ascii()
        ))
    }
}

impl Transport for ProbeTransport {
    /// No connection has it: those of clients begin at 1.
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
        let left = &self.question[self.received..];
        if left.is_empty() {
            // Whoever asked waits for the answer, and closes nothing before.
            return Poll::Pending;
        }
        let n = left.len().min(buf.len());
        buf[..n].copy_from_slice(&left[..n]);
        self.received += n;
        Poll::Ready(Ok(n))
    }

    fn poll_receivable(&mut self, _: &mut Context<'_>) -> Poll<()> {
        match self.received < self.question.len() {
            true => Poll::Ready(()),
            false => Poll::Pending,
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
