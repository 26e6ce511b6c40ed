//! What CPUID tells a guest: what the host's KVM supports, with this machine's topology.
//!
//! Leaves are those of the Intel SDM volume 2A (CPUID) and the AMD APM volume 3 (appendix E); the paravirtual ones
//! are in the kernel's `Documentation/virt/kvm/x86/cpuid.rst`.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// Leaf 1 ECX: the local APIC has the deadline timer, so that a guest need not calibrate the counting one (with a
/// PIT that is not there).
const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1 ECX: x2APIC.
const X2APIC: u32 = 1 << 21;
/// Leaf 1 ECX: there is a hypervisor, so leaves 0x4000_0000 and on mean something.
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1 EDX: more than one logical processor in the package.
const HTT: u32 = 1 << 28;

/// Levels of the extended topology leaf.
const SMT_LEVEL: u32 = 1 << 8;
const CORE_LEVEL: u32 = 2 << 8;

/// Makes the CPUID of vCPU `id` out of `count`, one package of single-threaded cores, from what KVM supports.
///
/// # Errors
/// The list has more entries than KVM takes.
pub fn tailor(supported: &CpuId, id: u32, count: u32) -> Result<CpuId, vmm_sys_util::fam::Error> {
    let package_bits = u32::BITS - count.saturating_sub(1).leading_zeros();
    let mut entries: Vec<kvm_cpuid_entry2> =
        supported.as_slice().iter().filter(|entry| !matches!(entry.function, 0xb | 0x1f)).copied().collect();
    for entry in &mut entries {
        describe(entry, id, count, package_bits);
    }
    let highest = entries.iter().find(|entry| entry.function == 0).map_or(0, |entry| entry.eax);
    for leaf in [0xb, 0x1f] {
        if leaf <= highest {
            entries.extend(topology(leaf, id, count, package_bits));
        }
    }
    CpuId::from_entries(&entries)
}

fn describe(entry: &mut kvm_cpuid_entry2, id: u32, count: u32, package_bits: u32) {
    match entry.function {
        0x1 => {
            entry.ebx = (entry.ebx & 0xffff) | (id & 0xff) << 24 | (1u32 << package_bits).min(0xff) << 16;
            entry.ecx |= TSC_DEADLINE | X2APIC | HYPERVISOR;
            entry.edx = if count > 1 { entry.edx | HTT } else { entry.edx & !HTT };
        }
        // Caches: the last level is shared by the package, the others belong to one core. Intel counts the cores
        // of the package here too.
        0x4 | 0x8000_001d if entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 0x7;
            let sharing = if level >= 3 { (1u32 << package_bits) - 1 } else { 0 };
            entry.eax = (entry.eax & 0x3fff) | (sharing & 0xfff) << 14;
            if entry.function == 0x4 {
                entry.eax |= ((1u32 << package_bits) - 1).min(0x3f) << 26;
            }
        }
        0x8000_0008 => entry.ecx = (entry.ecx & !0xf0ff) | package_bits << 12 | (count - 1) & 0xff,
        0x8000_001e => {
            entry.eax = id;
            entry.ebx = id & 0xff;
            entry.ecx = 0;
        }
        _ => {}
    }
}

/// The extended topology: thread level, core level, end.
fn topology(function: u32, id: u32, count: u32, package_bits: u32) -> [kvm_cpuid_entry2; 3] {
    let level = |index, eax, ebx, kind: u32| kvm_cpuid_entry2 {
        function,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax,
        ebx,
        ecx: kind | index,
        edx: id,
        ..Default::default()
    };
    [level(0, 0, 1, SMT_LEVEL), level(1, package_bits, count, CORE_LEVEL), level(2, 0, 0, 0)]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, eax: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, eax, ..Default::default() }
    }

    fn get(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        *cpuid.as_slice().iter().find(|e| e.function == function && e.index == index).unwrap()
    }

    #[test]
    fn each_vcpu_knows_its_place() {
        let host = [
            leaf(0, 0x1f),
            leaf(1, 0),
            leaf(4, 0x163),
            leaf(0xb, 7),
            leaf(0x8000_0008, 0),
            leaf(0x8000_001e, 9),
        ];
        let supported = CpuId::from_entries(&host).unwrap();
        let cpuid = tailor(&supported, 3, 6).unwrap();
        assert_eq!(get(&cpuid, 1, 0).ebx >> 24, 3);
        assert_eq!(get(&cpuid, 1, 0).ebx >> 16 & 0xff, 8, "logical ids are counted in powers of two");
        assert_ne!(get(&cpuid, 1, 0).edx & HTT, 0);
        assert_eq!(get(&cpuid, 4, 0).eax >> 14 & 0xfff, 7, "the third level is shared by all");
        assert_eq!(get(&cpuid, 0xb, 1).ebx, 6);
        assert_eq!(get(&cpuid, 0xb, 1).eax, 3);
        assert_eq!(get(&cpuid, 0x1f, 0).edx, 3);
        assert_eq!(get(&cpuid, 0x8000_0008, 0).ecx, 3 << 12 | 5);
        assert_eq!(get(&cpuid, 0x8000_001e, 0).eax, 3);
        let single = tailor(&supported, 0, 1).unwrap();
        assert_eq!(get(&single, 1, 0).edx & HTT, 0);
        assert_eq!(get(&single, 0xb, 1).eax, 0);
    }
}
