//! Phases of a server, or of one version of a guest: serving, replaced, draining, ended.

use tokio::sync::watch;

#[derive(Clone, Copy, Debug, PartialEq)]
struct State {
    phase: Phase,
    /// Takes over the listening sockets. None if they are closed.
    new_owner: Option<NewOwner>,
}

/// New owner of the listening sockets.
#[derive(Clone, Copy, Debug, PartialEq)]
enum NewOwner {
    /// Another accept loop in this process.
    ThisProcess,
    /// The process that replaces this one.
    OtherProcess,
}

/// Phases in their order. A state never returns to an earlier phase.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
enum Phase {
    Serving,
    Replaced,
    Draining,
    Ended,
}

/// Moves a server or a version to its next phase.
///
/// Every [`Lifecycle`] of it sees the change.
#[derive(Debug)]
pub struct Controller(watch::Sender<State>);

impl Default for Controller {
    fn default() -> Self {
        Self(watch::Sender::new(State {
            phase: Phase::Serving,
            new_owner: None,
        }))
    }
}

impl Controller {
    /// A view of the current phase.
    pub fn lifecycle(&self) -> Lifecycle {
        Lifecycle(self.0.subscribe())
    }

    /// Marks a version as replaced: a newer one gets the new connections. Open ones go on.
    pub fn replace(&self) {
        self.advance(Phase::Replaced);
    }

    /// Starts draining: no new connections, and the open ones may finish.
    pub fn drain(&self) {
        self.advance(Phase::Draining);
    }

    /// Starts draining, and leaves the listening sockets to another process.
    ///
    /// No client is refused. Returns false if it is too late, because draining has begun already.
    #[must_use]
    pub fn hand_over_to_process(&self) -> bool {
        self.drain_with_new_owner(NewOwner::OtherProcess)
    }

    /// Starts draining, and leaves the listening sockets to this process.
    ///
    /// Another accept loop takes them over, so no client is refused.
    pub fn hand_over_in_process(&self) {
        // If draining has begun already, the other loop accepts all the same.
        self.drain_with_new_owner(NewOwner::ThisProcess);
    }

    fn drain_with_new_owner(&self, new_owner: NewOwner) -> bool {
        self.0.send_if_modified(|state| {
            let accepting = state.phase < Phase::Draining;
            if accepting {
                state.new_owner = Some(new_owner);
                state.phase = Phase::Draining;
            }
            accepting
        })
    }

    /// Whether any [`Lifecycle`] of this controller exists.
    pub fn is_observed(&self) -> bool {
        self.0.receiver_count() > 0
    }

    /// Ends the open connections.
    pub fn end(&self) {
        self.advance(Phase::Ended);
    }

    fn advance(&self, to: Phase) {
        self.0.send_if_modified(|state| {
            let is_later = state.phase < to;
            if is_later {
                state.phase = to;
            }
            is_later
        });
    }
}

/// View of the phase of a server or a version. A dropped [`Controller`] counts as the end.
#[derive(Clone, Debug)]
pub struct Lifecycle(watch::Receiver<State>);

impl Lifecycle {
    /// Whether draining has begun: new connections are no longer accepted.
    pub fn is_draining(&self) -> bool {
        self.has_reached(Phase::Draining)
    }

    /// Whether new connections go to another version, or to none.
    pub fn is_replaced(&self) -> bool {
        self.has_reached(Phase::Replaced)
    }

    fn has_reached(&self, phase: Phase) -> bool {
        self.0.borrow().phase >= phase || self.0.has_changed().is_err()
    }

    /// Waits until new connections go to another version, or to none.
    pub async fn replaced(&self) {
        self.wait_for(Phase::Replaced).await;
    }

    /// Whether another process accepts the new connections.
    pub fn is_handed_over_to_process(&self) -> bool {
        self.0.borrow().new_owner == Some(NewOwner::OtherProcess)
    }

    /// Whether this or another process takes over the listening sockets.
    pub fn has_new_owner(&self) -> bool {
        self.0.borrow().new_owner.is_some()
    }

    /// Waits until draining begins.
    pub async fn draining(&self) {
        self.wait_for(Phase::Draining).await;
    }

    /// Waits until open connections must end.
    pub async fn ended(&self) {
        self.wait_for(Phase::Ended).await;
    }

    async fn wait_for(&self, phase: Phase) {
        // Fails if the controller is dropped, which counts as the end.
        let _ = self.0.clone().wait_for(|state| state.phase >= phase).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_phase_never_goes_back() {
        let controller = Controller::default();
        let lifecycle = controller.lifecycle();
        controller.drain();
        controller.replace();
        assert!(lifecycle.is_draining() && lifecycle.is_replaced());
    }

    #[test]
    fn sockets_are_handed_over_before_draining_or_not_at_all() {
        let controller = Controller::default();
        let lifecycle = controller.lifecycle();
        assert!(controller.hand_over_to_process());
        assert!(lifecycle.is_draining() && lifecycle.is_handed_over_to_process());
        let draining = Controller::default();
        let lifecycle = draining.lifecycle();
        draining.drain();
        assert!(!draining.hand_over_to_process());
        assert!(!lifecycle.has_new_owner());
    }

    #[test]
    fn a_dropped_controller_counts_as_the_end() {
        let controller = Controller::default();
        let lifecycle = controller.lifecycle();
        assert!(controller.is_observed() && !lifecycle.is_replaced());
        drop(controller);
        assert!(lifecycle.is_draining());
        futures::executor::block_on(lifecycle.ended());
    }
}
