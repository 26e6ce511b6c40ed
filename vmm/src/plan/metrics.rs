//! Where a plan wants the machine's counters written.

use std::fs::File;
use std::path::PathBuf;
use std::time::Duration;

use base::host::{Access, Host};
use base::{Fail, Result, Why};
use devices::flag::{self, Form};
use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize};

use super::Period;

/// The flag.
const FORM: Form = Form { flag: "metrics", bare: "path", example: "counters.jsonl,every=500ms" };
/// A line costs the control thread some microseconds; more of them than this nobody needs.
const SHORTEST: Duration = Duration::from_millis(10);

/// Counters of the machine and its devices, written to a file while it runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Metrics {
    /// The file: emptied, then a line of JSON at the start, after each period and at the end.
    pub path: PathBuf,
    /// The period, 10ms or longer.
    #[serde(default = "second", deserialize_with = "text")]
    #[schemars(with = "String")]
    pub every: Period,
}

fn second() -> Period {
    Period::of(Duration::from_secs(1))
}

/// A flag has text only, and its reader wants to know that beforehand.
fn text<'de, D: Deserializer<'de>>(from: D) -> Result<Period, D::Error> {
    String::deserialize(from)?.parse().map_err(serde::de::Error::custom)
}

impl Metrics {
    /// Reads the text of the flag.
    ///
    /// # Errors
    /// [`Why::Usage`]: an unknown key, a bad value.
    pub fn parse(text: &str) -> Result<Metrics> {
        flag::parse(&FORM, text)
    }

    /// Opens the file as an output of a device is opened: emptied, and a pipe needs its reader first.
    ///
    /// # Errors
    /// As the host answers.
    pub fn open(&self, host: &dyn Host) -> Result<File> {
        host.open("metrics file", &self.path, Access { create: true, write: true, ..Access::default() })
    }

    /// Sees to it that the values make sense.
    ///
    /// # Errors
    /// [`Why::Usage`]: they do not.
    pub(super) fn check(&self) -> Result<()> {
        if self.every.duration() < SHORTEST {
            return Err(Fail::new(Why::Usage, format!("write metrics every {}", self.every))
                .because(format!("the shortest period is {} ms", SHORTEST.as_millis())));
        }
        Ok(())
    }
}
