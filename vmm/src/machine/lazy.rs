//! Lazy registers: those whose writes the hypervisor may keep back until the next exit, once they are busy.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use devices::catalog::Space;

use crate::hv::Vm;

/// A register on which nothing depends but the order of its writes and the accesses that follow.
pub struct Lazy {
    space: Space,
    address: u64,
    len: u32,
    only: Option<u8>,
    since: Instant,
    /// Writes in a row that could have been late; [`Lazy::BUSY`] and more: they are delayed now.
    written: AtomicU64,
}

impl Lazy {
    /// So many writes make a register busy,
    const BUSY: u64 = 16;
    /// but not before the machine has lived so long.
    ///
    /// A registration makes KVM free what it replaced after a grace period of some 10 ms, and a VM that ends earlier
    /// waits for it: a guest that says a sentence and is gone should not.
    const SETTLED: Duration = Duration::from_millis(20);

    /// The register of `len` bytes at `address`; with `only`, writes of any other value have to be heard at once.
    pub fn new(space: Space, address: u64, len: u32, only: Option<u8>) -> Lazy {
        Lazy { space, address, len, only, since: Instant::now(), written: AtomicU64::new(0) }
    }

    /// Whether this is the register at `address`.
    pub fn is_at(&self, space: Space, address: u64) -> bool {
        self.address == address && self.space == space
    }

    /// The guest has written `data`: has the next writes delayed when there are many, and no longer when one has to be
    /// heard at once.
    pub fn notice(&self, data: &[u8], vm: &dyn Vm) {
        let late = self.only.is_none_or(|value| data == [value]);
        let written = self.written.load(Ordering::Relaxed);
        // Where the hypervisor cannot delay writes they go on coming as exits: slower, and just as right.
        if !late && written >= Self::BUSY {
            let _ = vm.hear_writes(self.space, self.address, self.len);
        }
        if late && written + 1 == Self::BUSY {
            if self.since.elapsed() < Self::SETTLED {
                return;
            }
            let _ = vm.delay_writes(self.space, self.address, self.len);
        }
        self.written.store(if late { written.saturating_add(1) } else { 0 }, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::hv::fake::{Fake, FakeVm};

    fn busy(only: Option<u8>) -> (Arc<FakeVm>, Fake, Lazy) {
        let fake = FakeVm::new([]);
        let mut lazy = Lazy::new(Space::Port, 0x3f8, 1, only);
        lazy.since = Instant::now().checked_sub(Duration::from_secs(1)).unwrap();
        (fake.clone(), Fake(fake), lazy)
    }

    #[test]
    fn a_busy_register_is_delayed_once() {
        let (fake, vm, lazy) = busy(None);
        (0..100).for_each(|byte| lazy.notice(&[byte], &vm));
        assert_eq!(*fake.delays.lock().unwrap(), [(0x3f8, true)]);
    }

    #[test]
    fn a_young_machine_delays_nothing() {
        let (fake, vm, mut lazy) = busy(None);
        lazy.since = Instant::now() + Duration::from_secs(3600);
        (0..100).for_each(|byte| lazy.notice(&[byte], &vm));
        assert_eq!(*fake.delays.lock().unwrap(), []);
    }

    #[test]
    fn a_value_that_matters_ends_the_delay_until_it_is_busy_again() {
        let (fake, vm, lazy) = busy(Some(0));
        let zeros = || (0..20).for_each(|_| lazy.notice(&[0], &vm));
        zeros();
        lazy.notice(&[2], &vm);
        lazy.notice(&[0], &vm);
        lazy.notice(&[5], &vm);
        zeros();
        assert_eq!(*fake.delays.lock().unwrap(), [(0x3f8, true), (0x3f8, false), (0x3f8, true)]);
    }
}
