//! The link to a tap of the host: the kernel reads and writes frames in guest memory, offloads pass both ways. Where the
//! host's kernel works the rings as well (vhost-net), this process only sets it up.

use std::os::fd::AsFd;

use base::host::{Tap, offload};
use base::lane::Interest;
use base::sys::iovec::Iovecs;
use base::sys::socket;
use base::{Doing, Fault, Why};
use rustix::io::Errno;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_UFO, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6,
    VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_UFO,
    VIRTIO_NET_F_HOST_USO, VIRTIO_NET_F_MQ,
};

use super::{HEADER, Inbox, LARGEST, Link};
use crate::virtio::vhost::Worker;
use crate::virtio::{Chain, Io};

/// Frames read in one visit, so that a flood leaves the lane to others.
const SHARE: usize = 64;

/// What the guest takes, and the bits of the tap for it. Large segments need checksums left open.
const TAKES: [(u32, u32); 7] = [
    (VIRTIO_NET_F_GUEST_CSUM, offload::CSUM),
    (VIRTIO_NET_F_GUEST_TSO4, offload::TSO4),
    (VIRTIO_NET_F_GUEST_TSO6, offload::TSO6),
    (VIRTIO_NET_F_GUEST_ECN, offload::ECN),
    (VIRTIO_NET_F_GUEST_UFO, offload::UFO),
    (VIRTIO_NET_F_GUEST_USO4, offload::USO),
    (VIRTIO_NET_F_GUEST_USO6, offload::USO),
];

/// What the kernel takes from the guest, and the bits that show that it does.
const GIVES: [(u32, u32); 6] = [
    (VIRTIO_NET_F_CSUM, offload::CSUM),
    (VIRTIO_NET_F_HOST_TSO4, offload::TSO4),
    (VIRTIO_NET_F_HOST_TSO6, offload::TSO6),
    (VIRTIO_NET_F_HOST_ECN, offload::ECN),
    (VIRTIO_NET_F_HOST_UFO, offload::UFO),
    (VIRTIO_NET_F_HOST_USO, offload::USO),
];

/// A tap as a link.
pub struct TapLink {
    tap: Tap,
    name: String,
    mtu: u16,
    /// The guest takes large segments, so any frame may be one.
    large: bool,
    /// For each pair: frames may wait for room in the inbox.
    starved: Vec<bool>,
    /// For each pair, who works its rings, if that is the host's kernel.
    workers: Vec<Worker>,
}

impl TapLink {
    /// The link of the device called `name`; `workers` are as many as the tap has queues, or none.
    pub fn new(tap: Tap, name: &str, mtu: Option<u16>, workers: Vec<Worker>) -> TapLink {
        let mtu = mtu.unwrap_or(tap.mtu);
        let starved = vec![false; tap.queues.len()];
        TapLink { tap, name: name.to_owned(), mtu, large: false, starved, workers }
    }

    /// Gives the kernel the rings of all pairs that the driver knows of, and has it begin with the first.
    fn hand_over(&mut self, features: u64, io: &mut Io<'_>) -> std::io::Result<()> {
        let known = if features & 1 << VIRTIO_NET_F_MQ != 0 { self.workers.len() } else { 1 };
        for (pair, worker) in self.workers.iter_mut().take(known).enumerate() {
            let receive = token(pair).saturating_mul(2);
            worker.take(&[receive, receive.saturating_add(1)], features, token(pair) | BROKEN, io)?;
        }
        self.begin(1)
    }

    /// Has the kernel carry the frames of so many pairs, and of no more.
    fn begin(&mut self, pairs: usize) -> std::io::Result<()> {
        // A queue that is not used has no frames to wait for, which the kernel refuses to do.
        self.workers.iter_mut().skip(pairs).for_each(Worker::pause);
        if let Err(cause) = self.tap.use_queues(pairs) {
            log::debug!(target: "guest", "{}: use {pairs} queues of {}: {cause}", self.name, self.tap.name);
        }
        let mut ours = self.workers.iter_mut().zip(&self.tap.queues).take(pairs);
        ours.try_for_each(|(worker, queue)| worker.begin(Some(queue.as_fd())))
    }

    /// Moves frames from the tap into the inbox, until either has no more.
    fn receive(&mut self, pair: usize, inboxes: &mut [Inbox], io: &mut Io<'_>) -> Result<(), Fault> {
        let (Some(queue), Some(inbox), Some(starved)) =
            (self.tap.queues.get(pair), inboxes.get_mut(pair), self.starved.get_mut(pair))
        else {
            return Ok(());
        };
        *starved = false;
        // A frame that finds too little room is cut off by the kernel, so none is read before there is enough.
        let largest = if self.large { LARGEST } else { u64::from(self.mtu).saturating_add(18) };
        let largest = largest.saturating_add(HEADER);
        for _ in 0..SHARE {
            let room = inbox.room(largest, io)?;
            if room < largest {
                *starved = true;
                return Ok(());
            }
            let Ok(into) = Iovecs::guest(io.memory(), inbox.parts(0, room)) else { return Ok(()) };
            match socket::read(queue, &into) {
                Ok(len) if len > 0 => {
                    if let Some(len) = (len as u64).checked_sub(HEADER) {
                        inbox.commit_as_read(len, io);
                    }
                }
                _ => return Ok(()),
            }
        }
        // The rest, behind everyone else's work.
        io.arm(more(pair), std::time::Duration::ZERO);
        Ok(())
    }
}

/// The bit of tokens by which the kernel says that it cannot go on with a pair.
const BROKEN: u16 = 0x200;

/// The token of a queue's descriptor.
fn token(pair: usize) -> u16 {
    u16::try_from(pair).unwrap_or(u16::MAX) & 0xff
}

/// The token of what is left of a queue.
fn more(pair: usize) -> u16 {
    token(pair) | 0x100
}

fn bits(table: &[(u32, u32)], has: impl Fn(u32, u32) -> bool) -> (u64, u32) {
    let chosen = table.iter().filter(|(bit, tap)| has(*bit, *tap));
    chosen.fold((0, 0), |(bits, taps), (bit, tap)| (bits | 1 << bit, taps | tap))
}

impl Link for TapLink {
    fn features(&self) -> u64 {
        let known = |_, tap: u32| self.tap.offloads & tap != 0;
        bits(&TAKES, known).0 | bits(&GIVES, known).0
    }

    fn mtu(&self) -> u16 {
        self.mtu
    }

    fn start(&mut self, features: u64, io: &mut Io<'_>) -> base::Result<()> {
        self.offer(features);
        if !self.workers.is_empty() {
            return self
                .hand_over(features, io)
                .doing(Why::Host, || format!("have the host's kernel work for {}", self.name));
        }
        for (pair, queue) in self.tap.queues.iter().enumerate() {
            // Edge-triggered: nothing is asked again while the guest has no buffers.
            io.watch(queue, token(pair), Interest::Changes)
                .doing(Why::Host, || format!("wait for frames of {}", self.tap.name))?;
        }
        Ok(())
    }

    fn offer(&mut self, features: u64) {
        let csum = features & 1 << VIRTIO_NET_F_GUEST_CSUM != 0;
        let set = bits(&TAKES, |bit, _| csum && features & 1 << bit != 0).1 & self.tap.offloads;
        self.large = set & !(offload::CSUM | offload::ECN) != 0;
        if let Err(cause) = self.tap.set_offloads(set) {
            log::debug!(target: "guest", "{}: set the offloads of {}: {cause}", self.name, self.tap.name);
        }
    }

    fn use_pairs(&mut self, pairs: usize) -> bool {
        let begun = self.begin(pairs);
        if let Err(cause) = &begun {
            log::warn!(target: "guest", "{}: have the host's kernel work {pairs} pairs: {cause}", self.name);
        }
        begun.is_ok()
    }

    fn shows_frames(&self) -> bool {
        self.workers.is_empty()
    }

    fn transmit(
        &mut self,
        pair: usize,
        chain: &Chain,
        _: &mut [Inbox],
        io: &mut Io<'_>,
    ) -> Result<bool, Fault> {
        let Some(queue) = self.tap.queues.get(pair) else { return Ok(true) };
        let len = chain.readable().len();
        let parts = chain.readable().parts(0, len).map(|part| (part.addr.0, part.len));
        // The kernel checks the header and the frame. What it does not take is lost, as on any wire.
        if let Ok(from) = Iovecs::guest(io.memory(), parts)
            && let Err(cause) = socket::write(queue, &from)
        {
            log::trace!(target: "guest", "{}: send {len} bytes to {}: {cause}", self.name, self.tap.name);
        }
        Ok(true)
    }

    fn refilled(&mut self, pair: usize, inboxes: &mut [Inbox], io: &mut Io<'_>) -> Result<(), Fault> {
        if self.starved.get(pair) == Some(&true) { self.receive(pair, inboxes, io) } else { Ok(()) }
    }

    fn ready(&mut self, token: u16, inboxes: &mut [Inbox], io: &mut Io<'_>) -> Result<(), Fault> {
        let pair = usize::from(token & 0xff);
        if token & BROKEN == 0 {
            return self.receive(pair, inboxes, io);
        }
        self.workers.get_mut(pair).map_or(Ok(()), Worker::break_off)
    }

    fn stop(&mut self, io: &mut Io<'_>) {
        self.workers.iter_mut().for_each(|worker| worker.stop(io));
        for (pair, queue) in self.tap.queues.iter().enumerate() {
            io.unwatch(queue);
            io.disarm(more(pair));
        }
        // What came for the guest that is going is not for the one that comes.
        for queue in &self.tap.queues {
            for _ in 0..SHARE.saturating_mul(16) {
                let mut frame = [0u8; 64];
                if let Err(Errno::AGAIN | Errno::IO | Errno::BADFD) = rustix::io::read(queue, &mut frame) {
                    break;
                }
            }
        }
        self.offer(0);
    }
}
