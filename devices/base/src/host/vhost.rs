//! Vhost: a part of the host's kernel that works the rings of a device, so that what passes wakes nobody here.

use std::io;
use std::os::fd::BorrowedFd;

/// What the host's kernel can be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Back {
    /// The rings of one pair of queues of a network card, with a tap behind them.
    Net,
    /// The rings of a socket device, with the host's `AF_VSOCK` behind them.
    Vsock,
}

impl Back {
    /// The device file that stands for it.
    pub fn path(self) -> &'static str {
        match self {
            Back::Net => "/dev/vhost-net",
            Back::Vsock => "/dev/vhost-vsock",
        }
    }

    /// The module that brings it.
    pub fn module(self) -> &'static str {
        match self {
            Back::Net => "vhost_net",
            Back::Vsock => "vhost_vsock",
        }
    }
}

/// Where a ring lies: guest-physical addresses, and the number of its entries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// Entries.
    pub size: u16,
    /// The descriptor table.
    pub desc: u64,
    /// The available ring.
    pub avail: u64,
    /// The used ring.
    pub used: u64,
}

/// One thing to ask of it (`include/uapi/linux/vhost.h`). Rings are counted from 0 for each of them.
#[derive(Clone, Copy, Debug)]
pub enum Request<'a> {
    /// Which features it can live up to: the answer is their set.
    Features,
    /// It works for this process from now on, with a thread of its own, and reaches guest memory.
    Own,
    /// The driver has accepted these features.
    Accept(u64),
    /// A ring lies there, and has not been used yet.
    Ring(u32, Place),
    /// The eventfd by which the driver says that there is work in a ring; `None`: none any more.
    Kick(u32, Option<BorrowedFd<'a>>),
    /// The eventfd by which it says that the driver wants an interrupt for a ring.
    Call(u32, Option<BorrowedFd<'a>>),
    /// The eventfd by which it says that a ring is broken.
    Error(u32, Option<BorrowedFd<'a>>),
    /// [`Back::Net`]: the ring carries the frames of this tap; `None`: of none, and guest memory is left alone.
    Backend(u32, Option<BorrowedFd<'a>>),
    /// [`Back::Vsock`]: the guest's context ID.
    Guest(u32),
    /// [`Back::Vsock`]: works both rings, or leaves guest memory alone.
    Run(bool),
}

/// An open one. Dropped, it lets go of everything at once.
pub trait Vhost: Send {
    /// Asks for one thing. The answer is a number where there is one, else 0.
    ///
    /// # Errors
    /// As the kernel answers. A ring that does not lie in guest memory is not told to it at all.
    fn ask(&mut self, request: Request<'_>) -> io::Result<u64>;

    /// Lets go of everything, and is as if just opened.
    ///
    /// # Errors
    /// As for an open; it is of no use any more.
    fn renew(&mut self) -> io::Result<()>;
}
