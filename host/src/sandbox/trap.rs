//! Traps of a guest, in words for the log.

use wasmtime::WasmBacktrace;
use wasmtime_wasi::I32Exit;

use super::output::printable;

/// Why and where a guest was stopped.
#[derive(Debug, PartialEq)]
pub struct Trap {
    /// The reason, in one line.
    pub reason: String,
    /// The guest's functions on the stack, innermost first.
    ///
    /// Each has its file and line if the guest has debug information.
    pub backtrace: Vec<String>,
}

/// Describes the error that ended a call of a guest.
pub(super) fn describe(error: &wasmtime::Error) -> Trap {
    Trap {
        reason: reason(error),
        backtrace: error
            .downcast_ref::<WasmBacktrace>()
            .map(|backtrace| backtrace.frames().iter().map(describe_frame).collect())
            .unwrap_or_default(),
    }
}

/// The innermost cause, without wasmtime's backtrace.
pub(super) fn reason(error: &wasmtime::Error) -> String {
    if let Some(trap) = error.downcast_ref::<wasmtime::Trap>() {
        let text = trap.to_string();
        return text
            .strip_prefix("wasm trap: ")
            .map_or(text.clone(), String::from);
    }
    if let Some(I32Exit(code)) = error.downcast_ref::<I32Exit>() {
        return format!("the guest exited with code {code} instead of returning");
    }
    error.root_cause().to_string()
}

/// The longest description of a stack frame in the log, in bytes.
const MAX_FRAME_BYTES: usize = 256;

fn describe_frame(frame: &wasmtime::FrameInfo) -> String {
    let function = match frame.func_name() {
        // The alternate form omits the hash that the compiler adds to a name.
        Some(name) => format!("{:#}", rustc_demangle::demangle(name)),
        None => format!("function {}", frame.func_index()),
    };
    let position = frame
        .symbols()
        .first()
        .and_then(|symbol| Some(format!(" ({}:{})", symbol.file()?, symbol.line()?)));
    // The guest chooses these names.
    let text = format!("{function}{}", position.unwrap_or_default());
    printable(text.as_bytes(), MAX_FRAME_BYTES)
}
