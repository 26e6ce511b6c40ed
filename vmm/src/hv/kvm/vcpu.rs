//! A vCPU: run it, get it out, and say where it stands.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, Once, PoisonError};

use base::memory::Memory;
use base::{Doing, Fail, Result, Why};
use boot::Start;
use kvm_bindings::{
    KVM_INTERNAL_ERROR_EMULATION, KVM_MP_STATE_HALTED, KVM_MP_STATE_RUNNABLE, Msrs, kvm_msr_entry, kvm_run,
};
use kvm_ioctls::{VcpuExit, VcpuFd};

use crate::hv::{Activity, Exit, Kick, Stand, Vcpu, registers_at};

/// A KVM virtual processor.
pub struct KvmVcpu {
    id: u32,
    fd: VcpuFd,
    kick: Arc<KvmKick>,
    /// Whether kicks know the thread that runs this vCPU.
    settled: bool,
    /// What its guest can reach. Last: it goes after the descriptor.
    _memory: Memory,
}

/// Where to reach a running vCPU. Empty once it is gone.
#[derive(Default)]
struct KvmKick(Mutex<Target>);

#[derive(Default)]
struct Target {
    /// `immediate_exit` in the vCPU's run page.
    flag: Option<FlagPointer>,
    /// The thread that runs it, once it does.
    thread: Option<libc::pthread_t>,
}

struct FlagPointer(*mut u8);

// SAFETY: the pointer is only used under the lock of `KvmKick`, which the vCPU empties before its run page goes.
unsafe impl Send for FlagPointer {}

impl KvmKick {
    /// Sets or clears `immediate_exit`: while it is set, KVM_RUN comes back at once.
    fn flag(target: &Target, value: u8) {
        if let Some(flag) = &target.flag {
            // SAFETY: the run page is mapped while the pointer is here, and KVM reads this byte at any time.
            unsafe { AtomicU8::from_ptr(flag.0) }.store(value, Ordering::SeqCst);
        }
    }

    fn answer(&self) {
        KvmKick::flag(&self.0.lock().unwrap_or_else(PoisonError::into_inner), 0);
    }
}

impl Kick for KvmKick {
    fn kick(&self) {
        let target = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        KvmKick::flag(&target, 1);
        if let Some(thread) = target.thread {
            // SAFETY: the thread is alive: it clears this field, under this lock, before it ends.
            unsafe { libc::pthread_kill(thread, kick_signal()) };
        }
    }
}

fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN()
}

/// Gives the kick signal a handler that does nothing: it is only there to end the system call.
fn handle_kicks() {
    static ONCE: Once = Once::new();
    extern "C" fn nothing(_: libc::c_int) {}
    ONCE.call_once(|| {
        // SAFETY: all-zero is a valid `sigaction`: no flags, so that system calls are not restarted.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as usize;
        // SAFETY: the handler touches nothing, and the pointer is to a valid `sigaction`.
        unsafe { libc::sigaction(kick_signal(), &raw const action, std::ptr::null_mut()) };
    });
}

impl KvmVcpu {
    /// `memory` is what its VM was given: a vCPU's descriptor keeps the VM in the kernel alive.
    pub(super) fn new(
        id: u32,
        mut fd: VcpuFd,
        memory: Memory,
        ring: impl FnOnce(&VcpuFd) -> Result<()>,
    ) -> Result<KvmVcpu> {
        handle_kicks();
        ring(&fd)?;
        let msrs = Msrs::from_entries(&arch::msr::boot())
            .map_err(|cause| Fail::new(Why::Host, "list the MSRs").because(format!("{cause:?}")))?;
        // A host that does not know one of them sets those before it; a guest lives without.
        fd.set_msrs(&msrs).doing(Why::Host, || format!("set the MSRs of vCPU {id}"))?;
        let run: *mut kvm_run = fd.get_kvm_run();
        // SAFETY: the run page is mapped as long as `fd` lives; only the address is taken.
        let flag = unsafe { &raw mut (*run).immediate_exit };
        let kick = Arc::new(KvmKick(Mutex::new(Target { flag: Some(FlagPointer(flag)), thread: None })));
        Ok(KvmVcpu { id, fd, kick, settled: false, _memory: memory })
    }

    /// Tells kicks which thread to signal: the one that calls this.
    fn settle(&mut self) {
        if !self.settled {
            // SAFETY: has no preconditions.
            let me = unsafe { libc::pthread_self() };
            self.kick.0.lock().unwrap_or_else(PoisonError::into_inner).thread = Some(me);
            self.settled = true;
        }
    }
}

/// The host's failure, not the guest's: memory ran out, or a file mapped into the guest was cut short.
fn unbacked(id: u32, at: &str) -> Fail {
    Fail::new(Why::Host, format!("run vCPU {id}")).because(format!("the host cannot back guest memory{at}"))
}

impl Drop for KvmVcpu {
    fn drop(&mut self) {
        *self.kick.0.lock().unwrap_or_else(PoisonError::into_inner) = Target::default();
    }
}

impl Vcpu for KvmVcpu {
    fn start_at(&mut self, start: &Start) -> Result<()> {
        let doing = || format!("set the registers of vCPU {}", self.id);
        let mut sregs = self.fd.get_sregs().doing(Why::Host, doing)?;
        let regs = registers_at(start, &mut sregs);
        self.fd.set_sregs(&sregs).doing(Why::Host, doing)?;
        self.fd.set_regs(&regs).doing(Why::Host, doing)
    }

    fn run(&mut self) -> Result<Exit<'_>> {
        self.settle();
        let id = self.id;
        // What `Exit::PortRead` needs beside the data: one access may be several (`rep insb`).
        let run: *const kvm_run = self.fd.get_kvm_run();
        let width = move || {
            // SAFETY: the exit was KVM_EXIT_IO, so `io` is the member that KVM has filled in.
            usize::from(unsafe { (*run).__bindgen_anon_1.io.size })
        };
        let internal = move || {
            // SAFETY: the exit was KVM_EXIT_INTERNAL_ERROR, so `internal` is the member that KVM has filled in.
            unsafe { (*run).__bindgen_anon_1.internal.suberror }
        };
        match self.fd.run() {
            Ok(VcpuExit::IoIn(port, data)) => Ok(Exit::PortRead { port, width: width(), data }),
            Ok(VcpuExit::IoOut(port, data)) => Ok(Exit::PortWrite { port, width: width(), data }),
            Ok(VcpuExit::MmioRead(address, data)) => Ok(Exit::MemoryRead(address, data)),
            Ok(VcpuExit::MmioWrite(address, data)) => Ok(Exit::MemoryWrite(address, data)),
            Ok(VcpuExit::IoapicEoi(vector)) => Ok(Exit::EndOfInterrupt(vector)),
            Ok(VcpuExit::Shutdown) => Ok(Exit::Shutdown),
            Ok(VcpuExit::Hlt) => Ok(Exit::Halted),
            Ok(VcpuExit::Intr) => Ok(Exit::Interrupted),
            Ok(VcpuExit::InternalError) => Ok(Exit::Stuck(match internal() {
                KVM_INTERNAL_ERROR_EMULATION => "KVM cannot emulate an instruction of the guest".to_owned(),
                other => format!("KVM reports internal error {other}"),
            })),
            Ok(VcpuExit::FailEntry(reason, _)) => {
                Ok(Exit::Stuck(format!("the processor refuses the guest's state (reason {reason:#x})")))
            }
            Ok(VcpuExit::MemoryFault { gpa, .. }) => Err(unbacked(id, &format!(" at {gpa:#x}"))),
            Ok(other) => Ok(Exit::Stuck(format!("KVM reports an unexpected exit: {other:?}"))),
            Err(errno) => match errno.errno() {
                libc::EINTR => {
                    self.kick.answer();
                    Ok(Exit::Interrupted)
                }
                libc::EAGAIN => Ok(Exit::Nothing),
                libc::EFAULT => Err(unbacked(id, "")),
                _ => Err(Fail::new(Why::Host, format!("run vCPU {id}")).because(errno)),
            },
        }
    }

    fn kick(&self) -> Arc<dyn Kick> {
        self.kick.clone()
    }

    fn whereabouts(&self) -> String {
        match (self.fd.get_regs(), self.fd.get_sregs()) {
            (Ok(regs), Ok(sregs)) => format!(
                "vCPU {}: rip={:#x} rsp={:#x} rflags={:#x} cr0={:#x} cr2={:#x} cr3={:#x} cr4={:#x} efer={:#x}",
                self.id,
                regs.rip,
                regs.rsp,
                regs.rflags,
                sregs.cr0,
                sregs.cr2,
                sregs.cr3,
                sregs.cr4,
                sregs.efer
            ),
            _ => format!("vCPU {}: registers not readable", self.id),
        }
    }
    fn stand(&self) -> Result<Stand> {
        let doing = || format!("read the registers of vCPU {}", self.id);
        let mut msrs =
            Msrs::from_entries(&[kvm_msr_entry { index: arch::msr::LSTAR, ..kvm_msr_entry::default() }])
                .map_err(|cause| Fail::new(Why::Host, doing()).because(format!("{cause:?}")))?;
        let read = self.fd.get_msrs(&mut msrs).doing(Why::Host, doing)?;
        let lstar = msrs.as_slice().get(..read).and_then(<[_]>::first).map_or(0, |entry| entry.data);
        let activity = match self.fd.get_mp_state().doing(Why::Host, doing)?.mp_state {
            KVM_MP_STATE_RUNNABLE => Activity::Running,
            KVM_MP_STATE_HALTED => Activity::Halted,
            _ => Activity::Parked,
        };
        let regs = self.fd.get_regs().doing(Why::Host, doing)?;
        let sregs = self.fd.get_sregs().doing(Why::Host, doing)?;
        Ok(Stand { activity, regs, sregs, lstar })
    }
}
