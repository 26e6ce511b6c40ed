//! Time, passed in: devices never ask the host themselves, so a test can move the hands.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The two times a device may need.
pub trait Clock: Send + Sync {
    /// Wall clock: time since 1970-01-01 00:00 UTC.
    fn wall(&self) -> Duration;
    /// Time since some fixed moment; never goes back.
    fn monotonic(&self) -> Duration;
}

/// The host's clocks.
#[derive(Debug)]
pub struct HostClock(std::time::Instant);

impl Default for HostClock {
    fn default() -> Self {
        HostClock(std::time::Instant::now())
    }
}

impl Clock for HostClock {
    fn wall(&self) -> Duration {
        SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
    }
    fn monotonic(&self) -> Duration {
        self.0.elapsed()
    }
}

/// A clock that a test moves by hand.
#[derive(Debug, Default)]
pub struct ManualClock(AtomicU64);

impl ManualClock {
    /// A clock whose wall and monotonic time both read `at`.
    pub fn at(at: Duration) -> Self {
        let clock = ManualClock::default();
        clock.advance(at);
        clock
    }

    /// Moves the hands forward.
    pub fn advance(&self, by: Duration) {
        self.0.fetch_add(u64::try_from(by.as_nanos()).unwrap_or(u64::MAX), Ordering::SeqCst);
    }
}

impl Clock for ManualClock {
    fn wall(&self) -> Duration {
        Duration::from_nanos(self.0.load(Ordering::SeqCst))
    }
    fn monotonic(&self) -> Duration {
        self.wall()
    }
}
