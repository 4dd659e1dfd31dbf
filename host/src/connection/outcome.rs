//! How connections end.

use std::fmt;

use crate::limit::Limit;
use crate::named_enum;
use crate::sandbox;

named_enum! {
    /// How a connection ended, without details: a label of metrics and spans.
    pub enum OutcomeKind {
        /// The guest returned `ok`.
        Ok => "ok",
        /// The guest returned an error.
        GuestError => "guest_error",
        /// The guest trapped.
        Trap => "trap",
        /// The guest returned an error because the client was gone.
        ClientGone => "client_gone",
        /// The connection exceeded a limit.
        Limit => "limit",
        /// An operator ended the connection.
        Killed => "killed",
        /// The server shut down first.
        DrainTimeout => "drain_timeout",
        /// The sandbox could not be made.
        NoSandbox => "no_sandbox",
    }
}

/// How a connection ended, with the details for the log.
#[derive(Debug, PartialEq)]
pub(super) enum Outcome {
    Ok,
    GuestError(String),
    Trap(sandbox::Trap),
    ClientGone,
    Limit(Limit),
    Killed,
    DrainTimeout,
    NoSandbox(String),
}

/// Cause of the end of a connection.
pub(super) enum EndedBy {
    /// The call of the guest returned.
    Guest(Result<(), sandbox::Failure>),
    /// The connection exceeded a limit.
    Limit(Limit),
    /// An operator or the server asked for the end.
    Request(EndReason),
}

/// Why an operator or the server ends a connection.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(u8)]
pub(super) enum EndReason {
    Killed = 1,
    VersionTooOld,
    ServerShutdown,
}

impl Outcome {
    /// The outcome of a connection with that cause.
    pub(super) fn new(ended_by: EndedBy, client_gone: bool) -> Self {
        match ended_by {
            EndedBy::Guest(Ok(())) => Self::Ok,
            EndedBy::Guest(Err(sandbox::Failure::Guest(_))) if client_gone => Self::ClientGone,
            EndedBy::Guest(Err(sandbox::Failure::Guest(text))) => Self::GuestError(text),
            EndedBy::Guest(Err(sandbox::Failure::Trap(trap))) => Self::Trap(trap),
            EndedBy::Guest(Err(sandbox::Failure::NotStarted(reason))) => Self::NoSandbox(reason),
            EndedBy::Limit(limit) => Self::Limit(limit),
            EndedBy::Request(EndReason::Killed) => Self::Killed,
            EndedBy::Request(EndReason::VersionTooOld) => Self::Limit(Limit::MaxOldVersionAge),
            EndedBy::Request(EndReason::ServerShutdown) => Self::DrainTimeout,
        }
    }

    pub(super) fn kind(&self) -> OutcomeKind {
        match self {
            Self::Ok => OutcomeKind::Ok,
            Self::GuestError(_) => OutcomeKind::GuestError,
            Self::Trap(_) => OutcomeKind::Trap,
            Self::ClientGone => OutcomeKind::ClientGone,
            Self::Limit(_) => OutcomeKind::Limit,
            Self::Killed => OutcomeKind::Killed,
            Self::DrainTimeout => OutcomeKind::DrainTimeout,
            Self::NoSandbox(_) => OutcomeKind::NoSandbox,
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ok => write!(f, "ok"),
            Self::GuestError(text) => write!(f, "guest error: {text}"),
            Self::Trap(trap) => write!(f, "trap: {}", trap.reason),
            Self::ClientGone => write!(f, "client gone"),
            Self::Limit(limit) => write!(f, "limit: {limit}"),
            Self::Killed => write!(f, "killed"),
            Self::DrainTimeout => write!(f, "drain timeout"),
            Self::NoSandbox(reason) => write!(f, "no sandbox: {reason}"),
        }
    }
}
