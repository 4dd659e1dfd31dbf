//! `ctl`: controls a running server by its admin API.

mod client;
mod error;
mod format;
mod table;
mod top;
mod view;

use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;

use serde::Serialize;
use serde::de::DeserializeOwned;
use wasinetd::admin::model;

use crate::cli::{CtlArgs, CtlCommand};
use crate::commands::read_token;
use client::AdminClient;
use error::CtlError;

/// Sends a command to the server and prints the answer.
pub(crate) fn run(args: CtlArgs) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let result = match runtime {
        Ok(runtime) => runtime.block_on(execute(args)),
        Err(error) => Err(CtlError::unavailable(error)),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(CtlError { code, message }) => {
            // Without standard error, the exit code still tells the kind of failure.
            let _ = writeln!(io::stderr(), "wasinetd: {message}");
            ExitCode::from(code)
        }
    }
}

async fn execute(args: CtlArgs) -> Result<(), CtlError> {
    let Some(address) = args.admin else {
        return Err(CtlError::usage(
            "no server is named; use --admin with the address that was given to serve, or set WASINETD_ADMIN",
        ));
    };
    let token = args.admin_token_file.as_deref().map(read_token);
    let token = token.transpose().map_err(|error| CtlError {
        code: error.exit_code(),
        message: error.to_string(),
    })?;
    let client = AdminClient::new(address, token);
    let printer = Printer { json: args.json };
    match args.command {
        CtlCommand::Status => printer.print(client.get("/v1/status").await?, view::status),
        CtlCommand::Connections => {
            printer.print(client.get("/v1/connections").await?, view::connections)
        }
        CtlCommand::Limits => printer.print(client.get("/v1/limits").await?, view::limits),
        CtlCommand::Kill { id } => {
            let () = client.delete(&format!("/v1/connections/{id}")).await?;
            printer.print((), |()| format!("connection {id} was reset\n"))
        }
        CtlCommand::Drain => {
            let () = client.post("/v1/drain", Vec::new()).await?;
            printer.print((), |()| "the server is draining\n".into())
        }
        CtlCommand::Restart => {
            let answer = client.post("/v1/restart", Vec::new()).await?;
            printer.print(answer, |pid: u32| format!("process {pid} has taken over\n"))
        }
        CtlCommand::Reload => {
            let answer = client.post("/v1/reload", Vec::new()).await?;
            printer.print(answer, |changes: String| format!("{changes}\n"))
        }
        CtlCommand::Swap { service, guest } => {
            let answer = swap(&client, &service, &guest).await?;
            printer.print(answer, view::swapped)
        }
        CtlCommand::Rollback { service } => {
            let path = format!("/v1/services/{service}/rollback");
            printer.print(client.post(&path, Vec::new()).await?, view::swapped)
        }
        CtlCommand::Logs { id, follow } => print_logs(&client, id, follow).await,
        CtlCommand::Top { interval, count } => top::watch(&client, interval, count).await,
    }
}

/// Prints answers as text or as JSON.
struct Printer {
    json: bool,
}

impl Printer {
    fn print<T: Serialize + DeserializeOwned>(
        &self,
        answer: T,
        text: impl FnOnce(T) -> String,
    ) -> Result<(), CtlError> {
        let text = if self.json {
            serde_json::to_string_pretty(&answer).unwrap_or_default() + "\n"
        } else {
            text(answer)
        };
        // The reader may have closed the pipe.
        let _ = io::stdout().write_all(text.as_bytes());
        Ok(())
    }
}

async fn swap(
    client: &AdminClient,
    service: &str,
    guest: &Path,
) -> Result<model::Swapped, CtlError> {
    let component = std::fs::read(guest).map_err(|error| {
        CtlError::guest(format!(
            "cannot read the guest {guest:?}: {error}; give the path of a component built for wasm32-wasip2"
        ))
    })?;
    // Asked first, because the answer to the swap may get lost: a server that refuses a request by
    // its head resets the connection while a large guest is still being sent.
    let status: model::Status = client.get("/v1/status").await?;
    let names: Vec<&str> = status.services.iter().map(|known| &*known.name).collect();
    if !names.contains(&service) {
        return Err(CtlError::usage(format!(
            "there is no service {service:?}; the services are: {}",
            names.join(", ")
        )));
    }
    client
        .post(&format!("/v1/services/{service}/swap"), component)
        .await
}

async fn print_logs(client: &AdminClient, id: Option<u64>, follow: bool) -> Result<(), CtlError> {
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
