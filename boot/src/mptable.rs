//! The MP table: processors, I/O APIC and interrupts for a kernel without ACPI (MultiProcessor Specification 1.4,
//! chapter 4).
//!
//! The floating pointer lies in the last KiB of conventional memory, where every kernel looks; the table it points to
//! is in the BIOS area. Interrupts are of an ISA bus, edge-triggered and active-high, but for the pins of functions on a PCI
//! bus, which are as they are on PCI.

use std::collections::BTreeMap;

use arch::layout::{IOAPIC, LAPIC, MP_POINTER, MP_TABLE, MP_TABLE_LEN};
use base::memory::Memory;
use base::{Doing, Fail, Result, Why};
use vm_memory::{Bytes, GuestAddress};

use crate::acpi::Machine;

/// Version 1.4, in the pointer and in the table.
const REVISION: u8 = 4;
const OEM: &[u8; 8] = b"MAYFLY  ";
const PRODUCT: &[u8; 12] = b"MAYFLYVM    ";
/// The version of KVM's local APICs, and of the I/O APICs: KVM's and ours. Kernels read the registers.
const LAPIC_VERSION: u8 = 0x14;
const KERNEL_IOAPIC_VERSION: u8 = 0x11;
const IOAPIC_VERSION: u8 = 0x20;
/// The smallest processor that there is with an APIC of its own. Kernels ask CPUID.
const SIGNATURE: u32 = 0x600;
const FPU_AND_APIC: u32 = 1 | 1 << 9;
const ENABLED: u8 = 1;
const BOOT_PROCESSOR: u8 = 2;
/// The number of the bus of interrupts that are not of PCI. A PCI bus has to have its own number, which is 0.
const ISA: u8 = 1;
const PCI: u8 = 0;
/// APIC IDs have eight bits, of which 0xff means all, and the I/O APIC needs one.
const CPUS_MAX: u32 = 254;
const ALL: u8 = 0xff;

/// Interrupt types (table 4-11).
const INT: u8 = 0;
const NMI: u8 = 1;
const EXT_INT: u8 = 3;

/// Entry types (table 4-3).
const PROCESSOR: u8 = 0;
const BUS: u8 = 1;
const IO_APIC: u8 = 2;
const IO_INTERRUPT: u8 = 3;
const LOCAL_INTERRUPT: u8 = 4;

/// Writes pointer and table where `arch::layout` has them.
///
/// # Errors
/// As [`table`], or there is no memory there.
pub fn place(machine: &Machine, memory: &Memory) -> Result<()> {
    let table = table(machine)?;
    let write = |bytes: &[u8], at| {
        memory.ram().write_slice(bytes, GuestAddress(at)).doing(Why::Invalid, || "write the MP table")
    };
    write(&table, MP_TABLE)?;
    write(&pointer(), MP_POINTER)
}

/// The floating pointer structure (section 4.1).
fn pointer() -> [u8; 16] {
    let [a, b, c, d] = low(MP_TABLE);
    // One paragraph of 16 bytes; a table is there; interrupts begin in virtual wire mode.
    let mut bytes = [b'_', b'M', b'P', b'_', a, b, c, d, 1, REVISION, 0, 0, 0, 0, 0, 0];
    let sum = sum(&bytes);
    if let Some(checksum) = bytes.get_mut(10) {
        *checksum = sum.wrapping_neg();
    }
    bytes
}

/// The configuration table (section 4.2) with its entries (section 4.3), in the order of their types.
///
/// # Errors
/// There are more processors or interrupts than it can name.
pub fn table(machine: &Machine) -> Result<Vec<u8>> {
    let fail = |cause: String| {
        Fail::new(Why::Usage, "describe the machine without ACPI")
            .because(cause)
            .hint("leave acpi=off out of the kernel command line")
    };
    let io_apic = u8::try_from(machine.cpus).ok().filter(|_| machine.cpus <= CPUS_MAX);
    let io_apic = io_apic.ok_or_else(|| {
        fail(format!("an MP table lists {CPUS_MAX} processors at most, and there are {}", machine.cpus))
    })?;
    let mut entries = Entries::default();
    for id in 0..io_apic {
        let flags = if id == 0 { ENABLED | BOOT_PROCESSOR } else { ENABLED };
        let head = [PROCESSOR, id, LAPIC_VERSION, flags];
        entries.add(&[&head[..], &SIGNATURE.to_le_bytes(), &FPU_AND_APIC.to_le_bytes(), &[0; 8]]);
    }
    if machine.bridge.is_some() {
        entries.add(&[&[BUS, PCI], b"PCI   "]);
    }
    entries.add(&[&[BUS, ISA], b"ISA   "]);
    let version = if machine.full_irqchip { KERNEL_IOAPIC_VERSION } else { IOAPIC_VERSION };
    entries.add(&[&[IO_APIC, io_apic, version, ENABLED], &low(IOAPIC)]);
    let byte = |irq: u32| u8::try_from(irq).map_err(|_| fail(format!("an MP table has no interrupt {irq}")));
    for (irq, pin) in interrupts(machine) {
        entries.add(&[&[IO_INTERRUPT, INT, 0, 0, ISA, byte(irq)?, io_apic, byte(pin)?]]);
    }
    for (device, gsi) in pins(machine) {
        // Section D.3: the device, and its pin in the two lowest bits, of which INTA is 0. As the bus has it.
        entries.add(&[&[IO_INTERRUPT, INT, 0, 0, PCI, device << 2, io_apic, byte(*gsi)?]]);
    }
    if machine.full_irqchip {
        entries.add(&[&[LOCAL_INTERRUPT, EXT_INT, 0, 0, ISA, 0, 0, 0]]);
    }
    entries.add(&[&[LOCAL_INTERRUPT, NMI, 0, 0, ISA, 0, ALL, 1]]);
    entries.with_header().ok_or_else(|| fail("its MP table would be too long".to_owned()))
}

/// The ISA interrupts and the inputs of the I/O APIC at which they arrive: those of the devices, and with the legacy
/// controllers all 16, of which the timer's comes at input 2.
fn interrupts(machine: &Machine) -> BTreeMap<u32, u32> {
    let mut found = BTreeMap::new();
    if machine.full_irqchip {
        found.extend((0..16).filter(|irq| *irq != 2).map(|irq| (irq, if irq == 0 { 2 } else { irq })));
    }
    found.extend(machine.nodes.iter().flat_map(|node| &node.irqs).map(|irq| (*irq, *irq)));
    // An input is of one bus, or it would be of two kinds.
    found.retain(|_, input| pins(machine).all(|(_, gsi)| gsi != input));
    found
}

/// The devices of the PCI bus and where their pins lead.
fn pins<'a>(machine: &Machine<'a>) -> impl Iterator<Item = &'a (u8, u32)> {
    machine.bridge.into_iter().flat_map(|bridge| &bridge.pins)
}

/// Entries of the table, one after another.
#[derive(Default)]
struct Entries {
    bytes: Vec<u8>,
    count: u16,
}

impl Entries {
    fn add(&mut self, parts: &[&[u8]]) {
        self.bytes.extend(parts.concat());
        self.count = self.count.saturating_add(1);
    }

    /// The whole table; `None` if it does not fit into its place.
    fn with_header(self) -> Option<Vec<u8>> {
        const HEADER: usize = 44;
        let len = self.bytes.len().checked_add(HEADER)?;
        let length = u16::try_from(len).ok().filter(|_| len as u64 <= MP_TABLE_LEN)?;
        let mut table = Vec::with_capacity(len);
        table.extend(b"PCMP");
        table.extend(length.to_le_bytes());
        table.extend([REVISION, 0]);
        table.extend(OEM);
        table.extend(PRODUCT);
        // No OEM table.
        table.extend([0; 6]);
        table.extend(self.count.to_le_bytes());
        table.extend(low(LAPIC));
        // No extended table.
        table.extend([0; 4]);
        table.extend(self.bytes);
        let sum = sum(&table);
        *table.get_mut(7)? = sum.wrapping_neg();
        Some(table)
    }
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

/// An address below 4 GiB as the tables have it.
fn low(address: u64) -> [u8; 4] {
    let [a, b, c, d, ..] = address.to_le_bytes();
    [a, b, c, d]
}

#[cfg(test)]
mod tests {
    use super::*;
    use base::node::{HostBridge, Node};

    fn node(irqs: &[u32]) -> Node {
        let (ports, memory) = (Vec::new(), Vec::new());
        Node { name: "V000".into(), hid: "LNRO0005", uid: 0, ports, memory, irqs: irqs.to_vec() }
    }

    fn machine(cpus: u32, nodes: &[Node], full_irqchip: bool) -> Machine<'_> {
        Machine {
            cpus,
            nodes,
            bridge: None,
            sleep_port: 0x600,
            reset_port: 0x602,
            reset_value: 1,
            ioapic_pins: 24,
            full_irqchip,
            rtc: true,
            generation: None,
        }
    }

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn the_pointer_is_byte_for_byte_that_of_the_specification() {
        assert_eq!(hex(&pointer()), "5f4d505f00c00f000104d10000000000");
        assert_eq!(sum(&pointer()), 0);
    }

    #[test]
    fn the_table_is_byte_for_byte_that_of_the_specification() {
        let nodes = [node(&[4]), node(&[5]), node(&[17])];
        let table = table(&machine(2, &nodes, false)).unwrap();
        let expected = [
            "50434d50",                 // PCMP
            "8400",                     // bytes
            "04",                       // 1.4
            "ae",                       // checksum
            "4d4159464c592020",         // MAYFLY
            "4d4159464c59564d20202020", // MAYFLYVM
            "000000000000",             // no OEM table
            "0800",                     // entries
            "0000e0fe",                 // local APIC
            "00000000",                 // no extended table
            "0000140300060000010200000000000000000000",
            "0001140100060000010200000000000000000000",
            "0101495341202020", // bus 1 is ISA
            "020220010000c0fe", // I/O APIC 2
            "0300000001040204", // interrupt 4 at input 4
            "0300000001050205",
            "0300000001110211",
            "040100000100ff01", // NMI at LINT1 of all
        ]
        .concat();
        assert_eq!(hex(&table), expected);
        assert_eq!(sum(&table), 0);
    }

    #[test]
    fn legacy_controllers_bring_their_interrupts() {
        let table = table(&machine(1, &[node(&[4])], true)).unwrap();
        let entries: Vec<_> = table[44 + 20 + 8 + 8..].chunks(8).map(hex).collect();
        assert_eq!(entries.len(), 15 + 2);
        assert_eq!(entries[0], "0300000001000102", "the timer arrives at input 2");
        assert_eq!(entries[1], "0300000001010101");
        assert_eq!(entries[2], "0300000001030103", "there is no interrupt 2");
        assert_eq!(entries[15..], ["0403000001000000", "040100000100ff01"]);
    }

    #[test]
    fn pins_of_a_pci_bus_are_named_and_of_no_other_bus() {
        let bridge = HostBridge { ecam: (0, 0), low: (0, 0), high: (0, 0), pins: vec![(1, 5), (31, 23)] };
        for full in [false, true] {
            let nodes = [node(&[4])];
            let table = table(&Machine { bridge: Some(&bridge), ..machine(1, &nodes, full) }).unwrap();
            let entries: Vec<_> = table[44 + 20..].chunks(8).map(hex).collect();
            assert_eq!(entries[..2], ["0100504349202020", "0101495341202020"]);
            let named = |bus: &str| {
                entries.iter().filter(|entry| entry.starts_with(&format!("03000000{bus}"))).count()
            };
            assert_eq!((named("00"), named("01")), (2, if full { 14 } else { 1 }), "{entries:?}");
            assert!(entries.contains(&"0300000000040105".into()), "INTA of device 1 at input 5: {entries:?}");
            assert!(
                entries.contains(&"03000000007c0117".into()),
                "INTA of device 31 at input 23: {entries:?}"
            );
        }
    }

    #[test]
    fn the_largest_table_has_room_and_a_larger_one_is_refused() {
        let all: Vec<u32> = (0..240).collect();
        let nodes = [node(&all)];
        let table = table(&machine(CPUS_MAX, &nodes, true)).unwrap();
        assert_eq!(table.len(), 44 + 254 * 20 + 8 + 8 + 240 * 8 + 16);
        assert_eq!(usize::from(u16::from_le_bytes([table[4], table[5]])), table.len());
        let fail = super::table(&machine(255, &[], false)).unwrap_err();
        assert!(fail.summary().contains("254 processors at most, and there are 255"), "{fail}");
        let fail = super::table(&machine(1, &[node(&[256])], false)).unwrap_err();
        assert!(fail.summary().contains("no interrupt 256"), "{fail}");
    }

    #[test]
    fn a_kernel_finds_it_in_the_last_kib_of_conventional_memory() {
        let memory = Memory::new(&arch::layout::ram(2 << 20)).unwrap();
        place(&machine(4, &[], false), &memory).unwrap();
        let mut kib = [0; 1024];
        memory.ram().read_slice(&mut kib, GuestAddress(639 << 10)).unwrap();
        let found = kib.chunks(16).find(|p| p.starts_with(b"_MP_") && sum(p) == 0).unwrap();
        let at = u32::from_le_bytes([found[4], found[5], found[6], found[7]]);
        let mut head = [0; 4];
        memory.ram().read_slice(&mut head, GuestAddress(at.into())).unwrap();
        assert_eq!(&head, b"PCMP");
        let small = Memory::new(&[(0, 64 << 10)]).unwrap();
        assert!(place(&machine(1, &[], false), &small).is_err());
    }
}
