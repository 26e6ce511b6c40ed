//! A way to the command of a session, and to its agent, from other threads.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::Builder;

use agent::client::Remote;

/// Words on their way at the most. A guest that listens takes each at once.
const COURIERS: usize = 16;

/// Leads to the command while it runs.
#[derive(Clone, Default)]
pub struct Reach {
    pub(super) remote: Arc<Mutex<Option<Remote>>>,
    couriers: Couriers,
}

/// What came of a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    /// It is on its way.
    Sent,
    /// There is no command.
    Nobody,
    /// The guest does not take what it was told before.
    Deaf,
}

impl Reach {
    fn remote(&self) -> Option<Remote> {
        self.remote.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether there is a command to reach.
    pub fn is_there(&self) -> bool {
        self.remote().is_some()
    }

    /// Whether the guest does not take what it is told.
    pub fn is_deaf(&self) -> bool {
        self.couriers.0.load(Ordering::Relaxed) >= COURIERS
    }

    /// Sends the command a signal.
    pub fn signal(&self, number: u8) -> Told {
        self.tell(move |remote| remote.signal(number))
    }

    /// Asks the agent to call once more.
    pub fn ask_for_call(&self) -> Told {
        self.tell(|remote| remote.ask_for_call())
    }

    fn tell(&self, word: impl FnOnce(Remote) -> io::Result<()> + Send + 'static) -> Told {
        let Some(remote) = self.remote() else { return Told::Nobody };
        // A wire that is dead is found out by who listens to it.
        let sent = self.couriers.send(move || drop(word(remote)));
        if sent { Told::Sent } else { Told::Deaf }
    }
}

/// Threads that tell a guest something: one that does not listen must not hold up whoever tells it, nor collect them.
#[derive(Clone, Default)]
struct Couriers(Arc<AtomicUsize>);

/// One of them; dropped, it has arrived.
struct Courier(Arc<AtomicUsize>);

impl Drop for Courier {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Couriers {
    /// Has a thread do it; `false`: too many have not come back yet, or the host has no thread.
    fn send(&self, work: impl FnOnce() + Send + 'static) -> bool {
        self.0.fetch_add(1, Ordering::Relaxed);
        let courier = Courier(self.0.clone());
        if self.0.load(Ordering::Relaxed) > COURIERS {
            return false;
        }
        let errand = move || {
            work();
            drop(courier);
        };
        Builder::new().name("courier".into()).spawn(errand).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn a_guest_that_does_not_listen_collects_no_threads() {
        let reach = Reach::default();
        assert_eq!(reach.signal(15), Told::Nobody);
        let (go, wait) = channel::<()>();
        let wait = Arc::new(Mutex::new(wait));
        for number in 0..COURIERS {
            let wait = wait.clone();
            let stuck = move || {
                let _ = wait.lock().unwrap().recv();
            };
            assert!(reach.couriers.send(stuck), "courier {number}");
        }
        assert!(reach.is_deaf());
        assert!(!reach.couriers.send(|| unreachable!("one too many")));
        drop(go);
        // They come back, each in its own time.
        while reach.is_deaf() {
            std::thread::yield_now();
        }
        assert!(reach.couriers.send(|| ()));
    }
}
