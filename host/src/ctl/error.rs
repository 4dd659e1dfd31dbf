//! Failures of `ctl`, with their exit codes.

use std::fmt;

use wasinetd::admin::model;

use crate::cli::EX_USAGE;

/// Message for the operator, with an exit code.
#[derive(Debug)]
pub(crate) struct CtlError {
    pub(super) code: u8,
    pub(super) message: String,
}

/// The guest is refused (BSD `sysexits.h`: EX_DATAERR).
const EX_DATAERR: u8 = 65;
/// The server cannot be reached, or cannot do this now (EX_UNAVAILABLE).
const EX_UNAVAILABLE: u8 = 69;
/// The server failed (EX_SOFTWARE).
const EX_SOFTWARE: u8 = 70;
/// The token is missing or wrong (EX_CONFIG).
const EX_CONFIG: u8 = 78;

impl CtlError {
    /// A mistake on the command line.
    pub(super) fn usage(message: impl Into<String>) -> Self {
        Self {
            code: EX_USAGE,
            message: message.into(),
        }
    }

    /// A guest that cannot be used.
    pub(super) fn guest(message: impl Into<String>) -> Self {
        Self {
            code: EX_DATAERR,
            message: message.into(),
        }
    }

    /// A server that cannot be reached.
    pub(super) fn unavailable(message: impl fmt::Display) -> Self {
        Self {
            code: EX_UNAVAILABLE,
            message: message.to_string(),
        }
    }

    /// A response of the server that is not a success.
    pub(super) fn from_response(status: u16, body: &[u8]) -> Self {
        let code = match status {
            400 | 404 => EX_USAGE,
            401 => EX_CONFIG,
            422 => EX_DATAERR,
            409 | 503 => EX_UNAVAILABLE,
            _ => EX_SOFTWARE,
        };
        match serde_json::from_slice::<model::Failure>(body) {
            Ok(failure) => Self {
                code: failure.exit_code.unwrap_or(code),
                message: failure.error,
            },
            Err(_) => Self {
                code,
                message: format!(
                    "the server answered with HTTP status {status}; does it run the same release of wasinetd?"
                ),
            },
        }
    }
}
