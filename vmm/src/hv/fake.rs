//! A hypervisor that plays a script: run loop, control and assembly are tested on it, without KVM.

use std::os::fd::BorrowedFd;
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use base::irq::{Messages, Msi};
use base::memory::{Memory, Piece};
use base::{Fail, Result, Why};
use boot::Start;
use devices::catalog::Space;

use super::{Exit, Kick, Stand, Vcpu, Vm};

/// One thing a scripted vCPU does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Writes a port, one access of this width.
    Out(u16, Vec<u8>),
    /// Reads a port; the answer is kept in [`FakeVm::answers`].
    In(u16, usize),
    /// Writes device memory.
    Store(u64, Vec<u8>),
    /// Reads device memory; the answer is kept.
    Load(u64, usize),
    /// A write that the hypervisor hands over late.
    Late(u16, u8),
    /// Stays in the guest until it is kicked.
    Spin,
    /// Ends a level-triggered interrupt.
    Eoi(u8),
    /// A triple fault.
    TripleFault,
    /// The hypervisor gives up.
    Stuck(&'static str),
}

/// A scripted machine. A vCPU whose script has ended spins.
#[derive(Default)]
pub struct FakeVm {
    scripts: Mutex<Vec<Vec<Step>>>,
    late: Mutex<Vec<(u16, u8)>>,
    /// What reads were answered with, in order.
    pub answers: Mutex<Vec<Vec<u8>>>,
    /// RAM given to the guest.
    pub pieces: Mutex<Vec<Piece>>,
    /// Interrupts sent.
    pub sent: Mutex<Vec<Msi>>,
    /// Doorbells wired now: address and value.
    pub doorbells: Mutex<Vec<(u64, Option<u32>)>>,
    /// Registers whose writes were delayed (`true`) or heard again (`false`), in order.
    pub delays: Mutex<Vec<(u64, bool)>>,
    /// Where the boot processor was put.
    pub started: Mutex<Option<Start>>,
    /// Where vCPU n stands, whenever it is asked; those beyond stand nowhere in particular.
    pub stands: Mutex<Vec<Stand>>,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl FakeVm {
    /// A machine whose vCPU n plays script n.
    pub fn new(scripts: impl IntoIterator<Item = Vec<Step>>) -> Arc<FakeVm> {
        Arc::new(FakeVm { scripts: Mutex::new(scripts.into_iter().collect()), ..Default::default() })
    }

    /// A vCPU that keeps its machine, to see what it did.
    pub fn player(self: &Arc<Self>, id: u32) -> FakeVcpu {
        let scripts = lock(&self.scripts);
        let script = usize::try_from(id).ok().and_then(|id| scripts.get(id).cloned()).unwrap_or_default();
        FakeVcpu {
            id,
            vm: self.clone(),
            steps: script.into_iter(),
            data: Vec::new(),
            asked: false,
            kick: Arc::default(),
        }
    }
}

/// The fake as the port sees it: a shared machine.
pub struct Fake(pub Arc<FakeVm>);

impl Vm for Fake {
    fn map(&self, memory: &Memory) -> Result<()> {
        lock(&self.0.pieces).extend(memory.pieces());
        Ok(())
    }
    fn vcpu(&self, id: u32, _: u32) -> Result<Box<dyn Vcpu>> {
        Ok(Box::new(self.0.player(id)))
    }
    fn messages(self: Arc<Self>) -> Arc<dyn Messages> {
        self
    }
    fn lost_interrupts(&self) -> u64 {
        0
    }
    fn set_line(&self, _: u32, _: bool) {}
    fn ring_on_write(&self, address: u64, value: Option<u32>, _: BorrowedFd<'_>) -> Result<()> {
        let mut wired = lock(&self.0.doorbells);
        if wired.contains(&(address, value)) {
            return Err(Fail::new(Why::Host, "wire a doorbell").because("there is one"));
        }
        wired.push((address, value));
        Ok(())
    }
    fn stop_ringing(&self, address: u64, value: Option<u32>, _: BorrowedFd<'_>) -> Result<()> {
        lock(&self.0.doorbells).retain(|wired| *wired != (address, value));
        Ok(())
    }
    fn delay_writes(&self, _: Space, address: u64, _: u32) -> Result<()> {
        lock(&self.0.delays).push((address, true));
        Ok(())
    }
    fn hear_writes(&self, _: Space, address: u64, _: u32) -> Result<()> {
        lock(&self.0.delays).push((address, false));
        Ok(())
    }
    fn late_writes(&self, take: &mut dyn FnMut(Space, u64, &[u8])) {
        for (port, byte) in std::mem::take(&mut *lock(&self.0.late)) {
            take(Space::Port, u64::from(port), &[byte]);
        }
    }
}

impl Messages for Fake {
    fn send(&self, msi: Msi) {
        lock(&self.0.sent).push(msi);
    }
    fn watch(&self, _: u32, _: Option<Msi>) {}
}

/// A vCPU that plays its script.
pub struct FakeVcpu {
    id: u32,
    vm: Arc<FakeVm>,
    steps: std::vec::IntoIter<Step>,
    data: Vec<u8>,
    asked: bool,
    kick: Arc<FakeKick>,
}

#[derive(Default)]
struct FakeKick(Mutex<bool>, Condvar);

impl Kick for FakeKick {
    fn kick(&self) {
        *lock(&self.0) = true;
        self.1.notify_all();
    }
}

impl FakeKick {
    fn wait(&self) {
        let mut kicked = lock(&self.0);
        while !*kicked {
            kicked = self.1.wait(kicked).unwrap_or_else(PoisonError::into_inner);
        }
        *kicked = false;
    }
}

impl Vcpu for FakeVcpu {
    fn start_at(&mut self, start: &Start) -> Result<()> {
        *lock(&self.vm.started) = Some(*start);
        Ok(())
    }

    fn run(&mut self) -> Result<Exit<'_>> {
        if std::mem::take(&mut self.asked) {
            lock(&self.vm.answers).push(self.data.clone());
        }
        Ok(match self.steps.next().unwrap_or(Step::Spin) {
            Step::Out(port, data) => {
                self.data = data;
                Exit::PortWrite { port, width: self.data.len(), data: &self.data }
            }
            Step::In(port, width) => {
                self.data = vec![0; width];
                self.asked = true;
                Exit::PortRead { port, width, data: &mut self.data }
            }
            Step::Store(address, data) => {
                self.data = data;
                Exit::MemoryWrite(address, &self.data)
            }
            Step::Load(address, len) => {
                self.data = vec![0; len];
                self.asked = true;
                Exit::MemoryRead(address, &mut self.data)
            }
            Step::Late(port, byte) => {
                lock(&self.vm.late).push((port, byte));
                Exit::Nothing
            }
            Step::Spin => {
                self.kick.wait();
                Exit::Interrupted
            }
            Step::Eoi(vector) => Exit::EndOfInterrupt(vector),
            Step::TripleFault => Exit::Shutdown,
            Step::Stuck(why) => Exit::Stuck(why.to_owned()),
        })
    }

    fn kick(&self) -> Arc<dyn Kick> {
        self.kick.clone()
    }

    fn whereabouts(&self) -> String {
        "vCPU of a script".to_owned()
    }

    fn stand(&self) -> Result<Stand> {
        let stands = lock(&self.vm.stands);
        let mine = usize::try_from(self.id).ok().and_then(|id| stands.get(id).copied());
        Ok(mine.unwrap_or_default())
    }
}
