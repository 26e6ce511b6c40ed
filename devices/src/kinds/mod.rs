//! One file for each device.

pub mod balloon;
pub mod blk;
pub mod console;
pub mod debugcon;
pub mod debugexit;
pub mod i8042;
pub mod net;
pub mod power;
pub mod pvpanic;
pub mod rng;
pub mod rtc;
pub mod serial;
pub mod virtiofs;
pub mod vsock;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::catalog::{Body, Chip};

/// All there is to say about a device that a machine has or has not.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Switch {
    /// on: the machine has the device; off: it has none.
    #[serde(default = "on")]
    pub enabled: bool,
}

fn on() -> bool {
    true
}

impl Switch {
    fn body(self, chip: impl FnOnce() -> Chip) -> Body {
        if self.enabled { Body::Chip(chip()) } else { Body::Absent }
    }
}

#[cfg(test)]
mod tests;
