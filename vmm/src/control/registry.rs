//! The registry: a directory for each VM that can be reached, below the runtime directory.
//!
//! `result` is locked as long as the VM lives and holds its result object afterwards; `about` says what it is, `control` is its
//! socket; one that runs in the background has its output in `stdout` and `stderr`. All who make or remove such a
//! directory hold a lock on the one above meanwhile, so nobody sees half of one.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Read, Seek, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use base::host::socket::{self, Listener};
use base::{Doing, Fail, Result, Why};
use rustix::fs::{FlockOperation, Mode, Stat, flock};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::place;

/// Bytes of a name at the most.
const NAME_MAX: usize = 48;
/// All that is in the directory of an entry. The first goes first: without it the rest is cleared away by whoever comes next.
const FILES: [&str; 5] = ["result", "about", "control", "stdout", "stderr"];
/// Bytes that are read of a file of an entry.
const LARGEST: u64 = 1 << 20;

/// What one knows of a VM without asking it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct About {
    /// Its process.
    pub pid: u32,
    /// When it was started, in seconds since 1970.
    pub started: u64,
    /// It runs in the background, and its output is kept.
    pub detached: bool,
    /// Its kernel.
    pub kernel: PathBuf,
    /// Its command; empty if it has none.
    pub command: Vec<String>,
    /// Its CPUs.
    pub cpus: u32,
    /// Bytes of its memory.
    pub memory: u64,
}

/// How a VM is.
#[derive(Clone, Debug, PartialEq)]
pub enum State {
    /// It lives.
    Running,
    /// It has ended: its result object.
    Ended(Value),
}

/// A VM as others find it.
#[derive(Debug)]
pub struct Record {
    /// Its name.
    pub name: String,
    /// What it is.
    pub about: About,
    /// How it is.
    pub state: State,
    /// Its directory.
    pub path: PathBuf,
    /// Locked while it lives; also if its directory has gone.
    result: File,
}

/// How long somebody waits for the registry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Patience {
    /// As long as it takes: nobody waits for this thread.
    Endless,
    /// For a tenth of a second: it has something else to do.
    Short,
}

impl Patience {
    fn lock(self, place: &OwnedFd) -> rustix::io::Result<()> {
        if self == Patience::Endless {
            return rustix::io::retry_on_intr(|| flock(place, FlockOperation::LockExclusive));
        }
        let mut attempts = 100;
        loop {
            match flock(place, FlockOperation::NonBlockingLockExclusive) {
                Err(Errno::AGAIN | Errno::INTR) if attempts > 0 => attempts -= 1,
                done => return done,
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// The registry of this user.
#[derive(Clone, Debug)]
pub struct Registry {
    path: PathBuf,
}

/// A VM's own entry. Dropped, it is gone, unless it is to be kept and the VM has said how it ended.
pub struct Entry {
    /// Its name.
    pub name: String,
    registry: Registry,
    path: PathBuf,
    result: File,
    listener: Option<Listener>,
    keep: bool,
    ended: bool,
}

/// Says what is wrong with a name, if something is.
///
/// # Errors
/// [`Why::Usage`]: it is none.
pub fn check_name(name: &str) -> Result<()> {
    let fits = |c: char| c.is_ascii_alphanumeric() || "_.-".contains(c);
    let begins = name.starts_with(|c: char| c.is_ascii_alphanumeric());
    if begins && name.len() <= NAME_MAX && name.chars().all(fits) {
        return Ok(());
    }
    Err(Fail::new(Why::Usage, format!("call a VM `{name}`")).because("it is no name").hint(format!(
        "a name is 1 to {NAME_MAX} of a-z A-Z 0-9 _ . -, and begins with a letter or a number"
    )))
}

impl Registry {
    /// The registry, made if it is missing.
    ///
    /// # Errors
    /// There is no place for it.
    pub fn make() -> Result<Registry> {
        place::make().map(|path| Registry { path })
    }

    /// Those that are there: one more for each place that has been the first to serve.
    pub fn look() -> Vec<Registry> {
        place::find().into_iter().map(|path| Registry { path }).collect()
    }

    /// The one that a VM is in.
    pub fn of(record: &Record) -> Registry {
        Registry { path: record.path.parent().unwrap_or(Path::new("/")).to_owned() }
    }

    /// Keeps others from making and removing entries. What is done meanwhile takes microseconds; who holds the lock for longer
    /// is stopped or none of us, and only some can wait for that.
    fn lock(&self, patience: Patience) -> Result<OwnedFd> {
        let doing = || format!("lock the runtime directory {}", self.path.display());
        loop {
            let Some(place) = place::open(&self.path)? else {
                match rustix::fs::mkdir(&self.path, Mode::RWXU) {
                    Ok(()) | Err(Errno::EXIST) => continue,
                    Err(cause) => return Err(Fail::new(Why::Host, doing()).because(io::Error::from(cause))),
                }
            };
            patience.lock(&place).doing(Why::Host, doing)?;
            // The last one to leave takes it along, and the next makes another.
            let number = |about: Stat| (about.st_dev, about.st_ino);
            let locked = rustix::fs::fstat(&place).map(number).doing(Why::Host, doing)?;
            if rustix::fs::stat(&self.path).map(number) == Ok(locked) {
                return Ok(place);
            }
        }
    }

    /// Enters a VM of this process. With `keep`, how it ended is kept until it is removed.
    ///
    /// # Errors
    /// [`Why::Usage`]: there is one of that name, or it is no name; or the host refuses.
    pub fn enter(&self, name: &str, about: &About, keep: bool, patience: Patience) -> Result<Entry> {
        check_name(name)?;
        let _lock = self.lock(patience)?;
        let path = self.path.join(name);
        let doing = || format!("enter the VM {name} in {}", self.path.display());
        match look_at(&path, name) {
            Ok(Some(found)) => {
                let fail = Fail::new(Why::Usage, format!("call the VM {name}"));
                return Err(match found.state {
                    State::Running => fail
                        .because("there is a running VM of that name")
                        .hint(format!("choose another name, or end it: mayfly stop {name}")),
                    State::Ended(_) => fail
                        .because("there was a VM of that name")
                        .hint(format!("choose another name, or remove what is left of it: mayfly rm {name}")),
                });
            }
            // A file that is none of ours stays, and is in the way.
            Ok(None) => clear(&path),
            Err(cause) => return Err(Fail::new(Why::Host, doing()).because(cause)),
        }
        let entry = self.make_entry(&path, name, about, keep);
        if entry.is_err() {
            clear(&path);
        }
        entry
    }

    fn make_entry(&self, path: &Path, name: &str, about: &About, keep: bool) -> Result<Entry> {
        let doing = || format!("enter the VM {name} in {}", self.path.display());
        let result = make_files(path, about).doing(Why::Host, doing)?;
        let listener = Some(socket::listen("control", &path.join("control"))?);
        let (name, path, registry) = (name.to_owned(), path.to_owned(), self.clone());
        Ok(Entry { name, registry, path, result, listener, keep, ended: false })
    }

    /// All VMs, by name; what those that were killed have left is cleared away.
    ///
    /// # Errors
    /// As the host answers.
    pub fn list(&self) -> Result<Vec<Record>> {
        let _lock = self.lock(Patience::Endless)?;
        let doing = || format!("read the runtime directory {}", self.path.display());
        let mut list = Vec::new();
        for found in fs::read_dir(&self.path).doing(Why::Host, doing)? {
            let found = found.doing(Why::Host, doing)?;
            let Ok(name) = found.file_name().into_string() else { continue };
            match look_at(&found.path(), &name) {
                Ok(Some(record)) => list.push(record),
                Ok(None) => clear(&found.path()),
                Err(cause) => ::log::debug!("look at {}: {cause}", found.path().display()),
            }
        }
        if list.is_empty() {
            // Nobody's any more, unless there is a stranger's file.
            let _ = fs::remove_dir(&self.path);
        }
        list.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(list)
    }

    /// Removes what is left of a VM that has ended.
    ///
    /// # Errors
    /// As the host answers; it runs, or has gone.
    pub fn remove(&self, record: &Record) -> Result<()> {
        let _lock = self.lock(Patience::Endless)?;
        // Others may have removed it since it was found, and another VM may have its name.
        if !record.is_at_its_place() {
            return Err(missing(&record.name));
        }
        if record.lives() {
            return Err(Fail::new(Why::Usage, format!("remove the VM {}", record.name))
                .because("it is running")
                .hint(format!("end it first: mayfly stop {}", record.name)));
        }
        let doing = || format!("remove the VM {}", record.name);
        erase(&record.path).doing(Why::Host, doing)
    }
}

/// All VMs of some registries, by name. One that is not to be trusted, which in `/tmp` anybody can make, hides none of the others.
///
/// # Errors
/// As the host answers, and no VM is found.
pub fn list(registries: &[Registry]) -> Result<Vec<Record>> {
    let mut list = Vec::new();
    let mut refusal = None;
    for registry in registries {
        match registry.list() {
            Ok(found) => list.extend(found),
            Err(fail) => {
                ::log::debug!("{fail}");
                refusal = refusal.or(Some(fail));
            }
        }
    }
    match refusal {
        Some(fail) if list.is_empty() => Err(fail),
        _ => {
            list.sort_by(|a, b| a.name.cmp(&b.name));
            Ok(list)
        }
    }
}

/// The VM called `name`; of two in different places the one that runs.
///
/// # Errors
/// There is none.
pub fn find(registries: &[Registry], name: &str) -> Result<Record> {
    let mut found: Vec<_> = list(registries)?.into_iter().filter(|record| record.name == name).collect();
    let running = found.iter().position(|record| record.state == State::Running);
    if found.is_empty() { Err(missing(name)) } else { Ok(found.swap_remove(running.unwrap_or(0))) }
}

/// There is no VM of that name.
pub fn missing(name: &str) -> Fail {
    Fail::new(Why::Missing, format!("find the VM {name}"))
        .because("there is none of that name")
        .hint("`mayfly ps -a` lists those there are")
}

fn private() -> fs::OpenOptions {
    let mut options = File::options();
    options.read(true).write(true).create(true).mode(0o600);
    options
}

fn make_files(path: &Path, about: &About) -> io::Result<File> {
    fs::DirBuilder::new().mode(0o700).create(path)?;
    let result = private().create_new(true).open(path.join("result"))?;
    flock(&result, FlockOperation::NonBlockingLockExclusive)?;
    let text = serde_json::to_vec(about)?;
    private().create_new(true).open(path.join("about"))?.write_all(&text)?;
    Ok(result)
}

/// What an entry says; `None` if it is what a killed VM has left.
fn look_at(path: &Path, name: &str) -> io::Result<Option<Record>> {
    let result = match File::open(path.join("result")) {
        Ok(file) => file,
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    let state = match flock(&result, FlockOperation::NonBlockingLockShared) {
        Err(Errno::AGAIN) => State::Running,
        Err(error) => return Err(error.into()),
        Ok(()) => {
            flock(&result, FlockOperation::Unlock)?;
            match read_result(&result)? {
                Some(value) => State::Ended(value),
                None => return Ok(None),
            }
        }
    };
    let mut text = Vec::new();
    File::open(path.join("about"))?.take(LARGEST).read_to_end(&mut text)?;
    let about = serde_json::from_slice(&text)?;
    Ok(Some(Record { name: name.to_owned(), about, state, path: path.to_owned(), result }))
}

fn read_result(mut file: &File) -> io::Result<Option<Value>> {
    let mut text = Vec::new();
    file.rewind()?;
    file.take(LARGEST).read_to_end(&mut text)?;
    Ok(serde_json::from_slice(&text).ok())
}

/// Removes the directory of an entry. One that holds anything else stays as it is: it may be no entry at all.
fn erase(path: &Path) -> io::Result<()> {
    for found in fs::read_dir(path)? {
        let found = found?;
        if found.file_type()?.is_dir() || !FILES.iter().any(|name| found.file_name() == *name) {
            let text =
                format!("{} is no file of a VM's", crate::quote::line(found.path().as_os_str().as_bytes()));
            return Err(io::Error::new(ErrorKind::DirectoryNotEmpty, text));
        }
    }
    for name in FILES {
        match fs::remove_file(path.join(name)) {
            Err(cause) if cause.kind() != ErrorKind::NotFound => return Err(cause),
            _ => {}
        }
    }
    fs::remove_dir(path)
}

/// Removes what is left of an entry, if it is one: nothing but a directory of ours.
fn clear(path: &Path) {
    let own = fs::symlink_metadata(path)
        .is_ok_and(|about| about.is_dir() && about.uid() == rustix::process::geteuid().as_raw());
    if own {
        // What stays is in the way of who wants the name, and who is told so.
        let _ = erase(path);
    }
}

impl Record {
    /// Waits until the VM has ended; its result object, if it left one.
    ///
    /// # Errors
    /// As the host answers.
    pub fn wait(&self) -> Result<Option<Value>> {
        let doing = || format!("wait for the VM {}", self.name);
        let locked = rustix::io::retry_on_intr(|| flock(&self.result, FlockOperation::LockShared));
        locked.doing(Why::Host, doing)?;
        // Others that wait need not queue behind us.
        let _ = flock(&self.result, FlockOperation::Unlock);
        read_result(&self.result).doing(Why::Host, doing)
    }

    /// Whether it lives at this moment.
    pub fn lives(&self) -> bool {
        let locked = flock(&self.result, FlockOperation::NonBlockingLockShared);
        if locked.is_ok() {
            let _ = flock(&self.result, FlockOperation::Unlock);
        }
        locked == Err(Errno::AGAIN)
    }

    /// Whether its directory is still its own.
    fn is_at_its_place(&self) -> bool {
        let number = |about: fs::Metadata| (about.dev(), about.ino());
        let there = fs::metadata(self.path.join("result")).map(number);
        there.is_ok_and(|there| self.result.metadata().is_ok_and(|own| number(own) == there))
    }

    /// Its control socket.
    pub fn control(&self) -> PathBuf {
        self.path.join("control")
    }
}

impl Entry {
    /// The socket on which it is asked; it does not block.
    ///
    /// # Errors
    /// The host is out of descriptors.
    pub fn socket(&self) -> io::Result<OwnedFd> {
        self.listener.as_ref().ok_or(ErrorKind::NotConnected)?.socket.try_clone()
    }

    /// Files for the output of a VM in the background: standard output and standard error.
    ///
    /// # Errors
    /// As the host answers.
    pub fn logs(&self) -> io::Result<[File; 2]> {
        let make = |name| private().append(true).create_new(true).open(self.path.join(name));
        Ok([make("stdout")?, make("stderr")?])
    }

    /// Says how the VM ended: `line` is its result object.
    ///
    /// # Errors
    /// As the host answers.
    pub fn conclude(&mut self, line: &str) -> io::Result<()> {
        self.ended = true;
        // Whoever waits has the file open, also if its name goes now.
        self.result.write_all(line.as_bytes())
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        // Its file goes with it.
        self.listener = None;
        if self.keep && self.ended {
            return;
        }
        let _lock = match self.registry.lock(Patience::Short) {
            Ok(lock) => lock,
            // The next command clears it away.
            Err(fail) => return ::log::debug!("leave the VM {} behind: {fail}", self.name),
        };
        clear(&self.path);
        // Others may be there.
        let _ = fs::remove_dir(&self.registry.path);
    }
}

#[cfg(test)]
#[path = "registry_tests.rs"]
mod tests;
