//! The mappings behind guest RAM.

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::ptr::{copy_nonoverlapping, null_mut};

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};

use super::scratch::Scratch;

/// The view of guest memory that devices and loaders use, with the traits of `vm-memory`. It owns the mappings.
#[derive(Debug)]
pub struct Ram(GuestMemoryMmap<()>);

impl GuestMemoryBackend for Ram {
    type R = GuestRegionMmap<()>;

    fn num_regions(&self) -> usize {
        self.0.num_regions()
    }

    fn find_region(&self, at: GuestAddress) -> Option<&Self::R> {
        self.0.find_region(at)
    }

    fn iter(&self) -> impl Iterator<Item = &Self::R> {
        self.0.iter()
    }
}

impl Drop for Ram {
    fn drop(&mut self) {
        for region in self.0.iter() {
            let mmap = region.get_mmap();
            // SAFETY: the range was mapped by `reserve_one` for this value, and every reference into it borrows it.
            let _ = unsafe { munmap(mmap.as_ptr().cast(), mmap.size()) };
        }
    }
}

const PAGE: u64 = 4096;
/// The size of a huge page, and so the step in which host and guest addresses agree.
const STEP: usize = 2 << 20;

fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, what)
}

/// Maps every piece (guest address, length) and joins them.
pub fn reserve(pieces: &[(u64, u64)]) -> io::Result<Ram> {
    let regions =
        pieces.iter().map(|(guest, len)| reserve_one(*guest, *len)).collect::<io::Result<Vec<_>>>()?;
    GuestMemoryMmap::from_regions(regions).map(Ram).map_err(io::Error::other)
}

fn reserve_one(guest: u64, len: u64) -> io::Result<GuestRegionMmap> {
    let len = usize::try_from(len).map_err(|_| invalid("more memory than this host can address"))?;
    if len == 0 || !len.is_multiple_of(4096) || !guest.is_multiple_of(PAGE) {
        return Err(invalid("memory comes in whole pages"));
    }
    let whole = len.checked_add(STEP).ok_or_else(|| invalid("more memory than this host can address"))?;
    let prot = ProtFlags::READ | ProtFlags::WRITE;
    // NORESERVE: lazily backed, a 64 GiB guest costs what it touches.
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
    // SAFETY: a fresh anonymous mapping at an address of the kernel's choice aliases nothing.
    let start = unsafe { mmap_anonymous(null_mut(), whole, prot, flags) }?;
    let head = usize::try_from(guest % STEP as u64).unwrap_or(0).wrapping_sub(start.addr()) % STEP;
    let base = start.wrapping_byte_add(head);
    trim(start, head)?;
    trim(base.wrapping_byte_add(len), STEP - head)?;
    advise_huge_pages(base, guest, len);
    // SAFETY: `base..base + len` is mapped readable and writable, and stays so until `Ram` is dropped.
    let builder = unsafe { MmapRegionBuilder::new(len).with_raw_mmap_pointer(base.cast()) };
    let region = builder
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)
        .build()
        .map_err(io::Error::other)?;
    GuestRegionMmap::new(region, GuestAddress(guest))
        .ok_or_else(|| invalid("memory beyond the address space"))
}

/// Asks for huge pages, except for the first 2 MiB of the address space: boot data touches a few pages there, and
/// clearing a whole huge page for them would be the dearest step of a start.
fn advise_huge_pages(base: *mut c_void, guest: u64, len: usize) {
    let skip = if guest == 0 { STEP.min(len) } else { 0 };
    // SAFETY: the range lies in a fresh mapping of ours; the advice changes no content. A host without huge pages
    // refuses it, which costs speed and nothing else.
    let _ = unsafe { madvise(base.wrapping_byte_add(skip), len - skip, Advice::LinuxHugepage) };
}

/// Gives back the part of a reservation that alignment did not need.
fn trim(start: *mut c_void, len: usize) -> io::Result<()> {
    if len > 0 {
        // SAFETY: the range is a part of the fresh reservation that nobody has been told of.
        unsafe { munmap(start, len) }?;
    }
    Ok(())
}

/// Where the region lies in this process.
pub fn host_address(region: &GuestRegionMmap) -> u64 {
    region.get_mmap().as_ptr() as u64
}

/// The host address of whole pages within the region, and their length.
fn pages(region: &GuestRegionMmap, at: u64, offset: u64, len: u64) -> io::Result<(*mut c_void, usize)> {
    let inside = at.checked_add(len).is_some_and(|end| end <= region.len());
    if !inside || len == 0 || [at, offset, len].iter().any(|n| !n.is_multiple_of(PAGE)) {
        return Err(invalid("pages are replaced whole and within one piece of memory"));
    }
    let (Ok(at), Ok(len)) = (usize::try_from(at), usize::try_from(len)) else {
        return Err(invalid("more memory than this host can address"));
    };
    Ok((region.get_mmap().as_ptr().wrapping_add(at).cast(), len))
}

/// Moves pages of `scratch` over a part of the region.
pub fn adopt(
    region: &GuestRegionMmap,
    at: u64,
    scratch: &mut Scratch,
    offset: u64,
    len: u64,
) -> io::Result<()> {
    let (host, len) = pages(region, at, offset, len)?;
    let offset = usize::try_from(offset).map_err(|_| invalid("more memory than this host can address"))?;
    // SAFETY: the range lies within the region, which is only ever reached through volatile accesses and raw
    // pointers of vm-memory: no reference to the bytes being replaced exists.
    unsafe { scratch.move_to(offset, len, host) }
}

/// Puts a private mapping of `file` over a part of the region.
pub fn map_file(region: &GuestRegionMmap, at: u64, file: &File, offset: u64, len: u64) -> io::Result<()> {
    let (host, len) = pages(region, at, offset, len)?;
    let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
    // SAFETY: the range lies within the region, which is only ever reached through volatile accesses and raw
    // pointers of vm-memory: no reference to the bytes being replaced exists.
    unsafe { mmap(host, len, ProtFlags::READ | ProtFlags::WRITE, flags, file, offset) }?;
    Ok(())
}

/// Gives the host back what stands behind a part of the region: what was written there is gone.
pub fn discard(region: &GuestRegionMmap, at: u64, len: u64) -> io::Result<()> {
    let (host, len) = pages(region, at, 0, len)?;
    // SAFETY: the range lies within the region, which stays mapped. Its bytes change under whoever looks at them, as by
    // a write of the guest; it is only ever reached through volatile accesses and raw pointers of vm-memory.
    unsafe { madvise(host, len, Advice::LinuxDontNeed) }?;
    Ok(())
}

/// What is copied at once: little enough that `memcpy` moves vectors. For more it takes a string instruction, which
/// an emulated processor carries out byte by byte.
const PIECE: usize = 1024;

/// Copies a part of `file` into the region, whose memory there has never been written: what is zero stays untouched.
pub fn copy_file(region: &GuestRegionMmap, at: u64, file: &File, offset: u64, len: u64) -> io::Result<()> {
    let (host, len) = pages(region, at, offset, len)?;
    // SAFETY: a fresh mapping at an address of the kernel's choice aliases nothing.
    let mapped = unsafe { mmap(null_mut(), len, ProtFlags::READ, MapFlags::PRIVATE, file, offset) }?;
    let mut piece = [0u8; PIECE];
    // The length is in whole pages, so that pieces fill it.
    for start in (0..len).step_by(PIECE) {
        let (from, to) = (mapped.wrapping_byte_add(start), host.wrapping_byte_add(start));
        // SAFETY: `from` has a piece left in the mapping made above. The file may change meanwhile, so nothing but
        // this copy refers to it.
        unsafe { copy_nonoverlapping(from.cast(), piece.as_mut_ptr(), PIECE) };
        if piece != [0; PIECE] {
            // SAFETY: `to` has a piece left in the region, into which no reference exists (see `adopt`).
            unsafe { copy_nonoverlapping(piece.as_ptr(), to.cast(), PIECE) };
        }
    }
    // SAFETY: the mapping was made above, and nothing refers to it.
    unsafe { munmap(mapped, len) }?;
    Ok(())
}

/// Bytes of the region that are backed now. Asked for piece by piece: the answer takes a byte for each page.
pub fn resident(region: &GuestRegionMmap) -> io::Result<u64> {
    const PIECE: usize = 256 << 20;
    let mmap = region.get_mmap();
    let mut pages = vec![0u8; PIECE.min(mmap.size()).div_ceil(4096)];
    let mut backed = 0;
    for at in (0..mmap.size()).step_by(PIECE) {
        let len = PIECE.min(mmap.size() - at);
        let start = mmap.as_ptr().wrapping_add(at);
        // SAFETY: the range is mapped, and the vector has a byte for each of its pages.
        if unsafe { libc::mincore(start.cast(), len, pages.as_mut_ptr()) } != 0 {
            return Err(io::Error::last_os_error());
        }
        backed += pages.iter().take(len.div_ceil(4096)).filter(|page| **page & 1 == 1).count() as u64;
    }
    Ok(backed * PAGE)
}
