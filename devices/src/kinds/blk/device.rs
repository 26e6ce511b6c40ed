//! The device: requests from the ring to the disk and back, many at a time.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use base::disk::{Action, Backend, Disk, Ended, Image};
use base::lane::Interest;
use base::memory::Memory;
use base::meter::Counter;
use base::throttle::Throttle;
use base::{Doing, Fail, Fault, Result, Why};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use super::ID_BYTES;
use super::change::{Change, Size};
use super::request::{HEADER, LARGEST, Order, SECTOR, SEGMENT_BYTES, SEGMENTS, Shape, Status};
use crate::flag;
use crate::virtio::{Chain, Device, Io, Meters};

/// Entries of a queue: the segments of one request, its header and its status.
const QUEUE: u16 = 256;
/// Requests in flight at the most, of all queues. A driver can offer one chain twice, so the size of the ring is no bound.
const DEPTH: u16 = 128;
/// Bytes that are moved in one visit of the lane, and one request more. Those in memory move in the call that starts
/// them: a ring full of the largest would keep the lane from all other devices for seconds.
const SHARE: u64 = LARGEST;
/// The token of the disk's bell.
const DISK: u16 = 0;
/// The token of the deadline at which the rate limits, or the other devices, let the next request through.
const ADMIT: u16 = 1;

/// What the disk is opened from, when the driver first starts the device: a disk that no guest uses costs an open
/// file and no ring.
pub struct Source {
    pub image: Image,
    pub backend: Backend,
    pub name: String,
    pub memory: Memory,
}

/// A request in flight.
struct Flight {
    chain: Chain,
    action: Action,
    offset: u64,
    len: u64,
}

#[derive(Default)]
struct Counts {
    reads: Arc<Counter>,
    read_bytes: Arc<Counter>,
    writes: Arc<Counter>,
    write_bytes: Arc<Counter>,
    flushes: Arc<Counter>,
    errors: Arc<Counter>,
    throttled: Arc<Counter>,
}

pub struct Blk {
    source: Source,
    shape: Shape,
    id: [u8; ID_BYTES],
    queues: Vec<u16>,
    throttle: Throttle,
    /// Queues that may have requests, a bit for each.
    waiting: u64,
    /// Whose turn it is.
    turn: u16,
    disk: Option<Disk>,
    /// By tag.
    flights: Vec<Option<Flight>>,
    free: Vec<u16>,
    ended: Vec<Ended>,
    /// The driver knows nothing of flushes, so a write ends when it is on stable storage (section 5.2.6.2).
    write_through: bool,
    counts: Counts,
}

impl Blk {
    /// A disk on `source` with `queues` queues, of which there are 1 to 64.
    ///
    /// # Errors
    /// The host does not tell the size of the image.
    pub fn new(
        source: Source,
        readonly: bool,
        id: [u8; ID_BYTES],
        queues: u16,
        throttle: Throttle,
    ) -> io::Result<Blk> {
        let shape = Shape { sectors: sectors(&source.image)?, readonly, block: source.image.block() };
        Ok(Blk {
            source,
            shape,
            id,
            queues: vec![QUEUE; queues.into()],
            throttle,
            waiting: 0,
            turn: 0,
            disk: None,
            flights: (0..DEPTH).map(|_| None).collect(),
            free: (0..DEPTH).rev().collect(),
            ended: Vec::new(),
            write_through: false,
            counts: Counts::default(),
        })
    }

    /// Changes size and limits while the guest runs.
    fn change(&mut self, text: &str) -> Result<()> {
        let name = self.source.name.clone();
        let change: Change = flag::change(&name, "size=2G", text)?;
        let wrong = |cause: &str| Err(Fail::new(Why::Usage, format!("change {name}")).because(cause));
        if let Some(fault) = change.fault() {
            return wrong(fault);
        }
        if let Some(Size::Bytes(bytes)) = change.size {
            if self.shape.readonly {
                return wrong("it is read-only");
            }
            self.source.image.grow(bytes).map_err(|cause| {
                let why = if cause.kind() == io::ErrorKind::InvalidInput { Why::Usage } else { Why::Host };
                Fail::new(why, format!("make {name} larger")).because(cause)
            })?;
        }
        if change.size.is_some() {
            self.refresh()?;
        }
        if let Some(rate) = change.operations() {
            self.throttle.limit_operations(rate);
        }
        if let Some(rate) = change.bytes() {
            self.throttle.limit_bytes(rate);
        }
        Ok(())
    }

    /// The next queue that may have a request, in turns.
    fn next_queue(&mut self) -> Option<u16> {
        let ahead = self.waiting.checked_shr(self.turn.into()).unwrap_or(0);
        let queue = if ahead != 0 { self.turn.saturating_add(first(ahead)) } else { first(self.waiting) };
        self.turn = queue.saturating_add(1);
        (self.waiting != 0).then_some(queue)
    }

    /// Takes requests while there is room and the limits allow it, and until `share` bytes are named. What is left waits
    /// in the rings.
    fn admit(&mut self, share: &mut u64, io: &mut Io<'_>) -> Result<(), Fault> {
        while !self.free.is_empty()
            && let Some(queue) = self.next_queue()
        {
            let wait = match self.throttle.admit() {
                Ok(()) if *share > 0 => None,
                Ok(()) => Some(Duration::ZERO),
                Err(wait) => {
                    self.counts.throttled.add(1);
                    Some(wait)
                }
            };
            if let Some(wait) = wait {
                self.turn = queue;
                io.arm(ADMIT, wait);
                return Ok(());
            }
            match io.next(queue)? {
                Some(chain) => *share = share.saturating_sub(self.begin(chain, io)?),
                None => self.waiting &= !bit(queue),
            }
        }
        Ok(())
    }

    /// Takes requests, starts them together, and answers those that are done at once.
    fn pump(&mut self, io: &mut Io<'_>) -> Result<(), Fault> {
        let mut share = SHARE;
        loop {
            let admitted = self.admit(&mut share, io);
            let Some(disk) = &mut self.disk else { return admitted };
            // Also behind a fault: what was taken before it is in flight, and ends.
            disk.go();
            let mut ended = std::mem::take(&mut self.ended);
            disk.reap(&mut ended);
            if ended.is_empty() {
                return admitted;
            }
            for (tag, end) in ended.drain(..) {
                self.end(tag, end, io);
            }
            self.ended = ended;
            admitted?;
        }
    }

    /// Starts a request; the bytes that it moves.
    fn begin(&mut self, chain: Chain, io: &mut Io<'_>) -> Result<u64, Fault> {
        if chain.writable().is_empty() {
            return Err(Fault::new("block request has no room for its status", 0));
        }
        let order = self.shape.order(&chain, io.ram());
        let bytes = match order {
            // Advice moves nothing.
            Ok(Order::Disk { action, len, .. }) if action != Action::Discard => len,
            _ => 0,
        };
        self.throttle.spend(1, bytes);
        match order {
            Ok(Order::Disk { action, offset, len }) => {
                let flight = Flight { chain, action, offset, len };
                if len == 0 && action != Action::Flush {
                    answer(flight.chain, Status::Ok, 0, io);
                } else {
                    self.submit(flight, io);
                }
            }
            Ok(Order::Id) => {
                let room = chain.writable().len().saturating_sub(1).min(ID_BYTES as u64);
                let id = usize::try_from(room).ok().and_then(|room| self.id.get(..room)).unwrap_or_default();
                let written = chain.writable().write(io.ram(), 0, id) as u64;
                answer(chain, Status::Ok, written, io);
            }
            Err(status) => answer(chain, status, 0, io),
        }
        Ok(bytes)
    }

    fn submit(&mut self, flight: Flight, io: &mut Io<'_>) {
        match self.free.pop() {
            Some(tag) if self.take(tag, &flight) => {
                if let Some(slot) = self.flights.get_mut(usize::from(tag)) {
                    *slot = Some(flight);
                }
            }
            tag => {
                self.free.extend(tag);
                answer(flight.chain, Status::IoError, 0, io);
            }
        }
    }

    /// Hands a request to the disk; whether it took it.
    fn take(&mut self, tag: u16, flight: &Flight) -> bool {
        let Some(disk) = &mut self.disk else { return false };
        let Flight { chain, action, offset, len } = flight;
        let span = match action {
            Action::Read => chain.writable().parts(0, *len),
            Action::Write => chain.readable().parts(HEADER, *len),
            Action::Flush | Action::Discard | Action::Zero { .. } => chain.readable().parts(0, 0),
        };
        disk.take(tag, *action, (*offset, *len), span.map(|part| (part.addr.0, part.len))).is_ok()
    }

    fn end(&mut self, tag: u16, end: std::io::Result<()>, io: &mut Io<'_>) {
        let Some(flight) = self.flights.get_mut(usize::from(tag)).and_then(Option::take) else { return };
        self.free.push(tag);
        if let Err(cause) = &end {
            self.counts.errors.add(1);
            let count = self.counts.errors.get();
            // One line for the 1st, 2nd, 4th, 8th...: a full host disk would otherwise fill the log too.
            if count.is_power_of_two() {
                let Flight { action, offset, len, .. } = &flight;
                let name = &self.source.name;
                log::warn!(target: "guest", "{name}: {action:?} of {len} bytes at {offset:#x}: {cause} (error {count})");
            }
            return answer(flight.chain, Status::IoError, 0, io);
        }
        let written = match flight.action {
            Action::Read => {
                self.counts.reads.add(1);
                self.counts.read_bytes.add(flight.len);
                flight.len
            }
            Action::Flush => {
                self.counts.flushes.add(1);
                0
            }
            Action::Write | Action::Zero { .. } | Action::Discard => {
                self.counts.writes.add(1);
                self.counts.write_bytes.add(flight.len);
                if self.write_through {
                    return self.submit(Flight { action: Action::Flush, offset: 0, len: 0, ..flight }, io);
                }
                0
            }
        };
        answer(flight.chain, Status::Ok, written, io);
    }
}

fn bit(queue: u16) -> u64 {
    1u64.checked_shl(queue.into()).unwrap_or(0)
}

fn first(queues: u64) -> u16 {
    u16::try_from(queues.trailing_zeros()).unwrap_or(0)
}

/// Whole sectors of the disk now. One that was shrunk to no whole number of blocks loses the last.
fn sectors(image: &Image) -> io::Result<u64> {
    let bytes = image.size()?;
    Ok(bytes.saturating_sub(bytes.checked_rem(image.block()).unwrap_or(0)) / SECTOR)
}

/// Writes the status behind `written` bytes of data and gives the chain back.
fn answer(chain: Chain, status: Status, written: u64, io: &mut Io<'_>) {
    let last = chain.writable().len().saturating_sub(1);
    chain.writable().write(io.ram(), last, &[status as u8]);
    // The length counts from the first writable byte, so it reaches the status only if all before it was written.
    let whole = if written == last { written.saturating_add(1) } else { written };
    io.done(chain, u32::try_from(whole).unwrap_or(u32::MAX));
}

impl Device for Blk {
    fn id(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        let always = 1 << VIRTIO_BLK_F_SIZE_MAX
            | 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_TOPOLOGY
            | 1 << VIRTIO_BLK_F_FLUSH;
        let always = if self.queues.len() > 1 { always | 1 << VIRTIO_BLK_F_MQ } else { always };
        if self.shape.readonly {
            always | 1 << VIRTIO_BLK_F_RO
        } else {
            always | 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES
        }
    }

    fn queues(&self) -> &[u16] {
        &self.queues
    }

    /// `struct virtio_blk_config`, section 5.2.4.
    fn config(&self) -> Vec<u8> {
        let clear = u32::try_from(LARGEST / SECTOR).unwrap_or(u32::MAX);
        let small = |number: u64| u32::try_from(number).unwrap_or(u32::MAX);
        // The host's page cache works in 4 KiB: so many blocks, as a number and as a power of 2.
        let page = (4096 / self.shape.block).max(1);
        let queues = u16::try_from(self.queues.len()).unwrap_or(1);
        let mut config = Vec::with_capacity(60);
        config.extend(self.shape.sectors.to_le_bytes());
        config.extend(SEGMENT_BYTES.to_le_bytes()); // size_max
        config.extend(SEGMENTS.to_le_bytes()); // seg_max
        config.extend([0; 4]); // geometry: not offered
        config.extend(small(self.shape.block).to_le_bytes()); // blk_size
        // Physical blocks, aligned at 0; at least one and best one at a time.
        config.extend([u8::try_from(page.trailing_zeros()).unwrap_or(0), 0]);
        config.extend(u16::try_from(page).unwrap_or(1).to_le_bytes());
        config.extend(small(page).to_le_bytes());
        config.extend([0; 2]); // writeback and a hole
        config.extend(queues.to_le_bytes()); // num_queues
        config.extend(clear.to_le_bytes()); // max_discard_sectors
        config.extend(1u32.to_le_bytes()); // max_discard_seg
        config.extend(small(self.source.image.grain() / SECTOR).to_le_bytes()); // discard_sector_alignment
        config.extend(clear.to_le_bytes()); // max_write_zeroes_sectors
        config.extend(1u32.to_le_bytes()); // max_write_zeroes_seg
        config.extend([1, 0, 0, 0]); // write_zeroes_may_unmap
        config
    }

    fn start(&mut self, features: u64, io: &mut Io<'_>) -> Result<()> {
        self.write_through = features & 1 << VIRTIO_BLK_F_FLUSH == 0;
        let Source { image, backend, name, memory } = &self.source;
        if self.disk.is_none() {
            let disk = Disk::open(image, memory, *backend, DEPTH, name);
            self.disk = Some(disk.doing(Why::Host, || format!("set up {name}"))?);
        }
        match &self.disk {
            Some(disk) => {
                io.watch(disk, DISK, Interest::Rung).doing(Why::Host, || format!("wait for {name}"))
            }
            None => Ok(()),
        }
    }

    fn kick(&mut self, queue: u16, io: &mut Io<'_>) -> Result<(), Fault> {
        self.waiting |= bit(queue);
        self.pump(io)
    }

    fn ready(&mut self, _: u16, io: &mut Io<'_>) -> Result<(), Fault> {
        self.pump(io)
    }

    fn refresh(&mut self) -> Result<()> {
        let name = &self.source.name;
        let sectors =
            sectors(&self.source.image).doing(Why::Host, || format!("ask for the size of {name}"))?;
        self.shape.sectors = sectors;
        Ok(())
    }

    fn tune(&mut self, change: &str) -> Option<Result<()>> {
        Some(self.change(change))
    }

    fn stop(&mut self, io: &mut Io<'_>) {
        (self.waiting, self.turn) = (0, 0);
        io.disarm(ADMIT);
        let Some(disk) = &mut self.disk else { return };
        io.unwatch(&*disk);
        let mut ended = Vec::new();
        disk.drain(&mut ended);
        if let Err(cause) = disk.settle() {
            log::warn!(target: "guest", "{}: write the tables of the image: {cause}", self.source.name);
        }
        // The driver has forgotten its requests; so do we.
        for (tag, _) in ended {
            if self.flights.get_mut(usize::from(tag)).and_then(Option::take).is_some() {
                self.free.push(tag);
            }
        }
    }

    fn meters(&self) -> Meters {
        let counts = &self.counts;
        vec![
            ("reads", counts.reads.clone()),
            ("read_bytes", counts.read_bytes.clone()),
            ("writes", counts.writes.clone()),
            ("write_bytes", counts.write_bytes.clone()),
            ("flushes", counts.flushes.clone()),
            ("errors", counts.errors.clone()),
            ("throttled", counts.throttled.clone()),
        ]
    }
}
