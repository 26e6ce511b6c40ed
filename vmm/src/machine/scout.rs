//! The scout: the first vCPU's thread, sent ahead to ask KVM what takes long while the main thread reads the command
//! line and the kernel.

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use base::sys::signals;
use base::{Doing, Fail, Result, Why};
use kvm_bindings::CpuId;

use super::control::ENDING;
use crate::hv::kvm::Hypervisor;

/// The machine's KVM.
const KVM: &str = "/dev/kvm";

/// Work for the thread.
pub type Job = Box<dyn FnOnce() + Send>;

/// A thread that asks KVM first and runs jobs then.
pub struct Scout {
    jobs: Sender<Job>,
    hypervisor: Receiver<Result<Arc<Hypervisor>>>,
    cpuid: Receiver<Result<CpuId>>,
}

impl Scout {
    /// Sends it ahead.
    ///
    /// # Errors
    /// The host refuses the thread.
    pub fn send() -> Result<Scout> {
        let (jobs, orders) = channel::<Job>();
        let (tell_hypervisor, hypervisor) = channel();
        let (tell_cpuid, cpuid) = channel();
        let explore = move || {
            // Control takes these signals; this thread began before it did.
            let _ = signals::block(&ENDING);
            let found = Hypervisor::open(Path::new(KVM)).map(Arc::new);
            let known = found.as_ref().ok().cloned();
            // A run that ends before it wants to know hears nothing: that is no failure.
            let _ = tell_hypervisor.send(found);
            let _ = known.map(|hypervisor| tell_cpuid.send(hypervisor.cpuid()));
            orders.into_iter().for_each(|job| job());
        };
        std::thread::Builder::new()
            .name("vcpu0".to_owned())
            .spawn(explore)
            .doing(Why::Host, || "start the thread of vCPU 0")?;
        Ok(Scout { jobs, hypervisor, cpuid })
    }

    /// KVM, once it is open. To be asked once.
    ///
    /// # Errors
    /// As [`Hypervisor::open`].
    pub fn hypervisor(&self) -> Result<Arc<Hypervisor>> {
        self.hypervisor.recv().unwrap_or_else(|_| Err(lost()))
    }

    /// What CPUID can tell a guest here, once KVM has said so. To be asked once.
    ///
    /// # Errors
    /// As [`Hypervisor::cpuid`].
    pub fn cpuid(&self) -> Result<CpuId> {
        self.cpuid.recv().unwrap_or_else(|_| Err(lost()))
    }

    /// Has the thread run `job` after those it has.
    pub fn run(&self, job: Job) -> Result<()> {
        self.jobs.send(job).map_err(|_| lost())
    }
}

fn lost() -> Fail {
    Fail::new(Why::Host, "ask KVM").because("the thread of vCPU 0 is gone")
}
