//! The buffers that the guest has laid out in one receive queue, and how a frame is put into them.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use base::Fault;
use base::memory::Ram;
use base::meter::Counter;
use base::throttle::Throttle;

use super::{HEADER, Header};
use crate::virtio::{Chain, Io};

/// Chains taken from the ring before they are needed. The rest stays in the ring, so that the driver, which need not
/// tell of more, does not.
const AHEAD: usize = 64;
/// Chains taken at the most, however short: a frame of 64 KiB in buffers of 256 bytes.
const MOST: usize = 256;

/// What has been received.
#[derive(Default)]
pub struct Counts {
    /// Frames for the guest.
    pub frames: Arc<Counter>,
    /// Bytes in them, without virtio headers.
    pub bytes: Arc<Counter>,
    /// Frames for the guest that were thrown away, for want of buffers.
    pub dropped: Arc<Counter>,
}

/// The buffers of one receive queue.
pub struct Inbox {
    queue: u16,
    held: VecDeque<Chain>,
    /// Bytes of room in all of them.
    room: u64,
    /// A frame may take several (`VIRTIO_NET_F_MRG_RXBUF`).
    mergeable: bool,
    counts: Arc<Counts>,
    /// The chains of one frame on their way back.
    given: Vec<(Chain, u32)>,
    /// How much may be received.
    throttle: Throttle,
    /// It was more: for so long there is no room.
    wait: Option<Duration>,
}

impl Inbox {
    /// That of the queue with this index.
    pub fn new(queue: u16, counts: Arc<Counts>, throttle: Throttle) -> Inbox {
        Inbox {
            queue,
            held: VecDeque::new(),
            room: 0,
            mergeable: false,
            counts,
            given: Vec::new(),
            throttle,
            wait: None,
        }
    }

    /// The driver has started, and a frame may take several buffers or not.
    pub fn start(&mut self, mergeable: bool) {
        self.clear();
        self.mergeable = mergeable;
    }

    /// How long there is no room for a frame because the limit is reached, if somebody has asked for room since the
    /// last call.
    pub fn wait(&mut self) -> Option<Duration> {
        self.wait.take()
    }

    /// Forgets all buffers.
    pub fn clear(&mut self) {
        self.held.clear();
        self.room = 0;
    }

    /// Takes one more chain from the ring; whether there was one.
    fn take(&mut self, io: &mut Io<'_>) -> Result<bool, Fault> {
        let Some(chain) = io.next(self.queue)? else { return Ok(false) };
        let room = chain.writable().len();
        if room == 0 || !chain.readable().is_empty() {
            // Nothing that a frame could be put into (section 5.1.6.3.1).
            io.done(chain, 0);
        } else {
            self.room = self.room.saturating_add(room);
            self.held.push_back(chain);
        }
        Ok(true)
    }

    /// Takes some chains ahead.
    ///
    /// # Errors
    /// The ring is broken.
    pub fn refill(&mut self, io: &mut Io<'_>) -> Result<(), Fault> {
        while self.held.len() < AHEAD && self.take(io)? {}
        Ok(())
    }

    /// Bytes of room for the next frame, virtio header included; looks for no more than `want`.
    ///
    /// # Errors
    /// The ring is broken.
    pub fn room(&mut self, want: u64, io: &mut Io<'_>) -> Result<u64, Fault> {
        if let Err(wait) = self.throttle.admit() {
            self.wait = Some(wait);
            return Ok(0);
        }
        if !self.mergeable {
            if self.held.is_empty() {
                self.refill(io)?;
            }
            return Ok(self.held.front().map_or(0, |chain| chain.writable().len()).min(want));
        }
        while self.room < want && self.held.len() < MOST && self.take(io)? {}
        Ok(self.room.min(want))
    }

    /// The chains that the next frame may lie in.
    fn front(&self) -> impl Iterator<Item = &Chain> {
        let count = if self.mergeable { self.held.len() } else { 1 };
        self.held.iter().take(count)
    }

    /// The pieces of guest memory behind the bytes `at..at + len` of the next frame, virtio header included.
    pub fn parts(&self, at: u64, len: u64) -> impl Iterator<Item = (u64, u32)> {
        let (mut skip, mut want) = (at, len);
        self.front().flat_map(move |chain| {
            let whole = chain.writable().len();
            let (from, room) = (skip.min(whole), whole.saturating_sub(skip));
            skip = skip.saturating_sub(whole);
            let taken = room.min(want);
            want = want.saturating_sub(taken);
            chain.writable().parts(from, taken).map(|part| (part.addr.0, part.len))
        })
    }

    /// Calls `visit` with each piece of memory behind `at..at + len`, as far as there is any.
    fn each(&self, at: u64, len: u64, mut visit: impl FnMut(&Chain, u64, usize)) {
        let (mut skip, mut want) = (at, len);
        for chain in self.front() {
            if want == 0 {
                break;
            }
            let whole = chain.writable().len();
            let taken = whole.saturating_sub(skip).min(want);
            if taken > 0 {
                visit(chain, skip, usize::try_from(taken).unwrap_or(0));
            }
            skip = skip.saturating_sub(whole);
            want = want.saturating_sub(taken);
        }
    }

    /// Writes bytes of the next frame; `at` counts from the virtio header on.
    pub fn write(&self, ram: &Ram, at: u64, bytes: &[u8]) {
        let mut rest = bytes;
        self.each(at, bytes.len() as u64, |chain, at, len| {
            let (piece, later) = rest.split_at_checked(len).unwrap_or((rest, &[]));
            chain.writable().write(ram, at, piece);
            rest = later;
        });
    }

    /// Reads bytes of the next frame back; `at` counts from the virtio header on.
    pub fn read(&self, ram: &Ram, at: u64, bytes: &mut [u8]) {
        let mut done = 0usize;
        self.each(at, bytes.len() as u64, |chain, at, len| {
            let end = done.saturating_add(len);
            if let Some(room) = bytes.get_mut(done..end) {
                chain.writable().read(ram, at, room);
            }
            done = end;
        });
    }

    /// Hands the next frame to the guest: `len` bytes behind the virtio header, which is written now.
    pub fn commit(&mut self, len: u64, header: Header, io: &mut Io<'_>) {
        self.finish(len, io, |inbox, buffers, io| inbox.write(io.ram(), 0, &header.bytes(buffers)));
    }

    /// The same for a frame whose header is there, but for the number of its buffers.
    pub fn commit_as_read(&mut self, len: u64, io: &mut Io<'_>) {
        self.finish(len, io, |inbox, buffers, io| inbox.write(io.ram(), 10, &buffers.to_le_bytes()));
    }

    fn finish(&mut self, len: u64, io: &mut Io<'_>, stamp: impl FnOnce(&Self, u16, &Io<'_>)) {
        let mut left = len.saturating_add(HEADER);
        let mut buffers = 0u16;
        for chain in self.front() {
            if left == 0 {
                break;
            }
            left = left.saturating_sub(chain.writable().len());
            buffers = buffers.saturating_add(1);
        }
        stamp(self, buffers, io);
        let mut left = len.saturating_add(HEADER);
        for _ in 0..buffers {
            let Some(chain) = self.held.pop_front() else { break };
            let whole = chain.writable().len();
            self.room = self.room.saturating_sub(whole);
            let written = whole.min(left);
            left = left.saturating_sub(written);
            self.given.push((chain, u32::try_from(written).unwrap_or(u32::MAX)));
        }
        io.done_together(&mut self.given);
        self.throttle.spend(1, len);
        self.counts.frames.add(1);
        self.counts.bytes.add(len);
    }

    /// A frame that was known whole: whether there was room for it. One that does not fit is dropped and counted.
    ///
    /// # Errors
    /// The ring is broken.
    pub fn put(&mut self, frame: &[u8], header: Header, io: &mut Io<'_>) -> Result<bool, Fault> {
        let whole = HEADER.saturating_add(frame.len() as u64);
        if self.room(whole, io)? < whole {
            self.drop_one();
            return Ok(false);
        }
        self.write(io.ram(), HEADER, frame);
        self.commit(frame.len() as u64, header, io);
        Ok(true)
    }

    /// Counts a frame that did not get through.
    pub fn drop_one(&self) {
        self.counts.dropped.add(1);
    }
}
