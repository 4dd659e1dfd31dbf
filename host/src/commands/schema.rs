//! `schema`: what a config file may have, for editors.

use std::io::{self, Write};
use std::process::ExitCode;

use clap::{Arg, Command, CommandFactory};
use serde_json::{Map, Value, json};
use wasinetd::Error;
use wasinetd::config::{Key, Takes};

use super::configured::keys;
use crate::cli::{ServerTable, ServiceTable};

/// Prints a JSON schema (draft 2020-12) of the config file.
pub(crate) fn schema() -> Result<ExitCode, Error> {
    let mut schema = table(&ServerTable::command());
    schema["$schema"] = json!("https://json-schema.org/draft/2020-12/schema");
    schema["title"] = json!("wasinetd.toml");
    schema["properties"]["service"] = json!({
        "description": "A service: where it listens, and the guest that each connection is given to",
        "type": "array",
        "minItems": 1,
        "items": table(&ServiceTable::command()),
    });
    schema["required"] = json!(["service"]);
    let text = serde_json::to_string_pretty(&schema).unwrap_or_default();
    // Whoever closes the pipe has read enough.
    let _ = writeln!(io::stdout().lock(), "{text}");
    Ok(ExitCode::SUCCESS)
}

fn table(command: &Command) -> Value {
    let keys = keys(command);
    let arg = |key: &Key| {
        let mut args = command.get_arguments();
        args.find(|arg| arg.get_long() == Some(&key.name))
    };
    let args = keys.iter().filter_map(|key| Some((key, arg(key)?)));
    let properties: Map<String, Value> = args
        .clone()
        .map(|(key, arg)| (key.name.clone(), property(key, arg)))
        .collect();
    let required = args.filter(|(_, arg)| arg.is_required_set());
    let required: Vec<&str> = required.map(|(key, _)| &*key.name).collect();
    json!({
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": false,
    })
}

fn property(key: &Key, arg: &Arg) -> Value {
    let values = arg.get_possible_values();
    let one = match (key.takes, values.is_empty()) {
        (Takes::Switch, _) => json!({ "type": "boolean" }),
        (_, true) => json!({ "type": ["string", "integer"] }),
        (_, false) => {
            let names: Vec<&str> = values.iter().map(|value| value.get_name()).collect();
            json!({ "enum": names })
        }
    };
    let several = json!({ "type": "array", "items": one });
    let pairs = json!({ "type": "object", "additionalProperties": one });
    let mut property = match key.takes {
        Takes::Switch | Takes::One => one,
        Takes::Many => json!({ "anyOf": [one, several] }),
        Takes::Pairs => json!({ "anyOf": [one, several, pairs] }),
    };
    if let Some(help) = arg.get_help() {
        property["description"] = json!(help.to_string());
    }
    if let [default] = arg.get_default_values() {
        property["default"] = json!(default.to_string_lossy());
    }
    property
}
