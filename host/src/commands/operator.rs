//! Does what operators and signals say while the server serves.

use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;

use bytes::Bytes;
use futures::{Stream, StreamExt};
use tokio::sync::{mpsc, oneshot};
use tracing::{info, warn};
use wasinetd::admin::{Admin, Obeyed};
use wasinetd::connection::tls::Tls;
use wasinetd::lifecycle::Controller;
use wasinetd::service::Service;

use super::read;
use super::successor::Handover;
use super::supervisor::Supervisor;

/// What it is done with.
pub(super) struct Operator<'a> {
    pub(super) supervisor: &'a Supervisor,
    pub(super) service: &'a Arc<Service>,
    pub(super) guest: &'a Path,
    pub(super) tls: Option<&'a Arc<Tls>>,
    pub(super) controller: &'a Controller,
    pub(super) admin: Option<&'a Admin>,
    pub(super) drain: mpsc::Sender<()>,
}

impl Operator<'_> {
    /// Swaps to what the guest's file has, at each item, and to what those of TLS have, until the server
    /// drains.
    pub(super) async fn reload(&self, reloads: impl Stream<Item = ()>) {
        let reloading = async {
            let mut reloads = pin!(reloads);
            while let Some(()) = reloads.next().await {
                self.supervisor.reloading();
                self.read_certificates().await;
                self.read_and_swap().await;
                self.supervisor.ready();
            }
        };
        let lifecycle = self.controller.lifecycle();
        tokio::select! {
            biased;
            () = lifecycle.draining() => {}
            () = reloading => {}
        }
    }

    async fn read_and_swap(&self) {
        let file: PathBuf = self.guest.into();
        // A file system may take its time.
        let component = tokio::task::spawn_blocking(move || read(&file)).await;
        match component {
            // Whether it is swapped, and why not, is logged there.
            Ok(Ok(component)) => {
                let _ = self.service.clone().swap(Bytes::from(component)).await;
            }
            Ok(Err(error)) => warn!(%error, "nothing has changed"),
            Err(error) => warn!(%error, "reading the guest's file failed"),
        }
    }

    /// Reads the files of TLS again at each item.
    pub(super) async fn renew(&self, changes: impl Stream<Item = ()>) {
        let mut changes = pin!(changes);
        while let Some(()) = changes.next().await {
            self.read_certificates().await;
        }
    }

    async fn read_certificates(&self) {
        let Some(tls) = self.tls.cloned() else {
            return;
        };
        match tokio::task::spawn_blocking(move || tls.reload()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => warn!(%error, "TLS is spoken as before"),
            Err(error) => warn!(%error, "reading the files of TLS failed"),
        }
    }

    /// Hands over to a new process at an item, and says what came of it, until the server drains: the
    /// sockets are not to be kept open then, and a new process that is on its way is of no use.
    pub(super) async fn restart(
        &self,
        restarts: impl Stream<Item = Option<oneshot::Sender<Obeyed>>>,
        handover: Handover,
    ) {
        let lifecycle = self.controller.lifecycle();
        let mut restarts = pin!(restarts);
        loop {
            let done = tokio::select! {
                biased;
                () = lifecycle.draining() => return,
                Some(done) = restarts.next() => done,
            };
            let outcome = tokio::select! {
                biased;
                () = lifecycle.draining() => Err("the server drains".into()),
                outcome = self.hand_over(&handover) => outcome,
            };
            match &outcome {
                Ok(pid) => info!(pid, "a new process has taken over"),
                Err(error) => warn!(%error, "no new process has taken over"),
            }
            if let Some(done) = done {
                // Whoever asked may have gone.
                let _ = done.send(outcome);
            }
        }
    }

    async fn hand_over(&self, handover: &Handover) -> Obeyed {
        let successor = handover.start(&self.service.component()).await?;
        if !self.controller.hand_over() {
            return Err("the server drains".into());
        }
        let pid = successor.pid();
        successor.takes_over();
        self.supervisor.succeeded_by(pid);
        if let Some(admin) = self.admin {
            admin.hand_over();
        }
        // One that is on its way already is as good.
        let _ = self.drain.try_send(());
        Ok(pid)
    }

    /// Waits until another process has taken over.
    pub(super) async fn handed_over(&self) {
        let lifecycle = self.controller.lifecycle();
        lifecycle.draining().await;
        if !lifecycle.is_handed_over() {
            std::future::pending().await
        }
    }

    /// Says so to the service manager when the server drains. With a successor it does not stop.
    pub(super) async fn say_that_it_stops(&self) {
        let lifecycle = self.controller.lifecycle();
        lifecycle.draining().await;
        if !lifecycle.is_handed_over() {
            self.supervisor.stopping();
        }
    }
}
