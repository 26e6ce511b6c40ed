//! Virtio: a device author writes a [`Device`]; the transport and the engine do the rest.
//!
//! ```text
//! vCPU side    mmio, pci (tables: offset, width, register)  ->  front (status, features, queue set-up)
//!                                                             |  visit (waits), doorbell eventfds (never wait)
//! lane side                                                 engine (rings, suppression, faults)  ->  Device
//! ```
//!
//! Section numbers are those of *Virtual I/O Device (VIRTIO) Version 1.2*.

pub mod chain;
pub mod doorbell;
pub mod engine;
pub mod front;
pub mod interrupt;
mod knob;
pub mod mmio;
pub mod pci;
mod ring;
pub mod vhost;

use std::sync::Arc;
use std::time::Duration;

use base::meter::Counter;
use base::{Fault, Result};

use crate::catalog::Finish;
pub use chain::{Buffer, Chain, Span};
pub use engine::{Io, Lent};
pub use knob::Knob;

/// Counters of a device by name (`read_bytes`), to be read from any thread.
pub type Meters = Vec<(&'static str, Arc<Counter>)>;

/// A doorbell in the window of a transport: where an ioeventfd belongs.
#[derive(Clone, Debug)]
pub struct Bell {
    /// Offset in the window.
    pub at: u64,
    /// The 4-byte value that rings it; `None`: any write there does, of any width.
    pub value: Option<u32>,
    /// What to signal.
    pub doorbell: doorbell::Doorbell,
}

/// A virtio device, as its author writes it: it takes chains of buffers and says what it wrote.
///
/// All methods are called on one lane and none at the same time as another, so a device needs no lock. None of
/// them may wait for the guest or another thread; [`Device::stop`] alone may wait for the host's kernel.
pub trait Device: Send {
    /// The device ID (section 5).
    fn id(&self) -> u32;

    /// The device's own feature bits. Those of the ring and transport ([`engine::FEATURES`]) are added to them.
    fn features(&self) -> u64 {
        0
    }

    /// The largest size of each queue: powers of two, at most 32768.
    fn queues(&self) -> &[u16];

    /// The configuration space as it is now, at most 256 bytes or so. After a change of its own doing a device
    /// calls [`Io::reconfigured`].
    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    /// The driver has written `bytes` into the configuration space at `at`; both are the guest's claims.
    fn configure(&mut self, at: u64, bytes: &[u8]) {
        let _ = (at, bytes);
    }

    /// The driver is ready (DRIVER_OK) and accepted `features`: from now on the rings can be used.
    ///
    /// # Errors
    /// The host lacks what the device needs to run; the guest sees a device that needs a reset.
    fn start(&mut self, features: u64, io: &mut Io<'_>) -> Result<()> {
        let _ = (features, io);
        Ok(())
    }

    /// How long the driver may be left without an interrupt for chains of `queue`, which are back at once: no time,
    /// unless it is only room that comes back, which drivers look for by themselves whenever they have other work.
    fn patience(&self, queue: u16) -> Duration {
        let _ = queue;
        Duration::ZERO
    }

    /// There may be chains in `queue`: take them with [`Io::next`] until it has none, or until the device is full.
    /// A device that left some takes them up again from [`Device::ready`].
    ///
    /// # Errors
    /// The guest broke a rule that leaves no way to answer; the device is then broken until its reset.
    fn kick(&mut self, queue: u16, io: &mut Io<'_>) -> std::result::Result<(), Fault>;

    /// A descriptor given to [`Io::watch`] is ready, or the deadline of `token` has come.
    ///
    /// # Errors
    /// As [`Device::kick`].
    fn ready(&mut self, token: u16, io: &mut Io<'_>) -> std::result::Result<(), Fault> {
        let _ = (token, io);
        Ok(())
    }

    /// The operator has changed what the device stands on (a disk has grown): looks at it again. A new configuration
    /// space is shown to the driver by the caller. Also called of a device that no driver has started.
    ///
    /// # Errors
    /// As the host answers; the device stays as it is.
    fn refresh(&mut self) -> Result<()> {
        Ok(())
    }

    /// The operator changes settings while the guest runs: `change` is `key=value,key=value`, which
    /// [`flag::change`](crate::flag::change) reads into the type of what this device lets change. A new configuration space is
    /// shown to the driver by the caller, and every queue is kicked. Also called of a device that no driver has started.
    /// `None`: it has no such settings.
    ///
    /// # Errors
    /// [`Why::Usage`](base::Why::Usage): the change makes no sense; or as the host answers. The device stays as it is.
    fn tune(&mut self, change: &str) -> Option<Result<()>> {
        let _ = change;
        None
    }

    /// The rings are about to go (reset, end): waits until nothing in flight can touch guest memory, gives back or
    /// drops its chains, and stops watching descriptors.
    fn stop(&mut self, io: &mut Io<'_>) {
        let _ = io;
    }

    /// To be called once when the guest has ended and the device is gone: hands over to the host what the guest has
    /// written. Asked for before the device first starts.
    fn last_duty(&mut self) -> Option<Finish> {
        None
    }

    /// The device's own counters.
    fn meters(&self) -> Meters {
        Meters::new()
    }
}
