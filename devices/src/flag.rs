//! The text of a flag: `key=value,key=value` becomes a value with a schema.

use base::{Fail, Result, Why};
use schemars::JsonSchema;
use serde::de::DeserializeOwned;

/// A flag that takes keys.
#[derive(Clone, Copy, Debug)]
pub struct Form {
    /// Its name, without dashes.
    pub flag: &'static str,
    /// The key that a bare first value stands for.
    pub bare: &'static str,
    /// A working value, for the hint.
    pub example: &'static str,
}

impl Form {
    /// The remedy for a value that makes no sense.
    pub fn hint(&self) -> String {
        format!("an example: --{} {}", self.flag, self.example)
    }
}

/// Reads `key=value,key=value`; `,,` is a comma within a value. A key whose value is a list may be repeated.
///
/// # Errors
/// [`Why::Usage`]: an unknown key (the known ones are named), a missing or a bad value.
pub fn parse<T: DeserializeOwned + JsonSchema>(form: &Form, text: &str) -> Result<T> {
    let first = text.split(',').next().unwrap_or_default();
    let full = if first.contains('=') { text.to_owned() } else { format!("{}={text}", form.bare) };
    let full = gather(&full, |key| {
        let kind = schemars::schema_for!(T).pointer(&format!("/properties/{key}/type")).cloned();
        kind == Some("array".into())
    });
    let (quoted, objects) = quote(&full);
    let objects = objects.iter().map(|(id, value)| (id.as_str(), value.as_str())).collect();
    serde_aco::from_args(&quoted, &objects).map_err(|cause| {
        let cause = spell(cause);
        Fail::new(Why::Usage, format!("read --{} {text}", form.flag)).because(cause).hint(form.hint())
    })
}

/// Puts the values of a key that is given more than once, and may be, behind its first: `,,` is between them.
fn gather(text: &str, is_list: impl Fn(&str) -> bool) -> String {
    let text = text.replace(",,", "\0");
    let mut pairs: Vec<(&str, String)> = Vec::new();
    for pair in text.split(',') {
        let key = pair.split('=').next().unwrap_or_default();
        let value = pair.strip_prefix(key).and_then(|rest| rest.strip_prefix('='));
        match (pairs.iter_mut().find(|(known, _)| *known == key), value) {
            (Some((_, all)), Some(value)) if is_list(key) => {
                all.push('\0');
                all.push_str(value);
            }
            _ => pairs.push((key, pair.to_owned())),
        }
    }
    let pairs: Vec<String> = pairs.into_iter().map(|(_, pair)| pair).collect();
    pairs.join(",").replace('\0', ",,")
}

/// Makes values safe for the reader of flags, for which a comma ends a value and `id_` begins the name of an object:
/// the text for it, and the objects that stand for such values. In a flag `,,` is a comma within a value.
fn quote(text: &str) -> (String, Vec<(String, String)>) {
    // No argument of a program holds a zero byte, so it can stand for those commas, and make a name no value has.
    let text = text.replace(",,", "\0");
    let mut objects = Vec::new();
    let quoted = text.split(',').map(|pair| {
        let Some((key, value)) = pair.split_once('=') else { return pair.to_owned() };
        let meant = value.replace('\0', ",");
        if meant.starts_with("id_") {
            // Stands for itself, however often the reader looks it up.
            objects.push((meant.clone(), meant.clone()));
        }
        if meant == value {
            return pair.to_owned();
        }
        let name = format!("id_\0{}", objects.len());
        objects.push((name.clone(), meant));
        format!("{key}={name}")
    });
    (quoted.collect::<Vec<_>>().join(","), objects)
}

/// What is wrong with the text of a flag, in words.
fn spell(error: serde_aco::Error) -> String {
    use serde_aco::Error as E;
    match error {
        E::Message(text) => text,
        E::ExpectedMapEq => "it is not a list of key=value".to_owned(),
        E::ExpectedInteger => "a value is not a whole number".to_owned(),
        E::ExpectedFloat => "a value is not a number".to_owned(),
        E::ExpectedBool => "a value is neither on nor off".to_owned(),
        E::ExpectedUnit => "a value is one too many".to_owned(),
        E::Trailing(text) => format!("`{text}` is one too many"),
        E::Ignored(key) => format!("`{key}` makes no sense here"),
        E::IdNotFound(id) => format!("there is no `{id}`"),
        E::Overflow => "a number is too large".to_owned(),
        E::UnknownType => "a value has no type".to_owned(),
    }
}
