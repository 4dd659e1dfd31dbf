//! Bindings of `wasinetd:tcp`, generated from `wit/`.
//!
//! The guest SDK generates its bindings from the same files.

use std::io;
use std::net::SocketAddr;

use crate::net::TransportAddress;
use crate::sandbox::output::printable;
use crate::sandbox::transport::{ClientCertificate, TlsInfo};

pub(crate) use generated::wasinetd::tcp::types;
pub(crate) use generated::{Guest as GuestInstance, GuestPre};
use types::{ErrorCode, Ipv4SocketAddress, Ipv6SocketAddress, SocketAddress};

/// The generated code.
#[allow(missing_docs, unreachable_pub)]
mod generated {
    wasmtime::component::bindgen!({
        path: "../wit",
        inline: "
            package wasinetd:host;

            /// The part of `wasinetd:tcp/connection-handler` that is wasinetd's own. WASI's part
            /// is linked from wasmtime-wasi.
            world guest {
                import wasinetd:tcp/types@0.1.0;
                export wasinetd:tcp/handler@0.1.0;
            }
        ",
        world: "wasinetd:host/guest",
        imports: {
            "wasinetd:tcp/types@0.1.0.[method]connection.receive": store | trappable,
            "wasinetd:tcp/types@0.1.0.[method]connection.send": store | trappable,
            default: trappable,
        },
        exports: { default: async | store },
        with: {
            "wasinetd:tcp/types@0.1.0.connection": crate::sandbox::host_tcp::bindings::Connection,
        },
    });
}

/// The resource behind a guest's handle of its connection.
///
/// The transport is in the state of the store: each store has exactly one.
#[derive(Default)]
#[allow(unreachable_pub, reason = "the generated code re-exports it")]
pub struct Connection {
    /// Whether the guest has called `receive`.
    pub(super) is_receiving: bool,
    /// Whether the guest has called `send`.
    pub(super) is_sending: bool,
}

impl From<io::Error> for ErrorCode {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::ConnectionReset => Self::ConnectionReset,
            io::ErrorKind::BrokenPipe => Self::ConnectionBroken,
            io::ErrorKind::ConnectionAborted => Self::ConnectionAborted,
            io::ErrorKind::TimedOut => Self::Timeout,
            _ => Self::Other(Some(error.to_string())),
        }
    }
}

impl From<TlsInfo> for types::TlsInfo {
    fn from(tls: TlsInfo) -> Self {
        let certificate = |certificate: ClientCertificate| types::ClientCertificate {
            subject: certificate.subject,
            fingerprint: certificate.fingerprint,
        };
        Self {
            server_name: tls.server_name,
            alpn: tls.alpn,
            version: tls.version,
            client_certificate: tls.client_certificate.map(certificate),
        }
    }
}

impl From<TransportAddress> for SocketAddress {
    fn from(address: TransportAddress) -> Self {
        match address {
            TransportAddress::Ip(SocketAddr::V4(address)) => Self::Ipv4(Ipv4SocketAddress {
                port: address.port(),
                address: address.ip().octets().into(),
            }),
            TransportAddress::Ip(SocketAddr::V6(address)) => Self::Ipv6(Ipv6SocketAddress {
                port: address.port(),
                flow_info: address.flowinfo(),
                address: address.ip().segments().into(),
                scope_id: address.scope_id(),
            }),
            // A path may be any bytes, but a string in WIT is Unicode.
            TransportAddress::Unix(path) => {
                Self::Unix(path.map(|path| path.to_string_lossy().into()))
            }
        }
    }
}

/// The longest text of a guest's error in the log, in bytes.
const MAX_ERROR_BYTES: usize = 512;

/// Describes an error of a guest for the log.
///
/// One line of bounded length.
pub(crate) fn describe(error: &ErrorCode) -> String {
    let text = match error {
        ErrorCode::ConnectionReset => "connection reset",
        ErrorCode::ConnectionBroken => "connection broken",
        ErrorCode::ConnectionAborted => "connection aborted",
        ErrorCode::Timeout => "timeout",
        ErrorCode::InvalidState => "invalid state",
        ErrorCode::Other(Some(text)) => text,
        ErrorCode::Other(None) => "unspecified",
    };
    printable(text.as_bytes(), MAX_ERROR_BYTES)
}
