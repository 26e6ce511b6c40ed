//! The PCI host bridge in the tables: its device in the DSDT, and where its configuration space is (MCFG).
//!
//! Sources: PCI Firmware Specification 3.2, chapter 4; ACPI 6.5, sections 6.2.13 (`_PRT`) and 6.5.

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Memory32Fixed, Name, Package, ResourceTemplate,
};
use acpi_tables::mcfg::MCFG;
use base::node::HostBridge;
use base::{Doing, Fail, Result, Why};

use super::{OEM, OEM_REVISION, OEM_TABLE, Raw};

/// Ports of the configuration space: not for functions.
const CONFIG_PORTS: (u16, u8) = (0xcf8, 8);
/// In an address of `_PRT`: all functions of the device.
const ALL_FUNCTIONS: u32 = 0xffff;

/// Memory-mapped configuration space base addresses: segment 0, bus 0.
pub(super) fn mcfg(bridge: &HostBridge) -> impl Aml {
    let mut mcfg = MCFG::new(OEM, OEM_TABLE, OEM_REVISION);
    mcfg.add_ecam(bridge.ecam.0, 0, 0, 0);
    mcfg
}

/// The bridge, and the device that claims its configuration space, so that nobody else does.
///
/// # Errors
/// Its windows or interrupts are impossible.
pub(super) fn host_bridge(bridge: &HostBridge, gsis: u32) -> Result<Vec<u8>> {
    let fail = |cause: String| Fail::new(Why::Host, "describe the PCI host bridge").because(cause);
    if let Some((device, gsi)) = bridge.pins.iter().find(|(_, gsi)| *gsi >= gsis) {
        return Err(fail(format!("interrupt {gsi} of device {device} is none of the {gsis} there are")));
    }
    let last = |base: u64, len: u64| {
        len.checked_sub(1)
            .and_then(|last| base.checked_add(last))
            .ok_or_else(|| fail(format!("the window {base:#x}+{len:#x} is none")))
    };
    let narrow = |value: u64| u32::try_from(value).doing(Why::Host, || "describe the PCI host bridge");
    let (low, high, ecam) = (bridge.low, bridge.high, bridge.ecam);
    let low_end = narrow(last(low.0.into(), low.1.into())?)?;
    let high_end = last(high.0, high.1)?;
    let (ports, count) = CONFIG_PORTS;
    let buses = AddressSpace::new_bus_number(0u16, 0);
    let ports = IO::new(ports, ports, 1, count);
    let uncached = AddressSpaceCacheable::NotCacheable;
    let low = AddressSpace::new_memory(uncached, true, low.0, low_end, None);
    let high = AddressSpace::new_memory(AddressSpaceCacheable::NotCacheable, true, high.0, high_end, None);
    let windows = ResourceTemplate::new(vec![&buses, &ports, &low, &high]);
    let routes = routes(bridge);
    let (hid, cid, zero, coherent) = (EISAName::new("PNP0A08"), EISAName::new("PNP0A03"), 0u8, 1u8);
    let names = [
        Name::new("_HID".into(), &hid),
        Name::new("_CID".into(), &cid),
        Name::new("_SEG".into(), &zero),
        Name::new("_BBN".into(), &zero),
        Name::new("_UID".into(), &zero),
        Name::new("_CCA".into(), &coherent),
        Name::new("_CRS".into(), &windows),
        Name::new("_PRT".into(), &routes),
    ];
    let mut bytes = Vec::new();
    let children = names.iter().map(|name| name as &dyn Aml).collect();
    Device::new("PCI0".into(), children).to_aml_bytes(&mut bytes);

    let claimed = Memory32Fixed::new(true, narrow(ecam.0)?, narrow(ecam.1)?);
    let claimed = ResourceTemplate::new(vec![&claimed]);
    let hid = EISAName::new("PNP0C02");
    let names = [Name::new("_HID".into(), &hid), Name::new("_CRS".into(), &claimed)];
    let children = names.iter().map(|name| name as &dyn Aml).collect();
    Device::new("ECAM".into(), children).to_aml_bytes(&mut bytes);
    Ok(bytes)
}

/// `_PRT`: each entry is an address, a pin (0 is INTA), no link device, and the GSI.
fn routes(bridge: &HostBridge) -> Raw {
    let numbers: Vec<[u32; 4]> = bridge
        .pins
        .iter()
        .map(|(device, gsi)| [u32::from(*device) << 16 | ALL_FUNCTIONS, 0, 0, *gsi])
        .collect();
    let entries: Vec<Package> =
        numbers.iter().map(|entry| Package::new(entry.iter().map(|n| n as &dyn Aml).collect())).collect();
    let mut bytes = Vec::new();
    Package::new(entries.iter().map(|entry| entry as &dyn Aml).collect()).to_aml_bytes(&mut bytes);
    Raw(bytes)
}
