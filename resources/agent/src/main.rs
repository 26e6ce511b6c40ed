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
mod system;

use std::ffi::OsString;
use std::io::{self, BufWriter};
use std::path::Path;
use std::process::ExitCode;

use agent::orders::CHANGES;
use agent::{layer, parcel, programs};

/// First argument of the command that enters a terminal before it becomes the program that follows.
const ON_TERMINAL: &str = "on-terminal";
/// First argument of the command that serves another wire; the port to call follows.
const ANOTHER: &str = "another";

fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    if let Some((first, rest)) = arguments.split_first()
        && let Some(code) = first.to_str().and_then(|first| task(first, rest))
    {
        return code;
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

/// What else the agent's program is, by its first argument: programs that the agent, or the host by it, starts.
fn task(name: &str, arguments: &[OsString]) -> Option<ExitCode> {
    let first = arguments.first().map(Path::new);
    let done = match (name, first, arguments.get(1)) {
        (ON_TERMINAL, ..) => return Some(ExitCode::from(agent::enter_terminal(arguments))),
        (ANOTHER, Some(port), None) => session::serve_another(port.to_str().unwrap_or_default()),
        (programs::WAIT, None, None) => loop {
            std::thread::park();
        },
        (programs::PACK, Some(path), None) => {
            let mut out = BufWriter::with_capacity(64 << 10, io::stdout().lock());
            parcel::pack(path, &mut out).map(|left_out| {
                if left_out > 0 {
                    eprintln!("{left_out} special files were left out");
                }
            })
        }
        (programs::UNPACK, Some(place), Some(name)) => parcel::unpack(&mut io::stdin().lock(), place, name),
        (programs::LAYER, None, None) => {
            let out = BufWriter::with_capacity(64 << 10, io::stdout().lock());
            let Err(error) = layer::pack(Path::new(CHANGES), out) else { return Some(ExitCode::SUCCESS) };
            // An `errno` is all that whoever asked for it can take.
            let code = error.raw_os_error().and_then(|errno| u8::try_from(errno).ok());
            return Some(ExitCode::from(code.unwrap_or(u8::MAX)));
        }
        (system::SERVE, Some(port), None) => session::serve_in_system(port.to_str().unwrap_or_default()),
        (system::TROUBLE, Some(port), Some(text)) => {
            session::tell_of_system(port.to_str().unwrap_or_default(), &text.to_string_lossy())
        }
        _ => return None,
    };
    Some(match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    })
}
