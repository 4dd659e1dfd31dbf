//! Starts servers and talks to them. Asserts nothing about their answers.

mod admin;
mod client;
mod curl;
mod files;
mod machine;
mod server;
mod tools;

pub(crate) use admin::{AdminSocket, Successor};
pub(crate) use client::{Client, Response, StreamSocket, request};
pub(crate) use curl::curl;
pub(crate) use files::{fixture, guest, page, root, wat_fixture, write_version};
pub(crate) use machine::{PATIENCE, free_address, wait_until};
pub(crate) use server::{MODES, Server};
pub(crate) use tools::{has_program, output, program, run, wasinetd};
