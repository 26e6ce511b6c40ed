//! What an image says of the program in it. OCI image specification, "Image Configuration".

use serde::{Deserialize, Serialize};

/// The configuration of an image, as far as it matters here.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Config {
    /// The processor it is for.
    pub architecture: String,
    /// The system it is for.
    pub os: String,
    /// How its program is run.
    #[serde(deserialize_with = "or_nothing")]
    pub config: Execution,
    /// Its layers.
    pub rootfs: RootFs,
}

/// How the program of an image is run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct Execution {
    /// Who it runs as: `USER[:GROUP]`.
    #[serde(deserialize_with = "or_nothing")]
    pub user: String,
    /// Its environment.
    #[serde(deserialize_with = "or_nothing")]
    pub env: Vec<String>,
    /// The first words of what is run.
    #[serde(deserialize_with = "or_nothing")]
    pub entrypoint: Vec<String>,
    /// The words after them, unless others are given.
    #[serde(deserialize_with = "or_nothing")]
    pub cmd: Vec<String>,
    /// Where it starts.
    #[serde(deserialize_with = "or_nothing")]
    pub working_dir: String,
}

/// The layers of an image.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RootFs {
    /// Digests of the unpacked archives.
    #[serde(deserialize_with = "or_nothing")]
    pub diff_ids: Vec<String>,
}

/// Tools write `null` for what there is not.
fn or_nothing<'de, D: serde::Deserializer<'de>, T: Deserialize<'de> + Default>(
    from: D,
) -> Result<T, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or_default())
}

impl Execution {
    /// What is run: the image's entrypoint or `entrypoint`, and the image's command or `words`. Who gives an entrypoint, the
    /// command of the image is not meant for; an empty one is none.
    pub fn argv(&self, entrypoint: Option<&str>, words: &[String]) -> Vec<String> {
        let first: Vec<String> = match entrypoint {
            Some(word) => [word].into_iter().filter(|word| !word.is_empty()).map(str::to_owned).collect(),
            None => self.entrypoint.clone(),
        };
        let rest = match (words, entrypoint) {
            ([], None) => self.cmd.as_slice(),
            (words, _) => words,
        };
        first.into_iter().chain(rest.iter().cloned()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_run_follows_the_rules_of_docker() {
        let words = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        for (entrypoint, cmd, flag, given, wanted) in [
            ("", "sh", None, "", "sh"),
            ("", "sh", None, "ls -l", "ls -l"),
            ("tini --", "server -d", None, "", "tini -- server -d"),
            ("tini --", "server -d", None, "ls", "tini -- ls"),
            ("tini --", "server", Some("cat"), "", "cat"),
            ("tini --", "server", Some("cat"), "f", "cat f"),
            ("tini --", "server", Some(""), "ls", "ls"),
            ("tini --", "server", Some(""), "", ""),
            ("", "", None, "", ""),
        ] {
            let found = Execution { entrypoint: words(entrypoint), cmd: words(cmd), ..Execution::default() };
            assert_eq!(
                found.argv(flag, &words(given)),
                words(wanted),
                "{entrypoint:?} {cmd:?} with {flag:?} and {given:?}"
            );
        }
    }

    #[test]
    fn what_tools_leave_out_or_call_null_is_nothing() {
        for text in [
            r#"{"config": null}"#,
            r#"{"config": {"Env": null, "Cmd": null, "Entrypoint": null, "WorkingDir": ""}}"#,
            "{}",
        ] {
            assert_eq!(serde_json::from_str::<Config>(text).unwrap(), Config::default(), "{text}");
        }
    }
}
