//! Working memory that can become guest memory without being copied.

use std::ffi::c_void;
use std::io;
use std::ptr::null_mut;
use std::slice;

use rustix::mm::{Advice, MapFlags, MremapFlags, ProtFlags, madvise, mmap_anonymous, mremap_fixed, munmap};

/// The size of a huge page: the memory begins at a multiple, so that whole huge pages move at once.
const STEP: usize = 2 << 20;
const PAGE: usize = 4096;

/// Zeroed private memory in huge pages where the host has them.
#[derive(Debug)]
pub struct Scratch {
    mapping: *mut c_void,
    mapped: usize,
    start: *mut u8,
    len: usize,
}

// SAFETY: the mapping belongs to this value alone; it is tied to no thread.
unsafe impl Send for Scratch {}
// SAFETY: through `&Scratch` the bytes can only be read.
unsafe impl Sync for Scratch {}

impl Scratch {
    /// Reserves `len` bytes, lazily backed.
    ///
    /// # Errors
    /// The host has not that much address space.
    pub fn new(len: usize) -> io::Result<Scratch> {
        let mapped = len
            .checked_next_multiple_of(PAGE)
            .and_then(|whole| whole.checked_add(STEP))
            .ok_or(io::ErrorKind::OutOfMemory)?;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a fresh anonymous mapping at an address of the kernel's choice aliases nothing.
        let mapping =
            unsafe { mmap_anonymous(null_mut(), mapped, ProtFlags::READ | ProtFlags::WRITE, flags) }?;
        // SAFETY: the range was mapped above; the advice changes no content, and being refused costs speed only.
        let _ = unsafe { madvise(mapping, mapped, Advice::LinuxHugepage) };
        let head = mapping.addr().wrapping_neg() % STEP;
        Ok(Scratch { mapping, mapped, start: mapping.wrapping_byte_add(head).cast(), len })
    }

    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: `start..start + len` lies in the mapping, is initialised (zero, or what was written), and is only
        // written through `&mut self`.
        unsafe { slice::from_raw_parts(self.start, self.len) }
    }

    /// The bytes, to be written.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `&mut self` makes this the only reference.
        unsafe { slice::from_raw_parts_mut(self.start, self.len) }
    }

    /// Moves the pages from `offset` on to `target`; they read as zero here afterwards.
    ///
    /// # Safety
    /// `target..target + len` is mapped memory that belongs to the caller and that no reference points into.
    pub(super) unsafe fn move_to(
        &mut self,
        offset: usize,
        len: usize,
        target: *mut c_void,
    ) -> io::Result<()> {
        let inside = offset.checked_add(len).is_some_and(|end| end <= self.len);
        if !inside || len == 0 || !offset.is_multiple_of(PAGE) || !len.is_multiple_of(PAGE) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let from = self.start.wrapping_add(offset).cast();
        // DONTUNMAP: the range here stays mapped, so that nobody else's mapping can land in it before `drop`.
        let flags = MremapFlags::MAYMOVE | MremapFlags::DONTUNMAP;
        // SAFETY: the source lies in this mapping and `&mut self` excludes references; the caller vouches for the
        // target.
        unsafe { mremap_fixed(from, len, len, flags, target) }?;
        Ok(())
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and no reference outlives the value.
        let _ = unsafe { munmap(self.mapping, self.mapped) };
    }
}
