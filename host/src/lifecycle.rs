//! From serving, to draining, to the end: of the server, and of each version of a guest.

use tokio::sync::watch;

/// How far the server, or a version, has come on its way to its end. It never goes back.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
enum Phase {
    Serving,
    Replaced,
    Draining,
    Ended,
}

/// Moves the server, or a version, on, for all who hold a [`Lifecycle`] of it.
#[derive(Debug)]
pub struct Controller(watch::Sender<Phase>);

impl Default for Controller {
    fn default() -> Self {
        Self(watch::Sender::new(Phase::Serving))
    }
}

impl Controller {
    /// A view of the phase, for those that have to act on it.
    pub fn lifecycle(&self) -> Lifecycle {
        Lifecycle(self.0.subscribe())
    }

    /// New connections are another version's; the open ones may finish, in their own time.
    pub fn replace(&self) {
        self.advance(Phase::Replaced);
    }

    /// No new connections; the open ones may finish.
    pub fn drain(&self) {
        self.advance(Phase::Draining);
    }

    /// The open connections end now.
    pub fn end(&self) {
        self.advance(Phase::Ended);
    }

    fn advance(&self, to: Phase) {
        self.0.send_if_modified(|phase| {
            let forward = *phase < to;
            if forward {
                *phase = to;
            }
            forward
        });
    }
}

/// Tells whether the server is draining or has ended. A dropped [`Controller`] counts as the end.
#[derive(Clone, Debug)]
pub struct Lifecycle(watch::Receiver<Phase>);

impl Lifecycle {
    /// Whether no new connections are taken any more.
    pub fn is_draining(&self) -> bool {
        *self.0.borrow() >= Phase::Draining || self.0.has_changed().is_err()
    }

    /// Whether new connections are another version's, or nobody's.
    pub fn is_replaced(&self) -> bool {
        *self.0.borrow() >= Phase::Replaced || self.0.has_changed().is_err()
    }

    /// Waits until new connections are another version's, or nobody's.
    pub async fn replaced(&self) {
        self.reached(Phase::Replaced).await;
    }

    /// Waits until no new connections are to be taken.
    pub async fn draining(&self) {
        self.reached(Phase::Draining).await;
    }

    /// Waits until open connections are to end.
    pub async fn ended(&self) {
        self.reached(Phase::Ended).await;
    }

    async fn reached(&self, goal: Phase) {
        // The error says that the controller is gone, which is the end as well.
        let _ = self.0.clone().wait_for(|phase| *phase >= goal).await;
    }
}
