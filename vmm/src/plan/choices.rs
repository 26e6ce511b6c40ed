//! Settings of a plan that are one of a few words.

use clap::ValueEnum;
use devices::catalog::Driver;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How the kernel is entered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// The best of those that the kernel offers.
    #[default]
    Auto,
    /// The 64-bit Linux boot protocol.
    Linux,
    /// PVH: 32-bit, through the entry that an ELF note names.
    Pvh,
}

/// How the code of an uncompressed kernel comes into memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum KernelMemory {
    /// Copied, except with the accelerator `unchecked`, where a page fault is not what is dear.
    #[default]
    Auto,
    /// Mapped from the file: starts at once, and machines share the page cache.
    Mapped,
    /// Copied into huge pages: saves the guest up to three page faults for each 4 KiB of code.
    Copied,
}

/// What results of tests are good for that a command, or the guest's kernel, writes as KTAP or TAP.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Ktap {
    /// A command that ends with 0 although tests failed is no success.
    #[default]
    Strict,
    /// They are told of, and the command's own end counts.
    Report,
    /// Nobody looks for them.
    Off,
}

/// Who emulates the interrupt controllers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Irqchip {
    /// KVM has the local APICs, mayfly the I/O APIC; neither PIC nor PIT. Fast to set up and to close.
    #[default]
    Split,
    /// KVM has them all, PIC and PIT too, for guests that need those.
    Full,
}

/// How drivers reach virtio devices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// mmio, except for a kernel whose configuration (in the file beside it) has a driver for pci only.
    #[default]
    Auto,
    /// Registers at fixed addresses that ACPI names: the quickest start.
    Mmio,
    /// Functions on a PCI bus, with MSI-X: what every distribution's kernel and installer finds.
    Pci,
}

impl Transport {
    /// Where Linux has its driver.
    pub fn driver(self) -> Driver {
        match self {
            Transport::Auto | Transport::Mmio => Driver { module: "virtio_mmio", option: "VIRTIO_MMIO" },
            Transport::Pci => Driver { module: "virtio_pci", option: "VIRTIO_PCI" },
        }
    }
}

/// What a reset by the guest does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum OnReset {
    /// It ends the run.
    #[default]
    Exit,
    /// The machine starts again.
    Restart,
}

/// What runs the vCPUs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Accel {
    /// /dev/kvm where it can run Linux, else the emulated host.
    #[default]
    Auto,
    /// /dev/kvm, or an error that says why it cannot.
    Kvm,
    /// The emulated host: QEMU emulates a processor with AMD-V, Linux on it offers KVM. Slower.
    Emulated,
    /// /dev/kvm as it is, unasked what stands behind it: for bare-metal guests on a KVM that emulates ring 0.
    Unchecked,
}

impl Accel {
    /// What it is for a machine that is made here: `auto` is /dev/kvm then, or the run would have gone elsewhere.
    pub fn here(self) -> Accel {
        if self == Accel::Auto { Accel::Kvm } else { self }
    }
}
