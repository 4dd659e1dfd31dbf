//! Failures of `ctl`, with their exit codes.

use std::fmt;

use wasinetd::admin::model;

use crate::exit::code;

/// Message for the operator, with an exit code.
#[derive(Debug)]
pub(crate) struct CtlError {
    pub(super) code: u8,
    pub(super) message: String,
}

impl CtlError {
    /// A mistake on the command line.
    pub(super) fn usage(message: impl Into<String>) -> Self {
        Self {
            code: code::USAGE,
            message: message.into(),
        }
    }

    /// A guest that cannot be used.
    pub(super) fn guest(message: impl Into<String>) -> Self {
        Self {
            code: code::GUEST,
            message: message.into(),
        }
    }

    /// A server that cannot be reached.
    pub(super) fn unavailable(message: impl fmt::Display) -> Self {
        Self {
            code: code::UNAVAILABLE,
            message: message.to_string(),
        }
    }

    /// A response of the server that is not a success.
    pub(super) fn from_response(status: u16, body: &[u8]) -> Self {
        let exit_code = match status {
            400 | 404 => code::USAGE,
            401 => code::CONFIG,
            422 => code::GUEST,
            409 | 503 => code::UNAVAILABLE,
            _ => code::SOFTWARE,
        };
        match serde_json::from_slice::<model::Failure>(body) {
            Ok(failure) => Self {
                code: failure.exit_code.unwrap_or(exit_code),
                message: failure.error,
            },
            Err(_) => Self {
                code: exit_code,
                message: format!(
                    "the server answered with HTTP status {status}; does it run the same release of wasinetd?"
                ),
            },
        }
    }
}
