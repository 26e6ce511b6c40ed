//! The ACPI tables: processors, interrupt controller, devices, poweroff and reset (ACPI 6.5, chapter 5).
//!
//! The machine is hardware-reduced (section 4.1): no power management timer, no fixed events, no legacy interrupt
//! controller. A kernel then asks for no timer it does not have, and sleeps and resets through two registers.

mod pci;

use acpi_tables::aml::{
    Device, EISAName, IO, Interrupt, Memory32Fixed, Name, Package, Path, ResourceTemplate, Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use arch::layout::{ACPI, ACPI_LEN, GENERATION_ID, IOAPIC, LAPIC};
use base::memory::Memory;
use base::node::{HostBridge, Node};
use base::ports::SLEEP_TYPE_OFF;
use base::{Doing, Fail, Result, Why};
use vm_memory::{Bytes, GuestAddress};

const OEM: [u8; 6] = *b"MAYFLY";
const OEM_TABLE: [u8; 8] = *b"MAYFLYVM";
const OEM_REVISION: u32 = 1;
/// DSDT revision 2: integers have 64 bits.
const DSDT_REVISION: u8 = 2;
/// The MADT of ACPI 6.5. Its only flag, PCAT_COMPAT, says that there are 8259 controllers.
const MADT_REVISION: u8 = 6;
/// Interrupt source override (section 5.2.12.5): ISA interrupt 0, the PIT, arrives at input 2 of the I/O APIC.
const PIT_AT_INPUT_2: [u8; 10] = [2, 10, 0, 0, 2, 0, 0, 0, 0, 0];
const RSDP_LEN: u64 = 36;
/// A local APIC entry has eight bits for its ID, and 0xff means all.
const FIRST_X2APIC: u32 = 255;

/// IAPC_BOOT_ARCH flags (ACPI 6.5, table 5.11).
const LEGACY_DEVICES: u16 = 1;
const NO_VGA: u16 = 1 << 2;
const NO_CMOS_RTC: u16 = 1 << 5;

/// What the tables describe.
#[derive(Clone, Copy, Debug)]
pub struct Machine<'a> {
    /// Processors; their APIC IDs count from zero.
    pub cpus: u32,
    /// Devices.
    pub nodes: &'a [Node],
    /// The PCI host bridge, if there is one.
    pub bridge: Option<&'a HostBridge>,
    /// Port of the sleep control register; the sleep status register follows it.
    pub sleep_port: u16,
    /// Port of the reset register.
    pub reset_port: u16,
    /// What resets when written there.
    pub reset_value: u8,
    /// Inputs of the I/O APIC; every interrupt of a device is below.
    pub ioapic_pins: u32,
    /// Whether there are 8259 interrupt controllers and a PIT besides.
    pub full_irqchip: bool,
    /// Whether there is a CMOS real-time clock.
    pub rtc: bool,
    /// The VM generation ID, if the guest is to find one.
    pub generation: Option<[u8; 16]>,
}

/// Writes the tables where `arch::layout` has them.
///
/// # Errors
/// As [`tables`], or there is no memory there.
pub fn place(machine: &Machine, memory: &Memory) -> Result<()> {
    let tables = tables(machine)?;
    memory.ram().write_slice(&tables, GuestAddress(ACPI)).doing(Why::Invalid, || "write the ACPI tables")?;
    if let Some(id) = machine.generation {
        let at = GuestAddress(GENERATION_ID);
        memory.ram().write_slice(&id, at).doing(Why::Invalid, || "write the VM generation ID")?;
    }
    Ok(())
}

/// The tables as they lie from `layout::ACPI` on, the RSDP first.
///
/// # Errors
/// A device's description makes no sense, or the devices are too many for the space.
pub fn tables(machine: &Machine) -> Result<Vec<u8>> {
    let mut area = Area { bytes: vec![0; usize::try_from(RSDP_LEN).unwrap_or(0)] };
    let dsdt = area.add(&Raw(dsdt(machine)?));
    let fadt = area.add(&fadt(machine, dsdt));
    let madt = area.add(&madt(machine)?);
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    if let Some(bridge) = machine.bridge {
        xsdt.add_entry(area.add(&pci::mcfg(bridge)));
    }
    let mut rsdp = Vec::new();
    Rsdp::new(OEM, area.add(&xsdt)).to_aml_bytes(&mut rsdp);
    let mut bytes = area.bytes;
    for (target, byte) in bytes.iter_mut().zip(rsdp) {
        *target = byte;
    }
    if bytes.len() as u64 > ACPI_LEN {
        let cause =
            format!("{} devices need {} bytes, and there are {ACPI_LEN}", machine.nodes.len(), bytes.len());
        return Err(Fail::new(Why::Invalid, "write the ACPI tables").because(cause));
    }
    Ok(bytes)
}

/// Tables one after another, each at a multiple of 16 bytes.
struct Area {
    bytes: Vec<u8>,
}

impl Area {
    /// Adds a table; returns its guest-physical address.
    fn add(&mut self, table: &dyn Aml) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(16), 0);
        let address = ACPI + self.bytes.len() as u64;
        table.to_aml_bytes(&mut self.bytes);
        address
    }
}

/// Bytes that are AML already.
struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

fn port(address: u16) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(address))
}

/// Fixed ACPI description table (section 5.2.9).
fn fadt(machine: &Machine, dsdt: u64) -> impl Aml {
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION).dsdt_64(dsdt);
    // Power and sleep buttons are no fixed hardware (the flag says so), and there is no screen.
    for flag in [
        Flags::Wbinvd,
        Flags::PwrButton,
        Flags::SlpButton,
        Flags::ResetRegSup,
        Flags::Headless,
        Flags::HwReducedAcpi,
    ] {
        fadt = fadt.flag(flag);
    }
    // The 8042 stays unmentioned although one of its commands resets: mentioned, Linux would look for a keyboard
    // behind it. A clock that is absent has to be denied, or Linux polls its ports for a second.
    let legacy = if machine.full_irqchip { LEGACY_DEVICES } else { 0 };
    let clock = if machine.rtc { 0 } else { NO_CMOS_RTC };
    fadt.iapc_boot_arch = (NO_VGA | legacy | clock).into();
    fadt.reset_reg = port(machine.reset_port);
    fadt.reset_value = machine.reset_value;
    fadt.sleep_control_reg = port(machine.sleep_port);
    fadt.sleep_status_reg = port(machine.sleep_port.wrapping_add(1));
    fadt.finalize()
}

/// Multiple APIC description table (section 5.2.12).
fn madt(machine: &Machine) -> Result<impl Aml> {
    let low = |address: u64| u32::try_from(address).doing(Why::Host, || "write the ACPI tables");
    let mut madt = Sdt::new(*b"APIC", 36, MADT_REVISION, OEM, OEM_TABLE, OEM_REVISION);
    madt.dword(low(LAPIC)?);
    madt.dword(u32::from(machine.full_irqchip));
    for id in 0..machine.cpus {
        match u8::try_from(id) {
            Ok(short) if id < FIRST_X2APIC => {
                ProcessorLocalApic::new(short, short, EnabledStatus::Enabled).to_aml_bytes(&mut madt);
            }
            _ => LocalX2Apic(id).to_aml_bytes(&mut madt),
        }
    }
    IoApic::new(0, low(IOAPIC)?, 0).to_aml_bytes(&mut madt);
    if machine.full_irqchip {
        madt.vec(&PIT_AT_INPUT_2);
    }
    madt.update_checksum();
    Ok(Raw(madt.as_slice().to_vec()))
}

/// Processor local x2APIC structure (section 5.2.12.12), enabled.
struct LocalX2Apic(u32);

impl Aml for LocalX2Apic {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&[9, 16, 0, 0]);
        sink.dword(self.0);
        sink.dword(1);
        sink.dword(self.0);
    }
}

/// Differentiated system description table (section 5.2.11.1): the devices, and how to turn off.
fn dsdt(machine: &Machine) -> Result<Vec<u8>> {
    let mut devices = Vec::new();
    for node in machine.nodes {
        device(node, machine.ioapic_pins)?.to_aml_bytes(&mut devices);
    }
    if let Some(bridge) = machine.bridge {
        devices.extend(pci::host_bridge(bridge, machine.ioapic_pins)?);
    }
    if machine.generation.is_some() {
        generation_counter()?.to_aml_bytes(&mut devices);
    }
    let mut dsdt = Sdt::new(*b"DSDT", 36, DSDT_REVISION, OEM, OEM_TABLE, OEM_REVISION);
    dsdt.append_slice(&Scope::raw("_SB_".into(), devices));
    let zero = 0u8;
    let s5 = Package::new(vec![&SLEEP_TYPE_OFF, &SLEEP_TYPE_OFF, &zero, &zero]);
    let mut name = Vec::new();
    Name::new("_S5_".into(), &s5).to_aml_bytes(&mut name);
    dsdt.append_slice(&name);
    dsdt.update_checksum();
    Ok(dsdt.as_slice().to_vec())
}

fn device(node: &Node, pins: u32) -> Result<Raw> {
    let fail =
        |cause: String| Fail::new(Why::Host, format!("describe device {:?}", node.name)).because(cause);
    let letters =
        |text: &str| text.bytes().all(|b| b.is_ascii_uppercase() || b.is_ascii_digit() || b == b'_');
    if node.name.len() != 4 || !letters(&node.name) || node.name.starts_with(|c: char| c.is_ascii_digit()) {
        return Err(fail("its name is not four letters of ACPI's".into()));
    }
    if let Some(irq) = node.irqs.iter().find(|irq| **irq >= pins) {
        return Err(fail(format!("its interrupt {irq} is none of the {pins} there are")));
    }
    let mut resources: Vec<Box<dyn Aml>> = Vec::new();
    for ports in &node.ports {
        let len =
            ports.end().checked_sub(*ports.start()).and_then(|last| u8::try_from(last).ok()?.checked_add(1));
        let len = len.ok_or_else(|| fail(format!("its ports {ports:x?} are not 1 to 255")))?;
        resources.push(Box::new(IO::new(*ports.start(), *ports.start(), 1, len)));
    }
    for (base, len) in &node.memory {
        resources.push(Box::new(Memory32Fixed::new(true, *base, *len)));
    }
    for irq in &node.irqs {
        // A consumer of an edge-triggered, active-high interrupt of its own.
        resources.push(Box::new(Interrupt::new(true, true, false, false, *irq)));
    }
    let resources = ResourceTemplate::new(resources.iter().map(AsRef::as_ref).collect());
    let (present, coherent) = (0x0fu8, 1u8);
    let hid = hardware_id(node.hid).ok_or_else(|| fail(format!("its hardware ID {:?} is none", node.hid)))?;
    let mut names = vec![
        Name::new("_HID".into(), hid.as_ref()),
        Name::new("_UID".into(), &node.uid),
        Name::new("_STA".into(), &present),
        Name::new("_CRS".into(), &resources),
    ];
    if node.hid == VIRTIO_MMIO {
        names.push(Name::new("_CCA".into(), &coherent));
    }
    let mut bytes = Vec::new();
    let children = names.iter().map(|name| name as &dyn Aml).collect();
    Device::new(Path::new(&node.name), children).to_aml_bytes(&mut bytes);
    Ok(Raw(bytes))
}

/// The device that says where the generation ID is (Microsoft, "Virtual Machine Generation ID", 2012): guests know it by
/// its compatible ID, and read ADDR, the two halves of the address.
fn generation_counter() -> Result<Raw> {
    let [low, high] = [GENERATION_ID & 0xffff_ffff, GENERATION_ID >> 32]
        .map(|half| u32::try_from(half).doing(Why::Host, || "write the ACPI tables"));
    let (low, high, present) = (low?, high?, 0x0fu8);
    let address = Package::new(vec![&low, &high]);
    let names = [
        Name::new("_HID".into(), &"QEMUVGID"),
        Name::new("_CID".into(), &"VM_Gen_Counter"),
        Name::new("_DDN".into(), &"VM_Gen_Counter"),
        Name::new("_STA".into(), &present),
        Name::new("ADDR".into(), &address),
    ];
    let mut bytes = Vec::new();
    let children = names.iter().map(|name| name as &dyn Aml).collect();
    Device::new("VGEN".into(), children).to_aml_bytes(&mut bytes);
    Ok(Raw(bytes))
}

/// Linux's ID of virtio-mmio devices, which access memory coherently.
pub const VIRTIO_MMIO: &str = "LNRO0005";

/// A hardware ID (section 6.1.5): an EISA ID in its packed form, or a string.
fn hardware_id(id: &'static str) -> Option<Box<dyn Aml>> {
    let plain = !id.is_empty() && id.bytes().all(|b| b.is_ascii_uppercase() || b.is_ascii_digit());
    let eisa = id.len() == 7
        && id.bytes().take(3).all(|b| b.is_ascii_uppercase())
        && id.bytes().skip(3).all(|b| b.is_ascii_hexdigit());
    match (plain, eisa) {
        (true, true) => Some(Box::new(EISAName::new(id))),
        (true, false) => Some(Box::new(id)),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
