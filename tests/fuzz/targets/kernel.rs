//! Any bytes at all as a kernel: recognised, checked, unpacked, loaded with a RAM disk. Nothing panics, and nothing is
//! written outside guest memory.
#![no_main]

use std::sync::OnceLock;

use base::memory::Memory;
use boot::acpi::Machine;
use boot::kernel::Kernel;
use boot::smbios::Identity;
use boot::{Loading, Plan, Protocol, place};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((choice, image)) = data.split_first() else { return };
    let Ok(kernel) = Kernel::parse("fuzzed", image) else { return };
    let kernel = if choice & 1 == 0 { kernel } else { kernel.keep_packed() };
    let protocol =
        [Protocol::Auto, Protocol::Linux, Protocol::Pvh, Protocol::Auto][usize::from(choice >> 1 & 3)];
    // One memory for all inputs: it lives as long as the process. A small machine finds the same faults.
    static MEMORY: OnceLock<Memory> = OnceLock::new();
    let memory = MEMORY.get_or_init(|| Memory::new(&[(0, 32 << 20)]).expect("reserve memory"));
    let machine = Machine {
        cpus: 1,
        nodes: &[],
        bridge: None,
        sleep_port: 0x600,
        reset_port: 0x602,
        reset_value: 1,
        ioapic_pins: 24,
        full_irqchip: false,
        rtc: true,
        generation: None,
    };
    let loading = Loading::Copy;
    let (cmdline, identity) = ("console=ttyS0", Identity::default());
    let plan = Plan { kernel: &kernel, initrd: &[], cmdline, protocol, loading, identity, machine };
    let _ = place(&plan, memory);
});
