//! The guest-physical address map.
//!
//! ```text
//! 0x0000_0000  low RAM: boot data below 640 KiB, the BIOS area, the kernel from 1 MiB or where it asks
//! 0xc000_0000  hole for devices: PCI windows, virtio-mmio, PCI configuration space, I/O APIC, local APIC
//! 0x1_0000_0000  the rest of RAM, then more room for PCI
//! ```

/// End of low RAM at the most, and start of the hole for devices.
pub const HOLE_START: u64 = 0xc000_0000;
/// End of the hole; RAM beyond 3 GiB goes on here.
pub const HOLE_END: u64 = 0x1_0000_0000;

/// Top of the stack that a 64-bit entry begins with; Linux sets its own at once.
pub const BOOT_STACK: u64 = 0x8ff0;
/// The zero page (`struct boot_params`) of the Linux boot protocol.
pub const ZERO_PAGE: u64 = 0x7000;
/// `struct hvm_start_info` of the PVH protocol, its modules and memory map behind it.
pub const PVH_INFO: u64 = 0x6000;
/// Initial page tables: PML4, PDPT, then page directories.
pub const PAGE_TABLES: u64 = 0x9000;
/// Global descriptor table.
pub const GDT: u64 = 0x500;
/// The kernel command line, at most [`CMDLINE_MAX`] bytes with its terminating zero.
pub const CMDLINE: u64 = 0x2_0000;
/// Longest command line, as x86 Linux takes it (`COMMAND_LINE_SIZE`).
pub const CMDLINE_MAX: usize = 2048;
/// End of conventional memory, start of what firmware keeps for itself.
pub const EBDA: u64 = 0x9_fc00;
/// ACPI tables; the RSDP comes first, where a guest that scans for it looks.
pub const ACPI: u64 = 0xe_0000;
/// Room for the ACPI tables.
pub const ACPI_LEN: u64 = 0x1_0000;
/// SMBIOS tables; the entry point comes first, where a guest begins to look for it.
pub const SMBIOS: u64 = 0xf_0000;
/// Room for the SMBIOS tables.
pub const SMBIOS_LEN: u64 = 0xb000;
/// A page with the 16 bytes of the VM generation ID.
pub const GENERATION_ID: u64 = SMBIOS + SMBIOS_LEN;
/// The MP table, for kernels without ACPI.
pub const MP_TABLE: u64 = 0xf_c000;
/// Room for the MP table.
pub const MP_TABLE_LEN: u64 = 0x4000;
/// The pointer to the MP table: in the last KiB of conventional memory.
pub const MP_POINTER: u64 = EBDA;
/// Start of the memory that belongs to the kernel.
pub const HIGH_RAM: u64 = 0x10_0000;

/// virtio-mmio windows, one after another.
pub const VIRTIO_MMIO: u64 = 0xd000_0000;
/// Length of one virtio-mmio window.
pub const VIRTIO_MMIO_LEN: u64 = 0x1000;

/// Where PCI functions have their windows below 4 GiB.
pub const PCI_LOW: u64 = 0xc000_0000;
/// Length of that room.
pub const PCI_LOW_LEN: u64 = 0x1000_0000;
/// PCI configuration space of bus 0, memory-mapped (ECAM).
pub const PCI_ECAM: u64 = 0xe000_0000;
/// Length of the room for PCI windows above RAM.
pub const PCI_HIGH_LEN: u64 = 1 << 30;
/// Inputs of the I/O APIC that the interrupt pins of PCI functions share.
pub const PCI_GSIS: [u32; 3] = [5, 6, 7];

/// I/O APIC registers.
pub const IOAPIC: u64 = 0xfec0_0000;
/// Length of the window of I/O APIC registers.
pub const IOAPIC_LEN: u64 = 0x1000;
/// Local APIC registers.
pub const LAPIC: u64 = 0xfee0_0000;
/// Three pages Intel processors need for real mode (`KVM_SET_TSS_ADDR`).
pub const TSS: u64 = 0xfffb_d000;

/// First interrupt (GSI) that devices without a fixed one get.
pub const FIRST_FREE_GSI: u32 = 5;
/// Most inputs of an I/O APIC. One of ours shows as many as the machine uses: a guest visits each with a dozen accesses.
pub const IOAPIC_PINS_MAX: u32 = 240;
/// Inputs of the I/O APIC in the kernel.
pub const KERNEL_IOAPIC_PINS: u32 = 24;

/// The pieces of RAM (guest address, length) of a machine with `bytes` of memory: at most two, below and above the
/// hole.
pub fn ram(bytes: u64) -> Vec<(u64, u64)> {
    let low = bytes.min(HOLE_START);
    let mut pieces = vec![(0, low)];
    if bytes > low {
        pieces.push((HOLE_END, bytes - low));
    }
    pieces
}

/// Start of the room for PCI windows above RAM, in a machine with `bytes` of memory.
pub fn pci_high(bytes: u64) -> u64 {
    ram(bytes).iter().map(|(start, len)| start + len).fold(HOLE_END, u64::max).next_multiple_of(PCI_HIGH_LEN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_leaves_the_hole_free() {
        assert_eq!(ram(1 << 20), [(0, 1 << 20)]);
        assert_eq!(ram(5 << 30), [(0, 3 << 30), (4 << 30, 2 << 30)]);
    }

    #[test]
    fn pci_has_room_above_ram() {
        let high = [1 << 20, 3 << 30, 5 << 30, (5 << 30) + 4096].map(pci_high);
        assert_eq!(high, [4 << 30, 4 << 30, 6 << 30, 7 << 30]);
    }
}
