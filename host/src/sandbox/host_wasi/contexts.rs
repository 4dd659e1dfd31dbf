//! The WASI contexts of one connection, each made on its first use.
//!
//! All contexts together cost some microseconds to make, mostly for random seeds that few guests
//! use.

use wasmtime_wasi::WasiCtx;
use wasmtime_wasi::cli::WasiCliCtx;
use wasmtime_wasi::clocks::WasiClocksCtx;
use wasmtime_wasi::filesystem::WasiFilesystemCtx;
use wasmtime_wasi::random::WasiRandomCtx;
use wasmtime_wasi::sockets::WasiSocketsCtx;

use crate::sandbox::grants::Grants;
use crate::sandbox::host_network::outbound::Outbound;
use crate::sandbox::output::{GuestOutput, OutputLimit};
use crate::sandbox::transport::SharedTransport;

/// The WASI contexts of one connection.
pub(crate) struct WasiContexts {
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

impl WasiContexts {
    /// The contexts of the connection `id`. None of them is made yet.
    pub(crate) fn new(grants: &Grants, id: u64, output: OutputLimit) -> Self {
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

    /// Standard streams and environment. Standard input is at its end.
    pub(crate) fn cli(&mut self) -> &mut WasiCliCtx {
        let Self {
            id,
            grants,
            output,
            cli,
            ..
        } = self;
        cli.get_or_insert_with(|| {
            let mut context = WasiCtx::builder()
                .stdout(GuestOutput::new(*id, "stdout", output))
                .stderr(GuestOutput::new(*id, "stderr", output))
                .envs(grants.environment())
                .build();
            std::mem::take(context.cli())
        })
    }

    /// The clocks of the host.
    pub(crate) fn clocks(&mut self) -> &mut WasiClocksCtx {
        self.clocks.get_or_insert_default()
    }

    /// The granted directories.
    pub(crate) fn filesystem(&mut self) -> &mut WasiFilesystemCtx {
        let Self {
            grants, filesystem, ..
        } = self;
        filesystem.get_or_insert_with(|| grants.filesystem())
    }

    /// Random numbers.
    pub(crate) fn random(&mut self) -> &mut WasiRandomCtx {
        self.random.get_or_insert_with(|| {
            let mut context = WasiCtx::builder().max_random_size(MAX_RANDOM_BYTES).build();
            std::mem::take(context.random())
        })
    }

    /// The connections that the guest may make.
    pub(crate) fn outbound(&mut self, transport: &SharedTransport) -> &Outbound {
        let Self {
            grants, outbound, ..
        } = self;
        outbound.get_or_insert_with(|| Outbound::new(grants.destinations(), transport))
    }

    /// The sockets of the guest.
    pub(crate) fn sockets(&mut self, transport: &SharedTransport) -> &mut WasiSocketsCtx {
        let Self {
            grants,
            outbound,
            sockets,
            ..
        } = self;
        sockets.get_or_insert_with(|| {
            outbound
                .get_or_insert_with(|| Outbound::new(grants.destinations(), transport))
                .sockets()
        })
    }
}

/// The most random bytes in one call.
///
/// The host makes them in a moment.
const MAX_RANDOM_BYTES: u64 = 64 << 10;
