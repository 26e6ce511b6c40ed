//! Configuration space of a function: 256 bytes, and a mask of those bits that can be written (PCI 3.0, chapter 6).

use std::ops::Range;

/// Bytes of configuration space of a conventional function.
pub const LEN: usize = 256;

/// Command register.
const COMMAND: usize = 0x04;
const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_MASTER: u16 = 1 << 2;
const COMMAND_NO_INTX: u16 = 1 << 10;
/// Status register.
const STATUS: usize = 0x06;
const STATUS_INTERRUPT: u8 = 1 << 3;
const STATUS_CAPABILITIES: u8 = 1 << 4;
const REVISION: usize = 0x08;
const CLASS: usize = 0x09;
const BASE_ADDRESS: usize = 0x10;
/// A base address register of 64 bits, in memory (section 6.2.5.1).
const MEMORY_64: u64 = 0b100;
const SUBSYSTEM: usize = 0x2c;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
const INTERRUPT_PIN: usize = 0x3d;
/// First byte behind the header.
const FIRST_CAPABILITY: usize = 0x40;

/// Who a function is.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    /// Vendor, device.
    pub ids: [u16; 2],
    /// Vendor and device of the subsystem.
    pub subsystem: [u16; 2],
    /// Revision.
    pub revision: u8,
    /// Class, subclass, programming interface.
    pub class: [u8; 3],
}

/// The configuration space of one function with one base address register at most.
pub struct Config {
    bytes: [u8; LEN],
    writable: [u8; LEN],
    /// Where the next capability goes, and where the link to it is.
    next: usize,
    link: usize,
}

impl Config {
    /// The header of a function that decodes nothing yet.
    pub fn new(who: &Identity) -> Config {
        let mut config =
            Config { bytes: [0; LEN], writable: [0; LEN], next: FIRST_CAPABILITY, link: CAPABILITIES };
        let [vendor, device] = who.ids.map(u16::to_le_bytes);
        config.put(0, &[vendor, device].concat());
        config.put(REVISION, &[who.revision]);
        let [class, subclass, interface] = who.class;
        config.put(CLASS, &[interface, subclass, class]);
        let [vendor, device] = who.subsystem.map(u16::to_le_bytes);
        config.put(SUBSYSTEM, &[vendor, device].concat());
        config
            .allow(COMMAND..COMMAND + 2, &(COMMAND_MEMORY | COMMAND_MASTER | COMMAND_NO_INTX).to_le_bytes());
        config
    }

    /// Gives the function a window of `len` bytes of memory, a power of two, at `base` for a start.
    pub fn add_window(&mut self, base: u64, len: u64) {
        self.put(BASE_ADDRESS, &(base | MEMORY_64).to_le_bytes());
        self.allow(BASE_ADDRESS..BASE_ADDRESS + 8, &len.wrapping_neg().to_le_bytes());
    }

    /// Gives the function the interrupt pin INTA, of which firmware knows that it leads to `line`.
    pub fn add_pin(&mut self, line: u8) {
        self.put(INTERRUPT_LINE, &[line]);
        self.put(INTERRUPT_PIN, &[1]);
        self.allow(INTERRUPT_LINE..INTERRUPT_LINE + 1, &[0xff]);
    }

    /// Appends a capability: its ID, and what follows the link to the next one. Where it lies.
    pub fn add_capability(&mut self, id: u8, body: &[u8]) -> usize {
        let at = self.next;
        self.put(at, &[id, 0]);
        self.put(at.saturating_add(2), body);
        self.put(self.link, &[u8::try_from(at).unwrap_or(0)]);
        self.put(STATUS, &[STATUS_CAPABILITIES]);
        self.link = at.saturating_add(1);
        self.next = at.saturating_add(2).saturating_add(body.len()).next_multiple_of(4);
        at
    }

    /// Lets the guest write those bits of the bytes in `range` that `mask` has.
    pub fn allow(&mut self, range: Range<usize>, mask: &[u8]) {
        let masks = self.writable.get_mut(range).unwrap_or_default();
        masks.iter_mut().zip(mask).for_each(|(to, from)| *to = *from);
    }

    /// Sets bytes, whether the guest can write them or not.
    pub fn put(&mut self, at: usize, bytes: &[u8]) {
        let room = self.bytes.get_mut(at..).unwrap_or_default();
        room.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
    }

    /// `N` bytes at `at`; zeros beyond the end.
    pub fn get<const N: usize>(&self, at: usize) -> [u8; N] {
        let mut bytes = [0; N];
        self.read(at, &mut bytes);
        bytes
    }

    /// Reads; what lies beyond the end is left alone.
    pub fn read(&self, at: usize, data: &mut [u8]) {
        let bytes = self.bytes.get(at..).unwrap_or_default();
        data.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
    }

    /// Writes those bits that can be written.
    pub fn write(&mut self, at: usize, data: &[u8]) {
        let bytes = self.bytes.get_mut(at..).unwrap_or_default();
        let masks = self.writable.get(at..).unwrap_or_default();
        for ((byte, mask), new) in bytes.iter_mut().zip(masks).zip(data) {
            *byte = *byte & !mask | new & mask;
        }
    }

    fn commands(&self, bit: u16) -> bool {
        u16::from_le_bytes(self.get(COMMAND)) & bit != 0
    }

    /// Where the window answers; `None` while the function decodes no memory.
    pub fn place(&self) -> Option<u64> {
        let base = u64::from_le_bytes(self.get(BASE_ADDRESS)) & !0xf;
        self.commands(COMMAND_MEMORY).then_some(base)
    }

    /// Whether the function may access memory, messages of interrupts included.
    pub fn is_master(&self) -> bool {
        self.commands(COMMAND_MASTER)
    }

    /// Whether the function may assert its interrupt pin.
    pub fn may_assert(&self) -> bool {
        !self.commands(COMMAND_NO_INTX)
    }

    /// Shows whether an interrupt is pending (status bit 3, which the pin follows).
    pub fn show_interrupt(&mut self, pending: bool) {
        let [status] = self.get(STATUS);
        let bit = if pending { STATUS_INTERRUPT } else { 0 };
        self.put(STATUS, &[status & !STATUS_INTERRUPT | bit]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> Config {
        let mut config = Config::new(&Identity {
            ids: [0x1af4, 0x1042],
            subsystem: [0x1af4, 0x40],
            revision: 1,
            class: [0xff, 2, 3],
        });
        config.add_window(0xc000_4000, 0x4000);
        config
    }

    #[test]
    fn the_header_is_that_of_the_specification() {
        let mut config = config();
        assert_eq!(config.get(0), [0xf4, 0x1a, 0x42, 0x10]);
        assert_eq!(config.get(8), [1, 3, 2, 0xff], "revision, interface, subclass, class");
        assert_eq!(config.get(0x2c), [0xf4, 0x1a, 0x40, 0]);
        assert_eq!(config.get(6), [0u8], "no capabilities");
        assert_eq!(config.add_capability(0x11, &[1; 10]), 0x40);
        assert_eq!(config.add_capability(0x09, &[2; 3]), 0x4c);
        assert_eq!((config.get(6), config.get(0x34)), ([0x10u8], [0x40u8]));
        assert_eq!((config.get(0x40), config.get(0x4c)), ([0x11, 0x4c, 1], [9, 0, 2]));
    }

    #[test]
    fn a_window_is_sized_moved_and_switched() {
        let mut config = config();
        assert_eq!(config.place(), None, "decodes nothing after a reset");
        config.write(0x10, &[0xff; 4]);
        config.write(0x14, &[0xff; 4]);
        assert_eq!(config.get(0x10), 0xffff_ffff_ffff_c004u64.to_le_bytes());
        // Byte by byte, and across the register.
        config.write(0x11, &[0x80]);
        config.write(0x12, &[0, 0xd0, 1, 0, 0, 0]);
        assert_eq!(config.place(), None);
        config.write(4, &[2]);
        assert_eq!(config.place(), Some(0x1_d000_8000));
        assert_eq!((config.is_master(), config.may_assert()), (false, true));
        config.write(4, &[0xff, 0xff]);
        assert_eq!(config.get(4), [0b110, 0b100], "only what there is can be switched");
        assert_eq!((config.is_master(), config.may_assert()), (true, false));
    }

    #[test]
    fn the_end_is_the_end() {
        let mut config = config();
        let mut data = [0xff; 4];
        config.read(254, &mut data);
        assert_eq!(data, [0, 0, 0xff, 0xff]);
        config.write(254, &[1; 8]);
        config.write(usize::MAX, &[1; 8]);
        assert_eq!(config.get(254), [0, 0]);
    }
}
