//! Interrupt lines, as a device sees them: something to pull.

use std::os::fd::OwnedFd;
use std::sync::Arc;

/// One interrupt line of the machine.
pub trait Line: Send + Sync {
    /// Sets the level of the line. Devices with edge-triggered lines call [`Line::pulse`].
    fn set(&self, high: bool);

    /// Raises and lowers the line: one edge.
    fn pulse(&self) {
        self.set(true);
        self.set(false);
    }
}

/// A shared line.
pub type SharedLine = Arc<dyn Line>;

/// A message-signalled interrupt: the memory write that a local APIC understands as an interrupt
/// (Intel SDM volume 3, section 11.11).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Msi {
    /// Address of the write: 0xfee0_0000 and the destination.
    pub address: u64,
    /// Data of the write: vector, delivery mode, trigger mode.
    pub data: u32,
}

/// Where interrupt messages go: the hypervisor's local APICs, or a test.
pub trait Messages: Send + Sync {
    /// Delivers one message now.
    fn send(&self, msi: Msi);
    /// Tells the hypervisor which message the input `pin` of the I/O APIC stands for, so that a level-triggered
    /// interrupt's end is reported back. `None`: the pin is masked or edge-triggered and needs no report.
    fn watch(&self, pin: u32, msi: Option<Msi>);
    /// Has each write to one of these eventfds send its message without waking anyone, until further notice; `None`: not
    /// any more. Where the hypervisor cannot, and for messages not wired, whoever waits for the eventfd hears of the write.
    /// All that changes comes in one call: each change has the hypervisor build its routes anew.
    fn wire(&self, wires: &[Wire]) {
        let _ = wires;
    }
}

/// An eventfd, and the message that a write to it stands for.
pub type Wire = (Arc<OwnedFd>, Option<Msi>);

/// A line that counts its edges, for tests.
#[derive(Debug, Default)]
pub struct FakeLine {
    /// Rising edges so far.
    pub edges: crate::meter::Counter,
    level: std::sync::atomic::AtomicBool,
}

impl FakeLine {
    /// The present level.
    pub fn level(&self) -> bool {
        self.level.load(std::sync::atomic::Ordering::SeqCst)
    }
}

impl Line for FakeLine {
    fn set(&self, high: bool) {
        let was = self.level.swap(high, std::sync::atomic::Ordering::SeqCst);
        if high && !was {
            self.edges.add(1);
        }
    }
}
