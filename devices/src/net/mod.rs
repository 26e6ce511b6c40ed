//! Where frames of a network card go: a tap of the host, a NAT in this process, or the program passt.
//!
//! A [`Link`] takes the frames of the guest out of their chains and puts those for the guest into an [`Inbox`], both
//! in guest memory, so that a frame is copied once: by the kernel.

pub mod header;
pub mod inbox;
pub mod passt;
pub mod pcap;
pub mod tap;
pub mod user;

use base::{Fault, Result};

pub use header::{HEADER, Header};
pub use inbox::Inbox;

use crate::virtio::{Chain, Io, Meters};

/// The largest frame: an IP packet of 65535 bytes behind an Ethernet header.
pub const LARGEST: u64 = 65_535 + 14;

/// The other side of a network card. Called on one lane, as the device is.
pub trait Link: Send {
    /// The `VIRTIO_NET_F_` bits that it can live up to: checksums and segmentation.
    fn features(&self) -> u64;

    /// The MTU to tell the guest, in bytes.
    fn mtu(&self) -> u16;

    /// The driver is ready and accepted `features`.
    ///
    /// # Errors
    /// The host lacks what it needs.
    fn start(&mut self, features: u64, io: &mut Io<'_>) -> Result<()>;

    /// The guest takes these offloads from now on (`VIRTIO_NET_F_GUEST_` bits, section 5.1.6.5.6).
    fn offer(&mut self, features: u64) {
        let _ = features;
    }

    /// The guest uses so many pairs of queues from now on; whether it may.
    fn use_pairs(&mut self, pairs: usize) -> bool {
        let _ = pairs;
        true
    }

    /// Whether frames come by here, to be counted and limited.
    fn shows_frames(&self) -> bool {
        true
    }

    /// Takes the frame in `chain` (its first [`HEADER`] bytes are the virtio header); `false` if it cannot now and
    /// will be able after a call of [`Link::ready`].
    ///
    /// # Errors
    /// The guest broke a rule while it was answered.
    fn transmit(
        &mut self,
        pair: usize,
        chain: &Chain,
        inboxes: &mut [Inbox],
        io: &mut Io<'_>,
    ) -> Result<bool, Fault>;

    /// All frames that there were have been transmitted.
    ///
    /// # Errors
    /// As [`Link::transmit`].
    fn flush(&mut self, inboxes: &mut [Inbox], io: &mut Io<'_>) -> Result<(), Fault> {
        let _ = (inboxes, io);
        Ok(())
    }

    /// There may be new room in the inbox of `pair`.
    ///
    /// # Errors
    /// As [`Link::transmit`].
    fn refilled(&mut self, pair: usize, inboxes: &mut [Inbox], io: &mut Io<'_>) -> Result<(), Fault>;

    /// A descriptor that it watches is ready, or its deadline has come.
    ///
    /// # Errors
    /// As [`Link::transmit`].
    fn ready(&mut self, token: u16, inboxes: &mut [Inbox], io: &mut Io<'_>) -> Result<(), Fault>;

    /// The rings are about to go: stops watching.
    fn stop(&mut self, io: &mut Io<'_>);

    /// Its own counters.
    fn meters(&self) -> Meters {
        Meters::new()
    }
}
