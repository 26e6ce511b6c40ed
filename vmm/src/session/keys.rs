//! The operator's keyboard as that of the command: the terminal is raw, each key goes to the guest, but for `Ctrl-a x`.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};

use agent::wire::Size;
use base::sys::signals;
use base::{Doing, Result, Why};
use devices::escape::{CTRL_A, Escape, HELP, Key};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::Signal;

use crate::terminal;

/// Readable after each change of the terminal's size. To be made before any thread starts that is to leave it alone.
pub fn changes() -> Result<OwnedFd> {
    signals::divert(&[Signal::WINCH.as_raw()]).doing(Why::Host, || "divert signals")
}

/// Waits for a change of the size; `None` if there can be none any more.
pub fn await_change(changes: &OwnedFd) -> Option<Size> {
    rustix::io::retry_on_intr(|| poll(&mut [PollFd::new(changes, PollFlags::IN)], None)).ok()?;
    while signals::next(changes).is_some() {}
    Some(terminal::size())
}

/// The keys for the command, as a pipe; a thread reads them and calls `quit` at `Ctrl-a x`.
pub fn filter(quit: impl FnOnce() + Send + 'static) -> Result<OwnedFd> {
    let doing = || "read the keyboard for the command";
    let (keys, typed) = pipe_with(PipeFlags::CLOEXEC).doing(Why::Host, doing)?;
    let stdin = io::stdin().as_fd().try_clone_to_owned().doing(Why::Host, doing)?;
    let carry = move || {
        let mut typed = File::from(typed);
        let mut escape = Escape::default();
        let mut bytes = [0; 4096];
        while let Ok(n @ 1..) = rustix::io::retry_on_intr(|| rustix::io::read(&stdin, &mut bytes)) {
            let mut out = Vec::with_capacity(n);
            for byte in bytes.iter().take(n) {
                match escape.feed(*byte) {
                    Key::Type(byte) => out.push(byte),
                    Key::TypeEscaped(byte) => out.extend([CTRL_A, byte]),
                    Key::Wait | Key::Break => {}
                    // A terminal that does not take it needs no help.
                    Key::Help => drop(io::stderr().write_all(HELP.as_bytes())),
                    Key::Quit => return quit(),
                }
            }
            // The command may have ended.
            if typed.write_all(&out).is_err() {
                return;
            }
        }
    };
    std::thread::Builder::new().name("keys".into()).spawn(carry).doing(Why::Host, doing)?;
    Ok(keys)
}
