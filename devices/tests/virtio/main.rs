//! The virtio devices, driven by a played driver, over each transport.

#![allow(clippy::duplicate_mod, reason = "each file is compiled once for each transport")]

mod driver;
mod echo;
mod mmio;
mod pci;

/// The driver over one transport, and what every device and transport does over it.
macro_rules! over {
    ($module:ident, $via:ident) => {
        #[path = "."]
        mod $module {
            mod balloon;
            mod blk;
            mod console;
            mod images;
            mod net;
            mod rng;
            mod shares;
            mod transport;
            mod tuning;
            mod vhost;
            mod vsock;

            mod driver {
                pub use crate::driver::*;
                pub type Rig = Over<$via>;
            }
        }
    };
}

over!(over_mmio, Mmio);
over!(over_pci, Pci);
