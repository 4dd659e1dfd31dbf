//! The WASI contexts of one connection, each made when the guest first asks for something of it.
//!
//! A whole context costs some microseconds, mostly for random seeds that few guests ask for.

use wasmtime_wasi::WasiCtx;
use wasmtime_wasi::cli::{WasiCliCtx, WasiCliCtxView, WasiCliView};
use wasmtime_wasi::clocks::{WasiClocksCtx, WasiClocksCtxView, WasiClocksView};
use wasmtime_wasi::filesystem::{WasiFilesystemCtx, WasiFilesystemCtxView, WasiFilesystemView};
use wasmtime_wasi::random::{WasiRandomCtx, WasiRandomView};

use super::output::GuestOutput;
use super::{Grants, State};

/// What a guest has of WASI.
pub(super) struct Wasi {
    id: u64,
    grants: Grants,
    cli: Option<WasiCliCtx>,
    clocks: Option<WasiClocksCtx>,
    filesystem: Option<WasiFilesystemCtx>,
    random: Option<WasiRandomCtx>,
}

impl Wasi {
    /// For the guest of connection `id`.
    pub(super) fn new(grants: &Grants, id: u64) -> Self {
        Self {
            id,
            grants: grants.clone(),
            cli: None,
            clocks: None,
            filesystem: None,
            random: None,
        }
    }
}

/// Standard streams and environment. Standard input is at its end.
fn cli(grants: &Grants, id: u64) -> WasiCliCtx {
    let mut context = WasiCtx::builder()
        .stdout(GuestOutput::new(id, "stdout"))
        .stderr(GuestOutput::new(id, "stderr"))
        .envs(grants.environment())
        .build();
    std::mem::take(context.cli())
}

impl WasiCliView for State {
    fn cli(&mut self) -> WasiCliCtxView<'_> {
        let Wasi {
            id, grants, cli, ..
        } = &mut self.wasi;
        WasiCliCtxView {
            ctx: cli.get_or_insert_with(|| self::cli(grants, *id)),
            table: &mut self.table,
        }
    }
}

impl WasiClocksView for State {
    fn clocks(&mut self) -> WasiClocksCtxView<'_> {
        WasiClocksCtxView {
            ctx: self.wasi.clocks.get_or_insert_default(),
            table: &mut self.table,
        }
    }
}

impl WasiFilesystemView for State {
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

impl WasiRandomView for State {
    fn random(&mut self) -> &mut WasiRandomCtx {
        self.wasi.random.get_or_insert_default()
    }
}
