//! Where the line of a chip ends on the host: in a place that the chip knows, `to=PLACE`, or in a file, `file=PATH`.

use std::fs::File;
use std::path::{Path, PathBuf};

use base::host::{Access, Host};
use base::{Fail, Result, Why};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What can be said about the end of a line: `to=...` or `file=...`. `To` has the places.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, bound(deserialize = "To: Deserialize<'de>"))]
pub struct LineEnd<To> {
    /// A place that is no file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<To>,
    /// A file for the output, emptied first. There is no input then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
}

/// What was chosen.
pub enum Chosen<To> {
    /// A place.
    Place(To),
    /// A file, open and empty.
    File(File),
}

impl<To: Copy> LineEnd<To> {
    /// The end of the line of the chip `name`: `usual` if nothing was said.
    ///
    /// # Errors
    /// The file cannot be opened.
    pub fn choose(&self, usual: To, name: &str, host: &dyn Host) -> Result<Chosen<To>> {
        match self.claim(name, host)? {
            Some(file) => Ok(Chosen::File(file)),
            None => Ok(Chosen::Place(self.to.unwrap_or(usual))),
        }
    }

    /// Sees to it that the line of the chip `name` has one end.
    ///
    /// # Errors
    /// [`Why::Usage`]: both are given.
    pub fn check(&self, name: &str) -> Result<()> {
        if self.file.is_some() && self.to.is_some() {
            return Err(Fail::new(Why::Usage, format!("choose the end of {name}"))
                .because("both to and file are given")
                .hint("leave one of them out"));
        }
        Ok(())
    }

    /// The file of the chip `name`, if it was given one.
    ///
    /// # Errors
    /// It cannot be opened.
    pub fn claim(&self, name: &str, host: &dyn Host) -> Result<Option<File>> {
        self.file.as_deref().map(|path| empty(path, name, host)).transpose()
    }
}

/// Opens the file at `path` for the output of `name`, and empties it.
///
/// # Errors
/// As the host answers.
pub fn empty(path: &Path, name: &str, host: &dyn Host) -> Result<File> {
    host.open(&format!("{name} output"), path, Access { write: true, create: true, ..Access::default() })
}
