//! How a device interrupts its driver: the part of it that differs between transports.

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

    /// The driver has taken note of these causes.
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

    /// Reset: no cause is left, and no vector chosen.
    fn reset(&self) {
        self.clear(u32::MAX);
    }
}

/// One edge-triggered line for everything, with the causes in a register.
pub struct Edge {
    line: SharedLine,
    causes: AtomicU32,
}

impl Edge {
    /// Interrupts by `line`.
    pub fn new(line: SharedLine) -> Edge {
        Edge { line, causes: AtomicU32::new(0) }
    }

    /// The cause is set before the edge: a handler that runs meanwhile and clears it has not looked at the rings yet,
    /// or gets the edge.
    fn interrupt(&self, cause: u32) {
        self.causes.fetch_or(cause, Ordering::SeqCst);
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
        self.causes.load(Ordering::SeqCst)
    }

    fn clear(&self, causes: u32) {
        self.causes.fetch_and(!causes, Ordering::SeqCst);
    }
}
