//! Guest memory: where it lies in the guest's address space, and the mapping behind it.

use std::fs::File;
use std::io;
use std::sync::Arc;

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::sys::ram;
pub use crate::sys::ram::Ram;
use crate::sys::scratch::Scratch;

/// One contiguous piece of guest RAM, as the hypervisor has to know it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Guest-physical address of its first byte.
    pub guest: u64,
    /// Length in bytes.
    pub len: u64,
    /// Address of its first byte in this process.
    pub host: u64,
}

/// All RAM of a guest. Cheap to clone: clones share the same memory.
#[derive(Clone, Debug)]
pub struct Memory {
    ram: Arc<Ram>,
}

impl Memory {
    /// Reserves RAM for the given pieces (guest address, length in bytes), untouched and lazily backed.
    ///
    /// Host addresses are congruent with guest addresses modulo 2 MiB and huge pages are asked for, so that one
    /// fault backs 2 MiB: it saves 20 to 40 times the faults of a boot.
    ///
    /// # Errors
    /// The host has not that much address space, or the pieces overlap.
    pub fn new(pieces: &[(u64, u64)]) -> io::Result<Memory> {
        Ok(Memory { ram: Arc::new(ram::reserve(pieces)?) })
    }

    /// The memory for `vm-memory`'s traits.
    pub fn ram(&self) -> &Ram {
        &self.ram
    }

    /// A share of the memory for `vm-memory`'s address-space trait (queues).
    pub fn shared(&self) -> Arc<Ram> {
        self.ram.clone()
    }

    /// The pieces, in address order.
    pub fn pieces(&self) -> impl Iterator<Item = Piece> {
        self.ram.iter().map(|region| Piece {
            guest: region.start_addr().0,
            len: region.len(),
            host: ram::host_address(region),
        })
    }

    /// Bytes of RAM in all.
    pub fn len(&self) -> u64 {
        self.ram.iter().map(GuestMemoryRegion::len).sum()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Maps `len` bytes of `file` from `offset` privately over guest RAM at `guest`: the guest sees the file's
    /// bytes, its writes go to private copies, and nothing is read before it is touched. All three numbers are
    /// multiples of 4096.
    ///
    /// Only before the guest runs and devices use the memory: the bytes there before are gone. The hypervisor may know
    /// the memory already; it knows addresses, and sees what is mapped there now.
    ///
    /// # Errors
    /// The range is not RAM, a number is not page-aligned, or the host refuses.
    pub fn map_file(&self, guest: u64, file: &File, offset: u64, len: u64) -> io::Result<()> {
        let bad = || io::Error::from(io::ErrorKind::InvalidInput);
        let region = self.ram.find_region(GuestAddress(guest)).ok_or_else(bad)?;
        ram::map_file(region, guest - region.start_addr().0, file, offset, len)
    }

    /// Copies `len` bytes of `file` from `offset` to guest RAM at `guest`, which has never been written: memory stays
    /// in huge pages, and zeroes cost none. All three numbers are multiples of 4096.
    ///
    /// The file is to keep its length meanwhile: truncated, it ends the process as a mapping does.
    ///
    /// # Errors
    /// The range is not RAM, a number is not page-aligned, or the file cannot be mapped.
    pub fn copy_file(&self, guest: u64, file: &File, offset: u64, len: u64) -> io::Result<()> {
        let bad = || io::Error::from(io::ErrorKind::InvalidInput);
        let region = self.ram.find_region(GuestAddress(guest)).ok_or_else(bad)?;
        ram::copy_file(region, guest - region.start_addr().0, file, offset, len)
    }

    /// Moves `len` bytes of `scratch` from `offset` over guest RAM at `guest`, page by page and without a copy; they
    /// read as zero in `scratch` afterwards. All three numbers are multiples of 4096; when they agree modulo 2 MiB,
    /// huge pages move whole.
    ///
    /// Only before the guest runs and devices use the memory: the bytes there before are gone. The hypervisor may know
    /// the memory already; it knows addresses, and sees what is mapped there now.
    ///
    /// # Errors
    /// The range is not RAM, a number is not page-aligned, or the host refuses (before Linux 5.7).
    pub fn adopt(&self, guest: u64, scratch: &mut Scratch, offset: u64, len: u64) -> io::Result<()> {
        let bad = || io::Error::from(io::ErrorKind::InvalidInput);
        let region = self.ram.find_region(GuestAddress(guest)).ok_or_else(bad)?;
        ram::adopt(region, guest - region.start_addr().0, scratch, offset, len)
    }

    /// Gives the host back the memory behind `len` bytes of guest RAM at `guest`; both are multiples of 4096. The guest
    /// may use them again at any time: then they are backed anew, one fault at a time.
    ///
    /// What is found there afterwards is zeros, or what the file holds that is mapped there ([`Memory::map_file`]): never
    /// anything of another process, and never what was written last.
    ///
    /// # Errors
    /// Not all of the range is RAM, a number is not page-aligned, or the host refuses (locked memory).
    pub fn discard(&self, guest: u64, len: u64) -> io::Result<()> {
        let bytes = usize::try_from(len).unwrap_or(usize::MAX);
        if len == 0 || !self.ram.check_range(GuestAddress(guest), bytes) {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        let end = guest.saturating_add(len);
        for region in self.ram.iter() {
            let (first, last) = (region.start_addr().0, region.start_addr().0.saturating_add(region.len()));
            let (from, to) = (guest.max(first), end.min(last));
            if from < to {
                ram::discard(region, from - first, to - from)?;
            }
        }
        Ok(())
    }

    /// Bytes of guest RAM that are backed by host memory now.
    ///
    /// # Errors
    /// The host does not tell.
    pub fn resident(&self) -> io::Result<u64> {
        self.ram.iter().map(ram::resident).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use vm_memory::Bytes;

    #[test]
    fn reserves_lazily_and_in_step_with_guest_addresses() {
        let memory = Memory::new(&[(0, 64 << 20), (4 << 30, 8 << 20)]).unwrap();
        assert_eq!(memory.len(), 72 << 20);
        assert_eq!(memory.resident().unwrap(), 0);
        for piece in memory.pieces() {
            assert_eq!(piece.host % (2 << 20), piece.guest % (2 << 20));
        }
        memory.ram().write_obj(1u8, GuestAddress(5 << 20)).unwrap();
        let resident = memory.resident().unwrap();
        assert!((4096..=2 << 20).contains(&resident), "{resident}");
    }

    #[test]
    fn moves_pages_in() {
        let memory = Memory::new(&[(0, 4 << 20)]).unwrap();
        let mut scratch = Scratch::new(3 << 20).unwrap();
        scratch.as_mut_slice().fill(7);
        memory.adopt(0x20_0000, &mut scratch, 0x1000, 2 << 20).unwrap();
        assert_eq!(memory.ram().read_obj::<u8>(GuestAddress(0x3f_ffff)).unwrap(), 7);
        assert_eq!(memory.ram().read_obj::<u8>(GuestAddress(0x1f_ffff)).unwrap(), 0);
        assert_eq!(scratch.as_slice().get(..0x1001).map(|bytes| (bytes[0xfff], bytes[0x1000])), Some((7, 0)));
        assert_eq!(scratch.as_slice().last(), Some(&7), "pages that did not move are untouched");
        for (guest, offset, len) in
            [(0x1001, 0, 4096), (0, 1, 4096), (0x3f_f000, 0, 8192), (0, 0x2f_f000, 8192), (4 << 20, 0, 4096)]
        {
            assert!(memory.adopt(guest, &mut scratch, offset, len).is_err(), "{guest:#x} {offset} {len}");
        }
    }

    #[test]
    fn copies_files_and_leaves_zeroes_out() {
        let mut file = tempfile::tempfile().unwrap();
        let content: Vec<u8> = (0..8192u32).map(|n| u8::try_from(n % 251).unwrap()).collect();
        file.write_all(&content).unwrap();
        file.set_len(4 << 20).unwrap();
        let memory = Memory::new(&[(0, 8 << 20)]).unwrap();
        memory.copy_file(0x20_0000, &file, 4096, (4 << 20) - 4096).unwrap();
        let mut copied = [0; 8192];
        memory.ram().read_slice(&mut copied, GuestAddress(0x20_0000)).unwrap();
        assert!(copied.get(..4096) == content.get(4096..));
        assert!(copied.get(4096..) == Some(&[0; 4096]));
        assert!(memory.resident().unwrap() <= 2 << 20, "zeroes have been written");
        for (guest, offset, len) in [(0x3001, 0, 4096), (0x3000, 1, 4096), (0, 0, 100), (8 << 20, 0, 4096)] {
            assert!(memory.copy_file(guest, &file, offset, len).is_err(), "{guest:#x} {offset} {len}");
        }
    }

    #[test]
    fn discards_what_was_written_and_nothing_beside_it() {
        let pieces = [(0, 4 << 20), (4 << 20, 4 << 20)];
        let memory = Memory::new(&pieces).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 4096]).unwrap();
        memory.map_file(0x3000, &file, 0, 4096).unwrap();
        let byte = |at| memory.ram().read_obj::<u8>(GuestAddress(at)).unwrap();
        for at in (0..8 << 20).step_by(4096) {
            memory.ram().write_obj(9u8, GuestAddress(at)).unwrap();
        }
        let before = memory.resident().unwrap();
        // Over the border of two pieces.
        memory.discard(1 << 20, 6 << 20).unwrap();
        assert_eq!(memory.resident().unwrap(), before - (6 << 20));
        assert_eq!([(1 << 20) - 4096, 1 << 20, (7 << 20) - 4096, 7 << 20].map(byte), [9, 0, 0, 9]);
        memory.ram().write_obj(5u8, GuestAddress(1 << 20)).unwrap();
        assert_eq!(byte(1 << 20), 5, "it can be used again");
        memory.discard(0x2000, 0x2000).unwrap();
        assert_eq!([0x1000, 0x2000, 0x3000, 0x4000].map(byte), [9, 0, 7, 9], "a file shows again");
        for (guest, len) in [
            (0x1001, 4096),
            (0, 100),
            (0, 0),
            (7 << 20, 2 << 20),
            (8 << 20, 4096),
            (u64::MAX - 4095, 8192),
            (0, u64::MAX),
        ] {
            assert!(memory.discard(guest, len).is_err(), "{guest:#x} {len}");
        }
        assert_eq!(byte(7 << 20), 9, "a range that is refused is left alone");
    }

    #[test]
    fn the_last_share_gives_the_memory_back() {
        let memory = Memory::new(&[(0, 1 << 20)]).unwrap();
        let share = memory.shared();
        let at = memory.pieces().next().unwrap().host;
        let mapped = || {
            let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
            let starts = |line: &str| u64::from_str_radix(line.split('-').next().unwrap(), 16).unwrap();
            maps.lines().any(|line| starts(line) == at)
        };
        drop(memory);
        assert!(mapped(), "a share is left");
        drop(share);
        assert!(!mapped());
    }

    #[test]
    fn maps_files_privately() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 8192]).unwrap();
        let memory = Memory::new(&[(0, 1 << 20)]).unwrap();
        memory.map_file(0x3000, &file, 4096, 4096).unwrap();
        assert_eq!(memory.ram().read_obj::<u8>(GuestAddress(0x3000)).unwrap(), 7);
        assert_eq!(memory.ram().read_obj::<u8>(GuestAddress(0x4000)).unwrap(), 0);
        memory.ram().write_obj(9u8, GuestAddress(0x3000)).unwrap();
        let again = Memory::new(&[(0, 1 << 20)]).unwrap();
        again.map_file(0, &file, 4096, 4096).unwrap();
        assert_eq!(again.ram().read_obj::<u8>(GuestAddress(0)).unwrap(), 7, "the file is untouched");
        for (guest, offset, len) in
            [(0x3001, 0, 4096), (0x3000, 1, 4096), (0xff000, 0, 8192), (1 << 20, 0, 4096)]
        {
            assert!(memory.map_file(guest, &file, offset, len).is_err(), "{guest:#x} {offset} {len}");
        }
    }
}
