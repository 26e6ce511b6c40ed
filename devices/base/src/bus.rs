//! The bus: which chip answers at which address of a space.

use std::sync::{Arc, Mutex, PoisonError, RwLock};

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
    /// A window of registers goes elsewhere: the guest has written a PCI base address or switched its decoding.
    Move(Move),
}

/// Where a movable window goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Move {
    /// Which window, as [`Bus::insert_movable`] was told.
    pub window: u32,
    /// Its new base; `None`: it answers nowhere.
    pub to: Option<u64>,
    /// Counts the moves of this window. Two processors may obey two moves in the wrong order; the later one holds.
    pub turn: u64,
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

/// A window whose place the guest chooses.
#[derive(Clone)]
struct Roamer {
    window: u32,
    base: Option<u64>,
    len: u64,
    chip: Arc<Mutex<Box<dyn Registers>>>,
}

/// One address space: ports or memory-mapped registers. An access locks one chip.
///
/// Fixed windows are put in once and then only read: a look-up among them takes no lock. What they do not claim is
/// looked up among the movable ones.
pub struct Bus {
    space: &'static str,
    slots: Vec<Slot>,
    roamers: RwLock<Vec<Roamer>>,
    /// Accesses that no chip claimed.
    pub misses: Counter,
}

impl Bus {
    /// An empty bus; `space` is its name in messages (`port`, `mmio`).
    pub fn new(space: &'static str) -> Self {
        Bus { space, slots: Vec::new(), roamers: RwLock::default(), misses: Counter::default() }
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

    /// Puts in `chip` with a window of `len` bytes that is nowhere yet: [`Bus::place`] moves it.
    pub fn insert_movable(&mut self, window: u32, len: u64, chip: Box<dyn Registers>) {
        let roamers = self.roamers.get_mut().unwrap_or_else(PoisonError::into_inner);
        roamers.push(Roamer { window, base: None, len, chip: Arc::new(Mutex::new(chip)) });
    }

    /// Moves a window. The guest chooses the place, so any will do: where windows overlap, fixed ones come first.
    pub fn place(&self, window: u32, base: Option<u64>) {
        let mut roamers = self.roamers.write().unwrap_or_else(PoisonError::into_inner);
        roamers.iter_mut().filter(|roamer| roamer.window == window).for_each(|roamer| roamer.base = base);
    }

    fn locate(&self, addr: u64) -> Option<(&Slot, u64)> {
        let at = self.slots.partition_point(|slot| slot.base <= addr).checked_sub(1)?;
        let slot = self.slots.get(at)?;
        let offset = addr - slot.base;
        (offset < slot.len).then_some((slot, offset))
    }

    /// The movable window at `addr`. The list is let go before the chip is locked, so a chip never waits for a move.
    fn locate_movable(&self, addr: u64) -> Option<(Roamer, u64)> {
        let roamers = self.roamers.read().unwrap_or_else(PoisonError::into_inner);
        roamers.iter().find_map(|roamer| {
            let offset = addr.checked_sub(roamer.base?)?;
            (offset < roamer.len).then(|| (roamer.clone(), offset))
        })
    }

    /// Gives the chip at `addr` to `access`, with the offset in its window.
    fn with<T>(&self, addr: u64, access: impl FnOnce(&mut dyn Registers, u64) -> T) -> Option<T> {
        if let Some((slot, at)) = self.locate(addr) {
            let mut chip = slot.chip.lock().unwrap_or_else(PoisonError::into_inner);
            return Some(access(chip.as_mut(), at));
        }
        let Some((roamer, at)) = self.locate_movable(addr) else {
            self.misses.add(1);
            return None;
        };
        let mut chip = roamer.chip.lock().unwrap_or_else(PoisonError::into_inner);
        Some(access(chip.as_mut(), at))
    }

    /// Reads at `addr`; what nobody claims reads as ones.
    pub fn read(&self, addr: u64, data: &mut [u8]) {
        data.fill(0xff);
        self.with(addr, |chip, at| chip.read(at, data));
    }

    /// Writes at `addr`; what nobody claims goes nowhere.
    pub fn write(&self, addr: u64, data: &[u8]) -> Effect {
        self.with(addr, |chip, at| chip.write(at, data)).unwrap_or_default()
    }

    /// The fixed windows, in address order: base, length, name.
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
    fn windows_move_and_fixed_ones_come_first() {
        let mut bus = Bus::new("memory");
        bus.insert("fixed", 0x1000, 0x10, Box::new(Echo(1))).unwrap();
        bus.insert_movable(7, 0x20, Box::new(Echo(100)));
        let byte = |at| {
            let mut byte = [0];
            bus.read(at, &mut byte);
            byte[0]
        };
        assert_eq!(byte(0), 0xff, "nowhere at first");
        bus.place(7, Some(0x2000));
        assert_eq!((byte(0x2000), byte(0x201f), byte(0x2020)), (100, 131, 0xff));
        assert_eq!(bus.write(0x2001, &[50]), Effect::None);
        bus.place(7, Some(0xff8));
        assert_eq!((byte(0x2000), byte(0xff8), byte(0x1000), byte(0x1010)), (0xff, 50, 1, 74));
        bus.place(7, Some(u64::MAX - 3));
        assert_eq!((byte(u64::MAX), byte(0)), (53, 0xff), "a window at the end of all addresses ends there");
        bus.place(7, None);
        bus.place(8, Some(0x3000));
        assert_eq!((byte(0xff8), byte(0x3000)), (0xff, 0xff));
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
