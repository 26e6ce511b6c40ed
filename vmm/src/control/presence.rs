//! How a run shows itself to others: its entry in the registry, and the moment from which it is up.

use std::io::Write;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use base::Result;

use super::registry::{About, Entry, Patience, Registry};
use crate::plan::Plan;

/// Told the name of a VM in the background once it is up; whether anybody still wants it.
pub type Herald = Box<dyn FnOnce(&str) -> bool + Send>;

/// A run as others will find it.
#[derive(Clone)]
pub struct Presence(Arc<Mutex<Inner>>);

struct Inner {
    name: String,
    about: About,
    entry: Option<Entry>,
    herald: Option<Herald>,
    up: bool,
}

impl Presence {
    /// A run that enters when it is asked to: under `name`, or one of its own.
    pub fn new(plan: &Plan, name: Option<&str>, detached: bool) -> Presence {
        let pid = std::process::id();
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let about = About {
            pid,
            started: since.as_secs(),
            detached,
            kernel: plan.kernel.clone(),
            command: plan.command.as_ref().map(|command| command.argv.clone()).unwrap_or_default(),
            cpus: plan.cpus,
            memory: plan.memory.bytes(),
        };
        let name = name.map_or_else(|| format!("vm-{pid}"), str::to_owned);
        Presence(Arc::new(Mutex::new(Inner { name, about, entry: None, herald: None, up: false })))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters the registry, once. With `keep`, the end is kept there.
    ///
    /// # Errors
    /// As [`Registry::enter`].
    pub fn enter(&self, keep: bool) -> Result<()> {
        self.enter_within(keep, Patience::Endless)
    }

    fn enter_within(&self, keep: bool, patience: Patience) -> Result<()> {
        let mut inner = self.lock();
        if inner.entry.is_none() {
            inner.entry = Some(Registry::make()?.enter(&inner.name, &inner.about, keep, patience)?);
        }
        Ok(())
    }

    /// Does something with the entry, if there is one.
    pub fn with<T>(&self, f: impl FnOnce(&mut Entry) -> T) -> Option<T> {
        self.lock().entry.as_mut().map(f)
    }

    /// The socket on which it is asked. One that has not entered yet does so now, if it can at once: the thread that
    /// asks has a VM to run.
    pub fn socket(&self) -> Option<OwnedFd> {
        if let Err(fail) = self.enter_within(false, Patience::Short) {
            ::log::debug!("nobody will find this VM: {fail}");
        }
        self.with(|entry| entry.socket().ok()).flatten()
    }

    /// Its name.
    pub fn name(&self) -> String {
        self.lock().name.clone()
    }

    /// What others know of it.
    pub fn about(&self) -> About {
        self.lock().about.clone()
    }

    /// Has somebody told when it is up.
    pub fn announce(&self, herald: Herald) {
        self.lock().herald = Some(herald);
    }

    /// Whether somebody is to be told when it is up.
    pub fn is_awaited(&self) -> bool {
        self.lock().herald.is_some()
    }

    /// It is up: the guest runs, and its agent has called if it has one. Whether anybody still wants it.
    pub fn rise(&self) -> bool {
        let mut inner = self.lock();
        inner.up = true;
        match inner.herald.take() {
            Some(herald) => herald(&inner.name),
            None => true,
        }
    }

    /// Whether it is up.
    pub fn is_up(&self) -> bool {
        self.lock().up
    }

    /// Leaves the registry, whoever else has a share in this: threads that serve others may never end.
    pub fn leave(&self) {
        // Dropped when the lock is free again.
        let entry = self.lock().entry.take();
        drop(entry);
    }

    /// Says how it ended: `line` is its result object. Of one that has never been up nothing is kept.
    pub fn conclude(&self, line: &str) {
        if !self.is_up() {
            return;
        }
        let told = self.with(|entry| entry.conclude(line));
        if let Some(Err(cause)) = told {
            ::log::warn!("record how the VM ended: {cause}");
        }
    }
}

/// A herald that writes the name to the other end of a pipe.
pub fn herald(pipe: OwnedFd) -> Herald {
    Box::new(move |name| writeln!(std::fs::File::from(pipe), "{name}").is_ok())
}
