//! Model-specific registers (Intel SDM volume 4): those that firmware would have set, and one that tells of the guest.

use kvm_bindings::kvm_msr_entry;

/// `IA32_LSTAR`: where system calls of 64-bit programs enter the kernel.
pub const LSTAR: u32 = 0xc000_0082;
/// `IA32_MISC_ENABLE`: fast strings.
const MISC_ENABLE: u32 = 0x1a0;
const FAST_STRINGS: u64 = 1;
/// `IA32_MTRR_DEF_TYPE`: MTRRs on, everything write-back, as after a BIOS.
const MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ENABLE: u64 = 1 << 11;
const WRITE_BACK: u64 = 6;

/// What every vCPU has set before its first instruction.
pub fn boot() -> [kvm_msr_entry; 2] {
    let entry = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    [entry(MISC_ENABLE, FAST_STRINGS), entry(MTRR_DEF_TYPE, MTRR_ENABLE | WRITE_BACK)]
}
