//! The board: what all vCPUs of a machine share.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use base::bus::{Bus, Effect};
use base::meter::Counter;
use devices::catalog::Space;

use super::doorbells::Doorbells;
use super::lazy::Lazy;
use crate::hv::{Exit, Kind, Vm};
use crate::outcome::Watch;

/// Buses, counters and the watch on the console.
pub struct Board {
    /// The hypervisor's side.
    pub vm: Arc<dyn Vm>,
    /// I/O ports.
    pub ports: Bus,
    /// Device memory.
    pub memory: Bus,
    /// Told of the end of level-triggered interrupts.
    pub end_of_interrupt: Box<dyn Fn(u8) + Send + Sync>,
    /// Registers whose writes the hypervisor delays once they are busy.
    pub lazy: Vec<Lazy>,
    /// Windows that the guest moves, by their number, with their doorbells.
    pub movable: Vec<(u32, Arc<Doorbells>)>,
    /// Ports on which console text leaves: watched for a panic.
    pub consoles: Vec<u64>,
    /// What the console has said about the kernel's health.
    pub watch: Mutex<Watch>,
    /// The same of consoles that are no chip's.
    pub overheard: Arc<Mutex<Watch>>,
    /// Exits so far, by [`Kind`].
    pub exits: [Counter; Kind::NAMES.len()],
    /// Writes that came late.
    pub late: Counter,
    /// Set before the run is over if vCPUs are to say where they stand.
    pub examine: AtomicBool,
    /// Set when the run is over: vCPUs leave at their next interruption.
    pub over: AtomicBool,
}

/// Why a vCPU left its loop.
#[derive(Debug)]
pub enum Leave {
    /// The machine has to obey this.
    Effect(Effect),
    /// A triple fault.
    TripleFault,
    /// The processor halted for good.
    Halted,
    /// The hypervisor cannot go on.
    Stuck(String),
    /// The run is over.
    Over,
}

impl Board {
    /// A board with nothing on it.
    pub fn new(vm: Arc<dyn Vm>) -> Board {
        Board {
            vm,
            ports: Bus::new("port"),
            memory: Bus::new("memory"),
            end_of_interrupt: Box::new(|_| ()),
            lazy: Vec::new(),
            movable: Vec::new(),
            consoles: Vec::new(),
            watch: Mutex::default(),
            overheard: Arc::default(),
            exits: Default::default(),
            late: Counter::default(),
            examine: AtomicBool::new(false),
            over: AtomicBool::new(false),
        }
    }

    /// The bus of a space.
    pub fn bus(&mut self, space: Space) -> &mut Bus {
        match space {
            Space::Port => &mut self.ports,
            Space::Memory => &mut self.memory,
        }
    }

    /// Does what the guest left KVM for; `Some` when the vCPU's loop ends.
    pub fn handle(&self, exit: Exit<'_>) -> Option<Leave> {
        if let Some(counter) = self.exits.get(exit.kind() as usize) {
            counter.add(1);
        }
        // Delayed writes are older than this exit.
        let late = self.take_late_writes();
        if late != Effect::None {
            return Some(Leave::Effect(late));
        }
        let effect = match exit {
            Exit::PortRead { port, width, data } => {
                for item in data.chunks_mut(width.max(1)) {
                    self.ports.read(u64::from(port), item);
                }
                Effect::None
            }
            Exit::PortWrite { port, width, data } => self.write_port(u64::from(port), width, data),
            Exit::MemoryRead(address, data) => {
                self.memory.read(address, data);
                Effect::None
            }
            Exit::MemoryWrite(address, data) => self.write_memory(address, data),
            Exit::EndOfInterrupt(vector) => {
                (self.end_of_interrupt)(vector);
                Effect::None
            }
            Exit::Interrupted if self.over.load(Ordering::SeqCst) => return Some(Leave::Over),
            Exit::Interrupted | Exit::Nothing => Effect::None,
            Exit::Shutdown => return Some(Leave::TripleFault),
            Exit::Halted => return Some(Leave::Halted),
            Exit::Stuck(why) => return Some(Leave::Stuck(why)),
        };
        (effect != Effect::None).then_some(Leave::Effect(effect))
    }

    /// Keeps an eye on registers whose writes may come late.
    fn notice(&self, space: Space, address: u64, data: &[u8]) {
        if let Some(lazy) = self.lazy.iter().find(|lazy| lazy.is_at(space, address)) {
            lazy.notice(data, self.vm.as_ref());
        }
    }

    /// Does what concerns the board alone, now that the chip is unlocked; hands on the rest.
    fn obey(&self, effect: Effect) -> Effect {
        let Effect::Move(to) = effect else { return effect };
        if let Some((_, doorbells)) = self.movable.iter().find(|(window, _)| *window == to.window) {
            doorbells.obey(to, &self.memory);
        }
        Effect::None
    }

    fn write_memory(&self, address: u64, data: &[u8]) -> Effect {
        self.notice(Space::Memory, address, data);
        self.obey(self.memory.write(address, data))
    }

    fn write_port(&self, port: u64, width: usize, data: &[u8]) -> Effect {
        self.notice(Space::Port, port, data);
        if self.consoles.contains(&port) {
            self.watch.lock().unwrap_or_else(PoisonError::into_inner).feed(data);
        }
        // The first consequence wins: a machine that is off hears no more.
        data.chunks(width.max(1))
            .map(|item| self.obey(self.ports.write(port, item)))
            .find(|effect| *effect != Effect::None)
            .unwrap_or_default()
    }

    /// Hands the writes that KVM has delayed to their chips.
    pub fn take_late_writes(&self) -> Effect {
        let mut first = Effect::None;
        self.vm.late_writes(&mut |space, address, data| {
            self.late.add(1);
            let effect = match space {
                Space::Port => self.write_port(address, data.len(), data),
                Space::Memory => self.write_memory(address, data),
            };
            if first == Effect::None {
                first = effect;
            }
        });
        first
    }
}
