//! How the firmware tables tell the guest about a device: data only; `boot` turns it into ACPI.

use std::ops::RangeInclusive;

/// A PCI host bridge with its bus 0, as the tables name it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostBridge {
    /// The memory-mapped configuration space: base and length in bytes.
    pub ecam: (u64, u64),
    /// Room for windows of functions below 4 GiB: base and length.
    pub low: (u32, u32),
    /// The same above RAM.
    pub high: (u64, u64),
    /// Where the pin INTA of each device leads: device number and GSI.
    pub pins: Vec<(u8, u32)>,
}

/// A device as the DSDT names it (ACPI 6.5, section 19.6.33 and 6.4).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Four characters, unique below `_SB`: `COM1`, `V000`.
    pub name: String,
    /// Hardware ID: `PNP0501`, `LNRO0005`, `QEMU0001`.
    pub hid: &'static str,
    /// Unique ID among devices with the same hardware ID.
    pub uid: u32,
    /// Port windows.
    pub ports: Vec<RangeInclusive<u16>>,
    /// Memory windows: base and length in bytes.
    pub memory: Vec<(u32, u32)>,
    /// Edge-triggered, active-high interrupts (GSI numbers).
    pub irqs: Vec<u32>,
}
