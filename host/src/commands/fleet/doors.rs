//! Who accepts clients at the addresses of a service.

use std::sync::Arc;

use wasinetd::Error;
use wasinetd::lifecycle::Controller;
use wasinetd::listener::{
    Address, Admission, Incoming, Joining, Listening, Places, Rules, WhenFull,
};
use wasinetd::service::Route;

use super::{Shared, Threads};
use crate::cli::{Dispatch, ServiceArgs};

/// An address that a service listens at.
pub(super) struct Port {
    /// As it was asked for.
    pub(super) asked: Address,
    pub(super) listening: Arc<Listening>,
    /// Of whoever accepts there for the service.
    pub(super) controller: Arc<Controller>,
}

/// An address where all is ready for clients to be accepted.
pub(super) struct Door {
    port: Port,
    shards: Vec<Shard>,
}

struct Shard {
    joining: Joining<Incoming<Arc<Route>>>,
    incoming: Incoming<Arc<Route>>,
}

/// How clients of a service are accepted.
#[derive(Clone)]
pub(super) struct Accepting {
    dispatch: Dispatch,
    places: Places,
    when_full: WhenFull,
    admission: Admission,
}

impl Accepting {
    /// For a service that has no clients yet.
    pub(super) fn new(shared: &Shared, args: &ServiceArgs) -> Self {
        Self {
            dispatch: args.dispatch,
            places: Places::new(shared.places.clone(), shared.most(args)),
            when_full: when_full(args),
            admission: Admission::new(rules(shared, args)),
        }
    }

    /// For a service that has clients: they count as they did. How many places there are is for
    /// [`Self::resize`] to say.
    pub(super) fn with(&self, shared: &Shared, args: &ServiceArgs) -> Self {
        Self {
            dispatch: args.dispatch,
            places: self.places.clone(),
            when_full: when_full(args),
            admission: self.admission.with(rules(shared, args)),
        }
    }

    /// From now on there are as many places as the arguments say.
    pub(super) fn resize(&self, shared: &Shared, args: &ServiceArgs) {
        self.places.resize(shared.most(args));
    }
}

/// What becomes of clients when there is no place. Those who speak TLS are told nothing: they have no use
/// for text.
fn when_full(args: &ServiceArgs) -> WhenFull {
    match args.admission.when_full() {
        WhenFull::Close(_) if args.front.speaks_tls() => WhenFull::Close(Vec::new()),
        other => other,
    }
}

fn rules(shared: &Shared, args: &ServiceArgs) -> Rules {
    Rules {
        proxies: args.front.proxy_from.clone(),
        ..args.admission.rules(shared.most(args))
    }
}

impl Door {
    /// For the clients at an address, of which nobody is accepted yet.
    ///
    /// # Errors
    ///
    /// [`Error::Internal`] when the process has no more files.
    pub(super) fn new(
        threads: &[Threads],
        accepting: &Accepting,
        route: &Arc<Route>,
        asked: Address,
        listening: Arc<Listening>,
    ) -> Result<Self, Error> {
        let controller = Arc::new(Controller::default());
        let mut shards = Vec::new();
        for threads in threads {
            if threads.dispatch != accepting.dispatch {
                continue;
            }
            let by_shard = listening.by_shard(threads.handles.len())?;
            let each = threads.handles.iter().zip(&threads.joining);
            for ((handle, joining), listeners) in each.zip(by_shard) {
                let _context = handle.enter();
                shards.push(Shard {
                    joining: joining.clone(),
                    incoming: Incoming::new(
                        listeners,
                        route.clone(),
                        accepting.places.clone(),
                        accepting.when_full.clone(),
                        accepting.admission.clone(),
                        &controller.lifecycle(),
                    )?,
                });
            }
        }
        let port = Port {
            asked,
            listening,
            controller,
        };
        Ok(Self { port, shards })
    }

    /// Where it is.
    pub(super) fn address(&self) -> &Address {
        &self.port.listening.address
    }

    /// Whether these sockets are those behind it.
    pub(super) fn is_of(&self, listening: &Arc<Listening>) -> bool {
        Arc::ptr_eq(&self.port.listening, listening)
    }

    /// Clients are accepted from now on.
    pub(super) fn open(self) -> Port {
        for Shard { joining, incoming } in self.shards {
            joining.add(incoming);
        }
        self.port
    }
}
