//! The devices of a plan: those that were given, and what every machine has.

use std::collections::BTreeSet;

use base::{Fail, Result, Why};
use devices::catalog::{self, CATALOG, Entry, Presence};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// One device of a plan.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Device {
    /// Name of its catalogue entry.
    pub kind: String,
    /// Name of this one, in messages and counters: `disk0`. Chosen if it is left out.
    #[serde(default)]
    pub name: String,
    /// Its settings; the defaults are filled in.
    #[serde(default = "empty")]
    pub spec: Value,
}

fn empty() -> Value {
    Value::Object(serde_json::Map::new())
}

/// Adds what every machine has; names all, and fills in the defaults of their settings.
///
/// # Errors
/// [`Why::Usage`]: an unknown kind, a name that is none or taken, settings that make no sense.
pub fn complete(mut given: Vec<Device>) -> Result<Vec<Device>> {
    if let Some(stranger) = given.iter().find(|device| catalog::find(&device.kind).is_none()) {
        let known: Vec<_> = CATALOG.iter().map(|entry| entry.name()).collect();
        return Err(Fail::new(Why::Usage, format!("add a device of kind `{}`", stranger.kind))
            .because(format!("the kinds are {}", known.join(", "))));
    }
    let mut names: BTreeSet<String> = BTreeSet::new();
    for device in given.iter().filter(|device| !device.name.is_empty()) {
        let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '_';
        if !device.name.chars().all(fits) || device.name.len() > 32 {
            return Err(Fail::new(Why::Usage, format!("name a device `{}`", device.name))
                .because("a name is at most 32 small letters, digits, `-` and `_`"));
        }
        if !names.insert(device.name.clone()) {
            return Err(Fail::new(Why::Usage, format!("name a device `{}`", device.name))
                .because("another device has that name"));
        }
    }
    let mut all = Vec::new();
    for entry in CATALOG {
        let (mut mine, rest) = given.into_iter().partition(|device| device.kind == entry.name());
        given = rest;
        complete_kind(*entry, &mut mine, &mut names)?;
        all.append(&mut mine);
    }
    Ok(all)
}

/// Completes the devices of one kind.
fn complete_kind(entry: &dyn Entry, mine: &mut Vec<Device>, names: &mut BTreeSet<String>) -> Result<()> {
    if let Presence::Standard(usual) = entry.presence() {
        if mine.len() > 1 {
            return Err(Fail::new(Why::Usage, format!("add a second {} device", entry.name()))
                .because("a machine has exactly one"));
        }
        if mine.is_empty() {
            mine.push(Device {
                kind: entry.name().to_owned(),
                name: String::new(),
                spec: entry.parse(usual)?,
            });
        }
    }
    let mut number = 0;
    for device in mine {
        while device.name.is_empty() {
            let name = match entry.presence() {
                Presence::Standard(_) if number == 0 => entry.name().to_owned(),
                _ => format!("{}{number}", entry.flag()),
            };
            number += 1;
            if names.insert(name.clone()) {
                device.name = name;
            }
        }
        device.spec = entry.check(&device.spec, &device.name)?;
    }
    Ok(())
}
