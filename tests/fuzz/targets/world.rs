//! What stands around a fuzzed device: guest memory, a lane, and what its maker asks for.

use std::sync::Arc;

use base::clock::HostClock;
use base::host::fake::FakeHost;
use base::irq::{FakeLine, SharedLine};
use base::lane::{Lane, LaneHandle};
use base::memory::Memory;
use devices::catalog::{Body, Entry, Kit};
use devices::virtio::Device;

/// As signal(7) numbers it.
const SIGPIPE: i32 = 13;

/// Memory and a lane that all inputs share.
pub struct World {
    pub memory: Memory,
    pub lane: LaneHandle,
}

impl World {
    /// With RAM in these pieces (guest address, length in bytes).
    pub fn new(ram: &[(u64, u64)]) -> World {
        // A writer whose reader has gone wants to hear so; that it is not ended is the doing of a `main` of Rust's.
        base::sys::signals::block(&[SIGPIPE]).expect("block a signal");
        let lane = Lane::spawn("fuzz", |_| ()).expect("start a lane");
        World { memory: Memory::new(ram).expect("reserve memory"), lane }
    }

    /// Builds the device that `text` describes; `None` if it is no virtio device, or cannot be built.
    pub fn build(&self, entry: &dyn Entry, text: &str, host: &FakeHost) -> Option<Box<dyn Device>> {
        let line = |_| Arc::new(FakeLine::default()) as SharedLine;
        let kit = Kit {
            name: "fuzzed",
            host,
            clock: Arc::new(HostClock::default()),
            memory: &self.memory,
            lines: &line,
            lane: &self.lane,
            overhear: Arc::new(|_| ()),
        };
        match entry.build(&entry.parse(text).ok()?, &kit).ok()? {
            Body::Virtio(device) => Some(device),
            _ => None,
        }
    }
}
