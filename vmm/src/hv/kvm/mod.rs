//! KVM behind the hypervisor port. One of the three rooms with `unsafe`.
#![allow(unsafe_code)]

mod ring;
mod vcpu;
mod vm;

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use base::{Doing, Fail, Result, Why};
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Cap, Kvm, VmFd};

pub use vm::KvmVm;

use crate::plan::Irqchip;

/// The API version that KVM has had since Linux 2.6.22.
const API_VERSION: i32 = 12;

/// Capabilities without which no machine is made, and what each is for.
pub const REQUIRED: &[(Cap, &str, &str)] = &[
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY", "guest memory"),
    (Cap::SplitIrqchip, "KVM_CAP_SPLIT_IRQCHIP", "interrupts (needs Linux 4.4)"),
    (Cap::SignalMsi, "KVM_CAP_SIGNAL_MSI", "interrupts"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD", "virtio doorbells"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID", "CPUID"),
    (Cap::TscDeadlineTimer, "KVM_CAP_TSC_DEADLINE_TIMER", "the guest's timer"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT", "stopping a vCPU (needs Linux 4.13)"),
];

/// The host's KVM.
pub struct Hypervisor {
    kvm: Kvm,
    /// What CPUID can tell a guest here, once somebody has asked.
    cpuid: Mutex<Option<CpuId>>,
}

/// A VM that has neither interrupt controllers nor memory yet.
pub struct Blank {
    hypervisor: Arc<Hypervisor>,
    fd: VmFd,
}

impl Blank {
    /// Gives it its interrupt controllers.
    ///
    /// # Errors
    /// As KVM answers.
    pub fn with(self, irqchip: Irqchip) -> Result<KvmVm> {
        KvmVm::new(self, irqchip)
    }
}

impl Hypervisor {
    /// Opens the KVM device at `path` (`/dev/kvm`) and asks for its version.
    ///
    /// # Errors
    /// Three distinct ones: it is missing, it may not be opened, it is not a KVM this program knows.
    pub fn open(path: &Path) -> Result<Hypervisor> {
        let name = path.display();
        let c_path = std::ffi::CString::new(path.as_os_str().as_encoded_bytes())
            .doing(Why::Usage, || format!("open {name}"))?;
        let kvm = Kvm::new_with_path(c_path).map_err(|errno| {
            let cause = std::io::Error::from(errno);
            match cause.kind() {
                std::io::ErrorKind::NotFound => Fail::new(Why::Unsupported, format!("open {name}"))
                    .because("no such device: this host offers no KVM")
                    .hint("load kvm_intel or kvm_amd, enable virtualization in the firmware, or pass --accel emulated"),
                std::io::ErrorKind::PermissionDenied => Fail::new(Why::Denied, format!("open {name}"))
                    .because(cause)
                    .hint("sudo setfacl -m u:$USER:rw /dev/kvm; or, if its group is kvm, sudo usermod -aG kvm $USER and log in again; or pass --accel emulated"),
                _ => Fail::new(Why::Unsupported, format!("open {name}")).because(cause),
            }
        })?;
        let version = kvm.get_api_version();
        if version != API_VERSION {
            return Err(Fail::new(Why::Unsupported, format!("use {name}"))
                .because(format!("it speaks API version {version}, not {API_VERSION}"))
                .hint("is it really KVM? ls -l /dev/kvm should show major 10, minor 232"));
        }
        Ok(Hypervisor { kvm, cpuid: Mutex::default() })
    }

    /// The required capabilities this KVM lacks: name and purpose.
    pub fn lacks(&self) -> Vec<(&'static str, &'static str)> {
        REQUIRED
            .iter()
            .filter(|(cap, ..)| !self.kvm.check_extension(*cap))
            .map(|(_, name, purpose)| (*name, *purpose))
            .collect()
    }

    /// What CPUID can tell a guest here. Dear (0.6 ms where CPUID itself traps), so KVM is asked once.
    ///
    /// # Errors
    /// As KVM answers.
    pub fn cpuid(&self) -> Result<CpuId> {
        let mut known = self.cpuid.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(cpuid) = known.as_ref() {
            return Ok(cpuid.clone());
        }
        let doing = || "ask KVM for its CPUID";
        let told = self.kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).doing(Why::Host, doing)?;
        // Kept in the room that it takes, a third of what KVM was offered.
        let cpuid = CpuId::from_entries(told.as_slice())
            .map_err(|cause| Fail::new(Why::Host, doing()).because(format!("{cause:?}")))?;
        Ok(known.insert(cpuid).clone())
    }

    /// Makes an empty VM.
    ///
    /// # Errors
    /// As KVM answers.
    pub fn vm(self: &Arc<Self>) -> Result<Blank> {
        let fd = self.kvm.create_vm().doing(Why::Host, || "create a VM")?;
        Ok(Blank { hypervisor: self.clone(), fd })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hv::Vm;
    use base::memory::Memory;

    /// A guest whose memory had gone would write to whatever this process maps there next.
    #[test]
    fn memory_stays_as_long_as_a_guest_can_reach_it() {
        let hypervisor = match Hypervisor::open(Path::new("/dev/kvm")) {
            Ok(hypervisor) => Arc::new(hypervisor),
            Err(cause) => return eprintln!("skipped: {cause}"),
        };
        let vm = hypervisor.vm().unwrap().with(Irqchip::Split).unwrap();
        assert!(vm.vcpu(0, 1).is_err(), "a vCPU keeps the memory, so it has to be there");
        let memory = Memory::new(&[(0, 1 << 20)]).unwrap();
        let at = format!("{:x}-", memory.pieces().next().unwrap().host);
        let mapped =
            || std::fs::read_to_string("/proc/self/maps").unwrap().lines().any(|line| line.starts_with(&at));
        vm.map(&memory).unwrap();
        assert!(vm.map(&memory).is_err(), "given twice");
        drop(memory);
        assert!(mapped(), "the VM keeps it");
        let vcpu = vm.vcpu(0, 1).unwrap();
        drop(vm);
        assert!(mapped(), "so does a vCPU");
        drop(vcpu);
        assert!(!mapped(), "the last one gives it back");
    }
}
