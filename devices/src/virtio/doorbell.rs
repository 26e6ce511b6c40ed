//! A doorbell: what the driver's notification of a queue rings, from the kernel or from a register.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

/// An eventfd that the driver's notification of one queue writes to.
#[derive(Clone, Debug)]
pub struct Doorbell {
    /// The queue, which is also the value that the driver writes.
    pub queue: u16,
    fd: Arc<OwnedFd>,
}

impl Doorbell {
    pub(super) fn new(queue: u16) -> rustix::io::Result<Doorbell> {
        use rustix::event::{EventfdFlags, eventfd};
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Doorbell { queue, fd: Arc::new(fd) })
    }

    /// Does what the hypervisor's ioeventfd does.
    pub fn ring(&self) {
        // Fails only when the counter is full, and then the lane is awake already.
        let _ = rustix::io::write(&self.fd, &1u64.to_ne_bytes());
    }
}

impl AsFd for Doorbell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
