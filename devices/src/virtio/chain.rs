//! A descriptor chain: one request of the driver, as buffers that were checked to lie in guest RAM.

use base::memory::Ram;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, VolatileSlice};

/// One piece of guest RAM named by a descriptor; never empty, and known to lie within one piece of RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Guest-physical address.
    pub addr: GuestAddress,
    /// Length in bytes.
    pub len: u32,
}

/// A request taken from a queue. It goes back by [`crate::virtio::Io::done`], which takes it by value: no request
/// can be answered twice.
#[derive(Debug)]
#[must_use = "a chain that is not given back is lost to the driver"]
pub struct Chain {
    pub(super) queue: u16,
    pub(super) head: u16,
    /// Of the start of the device that it was taken in.
    pub(super) epoch: u32,
    pub(super) buffers: Vec<Buffer>,
    /// How many of the buffers the device may only read; they come first (section 2.7.4.2).
    pub(super) readable: usize,
}

impl Chain {
    /// The queue it was taken from.
    pub fn queue(&self) -> u16 {
        self.queue
    }

    /// What the driver wrote for the device.
    pub fn readable(&self) -> Span<'_> {
        Span(self.buffers.get(..self.readable).unwrap_or_default())
    }

    /// The room for the device's answer.
    pub fn writable(&self) -> Span<'_> {
        Span(self.buffers.get(self.readable..).unwrap_or_default())
    }
}

/// Buffers one after another, seen as one run of bytes.
#[derive(Clone, Copy, Debug)]
pub struct Span<'a>(&'a [Buffer]);

impl<'a> Span<'a> {
    /// Bytes in all; less than 4 GiB.
    pub fn len(&self) -> u64 {
        self.0.iter().map(|buffer| u64::from(buffer.len)).sum()
    }

    /// Whether there is not one byte.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The pieces of RAM behind the bytes `at..at + len`; fewer if the span ends before.
    pub fn parts(self, at: u64, len: u64) -> impl Iterator<Item = Buffer> + 'a {
        let (mut skip, mut want) = (at, len);
        self.0.iter().filter_map(move |buffer| {
            let skipped = skip.min(u64::from(buffer.len));
            skip = skip.saturating_sub(skipped);
            let taken = u64::from(buffer.len).saturating_sub(skipped).min(want);
            want = want.saturating_sub(taken);
            let len = u32::try_from(taken).ok().filter(|len| *len > 0)?;
            Some(Buffer { addr: GuestAddress(buffer.addr.0.checked_add(skipped)?), len })
        })
    }

    /// The memory behind the bytes `at..at + len`.
    pub fn slices(self, ram: &'a Ram, at: u64, len: u64) -> impl Iterator<Item = VolatileSlice<'a>> {
        self.parts(at, len).filter_map(|part| {
            let len = usize::try_from(part.len).ok()?;
            GuestMemoryBackend::get_slice(ram, part.addr, len).ok()
        })
    }

    /// Copies the bytes from `at` on into `to`; says how many there were.
    pub fn read(&self, ram: &Ram, at: u64, to: &mut [u8]) -> usize {
        let mut done = 0usize;
        for slice in self.slices(ram, at, to.len() as u64) {
            let Some(rest) = to.get_mut(done..) else { break };
            done = done.saturating_add(slice.copy_to(rest));
        }
        done
    }

    /// Copies `from` over the bytes from `at` on; says how many there was room for.
    pub fn write(&self, ram: &Ram, at: u64, from: &[u8]) -> usize {
        let mut done = 0usize;
        for slice in self.slices(ram, at, from.len() as u64) {
            let Some(rest) = from.get(done..) else { break };
            done = done.saturating_add(slice.write(rest, 0).unwrap_or(0));
        }
        done
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use base::memory::Memory;

    fn chain() -> Chain {
        let buffers = [(0x1000, 4), (0x3000, 1), (0x2000, 6), (0x1ff0, 2)];
        let buffers =
            buffers.map(|(addr, len)| Buffer { addr: GuestAddress(addr), len }).into_iter().collect();
        Chain { queue: 0, head: 0, epoch: 0, buffers, readable: 2 }
    }

    #[test]
    fn a_span_is_one_run_of_bytes() {
        let chain = chain();
        assert_eq!((chain.readable().len(), chain.writable().len()), (5, 8));
        let parts: Vec<_> = chain.writable().parts(4, 3).map(|part| (part.addr.0, part.len)).collect();
        assert_eq!(parts, [(0x2004, 2), (0x1ff0, 1)]);
        assert_eq!(chain.writable().parts(8, 1).count(), 0);
        assert_eq!(chain.readable().parts(u64::MAX, u64::MAX).count(), 0);
    }

    #[test]
    fn bytes_cross_the_borders_between_buffers() {
        let memory = Memory::new(&[(0, 1 << 20)]).unwrap();
        let chain = chain();
        assert_eq!(chain.writable().write(memory.ram(), 3, &[1, 2, 3, 4, 5, 6, 7]), 5, "only five fit");
        let mut bytes = [0xee; 10];
        assert_eq!(chain.writable().read(memory.ram(), 0, &mut bytes), 8);
        assert_eq!(bytes, [0, 0, 0, 1, 2, 3, 4, 5, 0xee, 0xee]);
    }
}
