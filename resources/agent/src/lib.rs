//! The wire: how a host starts programs in a guest and speaks with them, over one stream of bytes.
//!
//! Both ends are here: [`server`] is the guest's, which starts the programs, [`client`] is the host's.
//!
#![doc = include_str!("../../../docs/agent-protocol.md")]
#![forbid(unsafe_code)]

mod backlog;
pub mod client;
mod clock;
pub mod flow;
pub mod heard;
mod kernel_log;
pub mod layer;
pub mod orders;
pub mod parcel;
mod process;
pub mod server;
mod user;
pub mod wire;

pub use process::enter_terminal;

/// Programs that the agent itself is, for a host to start: this executable with one of these words.
pub mod programs {
    /// The executable, as a program that the agent starts finds it.
    pub const PATH: &str = "/proc/self/exe";
    /// Waits for ever.
    pub const WAIT: &str = "wait";
    /// Packs what is at the path that follows, to standard output.
    pub const PACK: &str = "pack";
    /// Unpacks standard input to the place that follows, under the name that follows that.
    pub const UNPACK: &str = "unpack";
    /// Writes the layer of the root to standard output.
    pub const LAYER: &str = "layer";
}
