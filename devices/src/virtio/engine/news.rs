//! When the driver hears of what was given back: at once, or after a while where it may do without.

use base::lane::Context;

use super::{Engine, TELL};

impl Engine {
    /// Drivers that have found by themselves what they were not told of want no interrupt for it any more. What is
    /// given back from now on is another matter, and may wait as long.
    pub(super) fn forget_unwanted(&mut self, ctx: &mut Context<'_>) {
        let ram = self.memory.ram();
        let mut still = false;
        for ring in self.rings.iter_mut().flatten() {
            if ring.wants_interrupt(ram).unwrap_or(false) {
                still = true;
            } else {
                ring.tell();
            }
        }
        if !still {
            self.waiting = false;
            ctx.disarm(TELL);
        }
    }

    /// Interrupts the driver for queues that it wants to hear of: at once, or unless it is `overdue` after a while.
    pub(super) fn interrupt_if_wanted(&mut self, overdue: bool, ctx: &mut Context<'_>) {
        let ram = self.memory.ram();
        self.wanted.clear();
        let mut patience = None;
        for (ring, doorbell) in self.rings.iter_mut().zip(&self.doorbells) {
            let Some(ring) = ring else { continue };
            // A ring that cannot be read was reported by whoever wrote to it.
            if ring.wants_interrupt(ram).unwrap_or(false) {
                let wait = self.device.patience(doorbell.queue);
                if !(wait.is_zero() || overdue || ring.is_pressing()) {
                    patience = Some(wait);
                    continue;
                }
                self.wanted.push(doorbell.queue);
            }
            ring.tell();
        }
        if !self.wanted.is_empty() {
            self.shared.used(&self.wanted);
        }
        match patience {
            Some(wait) if !self.waiting => ctx.arm(TELL, wait),
            None if self.waiting => ctx.disarm(TELL),
            _ => {}
        }
        self.waiting = patience.is_some();
    }
}
