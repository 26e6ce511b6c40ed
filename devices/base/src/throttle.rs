//! Rate limits: so many operations and so many bytes in a second, with bursts.
//!
//! A device asks before it takes the next request from its ring, and arms its lane for the time it is told to wait;
//! requests wait in the ring and none is dropped:
//!
//! ```
//! # use base::throttle::{Rate, Throttle};
//! # use base::clock::ManualClock;
//! # use std::sync::Arc;
//! # let clock = Arc::new(ManualClock::default());
//! let bandwidth = Rate { per_second: 1 << 20, burst: 1 << 20 };
//! let mut throttle = Throttle::new(None, Some(bandwidth), clock);
//! match throttle.admit() {
//!     Ok(()) => throttle.spend(1, 4096), // one operation of so many bytes
//!     Err(wait) => { /* io.arm(TOKEN, wait), and nothing is taken until then */ let _ = wait; }
//! }
//! ```
//!
//! The size of a request is not known before it is taken. So one is admitted while there is anything left in the
//! bucket, and may leave it in debt: the rate holds in the long run, and a moment may exceed the burst by one request.

use std::sync::Arc;
use std::time::Duration;

use crate::clock::Clock;

/// A limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Units in a second; at least 1.
    pub per_second: u64,
    /// Units that may be saved up and spent at once; at least 1.
    pub burst: u64,
}

impl Rate {
    /// How long `units` take, in nanoseconds.
    fn nanos(&self, units: u64) -> u64 {
        let nanos = u128::from(units) * 1_000_000_000 / u128::from(self.per_second.max(1));
        u64::try_from(nanos).unwrap_or(u64::MAX)
    }
}

/// A bucket of units that fills with time. It is kept as the moment at which it is full again: spending moves it on.
#[derive(Clone, Copy, Debug)]
struct Bucket {
    rate: Rate,
    /// Nanoseconds of the clock.
    full_at: u64,
}

impl Bucket {
    /// Nanoseconds until there is a unit in it; 0 if there is one.
    fn wait(&self, now: u64) -> u64 {
        let empty_at = now.saturating_add(self.rate.nanos(self.rate.burst.max(1)));
        self.full_at.saturating_add(self.rate.nanos(1)).saturating_sub(empty_at)
    }

    fn spend(&mut self, now: u64, units: u64) {
        self.full_at = self.full_at.max(now).saturating_add(self.rate.nanos(units));
    }
}

/// The limits of one device.
pub struct Throttle {
    clock: Arc<dyn Clock>,
    operations: Option<Bucket>,
    bytes: Option<Bucket>,
}

impl Throttle {
    /// Limits of operations and bytes, both buckets full; `None`: no limit.
    pub fn new(operations: Option<Rate>, bytes: Option<Rate>, clock: Arc<dyn Clock>) -> Throttle {
        let bucket = |rate: Rate| Bucket { rate, full_at: 0 };
        Throttle { clock, operations: operations.map(bucket), bytes: bytes.map(bucket) }
    }

    /// Changes the limit of operations; its bucket is full.
    pub fn limit_operations(&mut self, rate: Option<Rate>) {
        self.operations = rate.map(|rate| Bucket { rate, full_at: 0 });
    }

    /// Changes the limit of bytes; its bucket is full.
    pub fn limit_bytes(&mut self, rate: Option<Rate>) {
        self.bytes = rate.map(|rate| Bucket { rate, full_at: 0 });
    }

    /// Whether another request may be taken now.
    ///
    /// # Errors
    /// It may not: how long it will take until one may.
    pub fn admit(&self) -> Result<(), Duration> {
        if self.operations.is_none() && self.bytes.is_none() {
            return Ok(());
        }
        let now = self.now();
        let wait = self.operations.iter().chain(&self.bytes).map(|bucket| bucket.wait(now)).max();
        match wait {
            Some(wait @ 1..) => Err(Duration::from_nanos(wait)),
            _ => Ok(()),
        }
    }

    /// Takes note of a request that was taken.
    pub fn spend(&mut self, operations: u64, bytes: u64) {
        if self.operations.is_none() && self.bytes.is_none() {
            return;
        }
        let now = self.now();
        for (bucket, units) in [(&mut self.operations, operations), (&mut self.bytes, bytes)] {
            if let Some(bucket) = bucket {
                bucket.spend(now, units);
            }
        }
    }

    fn now(&self) -> u64 {
        u64::try_from(self.clock.monotonic().as_nanos()).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::ManualClock;
    use proptest::prelude::*;

    fn clock() -> Arc<ManualClock> {
        Arc::new(ManualClock::at(Duration::from_secs(5)))
    }

    #[test]
    fn a_burst_goes_at_once_and_the_rest_at_the_rate() {
        let clock = clock();
        let mut throttle = Throttle::new(Some(Rate { per_second: 10, burst: 3 }), None, clock.clone());
        for _ in 0..3 {
            assert_eq!(throttle.admit(), Ok(()));
            throttle.spend(1, 1 << 20);
        }
        for _ in 0..5 {
            assert_eq!(throttle.admit(), Err(Duration::from_millis(100)));
            clock.advance(Duration::from_millis(99));
            assert_eq!(throttle.admit(), Err(Duration::from_millis(1)));
            clock.advance(Duration::from_millis(1));
            assert_eq!(throttle.admit(), Ok(()));
            throttle.spend(1, 1 << 20);
        }
        clock.advance(Duration::from_secs(3600));
        let saved = std::iter::repeat_with(|| throttle.admit().map(|()| throttle.spend(1, 0)));
        assert_eq!(saved.take_while(Result::is_ok).count(), 3, "no more than the burst is saved up");
    }

    #[test]
    fn a_large_request_leaves_a_debt() {
        let clock = clock();
        let bytes = Rate { per_second: 1000, burst: 100 };
        let mut throttle =
            Throttle::new(Some(Rate { per_second: 1000, burst: 1000 }), Some(bytes), clock.clone());
        throttle.spend(1, 5100);
        assert_eq!(
            throttle.admit(),
            Err(Duration::from_millis(5001)),
            "5 s of debt, and a byte to begin with"
        );
        clock.advance(Duration::from_millis(5001));
        assert_eq!(throttle.admit(), Ok(()));
    }

    #[test]
    fn without_limits_nothing_waits() {
        let mut throttle = Throttle::new(None, None, clock());
        throttle.spend(u64::MAX, u64::MAX);
        assert_eq!(throttle.admit(), Ok(()));
    }

    #[test]
    fn extreme_rates_neither_panic_nor_wait_forever_for_one() {
        for rate in [
            Rate { per_second: 1, burst: u64::MAX },
            Rate { per_second: u64::MAX, burst: 1 },
            Rate { per_second: 0, burst: 0 },
        ] {
            let mut throttle = Throttle::new(Some(rate), Some(rate), clock());
            assert_eq!(throttle.admit(), Ok(()), "{rate:?}");
            throttle.spend(u64::MAX, u64::MAX);
            let _ = throttle.admit();
        }
    }

    proptest! {
        /// Whoever asks again after each wait gets what the rate allows: no less, and no more than a burst and one
        /// request beyond it.
        #[test]
        fn the_rate_holds_in_the_long_run(rate in 1..100_000u64, burst in 1..100_000u64, sizes in prop::collection::vec(1..5000u64, 1..200)) {
            let clock = clock();
            let mut throttle = Throttle::new(None, Some(Rate { per_second: rate, burst }), clock.clone());
            let (begin, mut moved, mut last) = (clock.monotonic(), 0u64, 0u64);
            for size in sizes {
                if let Err(wait) = throttle.admit() {
                    clock.advance(wait);
                    prop_assert_eq!(throttle.admit(), Ok(()), "the wait told is enough");
                }
                throttle.spend(1, size);
                (moved, last) = (moved + size, size);
            }
            let nanos = (clock.monotonic() - begin).as_nanos();
            let allowed = u128::from(burst + last) + nanos * u128::from(rate) / 1_000_000_000 + 2;
            prop_assert!(u128::from(moved) <= allowed, "{moved} bytes in {nanos} ns, {allowed} allowed");
            let least = (u128::from(moved - last) + 1).saturating_sub(u128::from(burst)) * 1_000_000_000 / u128::from(rate);
            prop_assert!(nanos <= least + 1_000_000_000 / u128::from(rate) + 1000, "{nanos} ns, {least} are enough");
        }
    }
}
