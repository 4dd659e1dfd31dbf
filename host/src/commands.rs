//! The subcommands: thin entry points that call the library and print.

mod admin_token;
mod cache;
mod cert;
mod check;
mod compile;
mod completions;
mod guest;
mod man;
mod new;
mod schema;
mod serve;

pub(crate) use admin_token::read_token;
pub(crate) use cert::cert;
pub(crate) use check::check;
pub(crate) use compile::compile;
pub(crate) use completions::completions;
pub(crate) use man::man;
pub(crate) use new::new;
pub(crate) use schema::schema;
pub(crate) use serve::serve;
