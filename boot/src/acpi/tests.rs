//! The tables, walked as a guest walks them.

use super::*;

fn nodes() -> Vec<Node> {
    let node = |name: &str, hid, uid, ports: &[_], memory: &[_], irqs: &[_]| Node {
        name: name.into(),
        hid,
        uid,
        ports: ports.to_vec(),
        memory: memory.to_vec(),
        irqs: irqs.to_vec(),
    };
    vec![
        node("COM1", "PNP0501", 0, &[0x3f8..=0x3ff], &[], &[4]),
        node("RTC0", "PNP0B00", 0, &[0x70..=0x71], &[], &[8]),
        node("V000", "LNRO0005", 0, &[], &[(0xd000_0000, 0x1000)], &[5]),
        node("V001", "LNRO0005", 1, &[], &[(0xd000_1000, 0x1000)], &[6]),
    ]
}

fn machine(nodes: &[Node]) -> Machine<'_> {
    Machine {
        cpus: 4,
        nodes,
        bridge: None,
        sleep_port: 0x600,
        reset_port: 0x602,
        reset_value: 1,
        ioapic_pins: 24,
        full_irqchip: false,
        rtc: true,
        generation: None,
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

/// The table at a guest-physical address; its bytes add up to zero.
fn table(bytes: &[u8], address: u64) -> &[u8] {
    let at = usize::try_from(address - ACPI).unwrap();
    let table = &bytes[at..at + word(bytes, at + 4) as usize];
    assert_eq!(
        table.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)),
        0,
        "checksum of {:?}",
        &table[..4]
    );
    table
}

fn pointer(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// DSDT, FADT and MADT, found from the RSDP.
fn walk(bytes: &[u8]) -> [&[u8]; 3] {
    let sum = |bytes: &[u8]| bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    assert_eq!((&bytes[..8], bytes[15]), (b"RSD PTR ".as_slice(), 2));
    assert_eq!((sum(&bytes[..20]), sum(&bytes[..36])), (0, 0), "checksums of the RSDP");
    let xsdt = table(bytes, pointer(bytes, 24));
    assert_eq!(&xsdt[..4], b"XSDT");
    let [fadt, madt] = [36, 44].map(|at| table(bytes, pointer(xsdt, at)));
    assert_eq!((&fadt[..4], &madt[..4]), (b"FACP".as_slice(), b"APIC".as_slice()));
    let dsdt = table(bytes, pointer(fadt, 140));
    assert_eq!(&dsdt[..4], b"DSDT");
    [dsdt, fadt, madt]
}

#[test]
fn a_guest_finds_every_table() {
    let nodes = nodes();
    let bytes = tables(&machine(&nodes)).unwrap();
    let [dsdt, fadt, madt] = walk(&bytes);
    for name in ["COM1", "RTC0", "V000", "V001", "LNRO0005", "_CCA", "_CRS", "_S5_"] {
        assert!(dsdt.windows(name.len()).any(|w| w == name.as_bytes()), "{name}");
    }
    // Offsets of table 5.9 of the specification.
    assert_eq!(word(fadt, 112) >> 20 & 1, 1, "HW_REDUCED_ACPI");
    assert_eq!(word(fadt, 112) >> 10 & 1, 1, "RESET_REG_SUP");
    assert_eq!((fadt[109], fadt[110]), (4, 0), "no VGA; no 8042, so that no keyboard is looked for; a clock");
    let register = |at: usize| (fadt[at], fadt[at + 1], pointer(fadt, at + 4));
    assert_eq!((register(116), fadt[128]), ((1, 8, 0x602), 1), "reset");
    assert_eq!((register(244), register(256)), ((1, 8, 0x600), (1, 8, 0x601)), "sleep control and status");
    assert_eq!((word(madt, 36), word(madt, 40)), (0xfee0_0000, 0), "local APIC, no 8259");
    assert_eq!(madt.len(), 44 + 4 * 8 + 12);
    assert_eq!(&madt[44 + 24..44 + 32], [0, 8, 3, 3, 1, 0, 0, 0], "the fourth processor");
    assert_eq!(&madt[76..88], [1, 12, 0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0], "the I/O APIC");
}

#[test]
fn says_what_is_absent_and_what_is_there() {
    let bytes = tables(&Machine { rtc: false, ..machine(&[]) }).unwrap();
    let [_, fadt, _] = walk(&bytes);
    assert_eq!(fadt[109], 4 | 0x20, "no clock");
    let bytes = tables(&Machine { full_irqchip: true, cpus: 300, ..machine(&[]) }).unwrap();
    let [_, fadt, madt] = walk(&bytes);
    assert_eq!(fadt[109] & 1, 1, "legacy devices");
    assert_eq!(word(madt, 40), 1, "PCAT_COMPAT");
    assert_eq!(madt.len(), 44 + 255 * 8 + 45 * 16 + 12 + 10);
    let x2apic = 44 + 255 * 8;
    assert_eq!((madt[x2apic], word(madt, x2apic + 4), word(madt, x2apic + 12)), (9, 255, 255));
}

fn bridge() -> HostBridge {
    HostBridge {
        ecam: (0xe000_0000, 1 << 20),
        low: (0xc000_0000, 0x1000_0000),
        high: (6 << 30, 1 << 30),
        pins: vec![(1, 5), (2, 6)],
    }
}

#[test]
fn a_guest_finds_the_pci_bus() {
    let bridge = bridge();
    let bytes = tables(&Machine { bridge: Some(&bridge), ..machine(&[]) }).unwrap();
    let xsdt = table(&bytes, pointer(&bytes, 24));
    let mcfg = table(&bytes, pointer(xsdt, 52));
    assert_eq!((&mcfg[..4], mcfg.len()), (b"MCFG".as_slice(), 44 + 16));
    assert_eq!((pointer(mcfg, 44), &mcfg[52..56]), (0xe000_0000, [0, 0, 0, 0].as_slice()), "segment, buses");
    let dsdt = table(&bytes, pointer(table(&bytes, pointer(xsdt, 36)), 140));
    for name in ["PCI0", "_BBN", "_PRT", "ECAM"] {
        assert!(dsdt.windows(4).any(|w| w == name.as_bytes()), "{name}");
    }
    let refused = tables(&Machine { bridge: Some(&bridge), ioapic_pins: 6, ..machine(&[]) }).unwrap_err();
    assert!(refused.summary().ends_with("interrupt 6 of device 2 is none of the 6 there are"), "{refused}");
    let empty = HostBridge { high: (1, 0), ..bridge };
    assert!(tables(&Machine { bridge: Some(&empty), ..machine(&[]) }).is_err());
}

#[test]
fn a_guest_finds_its_generation_id() {
    let id = *b"sixteen bytes id";
    let memory = Memory::new(&arch::layout::ram(2 << 20)).unwrap();
    place(&Machine { generation: Some(id), ..machine(&[]) }, &memory).unwrap();
    let mut bytes = vec![0; usize::try_from(ACPI_LEN).unwrap()];
    memory.ram().read_slice(&mut bytes, GuestAddress(ACPI)).unwrap();
    let [dsdt, ..] = walk(&bytes);
    // NameOp, the name, PackageOp, its length and count, a DWord or what is shorter for each half.
    let name = dsdt.windows(5).position(|w| w == b"\x08ADDR").unwrap();
    let halves = &dsdt[name + 5..name + 14];
    assert_eq!(
        halves[..4],
        [0x12, 8, 2, 0x0c],
        "a package of two integers, the first in a DWord: {halves:x?}"
    );
    let at = word(dsdt, name + 9);
    assert_eq!(dsdt[name + 13], 0, "the upper half");
    let mut found = [0; 16];
    memory.ram().read_slice(&mut found, GuestAddress(at.into())).unwrap();
    assert_eq!((found, at % 8), (id, 0));
    assert!(dsdt.windows(14).any(|w| w == b"VM_Gen_Counter"));
    let without = tables(&machine(&[])).unwrap();
    assert!(!without.windows(4).any(|w| w == b"VGEN"), "only who asks for it has one");
}

#[test]
fn refuses_what_is_no_description() {
    let good = nodes().remove(0);
    let text = |node: Node| tables(&machine(&[node])).unwrap_err().summary();
    assert!(text(Node { name: "com1".into(), ..good.clone() }).contains("four letters"));
    assert!(text(Node { name: "1COM".into(), ..good.clone() }).contains("four letters"));
    assert!(text(Node { irqs: vec![24], ..good.clone() }).contains("interrupt 24"));
    assert!(text(Node { hid: "", ..good.clone() }).contains("hardware ID"));
    assert!(text(Node { ports: vec![0..=0xffff], ..good.clone() }).contains("1 to 255"));
    #[expect(clippy::reversed_empty_ranges)]
    let backwards = vec![2..=1];
    assert!(text(Node { ports: backwards, ..good.clone() }).contains("1 to 255"));
    let many: Vec<Node> = (0..3000).map(|n| Node { name: format!("D{n:03X}"), ..good.clone() }).collect();
    assert!(tables(&machine(&many)).unwrap_err().summary().contains("3000 devices"));
}

/// What ACPICA's disassembler makes of the tables, if it is installed.
#[test]
fn acpica_reads_them() {
    let dir = tempfile::tempdir().unwrap();
    let nodes = nodes();
    let bridge = bridge();
    let generation = Some([7; 16]);
    let bytes = tables(&Machine { bridge: Some(&bridge), generation, ..machine(&nodes) }).unwrap();
    let [dsdt, fadt, madt] = walk(&bytes);
    for (name, table) in [("dsdt", dsdt), ("fadt", fadt), ("madt", madt)] {
        let file = dir.path().join(name);
        std::fs::write(&file, table).unwrap();
        let Ok(output) = std::process::Command::new("iasl").arg("-d").arg(&file).output() else {
            println!("skipped: there is no iasl program");
            return;
        };
        let said =
            String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && !said.contains("Error"), "{name}: {said}");
        let text = std::fs::read_to_string(dir.path().join(format!("{name}.dsl"))).unwrap();
        assert!(!text.contains("Invalid") && !text.contains("Incorrect checksum"), "{name}: {text}");
        if name == "dsdt" {
            for part in [
                "Device (V001)",
                "Device (PCI0)",
                "Name (_CID, EisaId (\"PNP0A03\")",
                "WordBusNumber (ResourceProducer, MinFixed, MaxFixed, PosDecode,",
                "DWordMemory (ResourceProducer, PosDecode, MinFixed, MaxFixed, NonCacheable, ReadWrite,",
                "QWordMemory (ResourceProducer,",
                "Name (_PRT, Package (0x02)",
                "0x0002FFFF,",
                "Name (_HID, EisaId (\"PNP0501\")",
                "Name (_HID, \"LNRO0005\")",
                "Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive, ,, )",
                "Memory32Fixed (ReadWrite,",
                "Name (_S5, Package (0x04)",
                "Device (VGEN)",
                "Name (_CID, \"VM_Gen_Counter\")",
                "Name (ADDR, Package (0x02)",
            ] {
                assert!(text.contains(part), "{part} is not in {text}");
            }
        }
    }
}
