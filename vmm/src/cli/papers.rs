//! What is printed about mayfly itself: completions, manual pages, the schema of a plan.

use clap::ArgMatches;
use clap_complete::Shell;
use devices::catalog::CATALOG;
use serde_json::{Map, Value, json};

use super::command::{Detail, command};
use super::say;
use crate::outcome::code;
use crate::plan::Plan;

/// Carries out `mayfly completions`.
pub fn completions(matches: &ArgMatches) -> u8 {
    let Some(shell) = matches.get_one::<Shell>("shell") else { return code::USAGE };
    let mut script = Vec::new();
    clap_complete::generate(*shell, &mut command(Detail::Keys), "mayfly", &mut script);
    say(&String::from_utf8_lossy(&script))
}

/// Carries out `mayfly man`.
pub fn man(matches: &ArgMatches) -> u8 {
    let mut command = command(Detail::Keys).disable_help_subcommand(true);
    command.build();
    let page = match matches.get_one::<String>("command").and_then(|name| command.find_subcommand(name)) {
        Some(page) => page.clone(),
        None => command,
    };
    let mut roff = Vec::new();
    match clap_mangen::Man::new(page).render(&mut roff) {
        Ok(()) => say(&String::from_utf8_lossy(&roff)),
        Err(_) => code::HOST,
    }
}

/// Carries out `mayfly schema`.
pub fn schema() -> u8 {
    say(&format!("{:#}\n", plan_schema()))
}

/// The JSON schema of a plan, in which a device's kind decides what its settings may be.
fn plan_schema() -> Value {
    let mut schema = Value::from(schemars::schema_for!(Plan));
    let mut definitions = Map::new();
    let mut settings = Vec::new();
    for entry in CATALOG {
        let mut spec = Value::from(entry.schema());
        let name = format!("{}-settings", entry.name());
        point_to(&mut spec, entry.name());
        if let Some(object) = spec.as_object_mut() {
            object.remove("$schema");
            if let Some(Value::Object(own)) = object.remove("$defs") {
                definitions.extend(own.into_iter().map(|(key, of)| (format!("{}-{key}", entry.name()), of)));
            }
        }
        settings.push(json!({
            "if": { "properties": { "kind": { "const": entry.name() } } },
            "then": { "properties": { "spec": { "$ref": format!("#/$defs/{name}") } } },
        }));
        definitions.insert(name, spec);
    }
    let kinds: Vec<_> = CATALOG.iter().map(|entry| entry.name()).collect();
    if let Some(defs) = schema.get_mut("$defs").and_then(Value::as_object_mut) {
        if let Some(device) = defs.get_mut("Device").and_then(Value::as_object_mut) {
            if let Some(kind) = device.get_mut("properties").and_then(|p| p.get_mut("kind")?.as_object_mut())
            {
                kind.insert("enum".to_owned(), json!(kinds));
            }
            if !settings.is_empty() {
                device.insert("allOf".to_owned(), Value::Array(settings));
            }
        }
        defs.extend(definitions);
    }
    schema
}

/// Gives the references within a device's schema the names that its definitions get in the common one.
fn point_to(schema: &mut Value, kind: &str) {
    match schema {
        Value::Object(object) => {
            for (key, value) in object {
                match value {
                    Value::String(target) if key == "$ref" => {
                        if let Some(name) = target.strip_prefix("#/$defs/") {
                            *target = format!("#/$defs/{kind}-{name}");
                        }
                    }
                    other => point_to(other, kind),
                }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(|item| point_to(item, kind)),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn references(schema: &Value, found: &mut Vec<String>) {
        match schema {
            Value::Object(object) => {
                found.extend(object.get("$ref").and_then(Value::as_str).map(str::to_owned));
                object.values().for_each(|value| references(value, found));
            }
            Value::Array(items) => items.iter().for_each(|item| references(item, found)),
            _ => {}
        }
    }

    #[test]
    fn the_schema_holds_every_device_and_no_dangling_reference() {
        let schema = plan_schema();
        let mut found = Vec::new();
        references(&schema, &mut found);
        assert!(!found.is_empty());
        for reference in found {
            assert!(schema.pointer(reference.trim_start_matches('#')).is_some(), "{reference} dangles");
        }
        for entry in CATALOG {
            let pointer = format!("/$defs/{}-settings/properties", entry.name());
            assert!(schema.pointer(&pointer).is_some(), "{pointer}");
        }
    }

    #[test]
    fn point_to_renames_only_references() {
        let mut schema = json!({"$ref": "#/$defs/A", "x": [{"$ref": "#/$defs/B"}], "const": "#/$defs/C"});
        point_to(&mut schema, "blk");
        assert_eq!(
            schema,
            json!({"$ref": "#/$defs/blk-A", "x": [{"$ref": "#/$defs/blk-B"}], "const": "#/$defs/C"})
        );
    }
}
