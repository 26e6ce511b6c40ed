//! What stands in guest memory before the first instruction.
//!
//! A [`Plan`] names it - kernel, initrd, command line, machine - and [`place`] puts it there: the kernel where it
//! wants to be, the initrd above it, ACPI and SMBIOS tables (and for a kernel without ACPI an MP table) in the firmware area, and the page that tells the kernel of them all.
//! Nothing here knows a hypervisor: it needs guest memory only, and can run while others set up the rest.
#![forbid(unsafe_code)]

pub mod acpi;
pub mod cmdline;
pub mod cpio;
mod discovery;
pub mod initrd;
pub mod inspect;
pub mod kernel;
mod linux;
mod map;
pub mod mptable;
mod pvh;
pub mod smbios;

use std::borrow::Cow;

use arch::layout::{CMDLINE, PVH_INFO, ZERO_PAGE};
use base::memory::Memory;
use base::{Doing, Fail, Result, Why};
use vm_memory::{Bytes, GuestAddress};

use self::discovery::Discovery;
use self::initrd::Part;
use self::kernel::Kernel;
use self::map::Map;

/// How the kernel is entered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Protocol {
    /// The 64-bit Linux protocol, or PVH for a kernel that is not Linux and has a PVH entry.
    ///
    /// An ELF file that is neither, such as a small guest of a test, is entered at its ELF entry as Linux would be: in
    /// long mode, with 4 GiB mapped to themselves.
    #[default]
    Auto,
    /// The 64-bit Linux protocol.
    Linux,
    /// PVH.
    Pvh,
}

/// How the code of an uncompressed kernel comes into memory. The rest of the file is mapped, and so is all of it where
/// the code does not fill a huge page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Loading {
    /// Mapped: at once, and shared with other machines until the guest changes it.
    #[default]
    Map,
    /// Copied into huge pages. A kernel patches itself on almost every page of its code when it starts, and each of
    /// them would be faulted in twice or three times.
    Copy,
}

/// What to put into memory.
#[derive(Clone, Copy, Debug)]
pub struct Plan<'a> {
    /// The kernel.
    pub kernel: &'a Kernel,
    /// The parts of the initrd, in order; none for no initrd.
    pub initrd: &'a [Part],
    /// The whole command line.
    pub cmdline: &'a str,
    /// How to enter the kernel.
    pub protocol: Protocol,
    /// How the kernel's code comes into memory.
    pub loading: Loading,
    /// Who made the machine, as SMBIOS says.
    pub identity: smbios::Identity<'a>,
    /// What the ACPI tables describe, or the MP table for a kernel without ACPI.
    pub machine: acpi::Machine<'a>,
}

/// Where the boot processor begins; `arch::registers` has its state for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// In long mode.
    Linux64 {
        /// Guest-physical address of the first instruction.
        entry: u64,
        /// Guest-physical address of the zero page.
        zero_page: u64,
    },
    /// In 32-bit protected mode without paging.
    Pvh {
        /// Guest-physical address of the first instruction.
        entry: u64,
        /// Guest-physical address of the start info.
        start_info: u64,
    },
}

/// Puts everything in the plan into `memory`, which has never been written.
///
/// Page tables and descriptor table are the caller's (`arch::paging`, `arch::registers`): they are the same for every
/// plan.
///
/// # Errors
/// A file cannot be read or is not what it should be, the command line is not one, or the memory is too small; the
/// failure names which.
pub fn place(plan: &Plan, memory: &Memory) -> Result<Start> {
    let map = Map::new(memory).reserving(plan.machine.bridge.map(|bridge| bridge.ecam));
    check_tight(plan, map.low_end())?;
    let kernel = plan.kernel.load(plan.protocol, plan.loading, memory, &map)?;
    let configured = || kernel.acpi.or_else(|| discovery::has_acpi(&inspect::config_in_tree(plan.kernel)?));
    let cmdline = match discovery::choose(plan.cmdline, configured) {
        Discovery::Acpi => Cow::Borrowed(plan.cmdline),
        Discovery::Words => {
            mptable::place(&plan.machine, memory)?;
            Cow::Owned(discovery::announce(plan.cmdline, plan.machine.nodes))
        }
    };
    cmdline::check(&cmdline, linux::cmdline_limit(&kernel.header))?;
    let ceiling = u64::from(kernel.header.initrd_addr_max);
    let initrd = initrd::place(plan.initrd, memory, &map, kernel.end, ceiling)?;
    // The terminating zero is there: this memory has never been written.
    memory
        .ram()
        .write_slice(cmdline.as_bytes(), GuestAddress(CMDLINE))
        .doing(Why::Invalid, || "write the kernel command line")?;
    // A kernel without ACPI does not look at them.
    acpi::place(&plan.machine, memory)?;
    smbios::place(&plan.identity, memory)?;
    let by_pvh = plan.protocol == Protocol::Pvh || (plan.protocol == Protocol::Auto && kernel.only_pvh);
    if let (true, Some(entry)) = (by_pvh, kernel.pvh) {
        pvh::place(initrd, memory, &map)?;
        return Ok(Start::Pvh { entry, start_info: PVH_INFO });
    }
    linux::place(kernel.header, initrd, memory, &map)?;
    Ok(Start::Linux64 { entry: kernel.linux, zero_page: ZERO_PAGE })
}

/// Memory that Linux needs beside its own and that of its initrd to come to user space, and to have room there.
pub(crate) const WORKSPACE: u64 = 96 << 20;
/// How much larger an initrd gets when it is unpacked; it stays in memory meanwhile.
const UNPACKED: u64 = 3;
/// The step in which memory is recommended.
const STEP: u64 = 32 << 20;
/// A machine with this much more than its kernel takes is looked at no closer.
const AMPLE: u64 = 256 << 20;

/// Sees to it that kernel and initrd fit into `low` bytes of RAM below the hole for devices, as far as their headers and
/// sizes tell; says how much would be enough to boot.
///
/// # Errors
/// They do not fit, or a part of the initrd cannot be read.
pub fn check_memory(kernel: &Kernel, initrd: &[Part], low: u64) -> Result<()> {
    let parts = initrd::size(initrd)?;
    let needed = kernel.end()?.saturating_add(parts);
    if needed <= low {
        return Ok(());
    }
    let enough = if kernel.is_linux() {
        let unpacked = parts.saturating_mul(UNPACKED);
        let all = needed.saturating_add(unpacked).saturating_add(WORKSPACE);
        all.checked_next_multiple_of(STEP).unwrap_or(all)
    } else {
        needed
    };
    let fail = match parts {
        0 => Fail::new(Why::Invalid, format!("load kernel {}", kernel.name())),
        _ => Fail::new(Why::Invalid, format!("load kernel {} and its initrd", kernel.name())),
    };
    Err(map::too_small(fail, low, needed, enough))
}

/// The same where memory is scarce: a machine with plenty does not wait for it.
fn check_tight(plan: &Plan, low: u64) -> Result<()> {
    match plan.kernel.end()?.saturating_add(AMPLE) {
        plenty if plenty <= low => Ok(()),
        _ => check_memory(plan.kernel, plan.initrd, low),
    }
}

#[cfg(test)]
mod tests;
