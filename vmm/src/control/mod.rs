//! Running VMs from the outside: who is there, and what one can ask of them. docs/control.md has the wire.
//!
//! There is no daemon. A VM that can be reached has a directory of its own in its user's [`place`], with a file that it holds
//! locked as long as it lives and a socket that its control lane answers. Who finds the lock free finds what is left of a VM
//! that was killed, and clears it away.

pub mod caller;
pub mod place;
pub mod presence;
pub mod registry;
pub mod server;
pub mod wire;

pub use registry::{About, Entry, Record, Registry, State};
