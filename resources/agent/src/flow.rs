//! Credit: who receives says how much may come, so a slow reader stops its own stream and nothing else.

use crate::wire::{MAX_DATA, Malformed};

/// The credit that every stream starts with, in bytes.
pub const WINDOW: u32 = 256 << 10;

/// The sender's side of a stream.
#[derive(Debug)]
pub struct Outflow {
    credit: u32,
}

impl Default for Outflow {
    fn default() -> Self {
        Outflow { credit: WINDOW }
    }
}

impl Outflow {
    /// How many bytes the next data frame may carry.
    pub fn room(&self) -> usize {
        usize::try_from(self.credit).unwrap_or(MAX_DATA).min(MAX_DATA)
    }

    /// Counts bytes that are sent; never more than [`Outflow::room`].
    pub fn sent(&mut self, bytes: usize) {
        self.credit = self.credit.saturating_sub(u32::try_from(bytes).unwrap_or(u32::MAX));
    }

    /// Takes credit from the receiver.
    ///
    /// # Errors
    /// It adds up to more than a window, so the two ends do not agree on what was sent.
    pub fn grant(&mut self, bytes: u32) -> Result<(), Malformed> {
        let sum = self.credit.checked_add(bytes).filter(|sum| *sum <= WINDOW);
        self.credit = sum.ok_or(Malformed("more credit was given than was used"))?;
        Ok(())
    }
}

/// The receiver's side of a stream.
#[derive(Debug)]
pub struct Inflow {
    /// What the sender may still send.
    allowed: u32,
    /// What was got rid of and not yet given back as credit.
    owed: u32,
}

impl Default for Inflow {
    fn default() -> Self {
        Inflow { allowed: WINDOW, owed: 0 }
    }
}

impl Inflow {
    /// Counts bytes that arrived.
    ///
    /// # Errors
    /// The sender had no credit for them.
    pub fn arrived(&mut self, bytes: usize) -> Result<(), Malformed> {
        let rest = u32::try_from(bytes).ok().and_then(|bytes| self.allowed.checked_sub(bytes));
        self.allowed = rest.ok_or(Malformed("more data came than there was credit for"))?;
        Ok(())
    }

    /// Counts bytes that are passed on or dropped; returns the credit to send now, if it is time to.
    pub fn passed(&mut self, bytes: usize) -> Option<u32> {
        self.owed =
            self.owed.saturating_add(u32::try_from(bytes).unwrap_or(u32::MAX)).min(WINDOW - self.allowed);
        // In halves of a window, so that credit costs little and the sender still never waits for a fast reader.
        if self.owed < WINDOW / 2 {
            return None;
        }
        self.allowed += self.owed;
        Some(std::mem::take(&mut self.owed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sender_stops_at_the_window_and_goes_on_with_credit() {
        let (mut out, mut inside) = (Outflow::default(), Inflow::default());
        let mut held = 0;
        while out.room() > 0 {
            let n = out.room().min(10_000);
            out.sent(n);
            inside.arrived(n).unwrap();
            held += n;
        }
        assert_eq!(held, usize::try_from(WINDOW).unwrap());
        assert!(inside.arrived(1).is_err(), "a byte without credit is refused");
        assert_eq!(inside.passed(1000), None);
        let credit = inside.passed(held - 1000).unwrap();
        assert_eq!(credit, WINDOW);
        out.grant(credit).unwrap();
        assert_eq!(out.room(), MAX_DATA);
        assert!(out.grant(1).is_err(), "credit beyond the window is refused");
    }
}
