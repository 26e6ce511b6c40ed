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
pub mod orders;
mod process;
pub mod server;
mod user;
pub mod wire;

pub use process::enter_terminal;
