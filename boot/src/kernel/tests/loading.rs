//! How the code of a kernel comes into memory.

use std::io::{Seek, SeekFrom, Write as _};

use super::*;

/// An ELF file whose segment has 5 MiB of code in its middle, as its section table says.
fn code_elf() -> Vec<u8> {
    let (segment, code) = ((0x1000, 0x10_1000, 8 * MIB, 8 * MIB), 2 * MIB..7 * MIB);
    let mut bytes = elf(0x10_1000, &[program_header(1, segment)], 0x80_1000);
    let table = bytes.len() as u64;
    bytes[0x28..0x30].copy_from_slice(&table.to_le_bytes());
    bytes[0x3a..0x3e].copy_from_slice(&[64, 0, 2, 0]);
    bytes.extend([0; 64]);
    for field in [1 << 32, 4, 0, code.start, code.end - code.start, 0, 0, 0] {
        bytes.extend(u64::to_le_bytes(field));
    }
    bytes
}

#[test]
fn copies_the_huge_pages_of_code_and_maps_the_rest() {
    for (loading, copied) in [(Loading::Map, 0..0), (Loading::Copy, 4 * MIB..8 * MIB)] {
        let mut file = tempfile::tempfile().unwrap();
        let image = code_elf();
        file.write_all(&image).unwrap();
        let (memory, map) = small_memory();
        let kernel = Kernel::read("k", file.try_clone().unwrap()).unwrap();
        kernel.load(Protocol::Auto, loading, &memory, &map).unwrap();
        let byte = |address: u64| memory.ram().read_obj::<u8>(GuestAddress(address)).unwrap();
        for page in (0x10_1000..0x90_1000).step_by(4096) {
            assert_eq!(byte(page + 77), 77, "{loading:?}: {page:#x} is loaded");
        }
        // A private mapping shows what is written to the file where the guest has written nothing.
        file.seek(SeekFrom::Start(0)).unwrap();
        file.write_all(&vec![0xee; image.len()]).unwrap();
        for page in (0x10_1000..0x90_1000).step_by(4096) {
            assert_eq!(byte(page + 77) == 77, copied.contains(&page), "{loading:?}: {page:#x} is a copy");
        }
    }
}

#[test]
fn does_without_a_section_table() {
    let spoil: [(usize, &[u8]); 4] =
        [(0x28, &[0xff; 8]), (0x3a, &[63]), (0x3c, &[0, 0]), (0x80_1000 + 64 + 24, &[0xff; 16])];
    for (at, bytes) in spoil {
        let mut image = code_elf();
        image[at..at + bytes.len()].copy_from_slice(bytes);
        let (memory, map) = small_memory();
        let kernel = Kernel::parse("k", image).unwrap();
        kernel.load(Protocol::Auto, Loading::Copy, &memory, &map).unwrap();
        assert_eq!(memory.ram().read_obj::<u8>(GuestAddress(0x90_0fff)).unwrap(), 0xff, "{at:#x}");
    }
}
