//! `schema`: a JSON schema of the config file, for editors.

use std::io::{self, Write};
use std::process::ExitCode;

use clap::{Arg, Command, CommandFactory};
use serde_json::{Map, Value, json};
use wasinetd::config::file::{Key, ValueKind};

use crate::cli::config_file::keys;
use crate::cli::{ServerTable, ServiceTable};
use crate::exit::Failure;

/// Prints the schema (JSON Schema draft 2020-12).
pub(crate) fn schema() -> Result<ExitCode, Failure> {
    let mut schema = table(&ServerTable::command());
    schema["$schema"] = json!("https://json-schema.org/draft/2020-12/schema");
    schema["title"] = json!("wasinetd.toml");
    schema["properties"]["service"] = json!({
        "description": "A service: its addresses, and the guest that handles its connections",
        "type": "array",
        "minItems": 1,
        "items": table(&ServiceTable::command()),
    });
    schema["required"] = json!(["service"]);
    let text = serde_json::to_string_pretty(&schema).unwrap_or_default();
    // The reader may have closed the pipe.
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
    let single = match (key.kind, values.is_empty()) {
        (ValueKind::Switch, _) => json!({ "type": "boolean" }),
        (_, true) => json!({ "type": ["string", "integer"] }),
        (_, false) => {
            let names: Vec<&str> = values.iter().map(|value| value.get_name()).collect();
            json!({ "enum": names })
        }
    };
    let several = json!({ "type": "array", "items": single });
    let pairs = json!({ "type": "object", "additionalProperties": single });
    let mut property = match key.kind {
        ValueKind::Switch | ValueKind::One => single,
        ValueKind::Many => json!({ "anyOf": [single, several] }),
        ValueKind::Pairs => json!({ "anyOf": [single, several, pairs] }),
    };
    if let Some(help) = arg.get_help() {
        property["description"] = json!(help.to_string());
    }
    if let [default] = arg.get_default_values() {
        property["default"] = json!(default.to_string_lossy());
    }
    property
}
