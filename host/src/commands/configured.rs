//! What is to be served: as the command line or a config file says it, read and checked.

mod agree;

use std::collections::{HashMap, HashSet};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use clap::builder::Command;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Arg, ArgAction, CommandFactory, Parser, ValueHint};
use wasinetd::Error;
use wasinetd::config::{self, Files, Key, Mistake, Mistakes, Setting, Table, Takes};
use wasinetd::connection::tls::Tls;
use wasinetd::net::ListenAddress;
use wasinetd::sandbox::{Access, Grants, Requirements};

use super::successor::Guest;
use super::{read, refused};
use crate::cli::{
    NAME_VALUE, ServeArgs, ServerArgs, ServerTable, ServiceArgs, ServiceTable, UNIX_PATH,
};
use agree::Validation;

/// The service of a server that is started without a config file.
const ONLY_SERVICE: &str = "default";

/// What is to be served.
pub(super) struct ResolvedConfig {
    pub(super) server: ServerArgs,
    /// What the config file says of the server.
    pub(super) server_table: Table,
    /// Connections of all services at once.
    pub(super) max_connections: Option<usize>,
    pub(super) services: Vec<ServiceSpec>,
}

/// A service as it is to be.
pub(super) struct ServiceSpec {
    pub(super) name: String,
    pub(super) guest: PathBuf,
    /// The service whose clients it has, of these names for the server.
    pub(super) behind: Option<(String, Vec<String>)>,
    pub(super) args: ServiceArgs,
    /// What the config file says of it.
    pub(super) table: Table,
}

impl ServiceSpec {
    /// Where the config file has this key, or the service.
    pub(super) fn line(&self, key: &str) -> usize {
        let setting = self.table.get(key);
        setting.map_or(self.table.line, |setting| setting.line)
    }
}

/// A service whose guest and directories are there.
pub(super) struct LoadedService {
    pub(super) spec: ServiceSpec,
    pub(super) component: Bytes,
    pub(super) needs: Requirements,
    pub(super) grants: Grants,
    pub(super) tls: Option<Arc<Tls>>,
}

impl ResolvedConfig {
    /// What the arguments say, or the file that they name. Without either it is listened at the `usual`
    /// addresses.
    pub(super) fn of(
        args: ServeArgs,
        usual: impl FnOnce() -> Vec<ListenAddress>,
    ) -> Result<Self, Error> {
        match (args.config, args.guest) {
            (Some(path), _) => Self::of_file(&path),
            (None, Some(guest)) => {
                let mut service = args.service;
                if service.listen.is_empty() {
                    service.listen = usual();
                }
                Ok(Self {
                    server: args.server,
                    server_table: Table::default(),
                    max_connections: service.max_connections,
                    services: vec![ServiceSpec {
                        name: ONLY_SERVICE.into(),
                        guest,
                        behind: None,
                        args: service,
                        table: Table::default(),
                    }],
                })
            }
            (None, None) => unreachable!("one of them is required"),
        }
    }

    /// What a config file says.
    ///
    /// # Errors
    ///
    /// Names all mistakes, with their lines.
    pub(super) fn of_file(path: &Path) -> Result<Self, Error> {
        let text = std::fs::read_to_string(path).map_err(|source| Error::ConfigUnreadable {
            path: path.into(),
            source,
        })?;
        let base = path.parent().unwrap_or(Path::new(""));
        let (server, service) = (ServerTable::command(), ServiceTable::command());
        let (file, mut mistakes) = config::read(&text, base, &keys(&server), &keys(&service));
        let server = parse_table::<ServerTable>(&server, &file.server, &mut mistakes);
        let tables = file.services.iter();
        let named = tables.filter_map(|table| table.get("name")?.values.first().cloned());
        let named: HashSet<String> = named.collect();
        let tables = file.services.into_iter();
        let services: Vec<ServiceSpec> = tables
            .filter_map(|table| {
                let parsed = parse_table::<ServiceTable>(&service, &table, &mut mistakes)?;
                Some(ServiceSpec {
                    name: parsed.name,
                    guest: parsed.guest,
                    behind: parsed.behind.map(|other| (other, parsed.server_name)),
                    args: parsed.service,
                    table,
                })
            })
            .collect();
        let among = Validation {
            services: &services,
            named: &named,
            server: server.as_ref(),
        };
        among.validate(&mut mistakes);
        if mistakes.is_empty() && services.is_empty() {
            mistakes.push(Mistake {
                line: 1,
                text: "there is no service; write [[service]], with a name, listen and a guest"
                    .into(),
            });
        }
        match server {
            Some(server) if mistakes.is_empty() => Ok(Self {
                server: server.server,
                server_table: file.server,
                max_connections: server.max_connections,
                services,
            }),
            _ => Err(wrong(path, mistakes)),
        }
    }
}

/// Reads the guests of `services` and opens their directories, with the components that are `known`
/// already instead of those in files. All that is wrong is told at once where there is a config file.
pub(super) fn load_all(
    services: Vec<ServiceSpec>,
    config: Option<&Path>,
    mut known: HashMap<Guest, Vec<u8>>,
) -> Result<Vec<LoadedService>, Error> {
    let mut checked = Vec::new();
    let mut mistakes = Vec::new();
    for spec in services {
        let guest = guest(
            &spec,
            known.remove(&(spec.name.clone(), spec.guest.clone())),
        )
        .map_err(|error| ("guest", error));
        let grants = grants(&spec);
        let tls = tls(&spec).map_err(|error| ("tls-cert", error));
        match (guest, grants, tls) {
            (Ok((component, needs)), Ok(grants), Ok(tls)) => checked.push(LoadedService {
                spec,
                component,
                needs,
                grants,
                tls,
            }),
            (guest, grants, tls) => {
                let wrong = guest.err().into_iter().chain(grants.err()).chain(tls.err());
                for (key, error) in wrong {
                    if config.is_none() {
                        return Err(error);
                    }
                    mistakes.push(Mistake {
                        line: spec.line(key),
                        text: format!("{key}: {error}"),
                    });
                }
            }
        }
    }
    match config {
        Some(path) if !mistakes.is_empty() => Err(wrong(path, mistakes)),
        _ => Ok(checked),
    }
}

fn guest(spec: &ServiceSpec, component: Option<Vec<u8>>) -> Result<(Bytes, Requirements), Error> {
    let component = match component {
        Some(component) => component,
        None => read(&spec.guest)?,
    };
    let needs = Requirements::of(&component).map_err(refused(&spec.guest))?;
    let limits = spec.args.guest_limits.limits();
    needs.fit(&limits).map_err(refused(&spec.guest))?;
    Ok((component.into(), needs))
}

fn tls(spec: &ServiceSpec) -> Result<Option<Arc<Tls>>, Error> {
    let settings = spec.args.front.tls()?;
    Ok(settings.map(Tls::new).transpose()?.map(Arc::new))
}

/// Fails with the key that is wrong.
fn grants(spec: &ServiceSpec) -> Result<Grants, (&'static str, Error)> {
    let grants = Grants::new(&spec.args.directories(), spec.args.env.clone());
    let grants = grants.map_err(|(grant, reason)| {
        let (key, flag) = match grant.access {
            Access::ReadOnly => ("dir", "--dir"),
            Access::ReadWrite => ("dir-rw", "--dir-rw"),
        };
        let path = grant.host;
        (key, Error::Directory { flag, path, reason })
    })?;
    Ok(grants.with_destinations(spec.args.network.allow_connect.clone()))
}

/// All that is wrong with a config file.
pub(super) fn wrong(path: &Path, mut mistakes: Vec<Mistake>) -> Error {
    mistakes.sort();
    Error::Config(Mistakes {
        path: path.into(),
        mistakes,
    })
}

/// The keys of a table, which are the flags of a command.
pub(crate) fn keys(command: &Command) -> Vec<Key> {
    let flags = command.get_arguments().filter(|arg| !arg.is_hide_set());
    flags
        .filter_map(|arg| {
            Some(Key {
                name: arg.get_long().filter(|long| *long != "help")?.into(),
                takes: takes(arg),
                files: files(arg),
            })
        })
        .collect()
}

fn files(arg: &Arg) -> Files {
    let names = arg.get_value_names().unwrap_or_default();
    match arg.get_value_hint() {
        ValueHint::FilePath | ValueHint::DirPath => Files::All,
        _ if names.iter().any(|name| name.contains(UNIX_PATH)) => Files::AfterUnix,
        _ => Files::None,
    }
}

fn takes(arg: &Arg) -> Takes {
    let names = arg.get_value_names().unwrap_or_default();
    match arg.get_action() {
        ArgAction::SetTrue => Takes::Switch,
        ArgAction::Append if names.iter().any(|name| name == NAME_VALUE) => Takes::Pairs,
        ArgAction::Append => Takes::Many,
        _ => Takes::One,
    }
}

/// A table as the command line would have it: the same types, and the same checks. None when something
/// is wrong, which is added to `mistakes`.
fn parse_table<T: Parser>(
    command: &Command,
    table: &Table,
    mistakes: &mut Vec<Mistake>,
) -> Option<T> {
    let before = mistakes.len();
    for setting in &table.settings {
        // One by one, so that one that is wrong does not hide the others.
        let alone = command.clone().try_get_matches_from(arguments(setting));
        if let Err(error) = alone
            && error.kind() != ErrorKind::MissingRequiredArgument
        {
            mistakes.push(Mistake {
                line: setting.line,
                text: explained(&error, setting),
            });
        }
    }
    let required = command.get_arguments().filter(|arg| arg.is_required_set());
    for key in required.filter_map(Arg::get_long) {
        if table.get(key).is_none() {
            mistakes.push(Mistake {
                line: table.line,
                text: format!("{key} is missing"),
            });
        }
    }
    if mistakes.len() > before {
        return None;
    }
    match T::try_parse_from(table.settings.iter().flat_map(arguments)) {
        Ok(parsed) => Some(parsed),
        Err(error) => {
            let missing = missing(&error);
            let wants = |setting: &&Setting| {
                let alone = command.clone().try_get_matches_from(arguments(setting));
                alone.is_err_and(|error| {
                    let mut of_it = self::missing(&error).into_iter();
                    of_it.any(|key| missing.contains(&key))
                })
            };
            let line = table.settings.iter().find(wants).map(|one| one.line);
            mistakes.push(Mistake {
                line: line.unwrap_or(table.line),
                text: match missing.is_empty() {
                    true => first_line(&error),
                    false => format!("missing: {}", missing.join(", ")),
                },
            });
            None
        }
    }
}

fn arguments(setting: &Setting) -> Vec<OsString> {
    let key = &setting.key;
    match &setting.values[..] {
        [] => vec![format!("--{key}").into()],
        values => values
            .iter()
            .map(|value| format!("--{key}={value}").into())
            .collect(),
    }
}

fn explained(error: &clap::Error, setting: &Setting) -> String {
    let key = &setting.key;
    let of = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.clone()),
        Some(ContextValue::Strings(texts)) => Some(texts.join(", ")),
        _ => None,
    };
    let value = of(ContextKind::InvalidValue).unwrap_or_else(|| setting.values.join(", "));
    let why = std::error::Error::source(error).map(ToString::to_string);
    let one_of = || of(ContextKind::ValidValue).map(|valid| format!("write one of {valid}"));
    let why = why.or_else(one_of).unwrap_or_else(|| first_line(error));
    format!("{key} = {value:?}: {why}")
}

/// The keys that an error says are missing.
fn missing(error: &clap::Error) -> Vec<String> {
    match (error.kind(), error.get(ContextKind::InvalidArg)) {
        (ErrorKind::MissingRequiredArgument, Some(ContextValue::Strings(flags))) => {
            let keys = flags.iter().map(|flag| {
                let flag = flag.trim_start_matches("--");
                flag.split([' ', '=']).next().unwrap_or(flag).to_string()
            });
            keys.collect()
        }
        _ => Vec::new(),
    }
}

fn first_line(error: &clap::Error) -> String {
    let text = error.to_string();
    let line = text.lines().next().unwrap_or_default();
    line.trim_start_matches("error: ").replace("--", "")
}

/// What an instance of any of them takes out of a pool, and how many files it can have open.
pub(super) fn requirements(services: &[LoadedService]) -> (Requirements, usize) {
    let needs = services.iter().map(|one| one.needs);
    let needs = needs.fold(Requirements::default(), |all, one| all.or(&one));
    let files = services.iter().map(|one| {
        let args = &one.spec.args;
        let opens = !args.directories().is_empty() || !args.network.allow_connect.is_empty();
        if opens {
            args.guest_limits.limits().open_files
        } else {
            0
        }
    });
    (needs, files.max().unwrap_or(0))
}
