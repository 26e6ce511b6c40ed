//! One split virtqueue at work, on the lane side: every lie in it becomes a [`Fault`].

use std::sync::atomic::{Ordering, fence};

use base::Fault;
use base::host::vhost::Place;
use base::memory::{Memory, Ram};
use virtio_queue::{Error, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::chain::{Buffer, Chain};

/// `VIRTQ_AVAIL_F_NO_INTERRUPT`, section 2.7.6.
const NO_INTERRUPT: u16 = 1;

/// A queue as the driver has set it up; the front fills it in, every value is a claim.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Setup {
    /// Entries.
    pub size: u16,
    /// The driver has enabled it.
    pub ready: bool,
    /// Guest-physical address of the descriptor table.
    pub desc: u64,
    /// Guest-physical address of the available ring (driver area).
    pub avail: u64,
    /// Guest-physical address of the used ring (device area).
    pub used: u64,
}

impl Setup {
    /// The queue that it describes, at most `max` entries long.
    ///
    /// # Errors
    /// The size is not a power of two or too large, or a part is misaligned or not in RAM.
    pub fn queue(&self, max: u16, ram: &Ram) -> Result<Queue, Fault> {
        let size = u64::from(self.size);
        // Section 2.7: 16 bytes for each descriptor; 6 bytes and 2, and 6 bytes and 8 for each ring entry.
        let parts = [
            (self.desc, size * 16, "descriptor table is not in memory"),
            (self.avail, 6 + size * 2, "available ring is not in memory"),
            (self.used, 6 + size * 8, "used ring is not in memory"),
        ];
        for (addr, len, what) in parts {
            let len = usize::try_from(len).unwrap_or(usize::MAX);
            // One piece of RAM: a ring that spans the hole does not exist.
            if GuestMemoryBackend::get_slice(ram, GuestAddress(addr), len).is_err() {
                return Err(Fault::new(what, addr));
            }
        }
        let refused = |_| Fault::new("virtqueue is misaligned or has no valid size", size);
        let mut queue = Queue::new(max).map_err(refused)?;
        queue.try_set_size(self.size).map_err(refused)?;
        queue.try_set_desc_table_address(GuestAddress(self.desc)).map_err(refused)?;
        queue.try_set_avail_ring_address(GuestAddress(self.avail)).map_err(refused)?;
        queue.try_set_used_ring_address(GuestAddress(self.used)).map_err(refused)?;
        queue.set_ready(true);
        Ok(queue)
    }
}

/// What a device has left in a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Left {
    /// Nothing that it has to be called for.
    Nothing,
    /// Chains that came while it worked.
    More,
    /// Chains beyond those of one visit.
    Rest,
}

/// A virtqueue in use.
pub(super) struct Ring {
    queue: Queue,
    /// Chains that the device may still take in this visit.
    budget: u16,
    /// It wanted more than that.
    cut: bool,
    /// It has seen the end of the available ring.
    drained: bool,
    /// Chains were given back since the driver was last considered for an interrupt.
    pub fresh: bool,
    /// The used index when the driver was last considered.
    told: u16,
}

fn unreachable_ring(_: Error) -> Fault {
    Fault::new("ring memory cannot be reached", 0)
}

impl Ring {
    pub fn new(setup: &Setup, max: u16, event_idx: bool, ram: &Ram) -> Result<Ring, Fault> {
        let mut queue = setup.queue(max, ram)?;
        queue.set_event_idx(event_idx);
        Ok(Ring { queue, budget: 0, cut: false, drained: false, fresh: false, told: 0 })
    }

    /// Where it lies.
    pub fn place(&self) -> Place {
        Place {
            size: self.queue.size(),
            desc: self.queue.desc_table(),
            avail: self.queue.avail_ring(),
            used: self.queue.used_ring(),
        }
    }

    /// Begins a visit of the lane, in which the device gets at most one ring full of chains: a guest that adds chains
    /// from one vCPU while the device answers them would otherwise keep the lane from all else for ever.
    pub fn open(&mut self) {
        self.budget = self.queue.size();
    }

    /// Takes the next chain. `spare` has empty lists to put its buffers in; queue and epoch of the answer are
    /// the caller's to fill in.
    ///
    /// A chain is at most as long as the largest queue (section 2.7.5.2 asks the driver for that): without this
    /// bound one indirect table could hold 65535 buffers, and the lane would work for the guest without end.
    pub fn next(&mut self, memory: &Memory, spare: &mut Vec<Vec<Buffer>>) -> Result<Option<Chain>, Fault> {
        let Some(budget) = self.budget.checked_sub(1) else {
            self.cut = true;
            return Ok(None);
        };
        self.budget = budget;
        let ram = memory.ram();
        let longest = usize::from(self.queue.max_size());
        let size = self.queue.size();
        let broken = |_| Fault::new("available index runs ahead of the ring", u64::from(size));
        let Some(descriptors) = self.queue.iter(ram).map_err(broken)?.next() else {
            self.drained = true;
            return Ok(None);
        };
        let head = descriptors.head_index();
        if head >= size {
            return Err(Fault::new("available ring names no descriptor", u64::from(head)));
        }
        let (mut buffers, mut readable) = (spare.pop().unwrap_or_default(), 0usize);
        let (mut count, mut open, mut writing) = (0usize, true, false);
        for descriptor in descriptors {
            count = count.saturating_add(1);
            if count > longest {
                return Err(Fault::new("descriptor chain is longer than the queue", longest as u64));
            }
            open = descriptor.has_next();
            let (addr, len) = (descriptor.addr(), descriptor.len());
            if writing && !descriptor.is_write_only() {
                return Err(Fault::new("readable descriptor follows a writable one", addr.0));
            }
            writing = descriptor.is_write_only();
            if len == 0 {
                continue;
            }
            if GuestMemoryBackend::get_slice(ram, addr, usize::try_from(len).unwrap_or(usize::MAX)).is_err() {
                return Err(Fault::new("descriptor names no memory", addr.0));
            }
            buffers.push(Buffer { addr, len });
            if !writing {
                readable = buffers.len();
            }
        }
        // The iterator ends without a word on loops, bad indices, bad indirect tables and 4 GiB of length.
        if open {
            return Err(Fault::new("descriptor chain breaks off", u64::from(head)));
        }
        Ok(Some(Chain { queue: 0, head, epoch: 0, buffers, readable }))
    }

    /// Gives chains back, each with the bytes of its writable part that hold the answer; the driver sees all of them at
    /// once or none.
    pub fn give(&mut self, ram: &Ram, chains: &[(u16, u32)]) -> Result<(), Fault> {
        let Some(((head, written), before)) = chains.split_last() else { return Ok(()) };
        self.fresh = true;
        let size = self.queue.size();
        for (head, _) in chains {
            if *head >= size {
                return Err(Fault::new("chain given back names no descriptor", u64::from(*head)));
            }
        }
        let mut next = self.queue.next_used();
        for (head, written) in before {
            // Section 2.7.8: behind flags and index, 8 bytes each; the size is a power of two and not zero.
            let slot = u64::from(next & size.wrapping_sub(1)).wrapping_mul(8).wrapping_add(4);
            let entry = [u32::from(*head).to_le(), written.to_le()];
            ram.write_obj(entry, GuestAddress(self.queue.used_ring().wrapping_add(slot)))
                .map_err(|_| Fault::new("used ring is not in memory", self.queue.used_ring()))?;
            next = next.wrapping_add(1);
        }
        self.queue.set_next_used(next);
        // The last one moves the index, and with it the driver's view, over all.
        self.queue.add_used(ram, *head, *written).map_err(unreachable_ring)
    }

    /// Tells the driver that it need not ring the doorbell while the device is at work.
    pub fn quiet(&mut self, ram: &Ram) -> Result<(), Fault> {
        self.queue.disable_notification(ram).map_err(unreachable_ring)
    }

    /// What the device has left. After the last chain, doorbells are asked for again, and what came meanwhile is
    /// looked for, since it may have come without one. A device that is full comes back on its own.
    pub fn close(&mut self, ram: &Ram) -> Result<Left, Fault> {
        let cut = std::mem::take(&mut self.cut);
        if std::mem::take(&mut self.drained) {
            let more = self.queue.enable_notification(ram).map_err(unreachable_ring)?;
            return Ok(if more { Left::More } else { Left::Nothing });
        }
        Ok(if cut { Left::Rest } else { Left::Nothing })
    }

    /// Whether the driver wants an interrupt for chains that it was not told of. It is told, or wants to hear of nothing
    /// so far: either way [`Ring::tell`] follows, now or later, and what counts then is what the driver wants by then.
    pub fn wants_interrupt(&self, ram: &Ram) -> Result<bool, Fault> {
        if !self.fresh {
            return Ok(false);
        }
        if self.queue.event_idx_enabled() {
            // Section 2.7.10: only if the entry that the driver waits for is among the new ones.
            fence(Ordering::SeqCst);
            let place = u64::from(self.queue.size()).wrapping_mul(2).wrapping_add(4);
            let place = self.queue.avail_ring().wrapping_add(place);
            let event: u16 = ram
                .load(GuestAddress(place), Ordering::Relaxed)
                .map_err(|_| Fault::new("available ring is not in memory", place))?;
            let used = self.queue.next_used();
            let behind = used.wrapping_sub(u16::from_le(event)).wrapping_sub(1);
            return Ok(behind < self.untold());
        }
        // The used index must be visible before the flag is read (section 2.7.7.2), or both sides could miss it.
        fence(Ordering::SeqCst);
        let flags: u16 = ram
            .load(GuestAddress(self.queue.avail_ring()), Ordering::Relaxed)
            .map_err(|_| Fault::new("available ring is not in memory", self.queue.avail_ring()))?;
        Ok(u16::from_le(flags) & NO_INTERRUPT == 0)
    }

    /// Chains given back since the last [`Ring::tell`].
    fn untold(&self) -> u16 {
        self.queue.next_used().wrapping_sub(self.told)
    }

    /// Whether so many chains are back that a driver may be waiting for them, whatever else it does.
    pub fn is_pressing(&self) -> bool {
        self.untold() >= self.queue.size() / 4
    }

    /// The driver was told of all chains, or has no wish to be.
    pub fn tell(&mut self) {
        self.fresh = false;
        self.told = self.queue.next_used();
    }
}
