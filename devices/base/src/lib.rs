//! What devices stand on. Base knows no device, no hypervisor and no command line.

pub mod bus;
pub mod clock;
pub mod crew;
pub mod disk;
pub mod fail;
pub mod files;
pub mod host;
pub mod irq;
pub mod lane;
pub mod memory;
pub mod meter;
pub mod node;
pub mod ports;
pub mod sys;
pub mod throttle;

pub use fail::{Doing, Fail, Fault, Result, Why};
