//! The zero page: what the Linux boot protocol tells a kernel (`Documentation/arch/x86/{boot,zero-page}.rst`).

use arch::layout::{ACPI, CMDLINE, CMDLINE_MAX, ZERO_PAGE};
use base::memory::Memory;
use base::{Doing, Result, Why};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::{Bytes, GuestAddress};

use crate::initrd::Initrd;
use crate::map::Map;

const BOOT_FLAG: u16 = 0xaa55;
const MAGIC: u32 = u32::from_le_bytes(*b"HdrS");
/// Protocol 2.15, the newest.
const VERSION: u16 = 0x020f;
/// The code is above 1 MiB.
const LOADED_HIGH: u8 = 1;
/// A loader without a number of its own.
const UNDEFINED_LOADER: u8 = 0xff;
/// Where Linux on x86-64 stops looking for its initrd.
const INITRD_MAX: u32 = 0x7fff_ffff;
const ALIGNMENT: u32 = 2 << 20;
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// The setup header a bzImage of today would have, for a kernel that comes without one.
pub fn header() -> setup_header {
    setup_header {
        boot_flag: BOOT_FLAG,
        header: MAGIC,
        version: VERSION,
        loadflags: LOADED_HIGH,
        initrd_addr_max: INITRD_MAX,
        kernel_alignment: ALIGNMENT,
        relocatable_kernel: 1,
        cmdline_size: u32::try_from(CMDLINE_MAX - 1).unwrap_or(0),
        ..Default::default()
    }
}

/// Bytes of command line the kernel takes, with the terminating zero.
pub fn cmdline_limit(header: &setup_header) -> usize {
    let own = usize::try_from(header.cmdline_size).unwrap_or(usize::MAX);
    own.saturating_add(1).min(CMDLINE_MAX)
}

/// Writes the zero page.
///
/// # Errors
/// There is no memory where it belongs.
pub fn place(mut header: setup_header, initrd: Option<Initrd>, memory: &Memory, map: &Map) -> Result<()> {
    let low = |value: u64| u32::try_from(value & 0xffff_ffff).unwrap_or(0);
    let initrd = initrd.unwrap_or(Initrd { start: 0, len: 0 });
    header.type_of_loader = UNDEFINED_LOADER;
    header.cmd_line_ptr = low(CMDLINE);
    header.ramdisk_image = low(initrd.start);
    header.ramdisk_size = low(initrd.len);
    let mut params = boot_params {
        acpi_rsdp_addr: ACPI,
        ext_cmd_line_ptr: low(CMDLINE >> 32),
        ext_ramdisk_image: low(initrd.start >> 32),
        ext_ramdisk_size: low(initrd.len >> 32),
        hdr: header,
        ..Default::default()
    };
    let mut table = params.e820_table;
    let mut count = 0u8;
    for (entry, range) in table.iter_mut().zip(map.ranges()) {
        let r#type = if range.usable { E820_RAM } else { E820_RESERVED };
        *entry = boot_e820_entry { addr: range.start, size: range.len, r#type };
        count = count.saturating_add(1);
    }
    params.e820_table = table;
    params.e820_entries = count;
    memory.ram().write_obj(params, GuestAddress(ZERO_PAGE)).doing(Why::Invalid, || "write the zero page")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_the_kernel_all_it_asks_for() {
        let memory = Memory::new(&arch::layout::ram(4 << 30)).unwrap();
        let initrd = Some(Initrd { start: 0x7f00_0000, len: 12345 });
        place(header(), initrd, &memory, &Map::new(&memory)).unwrap();
        let word = |at: u64| memory.ram().read_obj::<u32>(GuestAddress(ZERO_PAGE + at)).unwrap();
        // Offsets are those of the kernel's documentation.
        assert_eq!(word(0x070), 0xe_0000, "acpi_rsdp_addr");
        assert_eq!(word(0x1e8) & 0xff, 4, "e820_entries");
        assert_eq!(word(0x1fe) & 0xffff, 0xaa55);
        assert_eq!(word(0x202), MAGIC);
        assert_eq!(word(0x210) & 0xff, 0xff, "type_of_loader");
        assert_eq!((word(0x218), word(0x21c)), (0x7f00_0000, 12345));
        assert_eq!(word(0x228), 0x2_0000, "cmd_line_ptr");
        assert_eq!(word(0x2d0 + 3 * 20 + 4), 1, "the fourth range begins at 4 GiB");
        assert_eq!(word(0x2d0 + 20 + 16), E820_RESERVED);
    }
}
