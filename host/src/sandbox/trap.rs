//! Traps in words.

use wasmtime::WasmBacktrace;
use wasmtime_wasi::I32Exit;

/// Why and where a guest was stopped.
#[derive(Debug, PartialEq)]
pub struct Trap {
    /// In one line.
    pub reason: String,
    /// The functions of the guest that were on its stack, innermost first, with file and line
    /// where the guest has debug information.
    pub backtrace: Vec<String>,
}

/// What is to be logged of the error that ended a call.
pub(super) fn describe(error: &wasmtime::Error) -> Trap {
    Trap {
        reason: reason(error),
        backtrace: error
            .downcast_ref::<WasmBacktrace>()
            .map(|backtrace| backtrace.frames().iter().map(frame).collect())
            .unwrap_or_default(),
    }
}

/// The innermost cause, without the backtrace that wasmtime's own text has.
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

/// The longest text of a frame that is logged, in bytes.
const MAX_FRAME: usize = 256;

fn frame(frame: &wasmtime::FrameInfo) -> String {
    let function = match frame.func_name() {
        // Without the hash that the compiler adds.
        Some(name) => format!("{:#}", rustc_demangle::demangle(name)),
        None => format!("function {}", frame.func_index()),
    };
    let position = frame
        .symbols()
        .first()
        .and_then(|symbol| Some(format!(" ({}:{})", symbol.file()?, symbol.line()?)));
    // Names come from the guest.
    let text = format!("{function}{}", position.unwrap_or_default());
    super::output::printable(text.as_bytes(), MAX_FRAME)
}
