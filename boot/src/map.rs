//! The guest's RAM as a kernel is told of it, and whether something fits in there.

use arch::layout::{EBDA, HIGH_RAM, HOLE_START};
use base::memory::Memory;
use base::{Fail, Result, Why};

/// RAM pieces (guest address, length), the first of them from address zero.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Map {
    pieces: Vec<(u64, u64)>,
    reserved: Option<(u64, u64)>,
}

/// One line of the memory map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// Guest-physical address.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
    /// RAM to use, or reserved.
    pub usable: bool,
}

impl Map {
    /// The map of this memory.
    pub fn new(memory: &Memory) -> Map {
        let pieces = memory.pieces().map(|piece| (piece.guest, piece.len)).collect();
        Map { pieces, reserved: None }
    }

    /// The same with a range in the hole for devices (start, length) that the kernel is told to leave alone.
    pub fn reserving(self, range: Option<(u64, u64)>) -> Map {
        Map { reserved: range, ..self }
    }

    /// End of the RAM below the hole.
    pub fn low_end(&self) -> u64 {
        self.pieces.first().filter(|(start, _)| *start == 0).map_or(0, |(_, len)| *len)
    }

    /// What an e820 or PVH memory map lists: conventional memory, what firmware keeps (the ACPI tables are there), and
    /// the rest.
    pub fn ranges(&self) -> Vec<Range> {
        let mut ranges = Vec::new();
        let mut push = |start: u64, end: u64, usable| {
            if start < end {
                ranges.push(Range { start, len: end - start, usable });
            }
        };
        let low = self.low_end();
        push(0, low.min(EBDA), true);
        push(EBDA, HIGH_RAM, false);
        push(HIGH_RAM, low, true);
        if let Some((start, len)) = self.reserved {
            push(start, start.saturating_add(len), false);
        }
        for (start, len) in self.pieces.iter().filter(|(start, _)| *start > 0) {
            push(*start, start.saturating_add(*len), true);
        }
        ranges
    }

    /// Sees to it that a kernel fits at `start..end`.
    pub fn check(&self, name: &str, start: u64, end: u64) -> Result<()> {
        let fail = |why| Fail::new(why, format!("load kernel {name}"));
        if start < HIGH_RAM {
            let cause = format!("it wants address {start:#x}, below 1 MiB, where the boot data are");
            return Err(fail(Why::Invalid).because(cause).hint("link it at 1 MiB or above"));
        }
        if end > HOLE_START {
            let cause = format!("it would end at {end:#x}, in the hole for devices at {HOLE_START:#x}");
            return Err(fail(Why::Invalid).because(cause).hint("link it at lower physical addresses"));
        }
        if end > self.low_end() {
            return Err(self.too_small(fail(Why::Invalid), end));
        }
        Ok(())
    }

    /// Says how much memory would have been enough.
    pub fn too_small(&self, fail: Fail, needed: u64) -> Fail {
        too_small(fail, self.low_end(), needed, needed)
    }
}

/// Says that `given` bytes are less than what is `needed`, and that `enough` would do.
pub fn too_small(fail: Fail, given: u64, needed: u64, enough: u64) -> Fail {
    let (needed, given, enough) = (needed.div_ceil(1 << 20), given >> 20, enough.div_ceil(1 << 20));
    fail.because(format!("it needs {needed} MiB of memory, the guest has {given} MiB"))
        .hint(format!("pass --memory {enough}M or more"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pieces: &[(u64, u64)]) -> Map {
        Map { pieces: pieces.to_vec(), reserved: None }
    }

    #[test]
    fn lists_ram_around_the_firmware_area_and_the_hole() {
        let line = |start, len, usable| Range { start, len, usable };
        assert_eq!(
            map(&arch::layout::ram(5 << 30)).ranges(),
            [
                line(0, 0x9_fc00, true),
                line(0x9_fc00, 0x6_0400, false),
                line(0x10_0000, 0xbff0_0000, true),
                line(4 << 30, 2 << 30, true)
            ]
        );
        let reserving = map(&arch::layout::ram(5 << 30)).reserving(Some((0xe000_0000, 1 << 20)));
        assert_eq!(reserving.ranges().get(3), Some(&line(0xe000_0000, 1 << 20, false)));
        assert_eq!(map(&[(0, 1 << 20)]).ranges().len(), 2, "1 MiB has nothing beyond the firmware area");
        assert_eq!(map(&[]).low_end(), 0);
    }

    #[test]
    fn says_how_much_memory_a_kernel_needs() {
        let text = map(&[(0, 16 << 20)]).check("k", 16 << 20, 40 << 20).unwrap_err().to_string();
        assert_eq!(
            text,
            "load kernel k: it needs 40 MiB of memory, the guest has 16 MiB\n  hint: pass --memory 40M or more"
        );
        for (start, end) in [(0, 4096), (0x1000, 0x20_0000), (0x10_0000, 0xd000_0000)] {
            assert!(map(&[(0, 3 << 30)]).check("k", start, end).is_err(), "{start:#x}");
        }
        assert!(map(&[(0, 1 << 30)]).check("k", 16 << 20, 60 << 20).is_ok());
    }
}
