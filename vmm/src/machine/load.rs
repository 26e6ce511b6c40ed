//! What stands in RAM before the first instruction, for this plan.

use arch::layout;
use base::host::Host;
use base::memory::Memory;
use base::{Doing, Result, Why, ports};
use boot::initrd::Part;
use boot::kernel::Kernel;
use boot::{Loading, Start, acpi, smbios};
use vm_memory::{Bytes, GuestAddress};

use super::assemble::Assembled;
use super::virtio::choose;
use crate::builtin;
use crate::plan::{Accel, GenerationId, Initrd, Irqchip, KernelMemory, Plan, Protocol, Transport};

/// Hardware ID of a CMOS real-time clock.
const RTC: &str = "PNP0B00";

/// Fills RAM; where the boot processor begins.
///
/// # Errors
/// As `boot::place`, or the host has no random bytes.
pub fn load(
    plan: &Plan,
    kernel: &Kernel,
    made: &Assembled,
    memory: &Memory,
    host: &dyn Host,
) -> Result<Start> {
    let transport = if made.bridge.is_some() { Transport::Pci } else { Transport::Mmio };
    let initrd = parts(plan, kernel, transport)?;
    let cmdline = plan.cmdline.text(made.bridge.is_some(), plan.terminal());
    let start = boot::place(
        &boot::Plan {
            kernel,
            initrd: &initrd,
            cmdline: &cmdline,
            protocol: match plan.protocol {
                Protocol::Auto => boot::Protocol::Auto,
                Protocol::Linux => boot::Protocol::Linux,
                Protocol::Pvh => boot::Protocol::Pvh,
            },
            loading: match (plan.kernel_memory, plan.accel) {
                (KernelMemory::Mapped, _) | (KernelMemory::Auto, Accel::Unchecked) => Loading::Map,
                (KernelMemory::Copied | KernelMemory::Auto, _) => Loading::Copy,
            },
            identity: plan.smbios.identity(),
            machine: acpi::Machine {
                cpus: plan.cpus,
                nodes: &made.nodes,
                bridge: made.bridge.as_ref(),
                sleep_port: ports::SLEEP_CONTROL,
                reset_port: ports::RESET,
                reset_value: ports::RESET_VALUE,
                ioapic_pins: made.pins,
                full_irqchip: plan.irqchip == Irqchip::Full,
                rtc: made.nodes.iter().any(|node| node.hid == RTC),
                generation: plan.generation_id.map(|id| generation(id, host)).transpose()?,
            },
        },
        memory,
    )?;
    let long = matches!(start, Start::Linux64 { .. });
    let write = |bytes: &[u8], at| {
        memory
            .ram()
            .write_slice(bytes, GuestAddress(at))
            .doing(Why::Invalid, || "write the first page tables")
    };
    write(&arch::registers::gdt(long), layout::GDT)?;
    if long {
        write(&arch::paging::identity(), layout::PAGE_TABLES)?;
    }
    Ok(start)
}

/// The bytes of the generation ID. A reset is no new generation: a machine that is started again keeps it.
fn generation(id: GenerationId, host: &dyn Host) -> Result<[u8; 16]> {
    let random = || {
        let mut bytes = [0; 16];
        host.random(&mut bytes).doing(Why::Host, || "make a generation ID")?;
        Ok(bytes)
    };
    match (id, host.keepsakes()) {
        (GenerationId::Given(uuid), _) => Ok(smbios::wire(uuid.bytes())),
        (GenerationId::Random, Some(kept)) => kept.keep("generation ID", random),
        (GenerationId::Random, None) => random(),
    }
}

/// Sees to it that kernel and initrd of the plan can be read, that the kernel has the modules for what it is to do, and
/// that the memory holds them. Reads little.
///
/// # Errors
/// As [`load`] would fail.
pub fn check(plan: &Plan, kernel: &Kernel) -> Result<()> {
    let low = layout::ram(plan.memory.bytes()).first().map_or(0, |(_, len)| *len);
    boot::check_memory(kernel, &parts(plan, kernel, choose(plan.transport, kernel))?, low)
}

fn parts(plan: &Plan, kernel: &Kernel, transport: Transport) -> Result<Vec<Part>> {
    let part = |initrd: &Initrd| {
        Ok(match initrd {
            Initrd::File(path) => Part::File(path.clone()),
            Initrd::Builtin => Part::Bytes(builtin::initrd(plan, kernel, transport)?),
        })
    };
    plan.initrd.iter().map(part).collect()
}
