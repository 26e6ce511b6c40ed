//! The keyboard controller, as far as a machine without a keyboard needs one: it resets the machine.

use base::Result;
use base::bus::{Effect, Registers};

use super::Switch;
use crate::catalog::{Body, Chip, Kind, Kit, Presence, Space, Window};

const DATA: u64 = 0x60;
const COMMAND: u64 = 0x64;
/// Pulses the reset line of the processor.
const PULSE_RESET: u8 = 0xfe;

/// Never busy, so that a guest that reboots does not wait. Always a byte from a mouse: a driver that probes finds
/// that the buffer cannot be emptied and gives up within a millisecond, and one that polls for keys sees none.
/// Keyboard not locked, self-test passed.
const STATUS: u8 = 0x35;

/// The keyboard controller.
pub struct This;

impl Kind for This {
    type Spec = Switch;
    const NAME: &'static str = "i8042";
    const FLAG: &'static str = "i8042";
    const SUMMARY: &'static str = "the keyboard controller through which a guest may reset the machine";
    const BARE: &'static str = "enabled";
    const EXAMPLE: &'static str = "on";
    const PRESENCE: Presence = Presence::Standard("on");

    fn build(spec: &Switch, _: &Kit<'_>) -> Result<Body> {
        let window = |base, registers| Window { space: Space::Port, base, len: 1, lazy: &[], registers };
        Ok(spec.body(|| Chip {
            windows: vec![window(DATA, Box::new(Data)), window(COMMAND, Box::new(Command))],
            ..Chip::default()
        }))
    }
}

struct Data;

impl Registers for Data {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }
    fn write(&mut self, _: u64, _: &[u8]) -> Effect {
        Effect::None
    }
}

struct Command;

impl Registers for Command {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(STATUS);
    }
    fn write(&mut self, _: u64, data: &[u8]) -> Effect {
        if data.first() == Some(&PULSE_RESET) { Effect::Reset } else { Effect::None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kinds::tests::Fixture;

    #[test]
    fn resets_the_machine_and_nothing_else() {
        let mut chip = Fixture::default().chip::<This>("on");
        assert_eq!(chip.write(COMMAND, &[PULSE_RESET]), Effect::Reset);
        for command in 0..PULSE_RESET {
            assert_eq!(chip.write(COMMAND, &[command]), Effect::None);
            assert_eq!(chip.write(DATA, &[command]), Effect::None);
        }
        assert_eq!(chip.read(COMMAND, 1), [STATUS]);
        assert_eq!(STATUS & 2, 0, "never busy: a guest that reboots waits for that");
        assert_eq!(chip.read(DATA, 1), [0]);
    }

    #[test]
    fn can_be_left_out() {
        assert!(Fixture::default().absent::<This>("off"));
    }
}
