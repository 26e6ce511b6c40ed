//! INTx: interrupt lines that several functions share. A line is high while one of them asserts it.

use std::sync::{Arc, Mutex, PoisonError};

use base::irq::{Line, SharedLine};

/// A line with many ends.
pub struct Wire {
    line: SharedLine,
    /// One bit for each device that asserts it.
    asserted: Mutex<u32>,
}

impl Wire {
    /// A wire that leads to `line`.
    pub fn new(line: SharedLine) -> Arc<Wire> {
        Arc::new(Wire { line, asserted: Mutex::new(0) })
    }

    /// The end of device number `device`, below 32.
    pub fn end(self: &Arc<Self>, device: u8) -> SharedLine {
        Arc::new(End { wire: self.clone(), bit: 1u32.checked_shl(device.into()).unwrap_or(0) })
    }
}

struct End {
    wire: Arc<Wire>,
    bit: u32,
}

impl Line for End {
    fn set(&self, high: bool) {
        // Held while the line is set: of two who change it, the later one's level holds.
        let mut asserted = self.wire.asserted.lock().unwrap_or_else(PoisonError::into_inner);
        let before = *asserted;
        *asserted = if high { before | self.bit } else { before & !self.bit };
        if (before == 0) != (*asserted == 0) {
            self.wire.line.set(*asserted != 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use base::irq::FakeLine;

    use super::*;

    #[test]
    fn it_is_high_while_one_asserts_it() {
        let line = Arc::new(FakeLine::default());
        let wire = Wire::new(line.clone());
        let [a, b] = [1, 31].map(|device| wire.end(device));
        let levels =
            [(&a, true), (&b, true), (&a, false), (&a, false), (&b, false), (&b, true)].map(|(end, high)| {
                end.set(high);
                line.level()
            });
        assert_eq!(levels, [true, true, true, true, false, true]);
        assert_eq!(line.edges.get(), 2);
    }
}
