//! The text of a flag: `key=value,key=value` becomes a value with a schema.

use base::{Fail, Result, Why};
use schemars::JsonSchema;
use serde::Deserializer;
use serde::de::{DeserializeOwned, Visitor};

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
    parse_full(full).map_err(|cause| {
        Fail::new(Why::Usage, format!("read --{} {text}", form.flag)).because(cause).hint(form.hint())
    })
}

/// Reads a change of settings of the device `name`, `key=value,key=value`; `example` is a working one, for the hint.
///
/// # Errors
/// As [`parse`].
pub fn change<T: DeserializeOwned + JsonSchema>(name: &str, example: &str, text: &str) -> Result<T> {
    let bare = text.split(',').find(|pair| !pair.contains('='));
    let wrong = bare.map(|word| format!("`{word}` is not KEY=VALUE"));
    wrong.map_or_else(|| parse_full(text.to_owned()), Err).map_err(|cause| {
        Fail::new(Why::Usage, format!("change {name}: {text}"))
            .because(cause)
            .hint(format!("an example: {name} {example}"))
    })
}

/// Reads a text in which every value has its key; or says what is wrong.
fn parse_full<T: DeserializeOwned + JsonSchema>(full: String) -> std::result::Result<T, String> {
    // An empty list would be one that is not there, and a list can be that of all that is allowed; a file without a name
    // is none. Most of them come from a variable of a shell that is not set.
    let pairs = full.replace(",,", "\0");
    let mut pairs = pairs.split(',').filter_map(|pair| pair.split_once('='));
    if let Some((key, _)) = pairs.find(|(_, value)| value.is_empty()) {
        return Err(format!("{key}=: it has no value"));
    }
    let full = gather(&full, |key| {
        let kind = schemars::schema_for!(T).pointer(&format!("/properties/{key}/type")).cloned();
        kind == Some("array".into())
    });
    read(&full).map_err(|cause| blame(&full, cause, |begin| read::<T>(begin).err()))
}

/// Reads the text of a flag in which every value has its key; or says what is wrong.
fn read<T: DeserializeOwned>(full: &str) -> std::result::Result<T, String> {
    let (quoted, objects) = quote(full);
    let objects = objects.iter().map(|(id, value)| (id.as_str(), value.as_str())).collect();
    serde_aco::from_args(&quoted, &objects).map_err(spell)
}

/// Says which pair of the text `full` is to blame for `cause`. The reader does not tell, but it goes from left to right:
/// the pair is the last of the shortest beginning that fails in the same way.
fn blame(full: &str, cause: String, fails: impl Fn(&str) -> Option<String>) -> String {
    // Of keys that are unknown, missing or given twice it tells.
    if ["unknown field", "missing field", "duplicate field"].iter().any(|words| cause.starts_with(words)) {
        return cause;
    }
    let text = full.replace(",,", "\0");
    let pairs: Vec<&str> = text.split(',').collect();
    let culprit = (1..=pairs.len()).find_map(|count| {
        let begin = pairs.get(..count)?;
        (fails(&begin.join(",").replace('\0', ",,"))? == cause).then_some(*begin.last()?)
    });
    culprit.map_or_else(|| cause.clone(), |pair| format!("{}: {cause}", pair.replace('\0', ",")))
}

/// The keys of settings, in the order in which they are declared.
pub fn keys<T: DeserializeOwned>() -> &'static [&'static str] {
    let mut keys: &'static [&'static str] = &[];
    // A failure, as there is nothing to read but the question.
    let _ = T::deserialize(Keys(&mut keys));
    keys
}

/// Answers nothing, and remembers which keys a structure asks for.
struct Keys<'a>(&'a mut &'static [&'static str]);

impl<'de> Deserializer<'de> for Keys<'_> {
    type Error = serde::de::value::Error;

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> std::result::Result<V::Value, Self::Error> {
        Err(serde::de::Error::custom("nothing to read"))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> std::result::Result<V::Value, Self::Error> {
        *self.0 = fields;
        self.deserialize_any(visitor)
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct
        newtype_struct seq tuple tuple_struct map enum identifier ignored_any
    }
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
        E::ExpectedMapEq => "it is not key=value".to_owned(),
        E::ExpectedInteger => "it is not a whole number".to_owned(),
        E::ExpectedFloat => "it is not a number".to_owned(),
        E::ExpectedBool => "it is neither on nor off".to_owned(),
        E::ExpectedUnit => "it is one too many".to_owned(),
        E::Trailing(text) => format!("`{text}` is one too many"),
        E::Ignored(key) => format!("`{key}` makes no sense here"),
        E::IdNotFound(id) => format!("there is no `{id}`"),
        E::Overflow => "the number is too large".to_owned(),
        E::UnknownType => "it has no type".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Debug, Deserialize, JsonSchema)]
    #[serde(deny_unknown_fields)]
    #[expect(dead_code, reason = "only read")]
    struct Spec {
        path: String,
        #[serde(default)]
        open: bool,
        #[serde(default)]
        count: u16,
        #[serde(default)]
        list: Vec<String>,
    }

    #[test]
    fn a_bad_value_is_named_with_its_key() {
        let form = Form { flag: "thing", bare: "path", example: "a" };
        for (text, cause) in [
            ("a,open=maybe", "open=maybe: it is neither on nor off"),
            ("a,,b,list=x,list=y,,z,open=no", "open=no: it is neither on nor off"),
            ("open=on,count=many,path=a", "count=many: it is not a whole number"),
            ("a,count=70000", "count=70000: the number is too large"),
            ("a,list=", "list=: it has no value"),
            ("a,list=x,list=,open=on", "list=: it has no value"),
            ("", "path=: it has no value"),
            ("a,open=on,nonsense", "nonsense: it is not key=value"),
            ("open=on", "missing field `path`"),
        ] {
            let fail = parse::<Spec>(&form, text).unwrap_err();
            assert_eq!(fail.summary(), format!("read --thing {text}: {cause}"));
        }
        // A sign at the end of a value is not the one behind its key.
        assert!(parse::<Spec>(&form, "a,list=c2VjcmV0Cg==,list=,,").is_ok());
        assert_eq!(keys::<Spec>(), ["path", "open", "count", "list"]);
        assert_eq!(keys::<u8>(), [""; 0]);
    }
}
