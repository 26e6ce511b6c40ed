//! The knob of a device: the operator's way to it while a guest runs, whichever transport it is behind.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use base::lane::Handle;
use base::{Fail, Result, Why};

use super::engine::Engine;

/// Where the engine lives. A device that no driver ever starts costs no lane, no letter and no wake-up.
pub(super) enum Home {
    Waiting(Box<Engine>),
    Lane(Handle<Engine>),
    Moving,
}

/// What an operator can do with a device while it runs, from any thread but its lane's.
#[derive(Clone)]
pub struct Knob {
    home: Arc<Mutex<Home>>,
}

impl Knob {
    pub(super) fn new(engine: Engine) -> Knob {
        Knob { home: Arc::new(Mutex::new(Home::Waiting(Box::new(engine)))) }
    }

    pub(super) fn home(&self) -> MutexGuard<'_, Home> {
        self.home.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `f` where the engine lives, also if no driver has started it yet. `None`: its lane has ended.
    pub(super) fn turn<R: Send + 'static>(
        &self,
        f: impl FnOnce(&mut Engine) -> R + Send + 'static,
    ) -> Option<R> {
        let handle = match &mut *self.home() {
            Home::Waiting(engine) => return Some(f(engine)),
            Home::Lane(handle) => handle.clone(),
            Home::Moving => return None,
        };
        handle.visit(|engine, _| f(engine))
    }

    /// Has the device look again at what it stands on ([`Engine::refresh`]); a driver that runs it gets an interrupt if
    /// its configuration has changed.
    ///
    /// # Errors
    /// As the host answers.
    pub fn refresh(&self) -> Result<()> {
        // A lane that has ended has nobody left to tell.
        self.turn(Engine::refresh).unwrap_or(Ok(()))
    }

    /// Changes settings of the device ([`Engine::tune`]).
    ///
    /// # Errors
    /// As the device answers.
    pub fn tune(&self, change: &str) -> Result<()> {
        let change = change.to_owned();
        let over = || Err(Fail::new(Why::Host, "change a device").because("the machine is ending"));
        self.turn(move |engine| engine.tune(&change)).unwrap_or_else(over)
    }
}
