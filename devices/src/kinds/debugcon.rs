//! The debug console: what firmware and test kernels write to port 0xe9 or 0x402 appears on the host.
//!
//! Reading either port gives 0xe9, by which a guest finds out that somebody listens. An access wider than a byte
//! writes its low byte. Output goes out line by line; there is no way to make a guest wait, so what it writes
//! faster than the host takes it is dropped beyond a mebibyte.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use base::bus::{Effect, Registers};
use base::host::Host;
use base::{Doing, Fail, Result, Why};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::catalog::{Body, Chip, Kind, Kit, Presence, Space, Window};
use crate::line_end::{Chosen, LineEnd};
use crate::outlet::{Flow, Outlet};

const PORTS: [u64; 2] = [0xe9, 0x402];
const LISTENING: u8 = 0xe9;
/// Bytes after which a line goes out before its end.
const LONG_LINE: usize = 512;

/// A place for the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum To {
    /// mayfly's error stream.
    Stderr,
    /// Nowhere: the ports do not exist then.
    None,
}

/// The debug console.
pub struct This;

impl Kind for This {
    type Spec = LineEnd<To>;
    const NAME: &'static str = "debugcon";
    const FLAG: &'static str = "debugcon";
    const SUMMARY: &'static str = "where bytes written to ports 0xe9 and 0x402 go: stderr, none or file=PATH";
    const BARE: &'static str = "to";
    const EXAMPLE: &'static str = "stderr";
    const PRESENCE: Presence = Presence::Standard("stderr");

    fn check(spec: &LineEnd<To>, name: &str) -> Result<()> {
        spec.check(name)
    }

    fn claim(spec: &LineEnd<To>, name: &str, host: &dyn Host) -> Result<Vec<File>> {
        Ok(spec.claim(name, host)?.into_iter().collect())
    }

    fn build(spec: &LineEnd<To>, kit: &Kit<'_>) -> Result<Body> {
        let role = format!("{} output", kit.name);
        let fd: OwnedFd = match spec.choose(To::Stderr, kit.name, kit.host)? {
            Chosen::File(file) => file.into(),
            Chosen::Place(To::Stderr) => {
                kit.host.stderr().doing(Why::Host, || format!("share stderr as the {role}"))?
            }
            Chosen::Place(To::None) => return Ok(Body::Absent),
        };
        let outlet = Outlet::new(fd).doing(Why::Host, || format!("look at the {role}"))?;
        let outlet = Arc::new(Mutex::new(outlet));
        let window = |base| Window {
            space: Space::Port,
            base,
            len: 1,
            lazy: &[],
            registers: Box::new(Console(outlet.clone())),
        };
        Ok(Body::Chip(Chip {
            windows: PORTS.map(window).into(),
            finish: Some(Box::new(move |patience| {
                outlet.lock().unwrap_or_else(PoisonError::into_inner).finish(&role, patience).map(meaning)
            })),
            ..Chip::default()
        }))
    }
}

struct Console(Arc<Mutex<Outlet>>);

impl Registers for Console {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        if let Some(byte) = data.first_mut() {
            *byte = LISTENING;
        }
    }

    fn write(&mut self, _: u64, data: &[u8]) -> Effect {
        let Some(byte) = data.first() else { return Effect::None };
        let mut outlet = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        outlet.push(*byte);
        // There is no lane to wait for the host: an outlet that is stuck is tried again with the next line.
        if *byte != b'\n' && !outlet.len().is_multiple_of(LONG_LINE) {
            return Effect::None;
        }
        meaning(outlet.flush())
    }
}

/// What the way of the output means for the run: nothing, if nobody wants to read it.
fn meaning(flow: Flow) -> Effect {
    match flow {
        Flow::Drained | Flow::Stuck | Flow::Closed => Effect::None,
        Flow::Broken(error) => {
            Effect::Broken(Fail::new(Why::Host, "write the debug console output").because(error).summary())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kinds::tests::Fixture;
    use std::time::Duration;

    #[test]
    fn bytes_appear_line_by_line_and_the_rest_at_the_end() {
        let fixture = Fixture::default();
        let mut chip = fixture.chip::<This>("stderr");
        for port in PORTS {
            assert_eq!(chip.read(port, 1), [LISTENING], "port {port:#x}");
        }
        for byte in b"one\ntw" {
            chip.write(0xe9, &[*byte, 0xff]);
        }
        assert_eq!(fixture.output(), b"one\n");
        chip.write(0x402, b"o");
        assert_eq!((chip.body.finish.take().unwrap())(Duration::ZERO).unwrap(), Effect::None);
        assert_eq!(fixture.output(), b"two");
    }

    #[test]
    fn goes_to_a_file_or_nowhere_but_not_to_both() {
        let fixture = Fixture::default();
        let mut chip = fixture.chip::<This>("file=log");
        chip.write(0xe9, b"\n");
        assert_eq!(fixture.file(), b"\n");
        assert!(fixture.absent::<This>("none"));
        let fail = fixture.build::<This>("stderr,file=log").err().unwrap();
        assert_eq!(fail.why, Why::Usage, "{fail}");
    }

    #[test]
    fn a_guest_that_floods_it_costs_bounded_memory_and_does_not_block() {
        let fixture = Fixture::default();
        let mut chip = fixture.chip::<This>("stderr");
        for n in 0..2_000_000u32 {
            chip.write(0xe9, &[if n % 4096 == 0 { b'\n' } else { b'x' }]);
        }
        let fail = (chip.body.finish.take().unwrap())(Duration::ZERO).unwrap_err();
        assert_eq!(fail.summary(), "write the last 1048576 bytes of debugcon output: nobody takes them");
    }
}
