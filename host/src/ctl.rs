//! `ctl`: sees and steers a server that runs, by its admin endpoint.

mod client;
mod table;
mod top;

use std::fmt;
use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Duration;

use bytesize::ByteSize;
use serde::Serialize;
use serde::de::DeserializeOwned;
use wasinetd::admin::model;

use crate::cli::{CtlArgs, CtlCommand, EX_USAGE};
use crate::commands;
use client::AdminClient;
use table::Table;

/// Why it did not work, and what to tell the shell.
#[derive(Debug)]
pub(crate) struct CtlError {
    code: u8,
    message: String,
}

/// The guest is refused (BSD `sysexits.h`: EX_DATAERR).
const EX_DATAERR: u8 = 65;
/// The server is not there, or cannot do it now (EX_UNAVAILABLE).
const EX_UNAVAILABLE: u8 = 69;
/// The server's fault (EX_SOFTWARE).
const EX_SOFTWARE: u8 = 70;
/// The token is not the one (EX_CONFIG).
const EX_CONFIG: u8 = 78;

impl CtlError {
    fn unavailable(message: impl fmt::Display) -> Self {
        Self {
            code: EX_UNAVAILABLE,
            message: message.to_string(),
        }
    }

    /// What the server has answered instead.
    fn answered(status: u16, body: &[u8]) -> Self {
        let failure = serde_json::from_slice::<model::Failure>(body);
        let code = match status {
            400 | 404 => EX_USAGE,
            401 => EX_CONFIG,
            422 => EX_DATAERR,
            409 | 503 => EX_UNAVAILABLE,
            _ => EX_SOFTWARE,
        };
        match failure {
            Ok(failure) => Self {
                code: failure.exit_code.unwrap_or(code),
                message: failure.error,
            },
            Err(_) => Self {
                code,
                message: format!(
                    "the server answered with {status}; is it a wasinetd of this release?"
                ),
            },
        }
    }
}

/// Asks the server, and prints what it says.
pub(crate) fn run(args: CtlArgs) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let result = match runtime {
        Ok(runtime) => runtime.block_on(ask(args)),
        Err(error) => Err(CtlError::unavailable(error)),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(CtlError { code, message }) => {
            // Where standard error is closed, the exit code says what kind of failure it was.
            let _ = writeln!(io::stderr(), "wasinetd: {message}");
            ExitCode::from(code)
        }
    }
}

async fn ask(args: CtlArgs) -> Result<(), CtlError> {
    let Some(address) = args.admin else {
        return Err(CtlError {
            code: EX_USAGE,
            message: "which server? give --admin as it was given to serve, or set WASINETD_ADMIN"
                .into(),
        });
    };
    let token = args.admin_token_file.as_deref().map(commands::token);
    let token = token.transpose().map_err(|error| CtlError {
        code: error.exit_code(),
        message: error.to_string(),
    })?;
    let client = AdminClient::new(address, token);
    let out = Out { json: args.json };
    match args.command {
        CtlCommand::Status => out.print(client.get("/v1/status").await?, status),
        CtlCommand::Connections => out.print(client.get("/v1/connections").await?, connections),
        CtlCommand::Limits => out.print(client.get("/v1/limits").await?, limits),
        CtlCommand::Kill { id } => {
            let path = format!("/v1/connections/{id}");
            out.print(client.delete(&path).await?, |()| format!("{id} is reset\n"))
        }
        CtlCommand::Drain => {
            let drains = |()| "the server drains\n".to_string();
            out.print(client.post("/v1/drain", Vec::new()).await?, drains)
        }
        CtlCommand::Restart => {
            let restarted = |pid: u32| format!("process {pid} has taken over\n");
            out.print(client.post("/v1/restart", Vec::new()).await?, restarted)
        }
        CtlCommand::Reload => {
            let reloaded = |changes: String| format!("{changes}\n");
            out.print(client.post("/v1/reload", Vec::new()).await?, reloaded)
        }
        CtlCommand::Swap { service, guest } => {
            let component = std::fs::read(&guest).map_err(|error| CtlError {
                code: EX_DATAERR,
                message: format!(
                    "cannot read the guest {guest:?}: {error}; give the path of a component built for wasm32-wasip2"
                ),
            })?;
            // A server that refuses a large guest by its head may be heard of before all is sent, or not.
            let status: model::Status = client.get("/v1/status").await?;
            if !status.services.iter().any(|one| one.name == service) {
                let names: Vec<_> = status.services.iter().map(|one| &*one.name).collect();
                return Err(CtlError {
                    code: EX_USAGE,
                    message: format!(
                        "there is no service {service:?}; there is: {}",
                        names.join(", ")
                    ),
                });
            }
            let path = format!("/v1/services/{service}/swap");
            out.print(client.post(&path, component).await?, swapped)
        }
        CtlCommand::Rollback { service } => {
            let path = format!("/v1/services/{service}/rollback");
            out.print(client.post(&path, Vec::new()).await?, swapped)
        }
        CtlCommand::Logs { id, follow } => logs(&client, id, follow).await,
        CtlCommand::Top { interval, count } => top::watch(&client, interval, count).await,
    }
}

/// How answers are printed.
struct Out {
    json: bool,
}

impl Out {
    fn print<T: Serialize + DeserializeOwned>(
        &self,
        answer: T,
        text: impl FnOnce(T) -> String,
    ) -> Result<(), CtlError> {
        let text = match self.json {
            true => serde_json::to_string_pretty(&answer).unwrap_or_default() + "\n",
            false => text(answer),
        };
        // Whoever closes the pipe has read enough.
        let _ = io::stdout().write_all(text.as_bytes());
        Ok(())
    }
}

async fn logs(client: &AdminClient, id: Option<u64>, follow: bool) -> Result<(), CtlError> {
    let id = id.map_or(String::new(), |id| format!("&id={id}"));
    let path = format!("/v1/logs?follow={follow}{id}");
    let mut stdout = io::stdout();
    client
        .stream(&path, |bytes| {
            let written = stdout.write_all(bytes);
            written.and_then(|()| stdout.flush()).is_ok()
        })
        .await
}

fn status(status: model::Status) -> String {
    let mut text = format!(
        "wasinetd {} (process {}) is {} since {}, with {} of {} connections\n",
        status.version, status.pid, status.phase, status.since, status.open, status.max_connections,
    );
    let mut versions = Table::new([
        "SERVICE", "VERSION", "STATE", "SINCE", ">OPEN", ">ENDED", "NOT OK",
    ]);
    for service in &status.services {
        for version in &service.versions {
            let not_ok: Vec<_> = version
                .ended
                .iter()
                .filter(|ended| ended.outcome != "ok")
                .map(|ended| format!("{} {}", ended.count, ended.outcome))
                .collect();
            let ended: u64 = version.ended.iter().map(|ended| ended.count).sum();
            versions.row([
                service.name.clone(),
                short(&version.digest).into(),
                version.state.clone(),
                version.since.clone(),
                version.open.to_string(),
                ended.to_string(),
                not_ok.join(", "),
            ]);
        }
    }
    text += &versions.to_string();
    if !status.limits_met.is_empty() {
        let met = status.limits_met.iter();
        let met: Vec<_> = met
            .map(|one| format!("{} {}", one.limit, one.met))
            .collect();
        text += &format!("limits met: {}\n", met.join(", "));
    }
    text
}

fn connections(connections: Vec<model::Connection>) -> String {
    let mut table = Table::new([
        ">ID", "PEER", "SERVICE", "VERSION", ">AGE", ">IN", ">OUT", ">CPU", ">MEMORY",
    ]);
    for one in connections {
        table.row([
            one.id.to_string(),
            one.peer,
            one.service,
            one.version,
            age(one.age),
            size(one.received),
            size(one.sent),
            format!("{:.2}s", one.cpu),
            size(one.memory),
        ]);
    }
    table.to_string()
}

fn limits(limits: Vec<model::Limit>) -> String {
    let mut table = Table::new(["LIMIT", ">VALUE", ">MET"]);
    for one in limits {
        table.row([one.limit, one.value, one.met.to_string()]);
    }
    table.to_string()
}

fn swapped(swapped: model::Swapped) -> String {
    let (now, before) = (short(&swapped.digest), short(&swapped.before));
    let took = Duration::from_secs_f64(swapped.took);
    if now == before {
        return format!("{now} is served already; nothing has changed\n");
    }
    format!("{now} is served in place of {before} (after {took:.1?})\n")
}

/// Enough of a digest to tell versions apart.
fn short(digest: &str) -> &str {
    digest.get(..12).unwrap_or(digest)
}

fn size(bytes: u64) -> String {
    ByteSize(bytes).to_string().replace(' ', "")
}

/// In the largest unit that there is at least one of.
fn age(seconds: f64) -> String {
    match seconds {
        ..60.0 => format!("{seconds:.1}s"),
        ..3600.0 => format!("{:.1}m", seconds / 60.0),
        ..86400.0 => format!("{:.1}h", seconds / 3600.0),
        _ => format!("{:.1}d", seconds / 86400.0),
    }
}
