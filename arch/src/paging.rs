//! Page tables: those for the 64-bit entry, the first 4 GiB mapped to themselves in 2 MiB pages, and the way through
//! those that a guest has made.

use kvm_bindings::kvm_sregs;

use crate::layout::PAGE_TABLES;

const PAGE: u64 = 0x1000;
const PRESENT_WRITABLE: u64 = 0b11;
const LARGE: u64 = 1 << 7;
/// Gigabytes mapped: RAM below the hole, and the devices in it.
const GIB: u64 = 4;

/// The tables as bytes, to be written at [`PAGE_TABLES`], where CR3 points: PML4, PDPT, four page directories.
pub fn identity() -> Vec<u8> {
    let mut tables = vec![0u8; usize::from(6u8) * 4096];
    let mut set = |table: u64, index: u64, value: u64| {
        let at = usize::try_from(table * PAGE + index * 8).unwrap_or(usize::MAX);
        if let Some(entry) = tables.get_mut(at..at + 8) {
            entry.copy_from_slice(&value.to_le_bytes());
        }
    };
    set(0, 0, (PAGE_TABLES + PAGE) | PRESENT_WRITABLE);
    for gib in 0..GIB {
        set(1, gib, (PAGE_TABLES + (2 + gib) * PAGE) | PRESENT_WRITABLE);
        for step in 0..512 {
            set(2 + gib, step, (gib << 30 | step << 21) | LARGE | PRESENT_WRITABLE);
        }
    }
    tables
}

/// Bits of an entry with the address of a table or page (Intel SDM, volume 3, section 4.5).
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// Paging is on (CR0.PG), with 64-bit entries (CR4.PAE), for 64-bit code (EFER.LMA), with five levels (CR4.LA57).
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const CR4_LA57: u64 = 1 << 12;
const EFER_LMA: u64 = 1 << 10;

/// The guest-physical address behind `address` in the page tables that these registers are about, for 64-bit code only.
/// `entry` reads eight bytes of guest memory, and is asked five times at the most, whatever the tables say.
pub fn translate(sregs: &kvm_sregs, address: u64, mut entry: impl FnMut(u64) -> Option<u64>) -> Option<u64> {
    let long = sregs.cr0 & CR0_PG != 0 && sregs.cr4 & CR4_PAE != 0 && sregs.efer & EFER_LMA != 0;
    let levels = if sregs.cr4 & CR4_LA57 == 0 { 4 } else { 5 };
    // Of the bits beyond those that are looked up, all are as the last one that is.
    let unused = 63 - (12 + 9 * levels - 1);
    let canonical = (address.cast_signed() << unused >> unused).cast_unsigned() == address;
    if !long || !canonical {
        return None;
    }
    let mut table = sregs.cr3 & ADDRESS;
    for level in (0..levels).rev() {
        let shift = 12 + 9 * level;
        let found = entry(table | (address >> shift & 511) << 3)?;
        if found & 1 == 0 {
            return None;
        }
        if level == 0 || (level <= 2 && found & LARGE != 0) {
            let inside = (1 << shift) - 1;
            return Some(found & ADDRESS & !inside | address & inside);
        }
        table = found & ADDRESS;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn long_mode(cr3: u64, five: bool) -> kvm_sregs {
        let cr4 = CR4_PAE | if five { CR4_LA57 } else { 0 };
        kvm_sregs { cr0: CR0_PG, cr3, cr4, efer: EFER_LMA, ..Default::default() }
    }

    /// Walks the tables as the processor does.
    fn walk(tables: &[u8], address: u64) -> u64 {
        let entry = |at: u64| {
            let at = usize::try_from(at.checked_sub(PAGE_TABLES)?).ok()?;
            Some(u64::from_le_bytes(tables.get(at..at + 8)?.try_into().unwrap()))
        };
        translate(&long_mode(PAGE_TABLES, false), address, entry).unwrap()
    }

    #[test]
    fn maps_the_first_four_gigabytes_to_themselves() {
        let tables = identity();
        for address in [0, 0x1234, 0x10_0000, 0x3fff_ffff, 0x4000_0000, 0xd000_0050, 0xffff_ffff] {
            assert_eq!(walk(&tables, address), address, "{address:#x}");
        }
    }
    #[test]
    fn what_a_guest_makes_of_its_tables_is_followed_as_far_as_it_makes_sense() {
        // Tables of one entry for all: the address says the level.
        let tables = |last: u64| {
            move |at: u64| match at & !0xfff {
                0x1000 => Some(0x2003),
                0x2000 => Some(0x3003),
                0x3000 => Some(0x4003),
                0x4000 => Some(last),
                _ => None,
            }
        };
        let four = |address| translate(&long_mode(0x1000 | 0x18, false), address, tables(1 << 63 | 0x7_5003));
        assert_eq!(four(0x1234), Some(0x7_5234));
        assert_eq!(four(0xffff_ffff_8123_4567), Some(0x7_5567));
        assert_eq!(four(0x8000_0000_0000), None, "not canonical");
        assert_eq!(translate(&long_mode(0x1000, false), 0, tables(0x7_5002)), None, "not present");
        assert_eq!(translate(&long_mode(0x9000, false), 0, tables(3)), None, "no memory");
        let five = |address| translate(&long_mode(0x1000, true), address, tables(0x2003));
        assert_eq!(five(0x1_0000_0000_0123), Some(0x3123));
        // Each level leads back to the first: it ends all the same.
        let mut asked = 0;
        let circle = |_| {
            asked += 1;
            Some(0x1003)
        };
        assert_eq!(translate(&long_mode(0x1000, true), 0x1_0000_0000_0123, circle), Some(0x1123));
        assert_eq!(asked, 5);
        let huge = |_| Some(0x4000_0083);
        assert_eq!(
            translate(&long_mode(0, false), 0x12_3456, huge),
            Some(0x4012_3456),
            "a page of 1 GiB, not 512"
        );
        for unpaged in [
            kvm_sregs { cr0: 0, ..long_mode(0x1000, false) },
            kvm_sregs { efer: 0, ..long_mode(0x1000, false) },
        ] {
            assert_eq!(translate(&unpaged, 0, tables(3)), None);
        }
    }
}
