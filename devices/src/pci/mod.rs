//! PCI: one bus of conventional functions behind a host bridge.
//!
//! ```text
//! root     which function answers a configuration access, by ECAM and by ports 0xcf8 and 0xcfc
//! config   256 bytes with a mask of what can be written: header, base address, capabilities
//! msix     vectors of a function: table, pending bits, masks
//! wire     INTx: the lines that functions without MSI-X share
//! ```
//!
//! Sources: *PCI Local Bus Specification* 3.0, and *PCI Express Base Specification* 3.0 for ECAM (section 7.2.2).

pub mod config;
pub mod msix;
pub mod root;
pub mod wire;

use base::bus::Effect;

pub use root::Root;

/// A function of a device, as configuration accesses reach it: any width, any alignment.
pub trait Function: Send {
    /// Reads `data.len()` bytes of configuration space at `at`, below 256.
    fn read_config(&mut self, at: usize, data: &mut [u8]);
    /// Writes `data` at `at`.
    fn write_config(&mut self, at: usize, data: &[u8]) -> Effect;
}

/// Copies the part of a register that an access covers: `register` lies at `of`, the access begins at `at`.
pub(crate) fn overlay(of: u64, register: &[u8], at: u64, data: &mut [u8]) {
    for (to, place) in data.iter_mut().zip(at..) {
        let byte = place.checked_sub(of).and_then(|n| register.get(usize::try_from(n).ok()?));
        if let Some(byte) = byte {
            *to = *byte;
        }
    }
}
