//! The WASI contexts of one connection, each made when the guest first asks for something of it.
//!
//! A whole context costs some microseconds, mostly for random seeds that few guests ask for.

use wasmtime_wasi::WasiCtx;
use wasmtime_wasi::cli::{WasiCliCtx, WasiCliCtxView, WasiCliView};
use wasmtime_wasi::clocks::{WasiClocksCtx, WasiClocksCtxView, WasiClocksView};
use wasmtime_wasi::filesystem::{WasiFilesystemCtx, WasiFilesystemCtxView, WasiFilesystemView};
use wasmtime_wasi::random::{WasiRandomCtx, WasiRandomView};
use wasmtime_wasi::sockets::WasiSocketsCtx;

use super::host_network::Outbound;
use super::output::{GuestOutput, OutputLimit};
use super::{Grants, SharedTransport, StoreState};

/// What a guest has of WASI.
pub(super) struct Wasi {
    id: u64,
    grants: Grants,
    output: OutputLimit,
    cli: Option<WasiCliCtx>,
    clocks: Option<WasiClocksCtx>,
    filesystem: Option<WasiFilesystemCtx>,
    random: Option<WasiRandomCtx>,
    outbound: Option<Outbound>,
    sockets: Option<WasiSocketsCtx>,
}

impl Wasi {
    /// For the guest of connection `id`.
    pub(super) fn new(grants: &Grants, id: u64, output: OutputLimit) -> Self {
        Self {
            id,
            grants: grants.clone(),
            output,
            cli: None,
            clocks: None,
            filesystem: None,
            random: None,
            outbound: None,
            sockets: None,
        }
    }

    /// The network, and what `wasi:sockets` has of it.
    pub(super) fn network(
        &mut self,
        transport: &SharedTransport,
    ) -> (&Outbound, &mut Option<WasiSocketsCtx>) {
        let Self {
            grants,
            outbound,
            sockets,
            ..
        } = self;
        let outbound =
            outbound.get_or_insert_with(|| Outbound::new(grants.destinations(), transport.clone()));
        (outbound, sockets)
    }
}

/// Standard streams and environment. Standard input is at its end.
fn cli(grants: &Grants, id: u64, output: &OutputLimit) -> WasiCliCtx {
    let mut context = WasiCtx::builder()
        .stdout(GuestOutput::new(id, "stdout", output))
        .stderr(GuestOutput::new(id, "stderr", output))
        .envs(grants.environment())
        .build();
    std::mem::take(context.cli())
}

impl WasiCliView for StoreState {
    fn cli(&mut self) -> WasiCliCtxView<'_> {
        let Wasi {
            id,
            grants,
            output,
            cli,
            ..
        } = &mut self.wasi;
        WasiCliCtxView {
            ctx: cli.get_or_insert_with(|| self::cli(grants, *id, output)),
            table: &mut self.table,
        }
    }
}

impl WasiClocksView for StoreState {
    fn clocks(&mut self) -> WasiClocksCtxView<'_> {
        WasiClocksCtxView {
            ctx: self.wasi.clocks.get_or_insert_default(),
            table: &mut self.table,
        }
    }
}

impl WasiFilesystemView for StoreState {
    fn filesystem(&mut self) -> WasiFilesystemCtxView<'_> {
        let Wasi {
            grants, filesystem, ..
        } = &mut self.wasi;
        WasiFilesystemCtxView {
            ctx: filesystem.get_or_insert_with(|| grants.filesystem()),
            table: &mut self.table,
        }
    }
}

/// Randomness that a guest may ask for in one call, in bytes: no more than takes the host a moment.
const MAX_RANDOM_BYTES: u64 = 64 << 10;

fn random() -> WasiRandomCtx {
    let mut context = WasiCtx::builder().max_random_size(MAX_RANDOM_BYTES).build();
    std::mem::take(context.random())
}

impl WasiRandomView for StoreState {
    fn random(&mut self) -> &mut WasiRandomCtx {
        self.wasi.random.get_or_insert_with(random)
    }
}
