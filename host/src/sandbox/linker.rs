//! The interfaces that guests may import.

use wasmtime::component::Linker;

use super::store::StoreState;
use super::{host_network, host_tcp, host_wasi};

/// Links the imports of the world `wasinetd:tcp/connection-handler`, and `wasi:sockets`.
///
/// A guest that imports anything else is refused when it is loaded, as is a guest that imports
/// `wasi:sockets` and may connect nowhere.
pub(super) fn linker(engine: &wasmtime::Engine) -> wasmtime::Result<Linker<StoreState>> {
    let mut linker = Linker::new(engine);
    host_tcp::add_to_linker(&mut linker)?;
    host_wasi::add_to_linker(&mut linker)?;
    host_network::add_to_linker(&mut linker)?;
    Ok(linker)
}
