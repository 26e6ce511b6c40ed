//! What the flags of devices mean: their help, from the catalogue.

use devices::catalog::{Entry, Presence};
use serde_json::Value;

/// What a device is, for a line of help.
pub fn summary(entry: &dyn Entry) -> String {
    let (flag, example) = (entry.flag(), entry.example());
    let mut summary = entry.summary().to_owned();
    summary.get_mut(..1).map(str::make_ascii_uppercase);
    match entry.presence() {
        Presence::Standard(usual) => format!("{summary} [default: {usual}]"),
        Presence::OnRequest => format!("{summary} (--{flag} {example})"),
    }
}

/// A device's summary and its keys, from the doc comments of its settings. Of a device that is on or off the summary
/// says it all.
pub fn keys(entry: &dyn Entry) -> String {
    let schema = Value::from(entry.schema());
    let mut text = summary(entry);
    let mut keys: Vec<_> = settings(&schema).collect();
    // As their author has ordered them.
    keys.sort_by_key(|(key, _)| entry.keys().iter().position(|known| known == key));
    for (key, of) in keys {
        let default = match of.get("default") {
            None | Some(Value::Null) => String::new(),
            Some(Value::String(word)) => format!(" [default: {word}]"),
            Some(Value::Bool(on)) => format!(" [default: {}]", if *on { "on" } else { "off" }),
            Some(other) => format!(" [default: {other}]"),
        };
        text.push_str(&format!("\n  {key}: {}{default}", doc(of)));
        for word in words(&schema, of) {
            let name = word.get("const").and_then(Value::as_str).unwrap_or_default();
            text.push_str(&format!("\n    {name}: {}", doc(word)));
        }
    }
    text
}

/// The keys of a device's schema, but for the one that `on` and `off` stand for.
pub fn settings(schema: &Value) -> impl Iterator<Item = (&String, &Value)> {
    let properties = schema.get("properties").and_then(Value::as_object);
    properties.into_iter().flatten().filter(|(key, _)| *key != SWITCH)
}

/// The key of a device that a machine has or has not.
const SWITCH: &str = "enabled";

/// The doc comment of a part of a schema.
fn doc(of: &Value) -> String {
    of.get("description").and_then(Value::as_str).unwrap_or_default().replace('\n', " ")
}

/// The words that a key may have for its value, if it takes one of a few: in the definition it refers to.
fn words<'a>(schema: &'a Value, of: &'a Value) -> impl Iterator<Item = &'a Value> {
    let either = of.get("anyOf").and_then(Value::as_array).into_iter().flatten();
    let targets = std::iter::once(of).chain(either).filter_map(|of| of.get("$ref")?.as_str());
    let definitions = targets.filter_map(|target| schema.pointer(target.strip_prefix('#')?));
    definitions.filter_map(|of| of.get("oneOf")?.as_array()).flatten()
}
