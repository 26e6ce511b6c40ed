//! The scout: the first vCPU's thread, sent ahead to have KVM do what takes long while the main thread reads the command
//! line and the kernel.

use std::cell::{Cell, OnceCell};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use base::sys::signals;
use base::{Doing, Fail, Result, Why};

use super::control::ENDING;
use crate::hv::kvm::{Blank, Hypervisor};

/// The machine's KVM.
const KVM: &str = "/dev/kvm";

/// Work for the thread.
pub type Job = Box<dyn FnOnce() + Send>;

/// A thread that opens KVM, makes a VM and asks for CPUID first, and runs jobs then.
pub struct Scout {
    jobs: Sender<Job>,
    hypervisor: Answer<Arc<Hypervisor>>,
    /// The VM of the first life, until that takes it.
    vm: Cell<Option<Receiver<Result<Blank>>>>,
}

/// What the thread finds out, once it has; kept for the next who asks.
struct Answer<T> {
    told: Receiver<Result<T>>,
    known: OnceCell<T>,
}

impl<T: Clone> Answer<T> {
    fn get(&self) -> Result<T> {
        if let Some(known) = self.known.get() {
            return Ok(known.clone());
        }
        let told = self.told.recv().unwrap_or_else(|_| Err(lost()))?;
        Ok(self.known.get_or_init(|| told).clone())
    }
}

impl<T> From<Receiver<Result<T>>> for Answer<T> {
    fn from(told: Receiver<Result<T>>) -> Self {
        Answer { told, known: OnceCell::new() }
    }
}

impl Scout {
    /// Sends it ahead.
    ///
    /// # Errors
    /// The host refuses the thread.
    pub fn send() -> Result<Scout> {
        let (jobs, orders) = channel::<Job>();
        let (tell_hypervisor, hypervisor) = channel();
        let (tell_vm, vm) = channel();
        let explore = move || {
            // Control takes these signals; this thread began before it did. The last one is a terminal's, for a device.
            let _ = signals::block(&[&ENDING[..], &[libc::SIGWINCH]].concat());
            let found = Hypervisor::open(Path::new(KVM)).map(Arc::new);
            let known = found.as_ref().ok().cloned();
            // A run that ends before it wants to know hears nothing: that is no failure.
            let _ = tell_hypervisor.send(found);
            if let Some(hypervisor) = known {
                let _ = tell_vm.send(hypervisor.vm());
                // Kept for the first vCPU; what goes wrong is told to that.
                let _ = hypervisor.cpuid();
            }
            orders.into_iter().for_each(|job| job());
        };
        std::thread::Builder::new()
            .name("vcpu0".to_owned())
            .spawn(explore)
            .doing(Why::Host, || "start the thread of vCPU 0")?;
        Ok(Scout { jobs, hypervisor: hypervisor.into(), vm: Cell::new(Some(vm)) })
    }

    /// KVM, once it is open.
    ///
    /// # Errors
    /// As [`Hypervisor::open`]; asked again after that, it has nothing more to say.
    pub fn hypervisor(&self) -> Result<Arc<Hypervisor>> {
        self.hypervisor.get()
    }

    /// An empty VM, once there is one: the first was made ahead.
    ///
    /// # Errors
    /// As [`Hypervisor::vm`], and as above.
    pub fn vm(&self) -> Result<Blank> {
        match self.vm.take() {
            Some(told) => told.recv().unwrap_or_else(|_| Err(lost())),
            None => self.hypervisor()?.vm(),
        }
    }

    /// Has the thread run `job` after those it has.
    pub fn run(&self, job: Job) -> Result<()> {
        self.jobs.send(job).map_err(|_| lost())
    }
}

fn lost() -> Fail {
    Fail::new(Why::Host, "ask KVM").because("the thread of vCPU 0 is gone")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_told_as_often_as_it_is_asked_for() {
        let (tell, told) = channel();
        tell.send(Ok(7)).unwrap();
        drop(tell);
        let answer = Answer::from(told);
        assert_eq!((answer.get().unwrap(), answer.get().unwrap()), (7, 7));
        let (tell, told) = channel::<Result<u32>>();
        tell.send(Err(Fail::new(Why::Denied, "open it"))).unwrap();
        drop(tell);
        let answer = Answer::from(told);
        assert_eq!(answer.get().unwrap_err().why, Why::Denied);
        assert_eq!(answer.get().unwrap_err().summary(), lost().summary());
    }
}
