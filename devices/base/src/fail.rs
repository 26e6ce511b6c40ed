//! The two ways things go wrong: a [`Fail`] is told to the operator, a [`Fault`] is the guest's own doing.
//!
//! They never convert into each other: what a guest says must not end a run or fill a log, and what the host
//! lacks must not be blamed on the guest.

use std::error::Error;
use std::fmt;
use std::io;
use std::path::Path;

/// A result that can be told to the operator.
pub type Result<T, E = Fail> = std::result::Result<T, E>;

/// The kind of a failure: enough to choose an exit code or an HTTP status, and no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// The command line, plan or request asks for something that makes no sense.
    Usage,
    /// Something named does not exist.
    Missing,
    /// The host refuses: a permission, a lock, a limit.
    Denied,
    /// A file or a value given is not what it has to be.
    Invalid,
    /// This host cannot do it: no KVM, a missing capability, a missing program.
    Unsupported,
    /// The host failed while doing it.
    Host,
}

/// A failure worth telling: what was being done, to what, why it failed, and what would help.
///
/// Displayed as `open disk0 image /img/a.ext4: Permission denied`, with the remedy on a line of its own:
/// `hint: ...`. The text is lower case and begins with a verb.
#[derive(Debug)]
pub struct Fail {
    /// The kind.
    pub why: Why,
    doing: String,
    cause: Option<Box<dyn Error + Send + Sync>>,
    hint: Option<String>,
}

impl Fail {
    /// A failure of kind `why` while `doing` something: verb first, subject named.
    pub fn new(why: Why, doing: impl Into<String>) -> Self {
        Fail { why, doing: doing.into(), cause: None, hint: None }
    }

    /// Adds the cause, shown after a colon.
    #[must_use]
    pub fn because(mut self, cause: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        self.cause = Some(cause.into());
        self
    }

    /// Adds the remedy, shown on its own line.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// The remedy, if one is known.
    pub fn remedy(&self) -> Option<&str> {
        self.hint.as_deref()
    }

    /// The failure in one line, without the remedy.
    pub fn summary(&self) -> String {
        match &self.cause {
            Some(cause) => format!("{}: {}", self.doing, plain(cause.as_ref())),
            None => self.doing.clone(),
        }
    }
}

/// The text of an error without the ` (os error N)` that the standard library adds: the words say it already.
fn plain(cause: &(dyn Error + 'static)) -> String {
    let text = cause.to_string();
    match text.find(" (os error ") {
        Some(at) => text[..at].to_owned(),
        None => text,
    }
}

impl fmt::Display for Fail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.summary())?;
        match &self.hint {
            Some(hint) => write!(f, "\n  hint: {hint}"),
            None => Ok(()),
        }
    }
}

impl Error for Fail {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.cause.as_deref().map(|cause| cause as _)
    }
}

/// Turns any error into a [`Fail`] by saying what was being done.
pub trait Doing<T> {
    /// Names the kind of failure and what was being done.
    fn doing<S: Into<String>>(self, why: Why, what: impl FnOnce() -> S) -> Result<T>;
}

impl<T, E: Into<Box<dyn Error + Send + Sync>>> Doing<T> for std::result::Result<T, E> {
    fn doing<S: Into<String>>(self, why: Why, what: impl FnOnce() -> S) -> Result<T> {
        self.map_err(|cause| Fail::new(why, what()).because(cause))
    }
}

/// The kind that fits an I/O error of the host.
pub fn why_of(error: &io::Error) -> Why {
    use io::ErrorKind as K;
    match error.kind() {
        K::NotFound => Why::Missing,
        K::PermissionDenied | K::ResourceBusy | K::ReadOnlyFilesystem | K::AddrInUse => Why::Denied,
        K::InvalidInput | K::InvalidData | K::IsADirectory | K::NotADirectory => Why::Invalid,
        K::Unsupported => Why::Unsupported,
        _ => Why::Host,
    }
}

/// The failure to read the file at `path`, with the remedy where one is known. `doing` says what was being done, and
/// names the file.
pub fn unreadable(doing: impl Into<String>, path: &Path, cause: io::Error) -> Fail {
    let hint = remedy_to_read(path, &cause);
    let fail = Fail::new(why_of(&cause), doing).because(cause);
    hint.into_iter().fold(fail, Fail::hint)
}

/// What helps when the file at `path` cannot be read because of `cause`.
pub fn remedy_to_read(path: &Path, cause: &io::Error) -> Option<String> {
    Some(match cause.raw_os_error().unwrap_or(0) {
        libc::ENOENT | libc::ENOTDIR => match std::env::current_dir() {
            Ok(here) if path.is_relative() => {
                format!("check the name; it is looked for in {}", here.display())
            }
            _ => "check the name".to_owned(),
        },
        libc::EACCES | libc::EPERM => match barred(path) {
            Some(dir) => format!("let this user into its directory: chmod a+x {}", dir.display()),
            None => format!("make it readable: chmod a+r {}", path.display()),
        },
        libc::EISDIR => "name a file, not a directory".to_owned(),
        _ => return None,
    })
}

/// The first of the directories on the way to `path` that this user may not enter.
pub fn barred(path: &Path) -> Option<&Path> {
    let mut dirs: Vec<_> = path.ancestors().skip(1).filter(|dir| !dir.as_os_str().is_empty()).collect();
    dirs.reverse();
    let enters = |dir: &Path| rustix::fs::access(dir, rustix::fs::Access::EXEC_OK);
    dirs.into_iter().find(|dir| enters(dir) == Err(rustix::io::Errno::ACCESS))
}

/// Something the guest did that the specification does not allow. Counted, never fatal to the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// What the guest broke, as a short sentence: `descriptor chain loops`.
    pub what: &'static str,
    /// The offending value, if one says more.
    pub value: u64,
}

impl Fault {
    /// A fault with the value that shows it.
    pub const fn new(what: &'static str, value: u64) -> Self {
        Fault { what, value }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({:#x})", self.what, self.value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_names_the_thing_the_cause_and_the_remedy() {
        let denied = std::io::Error::from_raw_os_error(libc::EACCES);
        let fail = Fail::new(Why::Denied, "open disk0 image /img/a.ext4 for writing")
            .because(denied)
            .hint("pass readonly=on, or make the file writable");
        assert_eq!(
            fail.to_string(),
            "open disk0 image /img/a.ext4 for writing: Permission denied\n  \
             hint: pass readonly=on, or make the file writable"
        );
    }

    #[test]
    fn a_file_that_cannot_be_read_comes_with_the_remedy() {
        let told = |path: &str, number| {
            let cause = io::Error::from_raw_os_error(number);
            unreadable(format!("open {path}"), Path::new(path), cause).to_string()
        };
        assert_eq!(told("/a", libc::ENOENT), "open /a: No such file or directory\n  hint: check the name");
        let relative = told("a", libc::ENOENT);
        assert!(relative.contains("hint: check the name; it is looked for in /"), "{relative}");
        assert!(told("/a", libc::EACCES).ends_with("hint: make it readable: chmod a+r /a"));
        assert!(told("/a", libc::EISDIR).ends_with("hint: name a file, not a directory"));
        assert!(!told("/a", libc::EMFILE).contains("hint"));
    }
}
