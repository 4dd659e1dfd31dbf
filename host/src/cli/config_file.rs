//! Config files: the keys of a table are the flags of a clap command, and so are their values.
//!
//! One parser, one validation and one help text serve both. Each key is also parsed by itself, so that
//! one mistake does not hide the others.

use std::collections::HashSet;
use std::ffi::OsString;
use std::path::Path;

use clap::builder::Command;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Arg, ArgAction, Args, CommandFactory, Parser, ValueHint};
use wasinetd::config::file::{self, Key, PathRule, Setting, Table, ValueKind};
use wasinetd::config::model::{Origin, OriginKey, ResolvedConfig, ServerConfig};
use wasinetd::config::validate::Validation;
use wasinetd::config::{ConfigError, Mistake, Mistakes};

use super::listener::ListenerArgs;
use super::server::ServerTable;
use super::service::ServiceTable;
use super::values::{NAME_VALUE, UNIX_PATH};

/// Reads the config file at `path`.
///
/// # Errors
///
/// Reports all mistakes in the file, each with its line.
pub(crate) fn read(path: &Path) -> Result<ResolvedConfig, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Unreadable {
        path: path.into(),
        source,
    })?;
    let base = path.parent().unwrap_or(Path::new(""));
    parse(&text, base).map_err(|mistakes| Mistakes::new(path, mistakes).into())
}

fn parse(text: &str, base: &Path) -> Result<ResolvedConfig, Vec<Mistake>> {
    let (server, service) = (ServerTable::command(), ServiceTable::command());
    let (file, mut mistakes) = file::parse(text, base, &keys(&server), &keys(&service));
    let names = file.services.iter();
    let names = names.filter_map(|table| table.get("name")?.values.first().cloned());
    let names: HashSet<String> = names.collect();
    let server = parse_table::<ServerTable>(&server, &file.server, &mut mistakes);
    let server = server.map(ServerConfig::from);
    let of_listener = listener_keys();
    let mut services = Vec::new();
    for table in &file.services {
        if let Some(parsed) = parse_table::<ServiceTable>(&service, table, &mut mistakes) {
            services.push(parsed.into_config(origin(table, &of_listener)));
        }
    }
    let validation = Validation {
        services: &services,
        names: &names,
        server: server.as_ref(),
    };
    validation.run(&mut mistakes);
    if mistakes.is_empty() && services.is_empty() {
        mistakes.push(Mistake {
            line: 1,
            text: "there is no service; write [[service]], with a name, listen and a guest".into(),
        });
    }
    match server {
        Some(server) if mistakes.is_empty() => Ok(ResolvedConfig { server, services }),
        _ => Err(mistakes),
    }
}

/// Keys of the settings that belong to a listener.
fn listener_keys() -> HashSet<String> {
    let command = ListenerArgs::augment_args(Command::new(""));
    let keys = command.get_arguments().filter_map(Arg::get_long);
    keys.map(ToString::to_string).collect()
}

fn origin(table: &Table, of_listener: &HashSet<String>) -> Origin {
    let keys = table.settings.iter().map(|setting| OriginKey {
        name: setting.key.clone(),
        line: setting.line,
        of_listener: of_listener.contains(&setting.key),
    });
    Origin {
        line: table.line,
        keys: keys.collect(),
    }
}

/// The keys of a table: the flags of `command`.
pub(crate) fn keys(command: &Command) -> Vec<Key> {
    let flags = command.get_arguments().filter(|arg| !arg.is_hide_set());
    flags
        .filter_map(|arg| {
            Some(Key {
                name: arg.get_long().filter(|long| *long != "help")?.into(),
                kind: kind(arg),
                paths: paths(arg),
            })
        })
        .collect()
}

fn paths(arg: &Arg) -> PathRule {
    let names = arg.get_value_names().unwrap_or_default();
    match arg.get_value_hint() {
        ValueHint::FilePath | ValueHint::DirPath => PathRule::All,
        _ if names.iter().any(|name| name.contains(UNIX_PATH)) => PathRule::AfterUnix,
        _ => PathRule::None,
    }
}

fn kind(arg: &Arg) -> ValueKind {
    let names = arg.get_value_names().unwrap_or_default();
    match arg.get_action() {
        ArgAction::SetTrue => ValueKind::Switch,
        ArgAction::Append if names.iter().any(|name| name == NAME_VALUE) => ValueKind::Pairs,
        ArgAction::Append => ValueKind::Many,
        _ => ValueKind::One,
    }
}

/// Parses a table as a command line of `command`. Adds mistakes to `mistakes`, and returns `None` then.
fn parse_table<T: Parser>(
    command: &Command,
    table: &Table,
    mistakes: &mut Vec<Mistake>,
) -> Option<T> {
    let before = mistakes.len();
    for setting in &table.settings {
        let alone = command.clone().try_get_matches_from(arguments(setting));
        if let Err(error) = alone
            && error.kind() != ErrorKind::MissingRequiredArgument
        {
            mistakes.push(Mistake {
                line: setting.line,
                text: explain(&error, setting),
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
    let parsed = T::try_parse_from(table.settings.iter().flat_map(arguments));
    parsed
        .map_err(|error| mistakes.push(combination_mistake(command, table, &error)))
        .ok()
}

/// A mistake in keys that are fine one by one: one of them needs another key.
fn combination_mistake(command: &Command, table: &Table, error: &clap::Error) -> Mistake {
    let missing = missing_keys(error);
    let needs_missing = |setting: &&Setting| {
        let alone = command.clone().try_get_matches_from(arguments(setting));
        alone.is_err_and(|error| {
            let mut keys = missing_keys(&error).into_iter();
            keys.any(|key| missing.contains(&key))
        })
    };
    let culprit = table.settings.iter().find(needs_missing);
    Mistake {
        line: culprit.map_or(table.line, |setting| setting.line),
        text: match missing.is_empty() {
            true => first_line(error),
            false => format!("missing: {}", missing.join(", ")),
        },
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

/// The mistake in one setting, in words for a config file.
fn explain(error: &clap::Error, setting: &Setting) -> String {
    let key = &setting.key;
    let context = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.clone()),
        Some(ContextValue::Strings(texts)) => Some(texts.join(", ")),
        _ => None,
    };
    let value = context(ContextKind::InvalidValue).unwrap_or_else(|| setting.values.join(", "));
    let reason = std::error::Error::source(error).map(ToString::to_string);
    let choices = || context(ContextKind::ValidValue).map(|valid| format!("write one of {valid}"));
    let reason = reason.or_else(choices).unwrap_or_else(|| first_line(error));
    format!("{key} = {value:?}: {reason}")
}

/// The keys that are missing according to `error`.
fn missing_keys(error: &clap::Error) -> Vec<String> {
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
