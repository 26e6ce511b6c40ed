//! The wire: how a host starts programs in a guest and speaks with them, over one stream of bytes.
//!
//! Both ends are here: [`server`] is the guest's, which starts the programs, [`client`] is the host's. The stream
//! may be a virtio console port, a vsock connection or a socket pair; it has to be reliable and ordered, nothing
//! more.
//!
//! # Protocol, version 2
//!
//! Both ends send frames. A frame is a length (32 bits, of what follows the length), a kind (8 bits) and a body;
//! all numbers are little endian, byte strings are preceded by their length in 32 bits, lists by their count.
//!
//! | kind | frame | from | body |
//! |---|---|---|---|
//! | 1 | hello | both, first | `mayfly`, version (16) |
//! | 2 | exec | host | id (32), argv, environment, directory, user (a name or number, `:` and a group; empty: root), terminal size? |
//! | 3 | data | both | id, stream (8: stdin 0, stdout 1, stderr 2), bytes |
//! | 4 | end | both | id, stream: no more data will come |
//! | 5 | stop | both | id, stream: no more data is wanted, what arrives is dropped |
//! | 6 | credit | both | id, stream, bytes (32) that may be sent in addition |
//! | 7 | resize | host | id, rows (16), columns (16) |
//! | 8 | signal | host | id, number (8), to the program's process group |
//! | 9 | exit | guest | id, outcome; the last frame of that id |
//! | 10 | shutdown | host | write everything to disk and power off |
//! | 11 | clock | host | seconds (64) and nanoseconds (32) since 1970: the time it is |
//! | 12 | message | guest | level (8), microseconds since the kernel's start (64), text: what the kernel said |
//! | 13 | trouble | guest, in place of hello | text: why the guest cannot be set up |
//!
//! The guest speaks first. The host chooses ids and may use one again after its exit. Each stream of each program
//! starts with a credit of [`WINDOW`](flow::WINDOW) bytes, and who receives gives more as it gets rid of them. So
//! a slow reader stops its own program only, and neither end has to hold more than a window per stream. Who breaks
//! a rule is cut off: the stream has no way back to a known state.
#![forbid(unsafe_code)]

mod backlog;
pub mod client;
mod clock;
pub mod flow;
mod kernel_log;
pub mod orders;
mod process;
pub mod server;
mod user;
pub mod wire;

pub use process::enter_terminal;
