//! The bus: which chip answers at which address of a space.

use std::sync::{Mutex, PoisonError};

use crate::fail::{Fail, Result, Why};
use crate::meter::Counter;

/// What a register access asks of the machine. The caller obeys it after the chip is unlocked; chips hold no
/// handle to the world.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    #[default]
    None,
    /// The guest asks for a reset of the machine.
    Reset,
    /// The guest powers the machine off.
    Off,
    /// The guest ends the run with this exit code (debug-exit ports).
    Exit(u8),
    /// The guest's kernel says that it panicked.
    Panicked,
    /// The operator asks for the end of the run (`Ctrl-a x`).
    Quit,
    /// A host-side failure that makes going on senseless.
    Broken(String),
}

/// The registers of a chip, as the guest reaches them.
///
/// `at` is relative to the window under which the chip stands. Accesses may have any width from 1 to 8 and
/// any alignment: what the guest says is a claim. A read of a register that does not exist leaves `data`
/// alone (it comes filled with ones).
pub trait Registers: Send {
    /// Reads `data.len()` bytes at `at`.
    fn read(&mut self, at: u64, data: &mut [u8]);
    /// Writes `data` at `at`.
    fn write(&mut self, at: u64, data: &[u8]) -> Effect;
}

struct Slot {
    base: u64,
    len: u64,
    name: String,
    chip: Mutex<Box<dyn Registers>>,
}

/// One address space: ports or memory-mapped registers. Built once, then only read: a look-up takes no lock,
/// an access locks one chip.
pub struct Bus {
    space: &'static str,
    slots: Vec<Slot>,
    /// Accesses that no chip claimed.
    pub misses: Counter,
}

impl Bus {
    /// An empty bus; `space` is its name in messages (`port`, `mmio`).
    pub fn new(space: &'static str) -> Self {
        Bus { space, slots: Vec::new(), misses: Counter::default() }
    }

    /// Puts `chip` at `base..base + len`.
    ///
    /// # Errors
    /// The window is empty, wraps, or overlaps another.
    pub fn insert(&mut self, name: &str, base: u64, len: u64, chip: Box<dyn Registers>) -> Result<()> {
        let window = || format!("place {name} at {} {base:#x}+{len:#x}", self.space);
        let Some(end) = base.checked_add(len).filter(|end| *end > base) else {
            return Err(Fail::new(Why::Invalid, window()).because("the window is empty or wraps"));
        };
        let at = self.slots.partition_point(|slot| slot.base < base);
        let before = at.checked_sub(1).and_then(|at| self.slots.get(at)).filter(|s| s.base + s.len > base);
        let after = self.slots.get(at).filter(|slot| slot.base < end);
        if let Some(other) = before.or(after) {
            return Err(Fail::new(Why::Invalid, window()).because(format!("it overlaps {}", other.name)));
        }
        self.slots.insert(at, Slot { base, len, name: name.to_owned(), chip: Mutex::new(chip) });
        Ok(())
    }

    fn locate(&self, addr: u64) -> Option<(&Slot, u64)> {
        let at = self.slots.partition_point(|slot| slot.base <= addr).checked_sub(1)?;
        let slot = self.slots.get(at)?;
        let offset = addr - slot.base;
        (offset < slot.len).then_some((slot, offset))
    }

    /// Reads at `addr`; what nobody claims reads as ones.
    pub fn read(&self, addr: u64, data: &mut [u8]) {
        data.fill(0xff);
        match self.locate(addr) {
            Some((slot, at)) => slot.chip.lock().unwrap_or_else(PoisonError::into_inner).read(at, data),
            None => self.misses.add(1),
        }
    }

    /// Writes at `addr`; what nobody claims goes nowhere.
    pub fn write(&self, addr: u64, data: &[u8]) -> Effect {
        match self.locate(addr) {
            Some((slot, at)) => slot.chip.lock().unwrap_or_else(PoisonError::into_inner).write(at, data),
            None => {
                self.misses.add(1);
                Effect::None
            }
        }
    }

    /// The windows in use, in address order: base, length, name.
    pub fn windows(&self) -> impl Iterator<Item = (u64, u64, &str)> {
        self.slots.iter().map(|slot| (slot.base, slot.len, slot.name.as_str()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo(u8);
    impl Registers for Echo {
        fn read(&mut self, at: u64, data: &mut [u8]) {
            data.fill(self.0.wrapping_add(u8::try_from(at).unwrap()));
        }
        fn write(&mut self, _: u64, data: &[u8]) -> Effect {
            self.0 = data[0];
            if self.0 == 0xfe { Effect::Reset } else { Effect::None }
        }
    }

    #[test]
    fn finds_the_chip_and_hands_back_its_consequence() {
        let mut bus = Bus::new("port");
        bus.insert("a", 0x60, 4, Box::new(Echo(1))).unwrap();
        bus.insert("b", 0x64, 1, Box::new(Echo(9))).unwrap();
        let mut byte = [0];
        bus.read(0x62, &mut byte);
        assert_eq!(byte, [3]);
        assert_eq!(bus.write(0x64, &[0xfe]), Effect::Reset);
        bus.read(0x65, &mut byte);
        assert_eq!((byte, bus.misses.get()), ([0xff], 1), "unknown addresses read as ones and are counted");
    }

    #[test]
    fn refuses_overlap_and_wrap() {
        let mut bus = Bus::new("port");
        bus.insert("a", 0x60, 4, Box::new(Echo(1))).unwrap();
        for (base, len) in [(0x63, 1), (0x5f, 2), (0x60, 0), (u64::MAX, 2), (0x50, 0x100)] {
            assert!(bus.insert("b", base, len, Box::new(Echo(1))).is_err(), "{base:#x}+{len:#x}");
        }
    }
}
