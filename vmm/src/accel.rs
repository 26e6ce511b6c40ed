//! What stands behind `/dev/kvm`: a processor that runs guest kernels, or an emulator of some of their instructions.

use std::arch::x86_64::{__cpuid, __cpuid_count};
use std::sync::Arc;

use arch::layout::{GDT, PAGE_TABLES};
use base::memory::Memory;
use base::{Doing, Result, Why};
use boot::Start;
use vm_memory::{Bytes, GuestAddress};

use crate::hv::kvm::Hypervisor;
use crate::hv::{Exit, Vcpu, Vm};
use crate::plan::Irqchip;

/// How guest kernel code (ring 0) runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ring0 {
    /// On the processor.
    Hardware,
    /// KVM emulates it instruction by instruction, and only some instructions: it cannot boot Linux. The text says
    /// what was seen.
    Emulated(String),
}

/// Whether the processor itself shows hardware virtualization: VT-x in leaf 1, AMD-V in leaf 0x8000_0001.
fn shows_hardware() -> bool {
    let vmx = __cpuid_count(1, 0).ecx >> 5 & 1 == 1;
    let extended = __cpuid(0x8000_0000).eax >= 0x8000_0001;
    let svm = extended && __cpuid(0x8000_0001).ecx >> 2 & 1 == 1;
    vmx || svm
}

/// A guest of three instructions: one that no partial emulator bothers with, then a port that says it was run.
///
/// ```text
/// popcnt eax, eax
/// out 0xf4, al
/// hlt
/// ```
const PROBE: [u8; 7] = [0xf3, 0x0f, 0xb8, 0xc0, 0xe6, 0xf4, 0xf4];
const PROBE_AT: u64 = 0x1000;

/// Finds out how ring 0 runs here. Asks the processor first, which is free; where that shows no virtualization, a
/// micro guest tells in about a millisecond.
///
/// # Errors
/// As KVM answers.
pub fn ring0(hypervisor: &Arc<Hypervisor>) -> Result<Ring0> {
    if shows_hardware() { Ok(Ring0::Hardware) } else { probe(hypervisor) }
}

/// Runs the micro guest.
///
/// # Errors
/// As KVM answers.
pub fn probe(hypervisor: &Arc<Hypervisor>) -> Result<Ring0> {
    let doing = || "prepare the micro guest";
    let memory = Memory::new(&arch::layout::ram(1 << 20)).doing(Why::Host, doing)?;
    let ram = memory.ram();
    ram.write_slice(&PROBE, GuestAddress(PROBE_AT)).doing(Why::Host, doing)?;
    ram.write_slice(&arch::paging::identity(), GuestAddress(PAGE_TABLES)).doing(Why::Host, doing)?;
    ram.write_slice(&arch::registers::gdt(true), GuestAddress(GDT)).doing(Why::Host, doing)?;
    let vm = Arc::new(hypervisor.vm()?.with(Irqchip::Split)?);
    vm.map(&memory)?;
    let mut vcpu = vm.vcpu(0, 1)?;
    vcpu.start_at(&Start::Linux64 { entry: PROBE_AT, zero_page: 0 })?;
    judge(vcpu.as_mut())
}

fn judge(vcpu: &mut dyn Vcpu) -> Result<Ring0> {
    loop {
        match vcpu.run()? {
            Exit::PortWrite { port: 0xf4, .. } => return Ok(Ring0::Hardware),
            Exit::Interrupted | Exit::Nothing => {}
            Exit::Stuck(why) => return Ok(Ring0::Emulated(why)),
            other => return Ok(Ring0::Emulated(format!("a popcnt instruction ended in {other:?}"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hv::fake::{FakeVm, Step};

    #[test]
    fn judges_by_the_first_real_exit() {
        for (step, hardware) in [
            (Step::Out(0xf4, vec![0]), true),
            (Step::Stuck("KVM cannot emulate an instruction of the guest"), false),
            (Step::TripleFault, false),
        ] {
            let ring0 = judge(&mut FakeVm::new([vec![step.clone()]]).player(0)).unwrap();
            assert_eq!(ring0 == Ring0::Hardware, hardware, "{step:?}");
        }
    }
}
