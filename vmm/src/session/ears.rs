//! What is made of all that a guest says during a session: its kernel's health, and results of tests.

use std::sync::{Mutex, MutexGuard, PoisonError};

use agent::heard::Said;
use agent::wire::Stream;

use super::Ended;
use crate::health::Health;
use crate::ktap::Listener;
use crate::plan::{Command, Ktap};

/// Listens to the guest's kernel and to its command. What was heard is there however the session ends.
#[derive(Debug, Default)]
pub struct Ears {
    health: Mutex<Health>,
    kernel: Mutex<Listener>,
    command: Mutex<Listener>,
    /// Nobody wants to know of tests.
    deaf: bool,
}

/// Locks whatever a panicking thread may have left locked: what it holds is complete after each line.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Ears {
    /// For a guest that runs this command.
    pub fn new(command: &Command) -> Ears {
        let health = Mutex::new(Health::new(command.allow.clone()));
        Ears { health, deaf: command.ktap == Ktap::Off, ..Ears::default() }
    }

    /// Hears something.
    pub fn hear(&self, said: Said<'_>) {
        match said {
            Said::Kernel(message) => {
                lock(&self.health).hear(&message);
                if !self.deaf {
                    lock(&self.kernel).hear(&message.text);
                }
            }
            Said::Program(Stream::Stdout, bytes) if !self.deaf => lock(&self.command).feed(bytes),
            Said::Program(..) => {}
        }
    }

    /// Adds what was heard.
    pub fn tell(&self, ended: Ended) -> Ended {
        let health = std::mem::take(&mut *lock(&self.health));
        let tests = |listener: &Mutex<Listener>| std::mem::take(&mut *lock(listener)).tests();
        Ended { health, tests: tests(&self.command), kernel_tests: tests(&self.kernel), ..ended }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use agent::wire::Message;

    #[test]
    fn each_source_has_its_own_tests_and_standard_error_none() {
        let said = b"TAP version 13\n1..1\nnot ok 1 a\n";
        for (ktap, failed) in [(Ktap::Strict, 1), (Ktap::Report, 1), (Ktap::Off, 0)] {
            let ears = Ears::new(&Command { ktap, ..Command::default() });
            said.chunks(5).for_each(|bytes| ears.hear(Said::Program(Stream::Stdout, bytes)));
            ears.hear(Said::Program(Stream::Stderr, said));
            for line in ["KTAP version 1", "1..2", "ok 1 x", "BUG: y", "ok 2 z"] {
                ears.hear(Said::Kernel(Message { text: line.into(), ..Message::default() }));
            }
            let ended = ears.tell(Ended::default());
            assert_eq!((ended.tests.failed, ended.tests.count()), (failed, failed), "{ktap:?}");
            assert_eq!((ended.kernel_tests.passed, ended.kernel_tests.count()), (2 * failed, 2 * failed));
            assert_eq!(ended.health.findings.len(), 1);
        }
    }
}
