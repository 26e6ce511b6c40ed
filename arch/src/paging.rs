//! Page tables for the 64-bit entry: the first 4 GiB mapped to themselves in 2 MiB pages.

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

#[cfg(test)]
mod tests {
    use super::*;

    /// Walks the tables as the processor does.
    fn walk(tables: &[u8], address: u64) -> u64 {
        let entry = |table: u64, index: u64| {
            let at = usize::try_from(table - PAGE_TABLES + index * 8).unwrap();
            u64::from_le_bytes(tables[at..at + 8].try_into().unwrap())
        };
        let pdpt = entry(PAGE_TABLES, address >> 39 & 511) & !0xfff;
        let directory = entry(pdpt, address >> 30 & 511) & !0xfff;
        let page = entry(directory, address >> 21 & 511);
        assert_ne!(page & LARGE, 0);
        (page & !0x1f_ffff) | address & 0x1f_ffff
    }

    #[test]
    fn maps_the_first_four_gigabytes_to_themselves() {
        let tables = identity();
        for address in [0, 0x1234, 0x10_0000, 0x3fff_ffff, 0x4000_0000, 0xd000_0050, 0xffff_ffff] {
            assert_eq!(walk(&tables, address), address, "{address:#x}");
        }
    }
}
