//! The ring of delayed writes: a page that the kernel fills while the guest runs (`KVM_CAP_COALESCED_PIO`).
//!
//! The kernel writes the entry at `last` and moves `last` on; we read the entry at `first` and move `first` on. Before
//! Linux 6.12 it takes the ring to be full when `(first - last - 1) % 170` is zero, in 32 bits: wrong whenever the
//! difference is negative, and then a guest that writes 170 times without an exit finds its ring empty again. The
//! difference is never negative at the decisive moment as long as `first` is never zero, so here it never is: both
//! begin at one, and a `first` that has come round to zero is not published until it is one.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

use devices::catalog::Space;
use kvm_bindings::{KVM_COALESCED_MMIO_PAGE_OFFSET, kvm_coalesced_mmio, kvm_coalesced_mmio_ring};
use kvm_ioctls::VcpuFd;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

const PAGE: usize = 4096;
/// Entries of the ring, as the kernel counts them (`KVM_COALESCED_MMIO_MAX`): what fits behind the header.
const ENTRIES: u32 = 170;
const _: () = assert!(
    ENTRIES as usize == (PAGE - size_of::<kvm_coalesced_mmio_ring>()) / size_of::<kvm_coalesced_mmio>()
);

/// One delayed write.
pub struct Write {
    pub space: Space,
    pub address: u64,
    bytes: [u8; 8],
    len: usize,
}

impl Write {
    /// What was written.
    pub fn data(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }
}

/// The page. All vCPUs of a VM share it; its owner holds a lock.
pub struct Ring {
    page: NonNull<kvm_coalesced_mmio_ring>,
    /// The entry to be read next, where the kernel sees an older `first` if this one is zero.
    next: u32,
}

// SAFETY: the page is shared with the kernel only, and `Ring` is used by one thread at a time (it is `!Sync`).
unsafe impl Send for Ring {}

impl Ring {
    /// The writes there are: no more than the ring can hold at a time, since other vCPUs may fill it as fast as it is
    /// emptied, and whoever empties it has an exit to handle.
    pub fn full(&mut self) -> impl Iterator<Item = Write> {
        std::iter::from_fn(|| self.pop()).take(ENTRIES as usize)
    }

    /// Maps the ring of the VM to which `vcpu` belongs, while nothing is delayed yet.
    pub fn map(vcpu: &VcpuFd) -> io::Result<Ring> {
        // SAFETY: the descriptor is open for as long as `vcpu` lives, which is longer than this call.
        let fd = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
        let offset = u64::from(KVM_COALESCED_MMIO_PAGE_OFFSET) * PAGE as u64;
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let page = unsafe { mmap(std::ptr::null_mut(), PAGE, prot, MapFlags::SHARED, fd, offset) }?;
        Ok(Ring::over(NonNull::new(page.cast()).ok_or(io::ErrorKind::OutOfMemory)?))
    }

    /// The ring in a page that the kernel does not write to yet.
    fn over(page: NonNull<kvm_coalesced_mmio_ring>) -> Ring {
        let ring = Ring { page, next: 1 };
        ring.first().store(1, Ordering::Relaxed);
        ring.last().store(1, Ordering::Release);
        ring
    }

    fn first(&self) -> &AtomicU32 {
        // SAFETY: the field is aligned and mapped; the kernel and this process access it as an atomic word.
        unsafe { AtomicU32::from_ptr(&raw mut (*self.page.as_ptr()).first) }
    }

    fn last(&self) -> &AtomicU32 {
        // SAFETY: as in `first`.
        unsafe { AtomicU32::from_ptr(&raw mut (*self.page.as_ptr()).last) }
    }

    fn entries(&self) -> *mut kvm_coalesced_mmio {
        // SAFETY: the page is larger than the header.
        unsafe { self.page.as_ptr().add(1).cast() }
    }

    /// Takes the oldest write out of the ring.
    pub fn pop(&mut self) -> Option<Write> {
        if self.next == self.last().load(Ordering::Acquire) {
            return None;
        }
        // SAFETY: the entries follow the header, and `next` is below their number.
        let entry = unsafe { self.entries().add(self.next as usize).read_volatile() };
        self.next = (self.next + 1) % ENTRIES;
        if self.next != 0 {
            self.first().store(self.next, Ordering::Release);
        }
        // SAFETY: both members of the union are plain 32-bit words.
        let pio = unsafe { entry.__bindgen_anon_1.pio };
        let space = if pio == 1 { Space::Port } else { Space::Memory };
        Some(Write { space, address: entry.phys_addr, bytes: entry.data, len: (entry.len as usize).min(8) })
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: the page was mapped by `map`, and no reference into it outlives `self`.
        let _ = unsafe { munmap(self.page.as_ptr().cast(), PAGE) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The kernel's side, as Linux 6.1 has it (`virt/kvm/coalesced_mmio.c`).
    fn kernel_writes(ring: &Ring, byte: u8) -> bool {
        let (first, last) = (ring.first().load(Ordering::Acquire), ring.last().load(Ordering::Relaxed));
        if first.wrapping_sub(last).wrapping_sub(1) % ENTRIES == 0 {
            return false;
        }
        let entry = kvm_coalesced_mmio { phys_addr: 0x3f8, len: 1, data: [byte; 8], ..Default::default() };
        // SAFETY: the entries follow the header, and the kernel keeps `last` below their number.
        unsafe { ring.entries().add(last as usize).write_volatile(entry) };
        ring.last().store((last + 1) % ENTRIES, Ordering::Release);
        true
    }

    fn ring() -> Ring {
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice; `Ring` unmaps it.
        let page = unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), PAGE, prot, MapFlags::PRIVATE) };
        Ring::over(NonNull::new(page.unwrap().cast()).unwrap())
    }

    #[test]
    fn a_guest_that_never_stops_writing_holds_up_nobody() {
        let mut ring = ring();
        let feeder = Ring { page: ring.page, next: 0 };
        assert!(kernel_writes(&feeder, 0));
        let mut taken = 0;
        for _ in ring.full() {
            taken += 1;
            // As fast as it is emptied.
            while kernel_writes(&feeder, 0) {}
        }
        std::mem::forget(feeder);
        assert_eq!(taken, ENTRIES, "one ring full");
        assert!(ring.pop().is_some(), "the rest is there at the next exit");
    }

    #[test]
    fn nothing_is_lost_however_far_the_guest_runs_ahead() {
        let mut ring = ring();
        let (mut written, mut read) = (0u32, 0u32);
        // One thread reads so many while the guest runs on another and fills whatever room there is, over and over,
        // from every place in the ring.
        for burst in (1..=ENTRIES).cycle().take(20_000) {
            while kernel_writes(&ring, written.to_le_bytes()[0]) {
                written += 1;
                assert!(written - read < ENTRIES, "{} writes fit into the ring", written - read);
            }
            for _ in 0..burst {
                let Some(write) = ring.pop() else { break };
                assert_eq!((write.address, write.data()), (0x3f8, &read.to_le_bytes()[..1]), "write {read}");
                read += 1;
            }
        }
        while ring.pop().is_some() {
            read += 1;
        }
        assert_eq!(read, written);
    }
}
