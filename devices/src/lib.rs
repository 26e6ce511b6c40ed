//! Devices: each stands in one file below `kinds`, and on one line of the [`catalog`].
//!
//! Devices know no hypervisor: what they need of the machine comes in through [`catalog::Kit`].
#![forbid(unsafe_code)]

pub mod amount;
pub mod catalog;
pub mod escape;
pub mod flag;
pub mod inlet;
pub mod ioapic;
pub mod kinds;
pub mod line_end;
pub mod net;
pub mod outlet;
pub mod pci;
pub mod virtio;
