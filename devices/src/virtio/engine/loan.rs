//! Rings on loan: somebody outside this process works them (vhost, in the host's kernel), from the device's start to its
//! stop. Doorbells then go there, and what comes back is a word that the driver wants an interrupt.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use base::host::vhost::Place;
use base::lane::{Context, Interest};
use rustix::event::{EventfdFlags, eventfd};

use super::{CALLS, Engine, Io};
use crate::virtio::doorbell::Doorbell;

/// What who works a ring has to know.
pub struct Lent {
    /// Where the ring lies. All of it was in guest memory when the driver enabled it, and guest memory stays.
    pub place: Place,
    /// Rung by the driver when there is work.
    pub kick: Doorbell,
    /// An eventfd to be written to when the driver wants an interrupt.
    pub call: Arc<OwnedFd>,
}

/// A ring that is away.
pub(super) struct Loan {
    queue: u16,
    call: Arc<OwnedFd>,
}

impl Io<'_> {
    /// Lends the ring of `queue`, which the engine leaves alone until the device has stopped; `None` if the driver has
    /// not enabled it. To be called from [`crate::virtio::Device::start`].
    ///
    /// # Errors
    /// The host is out of descriptors.
    pub fn lend(&mut self, queue: u16) -> io::Result<Option<Lent>> {
        let at = usize::from(queue);
        let (Some(ring), Some(kick)) = (self.rings.get_mut(at), self.doorbells.get(at)) else {
            return Ok(None);
        };
        let Some(place) = ring.as_ref().map(super::Ring::place) else { return Ok(None) };
        let call = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        self.lane.watch(&call, CALLS | u32::from(queue), Interest::Rung)?;
        self.lane.unwatch(kick);
        *ring = None;
        self.loans.push(Loan { queue, call: call.clone() });
        Ok(Some(Lent { place, kick: kick.clone(), call }))
    }
}

impl Engine {
    /// Who works the rings has started: it hears of what the driver has put there before.
    pub(super) fn ring_lent(&self) {
        if self.loans.is_empty() {
            return;
        }
        let calls: Vec<_> = self.loans.iter().map(|loan| (loan.queue, loan.call.clone())).collect();
        self.shared.interrupt.lend(&calls);
        for loan in &self.loans {
            if let Some(doorbell) = self.doorbells.get(usize::from(loan.queue)) {
                doorbell.ring();
            }
        }
    }

    /// The driver wants an interrupt for a ring that is away.
    pub(super) fn called(&self, queue: u16) {
        if self.loans.iter().any(|loan| loan.queue == queue) {
            self.shared.used(&[queue]);
        }
    }

    /// The device has stopped: the doorbells are our own again.
    pub(super) fn take_back(&mut self, ctx: &mut Context<'_>) {
        if self.loans.is_empty() {
            return;
        }
        self.shared.interrupt.lend(&[]);
        for loan in std::mem::take(&mut self.loans) {
            ctx.unwatch(&loan.call);
            let Some(doorbell) = self.doorbells.get(usize::from(loan.queue)) else { continue };
            if let Err(cause) = ctx.watch(doorbell, u32::from(loan.queue), Interest::Rung) {
                // It was watched before, so there is room for it.
                log::error!(target: "guest", "{}: wait for a doorbell again: {cause}", self.shared.name);
            }
        }
    }
}
