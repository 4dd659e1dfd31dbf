//! The generated bindings that `export!` expands to, and the conversion of errors.

use std::io;

/// Bindings generated from `wit/`. The host generates its own from the same files.
#[allow(missing_docs)]
pub mod bindings {
    wit_bindgen::generate!({
        path: "../../wit",
        inline: "
            package wasinetd:guest;

            /// The part of `wasinetd:tcp/connection-handler` that this crate uses. The linker adds
            /// the imports of the guest itself.
            world guest {
                import wasinetd:tcp/types@0.1.0;
                import wasi:clocks/monotonic-clock@0.3.0;
                import wasi:filesystem/preopens@0.2.12;
                export wasinetd:tcp/handler@0.1.0;
            }
        ",
        world: "wasinetd:guest/guest",
        generate_all,
        pub_export_macro: true,
        export_macro_name: "export_handler",
        default_bindings_module: "wasinetd_guest::rt::bindings",
    });
}

pub use bindings::export_handler;
pub use bindings::exports::wasinetd::tcp::handler::{Connection, ErrorCode, Guest as Handler};

/// The error code that the host logs for `error`.
pub(crate) fn error_code(error: &io::Error) -> ErrorCode {
    match error.kind() {
        io::ErrorKind::ConnectionReset => ErrorCode::ConnectionReset,
        io::ErrorKind::BrokenPipe => ErrorCode::ConnectionBroken,
        io::ErrorKind::ConnectionAborted => ErrorCode::ConnectionAborted,
        io::ErrorKind::TimedOut => ErrorCode::Timeout,
        _ => ErrorCode::Other(Some(error.to_string())),
    }
}

/// The I/O error that the handler gets for `code`.
pub(crate) fn io_error(code: &ErrorCode) -> io::Error {
    let kind = match code {
        ErrorCode::ConnectionReset => io::ErrorKind::ConnectionReset,
        ErrorCode::ConnectionBroken => io::ErrorKind::BrokenPipe,
        ErrorCode::ConnectionAborted => io::ErrorKind::ConnectionAborted,
        ErrorCode::Timeout => io::ErrorKind::TimedOut,
        ErrorCode::InvalidState => io::ErrorKind::InvalidInput,
        ErrorCode::Other(Some(text)) => return io::Error::other(text.clone()),
        ErrorCode::Other(None) => return io::Error::other("the connection failed"),
    };
    kind.into()
}
