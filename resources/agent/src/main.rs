//! The guest agent: process 1 of an initial RAM disk, told by the kernel command line what to be.
//!
//! By default it says hello and powers off. With orders in its RAM disk it is a guest for commands;
//! `mayfly.mode=host` makes it the emulated host. Both serve the wire;
//! `mayfly.do=` and `mayfly.then=` are for tests (see `init`).
#![forbid(unsafe_code)]

mod checks;
mod host;
mod init;
mod mounts;
mod network;
mod root;
mod session;

use std::ffi::OsString;
use std::process::ExitCode;

/// First argument of the command that enters a terminal before it becomes the program that follows.
const ON_TERMINAL: &str = "on-terminal";

fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    if let Some((first, rest)) = arguments.split_first()
        && first == ON_TERMINAL
    {
        return ExitCode::from(agent::enter_terminal(rest));
    }
    if std::process::id() != 1 {
        eprintln!("error: run the agent: it is process 1 of a guest, not a command");
        return ExitCode::from(2);
    }
    let result = init::run();
    if let Err(error) = result {
        eprintln!("error: run the guest: {error}");
        // Not a return: that would be a kernel panic. The one thing left that may fail is this.
        let _ = init::end("poweroff", "");
    }
    ExitCode::SUCCESS
}
