//! Counters that any thread adds to and anyone reads.

use std::sync::atomic::{AtomicU64, Ordering};

/// A count that grows; or a level, where it is [`Counter::set`].
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `n`.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// Sets it: for what somebody else measures, such as the guest its memory.
    pub fn set(&self, n: u64) {
        self.0.store(n, Ordering::Relaxed);
    }

    /// The count so far.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
