//! WASI 0.2 and 0.3 for guests.
//!
//! Standard streams, environment, clocks, granted directories and random numbers.
//! wasmtime-wasi implements the interfaces. This module links them to the contexts of a store.

pub(super) mod contexts;

use wasmtime::component::{HasData, Linker, ResourceTable};
use wasmtime_wasi::cli::{WasiCli, WasiCliCtxView, WasiCliView};
use wasmtime_wasi::clocks::{WasiClocks, WasiClocksCtxView, WasiClocksView};
use wasmtime_wasi::filesystem::{WasiFilesystem, WasiFilesystemCtxView, WasiFilesystemView};
use wasmtime_wasi::random::{WasiRandom, WasiRandomCtx, WasiRandomView};
use wasmtime_wasi::{p2, p3};

use super::store::StoreState;

/// Adds `wasi:cli`, `wasi:clocks`, `wasi:filesystem`, `wasi:io` and `wasi:random` to `linker`.
pub(super) fn add_to_linker(linker: &mut Linker<StoreState>) -> wasmtime::Result<()> {
    add_p2_to_linker(linker)?;
    p3::cli::add_to_linker(linker)?;
    p3::clocks::add_to_linker(linker)?;
    p3::filesystem::add_to_linker(linker)?;
    p3::random::add_to_linker(linker)
}

fn add_p2_to_linker(linker: &mut Linker<StoreState>) -> wasmtime::Result<()> {
    use p2::bindings::{cli, clocks, filesystem, io, random};

    io::error::add_to_linker::<StoreState, Table>(linker, |state| &mut state.table)?;
    io::poll::add_to_linker::<StoreState, Table>(linker, |state| &mut state.table)?;
    io::streams::add_to_linker::<StoreState, Table>(linker, |state| &mut state.table)?;
    cli::environment::add_to_linker::<StoreState, WasiCli>(linker, StoreState::cli)?;
    cli::exit::add_to_linker::<StoreState, WasiCli>(linker, StoreState::cli)?;
    cli::stdin::add_to_linker::<StoreState, WasiCli>(linker, StoreState::cli)?;
    cli::stdout::add_to_linker::<StoreState, WasiCli>(linker, StoreState::cli)?;
    cli::stderr::add_to_linker::<StoreState, WasiCli>(linker, StoreState::cli)?;
    cli::terminal_input::add_to_linker::<StoreState, WasiCli>(linker, StoreState::cli)?;
    cli::terminal_output::add_to_linker::<StoreState, WasiCli>(linker, StoreState::cli)?;
    cli::terminal_stdin::add_to_linker::<StoreState, WasiCli>(linker, StoreState::cli)?;
    cli::terminal_stdout::add_to_linker::<StoreState, WasiCli>(linker, StoreState::cli)?;
    cli::terminal_stderr::add_to_linker::<StoreState, WasiCli>(linker, StoreState::cli)?;
    clocks::monotonic_clock::add_to_linker::<StoreState, WasiClocks>(linker, StoreState::clocks)?;
    clocks::wall_clock::add_to_linker::<StoreState, WasiClocks>(linker, StoreState::clocks)?;
    filesystem::types::add_to_linker::<StoreState, WasiFilesystem>(linker, StoreState::filesystem)?;
    filesystem::preopens::add_to_linker::<StoreState, WasiFilesystem>(
        linker,
        StoreState::filesystem,
    )?;
    random::random::add_to_linker::<StoreState, WasiRandom>(linker, StoreState::random)?;
    random::insecure::add_to_linker::<StoreState, WasiRandom>(linker, StoreState::random)?;
    random::insecure_seed::add_to_linker::<StoreState, WasiRandom>(linker, StoreState::random)?;
    Ok(())
}

/// Gives `wasi:io` access to the resource table of a store.
struct Table;

impl HasData for Table {
    type Data<'a> = &'a mut ResourceTable;
}

impl WasiCliView for StoreState {
    fn cli(&mut self) -> WasiCliCtxView<'_> {
        WasiCliCtxView {
            ctx: self.wasi.cli(),
            table: &mut self.table,
        }
    }
}

impl WasiClocksView for StoreState {
    fn clocks(&mut self) -> WasiClocksCtxView<'_> {
        WasiClocksCtxView {
            ctx: self.wasi.clocks(),
            table: &mut self.table,
        }
    }
}

impl WasiFilesystemView for StoreState {
    fn filesystem(&mut self) -> WasiFilesystemCtxView<'_> {
        WasiFilesystemCtxView {
            ctx: self.wasi.filesystem(),
            table: &mut self.table,
        }
    }
}

impl WasiRandomView for StoreState {
    fn random(&mut self) -> &mut WasiRandomCtx {
        self.wasi.random()
    }
}
