//! Writes kernel images around our own guests, whole or broken on purpose.

/// Where the guests are loaded and entered.
pub const LOAD: u64 = 0x10_0000;
const PAGE: usize = 0x1000;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// `XEN_ELFNOTE_PHYS32_ENTRY`: the note by which an image says that it can be entered by PVH.
const PHYS32_ENTRY: u32 = 18;

fn program_header(kind: u32, flags: u32, offset: usize, addr: u64, len: usize) -> Vec<u8> {
    let (offset, len) = (offset as u64, len as u64);
    let mut header = [kind.to_le_bytes(), flags.to_le_bytes()].concat();
    // File offset, virtual and physical address, length in the file and in memory, alignment.
    for field in [offset, addr, addr, len, len, PAGE as u64] {
        header.extend(field.to_le_bytes());
    }
    header
}

/// An ELF64 executable for x86-64 that holds `code` at [`LOAD`], with a PVH note if asked for.
pub fn elf(code: &[u8], pvh: bool) -> Vec<u8> {
    let headers: u16 = if pvh { 2 } else { 1 };
    let mut image = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    image.extend([2u16.to_le_bytes(), 62u16.to_le_bytes()].concat());
    image.extend(1u32.to_le_bytes());
    // Entry, program headers, section headers.
    for field in [LOAD, 64, 0] {
        image.extend(field.to_le_bytes());
    }
    image.extend(0u32.to_le_bytes());
    for field in [64, 56, headers, 0, 0, 0] {
        image.extend(field.to_le_bytes());
    }
    image.extend(program_header(PT_LOAD, 7, PAGE, LOAD, code.len()));
    if pvh {
        let mut note = [4u32, 8, PHYS32_ENTRY].map(u32::to_le_bytes).concat();
        note.extend(b"Xen\0");
        note.extend(LOAD.to_le_bytes());
        image.extend(program_header(PT_NOTE, 4, 512, 0, note.len()));
        image.resize(512, 0);
        image.extend(note);
    }
    image.resize(PAGE, 0);
    image.extend(code);
    image
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guests;

    #[test]
    fn the_guests_assemble_and_the_images_are_elf() {
        let guests = guests::all();
        assert!(guests.len() >= 15, "{:?}", guests.keys());
        assert!(guests["spin"] == [0xeb, 0xfe] && guests["tiny"].starts_with(&[0xb0, 0, 0xe6, 0xf4]));
        let image = elf(guests["pvh"], true);
        assert_eq!(&image[..4], b"\x7fELF");
        assert!(image.ends_with(guests["pvh"]) && image.windows(4).any(|four| four == b"Xen\0"));
    }
}
