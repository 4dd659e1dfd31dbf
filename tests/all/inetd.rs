//! The gallery of guests except `hello`: the classic inetd services and the scratch store.

mod clock;
mod resp;
mod small_services;
