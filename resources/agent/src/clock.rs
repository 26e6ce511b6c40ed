//! The guest's clock.

use rustix::time::{ClockId, Timespec, clock_gettime, clock_settime};

/// Sets the clock, unless it is right already: most guests have one from their hypervisor.
pub(crate) fn set(seconds: u64, nanoseconds: u32) {
    let Ok(seconds) = i64::try_from(seconds) else { return };
    let now = clock_gettime(ClockId::Realtime);
    if now.tv_sec.abs_diff(seconds) > 1 {
        // Without the right to it there is nothing to be done.
        let _ = clock_settime(
            ClockId::Realtime,
            Timespec { tv_sec: seconds, tv_nsec: i64::from(nanoseconds % 1_000_000_000) },
        );
    }
}
