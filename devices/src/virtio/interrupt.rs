//! How a device interrupts its driver: the part of it that differs between transports.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use base::irq::SharedLine;

/// Interrupt cause: chains were given back (InterruptStatus and ISR status bit 0).
pub const USED: u32 = 1;
/// Interrupt cause: the configuration or the device status has changed (bit 1).
pub const CHANGED: u32 = 2;
/// No vector is chosen (section 4.1.4.3, VIRTIO_MSI_NO_VECTOR).
pub const NO_VECTOR: u16 = 0xffff;

/// What a vector is chosen for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// A change of the configuration or the device status.
    Config,
    /// Chains given back to this queue.
    Queue(u16),
}

/// The way from a device to its driver. The lane pulls it, the registers tell it what the driver wants.
pub trait Interrupt: Send + Sync {
    /// Chains of these queues, one at least, were given back.
    fn used(&self, queues: &[u16]);

    /// The configuration or the device status has changed.
    fn changed(&self);

    /// The causes as the driver reads them: [`USED`], [`CHANGED`].
    fn causes(&self) -> u32;

    /// The driver has taken note of these causes. It may be heard of late: a cause that has come since the driver last
    /// read them is not among those it knows.
    fn clear(&self, causes: u32);

    /// The vector chosen for `source`; [`NO_VECTOR`] where there are none.
    fn vector(&self, source: Source) -> u16 {
        let _ = source;
        NO_VECTOR
    }

    /// The driver chooses a vector for `source`. One that does not exist is [`NO_VECTOR`].
    fn choose(&self, source: Source, vector: u16) {
        let _ = (source, vector);
    }

    /// From now on somebody outside this process writes to the eventfds of these queues, and of no others, where the driver
    /// is to be interrupted. What is not seen to here is heard by whoever waits for them, who then calls
    /// [`Interrupt::used`].
    fn lend(&self, calls: &[(u16, Arc<OwnedFd>)]) {
        let _ = calls;
    }

    /// Reset: no cause is left, and no vector chosen.
    fn reset(&self);
}

/// One edge-triggered line for everything, with the causes in a register.
pub struct Edge {
    line: SharedLine,
    /// The causes, and above them ([`UNREAD`]) those that have come since the driver last read them.
    causes: AtomicU32,
}

/// Shift of causes that the driver has not read.
const UNREAD: u32 = 16;
/// All causes.
const CAUSES: u32 = (1 << UNREAD) - 1;

impl Edge {
    /// Interrupts by `line`.
    pub fn new(line: SharedLine) -> Edge {
        Edge { line, causes: AtomicU32::new(0) }
    }

    /// The cause is set before the edge: a handler that runs meanwhile and clears it has not looked at the rings yet,
    /// or gets the edge.
    fn interrupt(&self, cause: u32) {
        self.causes.fetch_or(cause | cause << UNREAD, Ordering::SeqCst);
        self.line.pulse();
    }
}

impl Interrupt for Edge {
    fn used(&self, _: &[u16]) {
        self.interrupt(USED);
    }

    fn changed(&self) {
        self.interrupt(CHANGED);
    }

    fn causes(&self) -> u32 {
        self.causes.fetch_and(CAUSES, Ordering::SeqCst) & CAUSES
    }

    fn clear(&self, causes: u32) {
        let known = |now: u32| Some(now & !(causes & CAUSES & !(now >> UNREAD)));
        let _ = self.causes.fetch_update(Ordering::SeqCst, Ordering::SeqCst, known);
    }

    fn reset(&self) {
        self.causes.store(0, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use base::irq::FakeLine;

    use super::*;

    #[test]
    fn a_late_acknowledgement_takes_no_cause_that_came_after_the_read() {
        let line = Arc::new(FakeLine::default());
        let edge = Edge::new(line.clone());
        edge.used(&[0]);
        assert_eq!(edge.causes(), USED);
        edge.changed();
        edge.used(&[0]);
        edge.clear(USED);
        assert_eq!(edge.causes(), USED | CHANGED, "both came after the read that the driver answers");
        edge.clear(USED);
        assert_eq!(edge.causes(), CHANGED);
        edge.clear(u32::MAX);
        assert_eq!((edge.causes(), line.edges.get()), (0, 3));
        edge.used(&[0]);
        edge.reset();
        assert_eq!(edge.causes(), 0, "a reset takes what nobody has read");
    }
}
