//! `mayfly lab`: one command on an emulated host of its own, as if it ran here.

use std::ffi::OsString;
use std::io::{self, IsTerminal};
use std::os::fd::AsFd;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use agent::client::{Process, Remote};
use agent::wire::{Outcome, Size};
use base::sys::signals;
use base::{Doing, Fail, Result, Why};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::Signal;
use rustix::termios::{OptionalActions, OutputModes, tcgetattr, tcgetwinsize, tcsetattr};

use super::{Command, Host, Options};
use crate::outcome::code;
use crate::{log, terminal};

/// Signals that go to the command; the last one tells of a new size of the terminal.
const SIGNALS: [Signal; 5] = [Signal::INT, Signal::TERM, Signal::HUP, Signal::QUIT, Signal::WINCH];

/// How a command ended.
pub struct Ended {
    /// The exit code a shell would give it, or 124 when the time was up.
    pub code: u8,
    /// Why some of its output could not be written here.
    pub lost: Option<io::Error>,
}

impl Ended {
    fn with(code: u8) -> Ended {
        Ended { code, lost: None }
    }
}

/// Runs a command on an emulated host with this process's directory, environment and standard streams.
///
/// Where standard input and output are a terminal, the command has one. Signals that would end this process go to
/// the command instead, once it runs.
///
/// # Errors
/// The emulated host cannot be had, or ends before the command does.
pub fn run(options: &Options, timeout: Option<Duration>, argv: &[OsString]) -> Result<Ended> {
    let deadline = timeout.map(|timeout| Instant::now() + timeout);
    // Before any thread is started, so that all of them leave the signals to one.
    let numbers = SIGNALS.map(Signal::as_raw);
    let signals = signals::divert(&numbers).doing(Why::Host, || "divert signals")?;
    let remote: Arc<Mutex<Option<Remote>>> = Arc::default();
    std::thread::Builder::new()
        .name("signals".into())
        .spawn({
            let remote = remote.clone();
            move || forward(&signals, &remote)
        })
        .doing(Why::Host, || "start a thread")?;

    let left = |deadline: Option<Instant>| match deadline {
        Some(deadline) => deadline.saturating_duration_since(Instant::now()),
        None => Duration::MAX,
    };
    let host = match Host::boot_within(options, left(deadline)) {
        Err(_) if left(deadline).is_zero() => return Ok(Ended::with(overdue(timeout))),
        host => host?,
    };
    let command = local(argv)?;
    // A terminal in raw mode leaves the line discipline to the other side.
    let raw = if command.terminal.is_some() { raw()? } else { None };
    let process = host.start(command)?;
    *remote.lock().unwrap_or_else(PoisonError::into_inner) = Some(process.remote());
    let outputs = process.outputs();
    let ended = match wait(process, deadline)? {
        Some(ended) => ended.map_err(|cause| host.lost(&argv_name(argv), &cause))?,
        None => {
            drop(raw);
            return Ok(Ended::with(overdue(timeout)));
        }
    };
    drop(raw);
    if let Outcome::NoProgram(errno) | Outcome::NoDirectory(errno) = ended {
        let cause = io::Error::from_raw_os_error(errno);
        log::tell(&format!(
            "error: {}",
            Fail::new(Why::Missing, format!("run {}", argv_name(argv))).because(cause)
        ));
    }
    Ok(Ended { code: ended.code(), lost: outputs.error() })
}

fn argv_name(argv: &[OsString]) -> String {
    argv.first().map_or_else(String::new, |name| name.display().to_string())
}

fn overdue(timeout: Option<Duration>) -> u8 {
    log::note(&format!("the time was up after {:?}", timeout.unwrap_or_default()));
    code::TIMED_OUT
}

/// The command with the streams of this process.
fn local(argv: &[OsString]) -> Result<Command> {
    let copy =
        |fd: &dyn AsFd| fd.as_fd().try_clone_to_owned().doing(Why::Host, || "share the standard streams");
    let both = io::stdin().is_terminal() && io::stdout().is_terminal();
    Ok(Command {
        stdin: Some(copy(&io::stdin())?),
        stdout: Some(copy(&io::stdout())?),
        stderr: Some(copy(&io::stderr())?),
        terminal: both.then(size),
        ..Command::here(argv.iter().cloned())?
    })
}

/// The size of the terminal.
fn size() -> Size {
    match tcgetwinsize(io::stdout()) {
        Ok(size) if size.ws_row > 0 && size.ws_col > 0 => Size { rows: size.ws_row, columns: size.ws_col },
        _ => Size { rows: 24, columns: 80 },
    }
}

/// Makes the terminal raw in both directions: the terminal of the command has done its part for output, too.
fn raw() -> Result<Option<terminal::Raw>> {
    let switching = || "switch the terminal to raw mode";
    let raw = terminal::enter().doing(Why::Host, switching)?;
    if raw.is_some() {
        let mut modes = tcgetattr(io::stdin()).doing(Why::Host, switching)?;
        modes.output_modes.remove(OutputModes::OPOST);
        tcsetattr(io::stdin(), OptionalActions::Now, &modes).doing(Why::Host, switching)?;
    }
    Ok(raw)
}

/// Waits for the command's end; `None` when the time is up first.
fn wait(process: Process, deadline: Option<Instant>) -> Result<Option<io::Result<Outcome>>> {
    let Some(deadline) = deadline else { return Ok(Some(process.wait())) };
    let (tell, told) = channel();
    std::thread::Builder::new()
        .name("wait".into())
        .spawn(move || tell.send(process.wait()))
        .doing(Why::Host, || "start a thread")?;
    match told.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
        Ok(ended) => Ok(Some(ended)),
        Err(RecvTimeoutError::Timeout) => Ok(None),
        Err(RecvTimeoutError::Disconnected) => Err(Fail::new(Why::Host, "wait for the command")),
    }
}

/// Passes signals on. Without a command yet they end this process as they would have, and QEMU with it.
fn forward(signals: &impl AsFd, remote: &Mutex<Option<Remote>>) {
    loop {
        if rustix::io::retry_on_intr(|| poll(&mut [PollFd::new(signals, PollFlags::IN)], None)).is_err() {
            return;
        }
        while let Some(number) = signals::next(signals) {
            let small = u8::try_from(number).unwrap_or(u8::MAX);
            // A command that has ended meanwhile needs no signal.
            match &*remote.lock().unwrap_or_else(PoisonError::into_inner) {
                Some(remote) if number == Signal::WINCH.as_raw() => drop(remote.resize(size())),
                Some(remote) => drop(remote.signal(small)),
                None if number == Signal::WINCH.as_raw() => {}
                None => {
                    terminal::restore();
                    std::process::exit(i32::from(small.saturating_add(128)));
                }
            }
        }
    }
}
