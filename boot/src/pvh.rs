//! The start info of PVH: what a kernel entered in 32-bit mode is told (Xen's `public/arch-x86/hvm/start_info.h`).

use arch::layout::{ACPI, CMDLINE, PVH_INFO};
use base::memory::Memory;
use base::{Doing, Result, Why};
use linux_loader::loader::elf::start_info::{
    XEN_HVM_MEMMAP_TYPE_RAM, XEN_HVM_MEMMAP_TYPE_RESERVED, XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry,
    hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{Bytes, GuestAddress};

use crate::initrd::Initrd;
use crate::map::Map;

/// The module list and the memory map lie behind the start info, in the same page.
const MODULES: u64 = PVH_INFO + 0x40;
const MEMORY_MAP: u64 = PVH_INFO + 0x80;

/// Writes the start info, version 1.
///
/// # Errors
/// There is no memory where it belongs.
pub fn place(initrd: Option<Initrd>, memory: &Memory, map: &Map) -> Result<()> {
    let write = || {
        let ram = memory.ram();
        let mut entries = 0u32;
        let mut at = MEMORY_MAP;
        for range in map.ranges() {
            let type_ = if range.usable { XEN_HVM_MEMMAP_TYPE_RAM } else { XEN_HVM_MEMMAP_TYPE_RESERVED };
            let entry = hvm_memmap_table_entry { addr: range.start, size: range.len, type_, reserved: 0 };
            ram.write_obj(entry, GuestAddress(at))?;
            at += size_of::<hvm_memmap_table_entry>() as u64;
            entries += 1;
        }
        if let Some(Initrd { start, len }) = initrd {
            let module = hvm_modlist_entry { paddr: start, size: len, ..Default::default() };
            ram.write_obj(module, GuestAddress(MODULES))?;
        }
        let info = hvm_start_info {
            magic: XEN_HVM_START_MAGIC_VALUE,
            version: 1,
            nr_modules: u32::from(initrd.is_some()),
            modlist_paddr: if initrd.is_some() { MODULES } else { 0 },
            cmdline_paddr: CMDLINE,
            rsdp_paddr: ACPI,
            memmap_paddr: MEMORY_MAP,
            memmap_entries: entries,
            ..Default::default()
        };
        ram.write_obj(info, GuestAddress(PVH_INFO))
    };
    write().doing(Why::Invalid, || "write the PVH start info")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_of_memory_initrd_and_tables() {
        let memory = Memory::new(&[(0, 64 << 20)]).unwrap();
        place(Some(Initrd { start: 0x300_0000, len: 77 }), &memory, &Map::new(&memory)).unwrap();
        let word = |at: u64| memory.ram().read_obj::<u64>(GuestAddress(at)).unwrap();
        assert_eq!(word(PVH_INFO), 1 << 32 | 0x336e_c578);
        assert_eq!(word(PVH_INFO + 8) >> 32, 1, "modules");
        let modules = word(PVH_INFO + 16);
        assert_eq!((word(modules), word(modules + 8)), (0x300_0000, 77));
        assert_eq!((word(PVH_INFO + 24), word(PVH_INFO + 32)), (CMDLINE, ACPI));
        let (table, entries) = (word(PVH_INFO + 40), word(PVH_INFO + 48));
        assert_eq!(entries, 3);
        assert_eq!((word(table + 48), word(table + 56), word(table + 64)), (0x10_0000, 63 << 20, 1));
    }
}
