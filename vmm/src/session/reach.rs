//! A way to the command of a session, and to its agent, from other threads.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::Builder;

use agent::client::Remote;

/// Leads to the command while it runs.
#[derive(Clone, Default)]
pub struct Reach(pub(super) Arc<Mutex<Option<Remote>>>);

impl Reach {
    fn remote(&self) -> Option<Remote> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether there is a command to reach.
    pub fn is_there(&self) -> bool {
        self.remote().is_some()
    }

    /// Sends the command a signal; whether there is one.
    pub fn signal(&self, number: u8) -> bool {
        self.tell(move |remote| remote.signal(number))
    }

    /// Asks the agent to call once more; whether there is one.
    pub fn ask_for_call(&self) -> bool {
        self.tell(|remote| remote.ask_for_call())
    }

    /// A guest that does not listen must not hold up whoever tells it something.
    fn tell(&self, word: impl FnOnce(Remote) -> io::Result<()> + Send + 'static) -> bool {
        let Some(remote) = self.remote() else { return false };
        Builder::new().name("courier".into()).spawn(move || word(remote)).is_ok()
    }
}
