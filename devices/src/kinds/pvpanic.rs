//! The panic port: a guest kernel that panics says so by a write to port 0x505.
//!
//! Source: QEMU, docs/specs/pvpanic. Linux finds it by the firmware tables.

use base::Result;
use base::bus::{Effect, Registers};
use base::node::Node;

use super::Switch;
use crate::catalog::{Body, Chip, Kind, Kit, Presence, Space, Window};

const PORT: u16 = 0x505;
/// The guest has panicked.
const PANICKED: u8 = 1;
/// The guest has panicked and runs a crash kernel now.
const CRASH_LOADED: u8 = 2;

/// The panic port.
pub struct This;

impl Kind for This {
    type Spec = Switch;
    const NAME: &'static str = "pvpanic";
    const FLAG: &'static str = "pvpanic";
    const SUMMARY: &'static str = "port 0x505, by which a guest kernel tells that it has panicked";
    const BARE: &'static str = "enabled";
    const EXAMPLE: &'static str = "on";
    const PRESENCE: Presence = Presence::Standard("on");

    fn build(spec: &Switch, _: &Kit<'_>) -> Result<Body> {
        Ok(spec.body(|| Chip {
            windows: vec![Window {
                space: Space::Port,
                base: u64::from(PORT),
                len: 1,
                lazy: &[],
                registers: Box::new(Panic),
            }],
            node: Some(Node {
                name: "PEVT".to_owned(),
                hid: "QEMU0001",
                uid: 0,
                ports: vec![PORT..=PORT],
                memory: Vec::new(),
                irqs: Vec::new(),
            }),
            ..Chip::default()
        }))
    }
}

struct Panic;

impl Registers for Panic {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(events) = data.first_mut() {
            *events = PANICKED | CRASH_LOADED;
        }
    }
    fn write(&mut self, _: u64, data: &[u8]) -> Effect {
        // A crash kernel is about to tell more than the end of the run would: let it.
        let panicked =
            data.first().is_some_and(|events| events & PANICKED != 0 && events & CRASH_LOADED == 0);
        if panicked { Effect::Panicked } else { Effect::None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kinds::tests::Fixture;

    #[test]
    fn a_panic_is_told_and_a_crash_kernel_is_left_running() {
        let mut chip = Fixture::default().chip::<This>("on");
        assert_eq!(chip.read(0x505, 1), [3], "both events are offered");
        assert_eq!(chip.write(0x505, &[PANICKED]), Effect::Panicked);
        assert_eq!(chip.write(0x505, &[CRASH_LOADED]), Effect::None);
        assert_eq!(chip.write(0x505, &[0]), Effect::None);
        assert_eq!(chip.body.node.unwrap().hid, "QEMU0001");
    }
}
