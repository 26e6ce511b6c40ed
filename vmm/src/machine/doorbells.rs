//! Doorbells: the way from a driver's write to a lane without leaving the kernel.

use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use base::bus::{Bus, Effect, Move, Registers};
use devices::virtio::Bell;

use crate::hv::Vm;

/// The doorbells of one device, and whether the hypervisor rings them.
///
/// They are wired when the driver first rings one. Not earlier, because KVM frees what a registration replaced after a
/// grace period of some 10 ms, and a VM that ends before it waits.
pub struct Doorbells {
    vm: Arc<dyn Vm>,
    bells: Vec<Bell>,
    state: Mutex<State>,
}

struct State {
    /// Where the window is.
    base: Option<u64>,
    /// Whether the driver has rung there.
    rung: bool,
    /// The bells that the hypervisor rings, by their place in the list: it may have refused some.
    wired: Vec<usize>,
    /// The last move that was obeyed.
    turn: u64,
}

impl Doorbells {
    /// The doorbells in a window at `base`, or in one that is nowhere yet.
    pub fn new(vm: Arc<dyn Vm>, bells: Vec<Bell>, base: Option<u64>) -> Arc<Doorbells> {
        Arc::new(Doorbells {
            vm,
            bells,
            state: Mutex::new(State { base, rung: false, wired: Vec::new(), turn: 0 }),
        })
    }

    /// `registers`, in which the doorbells are.
    pub fn around(self: &Arc<Self>, registers: Box<dyn Registers>) -> Box<dyn Registers> {
        Box::new(Window { registers, doorbells: self.clone() })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The driver has rung: from now on the hypervisor does it. Where it cannot, such writes go on coming as exits, and
    /// the register rings the doorbell itself.
    fn wire(&self) {
        let mut state = self.lock();
        if let (Some(base), false) = (state.base, state.rung) {
            state.rung = true;
            for (place, bell) in self.bells.iter().enumerate() {
                let Some(address) = base.checked_add(bell.at) else { continue };
                if self.vm.ring_on_write(address, bell.value, bell.doorbell.as_fd()).is_ok() {
                    state.wired.push(place);
                }
            }
        }
    }

    /// The window goes elsewhere: no write to its old place rings any more.
    pub fn obey(&self, to: Move, bus: &Bus) {
        let mut state = self.lock();
        if to.turn <= state.turn {
            return;
        }
        for bell in state.wired.iter().filter_map(|place| self.bells.get(*place)) {
            if let Some(address) = state.base.and_then(|base| base.checked_add(bell.at)) {
                let _ = self.vm.stop_ringing(address, bell.value, bell.doorbell.as_fd());
            }
        }
        *state = State { base: to.to, rung: false, wired: Vec::new(), turn: to.turn };
        bus.place(to.window, to.to);
    }
}

/// A window with doorbells in it.
struct Window {
    registers: Box<dyn Registers>,
    doorbells: Arc<Doorbells>,
}

impl Registers for Window {
    fn read(&mut self, at: u64, data: &mut [u8]) {
        self.registers.read(at, data);
    }

    fn write(&mut self, at: u64, data: &[u8]) -> Effect {
        let effect = self.registers.write(at, data);
        if self.doorbells.bells.iter().any(|bell| bell.at == at) {
            self.doorbells.wire();
        }
        effect
    }
}

#[cfg(test)]
mod tests {
    use base::irq::FakeLine;
    use base::lane::Lane;
    use base::memory::Memory;
    use devices::catalog::{self, Body, Kit};
    use devices::virtio::mmio::Mmio;

    use super::*;
    use crate::hv::fake::{Fake, FakeVm};

    /// The one doorbell of an entropy device.
    fn bells() -> Vec<Bell> {
        let (_lane, lane) = Lane::new(|_| ()).unwrap();
        let memory = Memory::new(&[(0, 4096)]).unwrap();
        let entry = catalog::find("rng").unwrap();
        let kit = Kit {
            name: "rng",
            host: &base::host::fake::FakeHost::default(),
            clock: Arc::new(base::clock::HostClock::default()),
            memory: &memory,
            lines: &|_| Arc::new(FakeLine::default()),
            overhear: Arc::new(|_| ()),
            lane: &lane,
        };
        let Body::Virtio(device) = entry.build(&entry.parse("enabled=on").unwrap(), &kit).unwrap() else {
            panic!("rng is a virtio device")
        };
        Mmio::attach("rng", device, &memory, Arc::new(FakeLine::default()), &lane).unwrap().bells()
    }

    #[test]
    fn a_window_takes_its_doorbells_along() {
        let fake = FakeVm::new([]);
        let doorbells = Doorbells::new(Arc::new(Fake(fake.clone())), bells(), None);
        let wired = || fake.doorbells.lock().unwrap().clone();
        let mut bus = Bus::new("memory");
        struct Deaf;
        impl Registers for Deaf {
            fn read(&mut self, _: u64, data: &mut [u8]) {
                data.fill(7);
            }
            fn write(&mut self, _: u64, _: &[u8]) -> Effect {
                Effect::None
            }
        }
        bus.insert_movable(3, 0x100, doorbells.around(Box::new(Deaf)));
        let go = |to, turn| doorbells.obey(Move { window: 3, to, turn }, &bus);
        go(Some(0x1000), 1);
        bus.write(0x1040, &[0; 4]);
        assert_eq!(wired(), [], "not before the driver rings");
        bus.write(0x1050, &[0; 4]);
        bus.write(0x1050, &[0; 4]);
        assert_eq!(wired(), [(0x1050, Some(0))]);
        go(Some(0x8000), 3);
        assert_eq!(wired(), [], "the old place is silent");
        go(Some(0x9000), 2);
        bus.write(0x8050, &[0; 4]);
        assert_eq!(wired(), [(0x8050, Some(0))], "a move that comes late is none");
        // Another device comes to the same place: its doorbell is refused, and it takes none with it when it goes.
        let other = Doorbells::new(Arc::new(Fake(fake.clone())), bells(), Some(0x8000));
        other.wire();
        other.obey(Move { window: 4, to: None, turn: 1 }, &bus);
        assert_eq!(wired(), [(0x8050, Some(0))]);
        go(None, 4);
        bus.write(0x8050, &[0; 4]);
        assert_eq!((wired(), bus.misses.get()), (vec![], 1));
        go(Some(u64::MAX - 0x10), 5);
        bus.write(u64::MAX - 0x10, &[0; 4]);
        assert_eq!(wired(), []);
    }
}
