//! From serving, to draining, to the end: of the server, and of each version of a guest.

use tokio::sync::watch;

/// Where the server, or a version, is on its way to its end.
#[derive(Clone, Copy, Debug, PartialEq)]
struct LifecycleState {
    phase: Phase,
    /// Who accepts at the same sockets from now on, if anyone does.
    next: Option<TakenOverBy>,
}

/// Who goes on with the sockets.
#[derive(Clone, Copy, Debug, PartialEq)]
enum TakenOverBy {
    /// Another one here.
    Here,
    /// Another process.
    Process,
}

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
pub struct Controller(watch::Sender<LifecycleState>);

impl Default for Controller {
    fn default() -> Self {
        Self(watch::Sender::new(LifecycleState {
            phase: Phase::Serving,
            next: None,
        }))
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

    /// The same, and another process goes on with the listening sockets: nobody is to be refused. False
    /// when it is too late, because the server drains already.
    #[must_use]
    pub fn hand_over(&self) -> bool {
        self.leave_to(TakenOverBy::Process)
    }

    /// The same, and another one in this process goes on with the listening sockets.
    pub fn pass_on(&self) {
        // If it drains already, the other one goes on all the same.
        self.leave_to(TakenOverBy::Here);
    }

    fn leave_to(&self, next: TakenOverBy) -> bool {
        self.0.send_if_modified(|state| {
            let serves = state.phase < Phase::Draining;
            if serves {
                state.next = Some(next);
                state.phase = Phase::Draining;
            }
            serves
        })
    }

    /// Whether anybody looks at it.
    pub fn is_followed(&self) -> bool {
        self.0.receiver_count() > 0
    }

    /// The open connections end now.
    pub fn end(&self) {
        self.advance(Phase::Ended);
    }

    fn advance(&self, to: Phase) {
        self.0.send_if_modified(|state| {
            let forward = state.phase < to;
            if forward {
                state.phase = to;
            }
            forward
        });
    }
}

/// Tells whether the server is draining or has ended. A dropped [`Controller`] counts as the end.
#[derive(Clone, Debug)]
pub struct Lifecycle(watch::Receiver<LifecycleState>);

impl Lifecycle {
    /// Whether no new connections are taken any more.
    pub fn is_draining(&self) -> bool {
        self.0.borrow().phase >= Phase::Draining || self.0.has_changed().is_err()
    }

    /// Whether new connections are another version's, or nobody's.
    pub fn is_replaced(&self) -> bool {
        self.0.borrow().phase >= Phase::Replaced || self.0.has_changed().is_err()
    }

    /// Waits until new connections are another version's, or nobody's.
    pub async fn replaced(&self) {
        self.reached(Phase::Replaced).await;
    }

    /// Whether another process takes the new connections.
    pub fn is_handed_over(&self) -> bool {
        self.0.borrow().next == Some(TakenOverBy::Process)
    }

    /// Whether somebody else takes the new connections, in this process or another.
    pub fn is_passed_on(&self) -> bool {
        self.0.borrow().next.is_some()
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
        let _ = self.0.clone().wait_for(|state| state.phase >= goal).await;
    }
}
