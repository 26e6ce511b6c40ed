//! The debug exit: a guest ends its run with a code of its choice by writing it to port 0xf4 or 0x501.
//!
//! The low byte of what is written is the exit code, whatever the width of the access. QEMU's `isa-debug-exit`
//! makes `value * 2 + 1` of it; that is not done here, so a guest can end with success.

use base::Result;
use base::bus::{Effect, Registers};

use super::Switch;
use crate::catalog::{Body, Chip, Kind, Kit, Presence, Space, Window};

const PORTS: [u64; 2] = [0xf4, 0x501];

/// The debug exit.
pub struct This;

impl Kind for This {
    type Spec = Switch;
    const NAME: &'static str = "debugexit";
    const FLAG: &'static str = "debug-exit";
    const SUMMARY: &'static str = "ports 0xf4 and 0x501: what a guest writes there is the run's exit code";
    const BARE: &'static str = "enabled";
    const EXAMPLE: &'static str = "on";
    const PRESENCE: Presence = Presence::Standard("on");

    fn build(spec: &Switch, _: &Kit<'_>) -> Result<Body> {
        let window = |base| Window { space: Space::Port, base, len: 1, lazy: &[], registers: Box::new(Exit) };
        Ok(spec.body(|| Chip { windows: PORTS.map(window).into(), ..Chip::default() }))
    }
}

struct Exit;

impl Registers for Exit {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }
    fn write(&mut self, _: u64, data: &[u8]) -> Effect {
        data.first().map_or(Effect::None, |code| Effect::Exit(*code))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kinds::tests::Fixture;

    #[test]
    fn the_low_byte_is_the_exit_code_in_any_width() {
        let mut chip = Fixture::default().chip::<This>("on");
        for port in PORTS {
            for value in [&[7u8][..], &[7, 1], &[7, 2, 3, 4]] {
                assert_eq!(chip.write(port, value), Effect::Exit(7), "port {port:#x}, {} bytes", value.len());
            }
            assert_eq!(chip.write(port, &[0]), Effect::Exit(0), "success can be told");
        }
    }
}
