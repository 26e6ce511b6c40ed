//! The I/O APIC: turns interrupt lines into messages to the local APICs.
//!
//! Source: Intel 82093AA data sheet, with the EOI register of version 0x20. Two things every hypervisor adds: an
//! edge on a masked input is remembered and sent when the guest unmasks it, and 7 more bits of destination (bits 49
//! to 55 of an entry, `KVM_FEATURE_MSI_EXT_DEST_ID`).
//!
//! One mutex guards all: vCPUs come in through the registers, lanes through the lines. It is held while a message is
//! sent, so that none overtakes a change of its entry; [`Messages`] never call back.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use base::bus::{Effect, Registers};
use base::irq::{Line, Messages, Msi, SharedLine};

const SELECT: u64 = 0x00;
const DATA: u64 = 0x10;
const EOI: u64 = 0x40;

const ID: u32 = 0x00;
const VERSION: u32 = 0x01;
const ARBITRATION: u32 = 0x02;
const FIRST_ENTRY: u32 = 0x10;
/// The first version with an EOI register.
const VERSION_NUMBER: u32 = 0x20;
/// More do not fit beside the last number of the version register.
const PINS_MAX: u32 = 240;
const ID_BITS: u32 = 0x0f00_0000;

const DELIVERY_STATUS: u64 = 1 << 12;
const REMOTE_IRR: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
const READ_ONLY: u64 = DELIVERY_STATUS | REMOTE_IRR;

/// An interrupt controller with a number of inputs. Clones are the same one.
#[derive(Clone)]
pub struct IoApic {
    shared: Arc<Shared>,
}

struct Shared {
    chip: Mutex<Chip>,
    messages: Arc<dyn Messages>,
}

struct Chip {
    /// The selected register. Wider than the 8 bits of the data sheet, which would end at input 119.
    select: u32,
    id: u32,
    pins: Vec<Pin>,
}

#[derive(Clone, Copy)]
struct Pin {
    /// The redirection table entry.
    entry: u64,
    /// The level of the line.
    high: bool,
    /// An edge has come while the pin was masked.
    pending: bool,
    /// What the hypervisor was last told to watch for.
    watched: Option<Msi>,
}

impl IoApic {
    /// A controller with `pins` inputs (at most 240), all masked, that sends `messages`.
    pub fn new(pins: u32, messages: Arc<dyn Messages>) -> IoApic {
        let pin = Pin { entry: MASKED, high: false, pending: false, watched: None };
        let chip =
            Chip { select: 0, id: 0, pins: vec![pin; usize::try_from(pins.min(PINS_MAX)).unwrap_or(0)] };
        IoApic { shared: Arc::new(Shared { chip: Mutex::new(chip), messages }) }
    }

    /// Leaves only the first `pins` inputs, before the guest runs: a guest visits each input it is shown with a dozen
    /// accesses. Lines to the others lead nowhere from now on.
    pub fn set_pins(&self, pins: u32) {
        let mut chip = self.shared.lock();
        chip.pins.truncate(usize::try_from(pins).unwrap_or(usize::MAX));
        chip.pins.shrink_to_fit();
    }

    /// The registers, for the bus.
    pub fn registers(&self) -> Box<dyn Registers> {
        Box::new(self.clone())
    }

    /// The line that leads to input `gsi`; one that leads nowhere if there is no such input.
    pub fn line(&self, gsi: u32) -> SharedLine {
        Arc::new(Input { shared: self.shared.clone(), pin: gsi })
    }

    /// A processor has finished handling `vector`: level-triggered inputs that are still high interrupt again.
    pub fn eoi(&self, vector: u8) {
        self.shared.lock().eoi(vector, &*self.shared.messages);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Chip> {
        self.chip.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The end of a line.
struct Input {
    shared: Arc<Shared>,
    pin: u32,
}

impl Input {
    fn with(&self, change: impl FnOnce(&mut Pin, &dyn Messages)) {
        let mut chip = self.shared.lock();
        let pin = usize::try_from(self.pin).ok().and_then(|pin| chip.pins.get_mut(pin));
        if let Some(pin) = pin {
            change(pin, &*self.shared.messages);
        }
    }
}

impl Line for Input {
    fn set(&self, high: bool) {
        self.with(|pin, messages| pin.set(high, messages));
    }

    fn pulse(&self) {
        self.with(|pin, messages| {
            pin.set(true, messages);
            pin.set(false, messages);
        });
    }
}

impl Pin {
    fn is(&self, bit: u64) -> bool {
        self.entry & bit != 0
    }

    fn vector(&self) -> u8 {
        let [vector, ..] = self.entry.to_le_bytes();
        vector
    }

    fn set(&mut self, high: bool, messages: &dyn Messages) {
        let rises = high && !self.high;
        self.high = high;
        // A level-triggered input has nothing to remember: its line does.
        self.pending |= rises && !self.is(LEVEL);
        self.deliver(messages);
    }

    /// Sends what waits to be sent.
    fn deliver(&mut self, messages: &dyn Messages) {
        if self.is(MASKED) {
            return;
        }
        if self.is(LEVEL) {
            if self.high && !self.is(REMOTE_IRR) {
                self.entry |= REMOTE_IRR;
                messages.send(self.message());
            }
        } else if std::mem::take(&mut self.pending) {
            messages.send(self.message());
        }
    }

    /// The message the entry stands for (Intel SDM volume 3, section 11.11).
    fn message(&self) -> Msi {
        /// Address bits of every message.
        const ADDRESS: u64 = 0xfee0_0000;
        /// Data bit: the level is asserted.
        const ASSERT: u32 = 1 << 14;
        let destination = self.entry >> 56;
        let extended = self.entry >> 49 & 0x7f;
        let logical = self.entry >> 11 & 1;
        let [vector, mode, ..] = self.entry.to_le_bytes();
        let mut data = u32::from(vector) | u32::from(mode & 0x07) << 8;
        if self.is(LEVEL) {
            data |= ASSERT | 1 << 15;
        }
        Msi { address: ADDRESS | destination << 12 | extended << 5 | logical << 2, data }
    }

    fn write(&mut self, number: u32, entry: u64, messages: &dyn Messages) {
        self.entry = entry & !READ_ONLY | self.entry & READ_ONLY;
        if self.is(LEVEL) {
            self.pending = false;
        } else {
            // What Linux uses as an end of interrupt where there is no EOI register.
            self.entry &= !REMOTE_IRR;
        }
        // While it is masked the hypervisor goes on watching: the end of an interrupt that was sent before may still
        // be to come, and changing its routes is slow.
        if !self.is(MASKED) {
            let watched = self.is(LEVEL).then(|| self.message());
            if watched != self.watched {
                self.watched = watched;
                messages.watch(number, watched);
            }
        }
        self.deliver(messages);
    }
}

impl Chip {
    fn eoi(&mut self, vector: u8, messages: &dyn Messages) {
        for pin in &mut self.pins {
            if pin.is(LEVEL) && pin.is(REMOTE_IRR) && pin.vector() == vector {
                pin.entry &= !REMOTE_IRR;
                pin.deliver(messages);
            }
        }
    }

    /// The pin whose entry the selected register is half of, and whether that is the upper half.
    fn selected(&self) -> Option<(u32, bool)> {
        let at = self.select.checked_sub(FIRST_ENTRY)?;
        Some((at / 2, at % 2 == 1))
    }

    fn read(&self) -> u32 {
        if let Some((pin, upper)) = self.selected() {
            let pin = usize::try_from(pin).ok().and_then(|pin| self.pins.get(pin));
            let entry = pin.map_or(u64::MAX, |pin| pin.entry);
            return half(entry, upper);
        }
        match self.select {
            ID | ARBITRATION => self.id,
            VERSION => {
                let last = u32::try_from(self.pins.len()).unwrap_or(0).saturating_sub(1);
                last << 16 | VERSION_NUMBER
            }
            _ => u32::MAX,
        }
    }

    fn write(&mut self, value: u32, messages: &dyn Messages) {
        if let Some((number, upper)) = self.selected() {
            let pin = usize::try_from(number).ok().and_then(|pin| self.pins.get_mut(pin));
            if let Some(pin) = pin {
                let entry = if upper {
                    u64::from(value) << 32 | u64::from(half(pin.entry, false))
                } else {
                    u64::from(half(pin.entry, true)) << 32 | u64::from(value)
                };
                pin.write(number, entry, messages);
            }
        } else if self.select == ID {
            self.id = value & ID_BITS;
        }
    }
}

fn half(entry: u64, upper: bool) -> u32 {
    let [a, b, c, d, e, f, g, h] = entry.to_le_bytes();
    u32::from_le_bytes(if upper { [e, f, g, h] } else { [a, b, c, d] })
}

impl Registers for IoApic {
    fn read(&mut self, at: u64, data: &mut [u8]) {
        let chip = self.shared.lock();
        let value = match at {
            SELECT => chip.select,
            DATA => chip.read(),
            _ => 0,
        };
        data.fill(0);
        data.iter_mut().zip(value.to_le_bytes()).for_each(|(to, from)| *to = from);
    }

    fn write(&mut self, at: u64, data: &[u8]) -> Effect {
        let mut bytes = [0; 4];
        bytes.iter_mut().zip(data).for_each(|(to, from)| *to = *from);
        let [low, ..] = bytes;
        let messages = &*self.shared.messages;
        let mut chip = self.shared.lock();
        match at {
            SELECT => chip.select = u32::from_le_bytes(bytes),
            DATA => chip.write(u32::from_le_bytes(bytes), messages),
            EOI => chip.eoi(low, messages),
            _ => {}
        }
        Effect::None
    }
}

#[cfg(test)]
mod tests;
