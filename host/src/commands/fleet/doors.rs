//! Who accepts clients at the addresses of a service.

use std::sync::Arc;

use wasinetd::Error;
use wasinetd::lifecycle::Controller;
use wasinetd::listener::{
    Admission, AdmissionRules, ConnectionLimit, Incoming, ListeningSockets, MergeHandle, WhenFull,
};
use wasinetd::net::ListenAddress;
use wasinetd::service::SniRoute;

use super::{ShardGroup, SharedResources};
use crate::cli::{Dispatch, ServiceArgs};

/// An address that a service listens at.
pub(super) struct Endpoint {
    /// As it was asked for.
    pub(super) asked: ListenAddress,
    pub(super) listening: Arc<ListeningSockets>,
    /// Of whoever accepts there for the service.
    pub(super) controller: Arc<Controller>,
}

/// An address where all is ready for clients to be accepted.
pub(super) struct PreparedEndpoint {
    port: Endpoint,
    shards: Vec<Shard>,
}

struct Shard {
    joining: MergeHandle<Incoming<Arc<SniRoute>>>,
    incoming: Incoming<Arc<SniRoute>>,
}

/// How clients of a service are accepted.
#[derive(Clone)]
pub(super) struct AcceptPolicy {
    dispatch: Dispatch,
    places: ConnectionLimit,
    when_full: WhenFull,
    admission: Admission,
}

impl AcceptPolicy {
    /// For a service that has no clients yet.
    pub(super) fn new(shared: &SharedResources, args: &ServiceArgs) -> Self {
        Self {
            dispatch: args.dispatch,
            places: ConnectionLimit::new(shared.places.clone(), shared.most(args)),
            when_full: when_full(args),
            admission: Admission::new(rules(shared, args)),
        }
    }

    /// For a service that has clients: they count as they did. How many places there are is for
    /// [`Self::resize`] to say.
    pub(super) fn with(&self, shared: &SharedResources, args: &ServiceArgs) -> Self {
        Self {
            dispatch: args.dispatch,
            places: self.places.clone(),
            when_full: when_full(args),
            admission: self.admission.with(rules(shared, args)),
        }
    }

    /// From now on there are as many places as the arguments say.
    pub(super) fn resize(&self, shared: &SharedResources, args: &ServiceArgs) {
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

fn rules(shared: &SharedResources, args: &ServiceArgs) -> AdmissionRules {
    AdmissionRules {
        proxies: args.front.proxy_from.clone(),
        ..args.admission.rules(shared.most(args))
    }
}

impl PreparedEndpoint {
    /// For the clients at an address, of which nobody is accepted yet.
    ///
    /// # Errors
    ///
    /// [`Error::Internal`] when the process has no more files.
    pub(super) fn new(
        threads: &[ShardGroup],
        accepting: &AcceptPolicy,
        route: &Arc<SniRoute>,
        asked: ListenAddress,
        listening: Arc<ListeningSockets>,
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
        let port = Endpoint {
            asked,
            listening,
            controller,
        };
        Ok(Self { port, shards })
    }

    /// Where it is.
    pub(super) fn address(&self) -> &ListenAddress {
        &self.port.listening.address
    }

    /// Whether these sockets are those behind it.
    pub(super) fn is_of(&self, listening: &Arc<ListeningSockets>) -> bool {
        Arc::ptr_eq(&self.port.listening, listening)
    }

    /// Clients are accepted from now on.
    pub(super) fn open(self) -> Endpoint {
        for Shard { joining, incoming } in self.shards {
            joining.add(incoming);
        }
        self.port
    }
}
