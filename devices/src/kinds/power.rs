//! Power: the registers by which a guest turns the machine off or resets it.
//!
//! The ACPI tables name the first three (see [`base::ports`]); the other two are where a guest without ACPI looks
//! on any PC: the reset control register of the chipset and system control port A.

use base::Result;
use base::bus::{Effect, Registers};
use base::ports::{RESET, RESET_VALUE, SLEEP_CONTROL, SLEEP_STATUS, SLEEP_TYPE_OFF};

use super::Switch;
use crate::catalog::{Body, Chip, Kind, Kit, Presence, Space, Window};

/// Sleep control: go (ACPI 6.5, table 4.21).
const SLEEP_ENABLE: u8 = 0x20;
/// Sleep status: awake again (ACPI 6.5, table 4.22).
const WAKE_STATUS: u8 = 0x80;

/// Reset control register (Intel ICH10 data sheet, section 13.7.5).
const RESET_CONTROL: u16 = 0xcf9;
/// Its bit that resets when it goes from 0 to 1.
const RESET_CPU: u8 = 0x04;
/// Its bits that can be read back.
const RESET_BITS: u8 = 0x0e;

/// System control port A (Intel ICH10 data sheet, section 13.7.3).
const PORT_A: u16 = 0x92;
/// Its bit that resets when it is set; the other one opens address line 20.
const FAST_RESET: u8 = 0x01;
const A20: u8 = 0x02;

/// The power registers.
pub struct This;

impl Kind for This {
    type Spec = Switch;
    const NAME: &'static str = "power";
    const FLAG: &'static str = "power";
    const SUMMARY: &'static str = "the registers that turn the machine off or reset it";
    const BARE: &'static str = "enabled";
    const EXAMPLE: &'static str = "on";
    const PRESENCE: Presence = Presence::Standard("on");

    fn build(spec: &Switch, _: &Kit<'_>) -> Result<Body> {
        let window = |(port, role, value)| Window {
            space: Space::Port,
            base: u64::from(port),
            len: 1,
            lazy: &[],
            registers: Box::new(Register { role, value }),
        };
        let registers = [
            (SLEEP_CONTROL, Role::Sleep, 0),
            (SLEEP_STATUS, Role::Status, 0),
            (RESET, Role::Reset, 0),
            (RESET_CONTROL, Role::ResetControl, 0),
            (PORT_A, Role::PortA, A20),
        ];
        Ok(spec.body(|| Chip { windows: registers.map(window).into(), ..Chip::default() }))
    }
}

#[derive(Clone, Copy)]
enum Role {
    Sleep,
    Status,
    Reset,
    ResetControl,
    PortA,
}

struct Register {
    role: Role,
    value: u8,
}

impl Registers for Register {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        if let Some(byte) = data.first_mut() {
            *byte = self.value;
        }
    }

    fn write(&mut self, _: u64, data: &[u8]) -> Effect {
        let Some(&value) = data.first() else { return Effect::None };
        match self.role {
            Role::Sleep if value == SLEEP_ENABLE | SLEEP_TYPE_OFF << 2 => return Effect::Off,
            // There is no other sleep; writing ones clears the wake status.
            Role::Sleep => {}
            Role::Status => self.value &= !(value & WAKE_STATUS),
            Role::Reset if value == RESET_VALUE => return Effect::Reset,
            Role::Reset => {}
            Role::ResetControl => {
                let before = std::mem::replace(&mut self.value, value & RESET_BITS);
                if value & !before & RESET_CPU != 0 {
                    return Effect::Reset;
                }
            }
            Role::PortA => {
                self.value = value & A20;
                if value & FAST_RESET != 0 {
                    return Effect::Reset;
                }
            }
        }
        Effect::None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kinds::tests::{Driven, Fixture};

    fn effects(chip: &mut Driven, port: u16) -> Vec<(u8, Effect)> {
        let all = (0..=255).map(|value| (value, chip.write(u64::from(port), &[value])));
        all.filter(|(_, effect)| *effect != Effect::None).collect()
    }

    #[test]
    fn only_soft_off_turns_off_and_only_the_reset_value_resets() {
        let mut chip = Fixture::default().chip::<This>("on");
        assert_eq!(effects(&mut chip, SLEEP_CONTROL), [(0x34, Effect::Off)]);
        assert_eq!(effects(&mut chip, SLEEP_STATUS), []);
        assert_eq!(effects(&mut chip, RESET), [(RESET_VALUE, Effect::Reset)]);
        assert_eq!(chip.read(u64::from(SLEEP_STATUS), 1), [0]);
    }

    #[test]
    fn the_chipset_resets_when_the_bit_goes_up() {
        let mut chip = Fixture::default().chip::<This>("on");
        let port = u64::from(RESET_CONTROL);
        assert_eq!(chip.write(port, &[0x02]), Effect::None);
        assert_eq!(chip.read(port, 1), [0x02]);
        assert_eq!(chip.write(port, &[0x06]), Effect::Reset);
        assert_eq!(chip.write(port, &[0x0e]), Effect::None, "it is up already");
    }

    #[test]
    fn port_a_resets_and_remembers_address_line_20() {
        let mut chip = Fixture::default().chip::<This>("on");
        let port = u64::from(PORT_A);
        assert_eq!(chip.read(port, 1), [A20]);
        assert_eq!(chip.write(port, &[0]), Effect::None);
        assert_eq!(chip.read(port, 1), [0]);
        assert_eq!(chip.write(port, &[1]), Effect::Reset);
    }
}
