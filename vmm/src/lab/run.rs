//! `mayfly lab`: one command on an emulated host of its own, as if it ran here.

use std::ffi::OsString;
use std::io::{self, IsTerminal};
use std::os::fd::AsFd;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use agent::client::{Process, Remote};
use agent::wire::Outcome;
use base::sys::signals;
use base::{Doing, Fail, Result, Why};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::Signal;

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
    /// The signal that ended it all before the command began.
    pub unborn: Option<i32>,
}

impl Ended {
    fn with(code: u8) -> Ended {
        Ended { code, lost: None, unborn: None }
    }
}

/// What comes first: the emulated host, or a signal.
enum News {
    Booted(Result<Host>),
    Signal(i32),
}

/// Runs a command on an emulated host with this process's directory, environment and standard streams.
///
/// Where standard input and output are a terminal, the command has one. Signals that would end this process go to
/// the command instead, once it runs; before that they end the wait for it, and the process has to end soon. `beside` is
/// given the host when it is up.
///
/// # Errors
/// The emulated host cannot be had, or ends before the command does.
pub fn run(
    options: &Options,
    timeout: Option<Duration>,
    argv: &[OsString],
    beside: impl FnOnce(Weak<Host>),
) -> Result<Ended> {
    let deadline = timeout.map(|timeout| Instant::now() + timeout);
    // Before any thread is started, so that all of them leave the signals to one.
    let numbers = SIGNALS.map(Signal::as_raw);
    let signals = signals::divert(&numbers).doing(Why::Host, || "divert signals")?;
    let remote: Arc<Mutex<Option<Remote>>> = Arc::default();
    let (tell, told) = channel();
    std::thread::Builder::new()
        .name("signals".into())
        .spawn({
            let (remote, tell) = (remote.clone(), tell.clone());
            move || forward(&signals, &remote, &tell)
        })
        .doing(Why::Host, || "start a thread")?;

    let host = match boot(options, deadline, tell, &told)? {
        Some(News::Booted(host)) => host?,
        Some(News::Signal(number)) => {
            return Ok(Ended { unborn: Some(number), ..Ended::with(code::signalled(number)) });
        }
        None => return Ok(Ended::with(overdue(timeout))),
    };
    let command = local(argv)?;
    // A terminal in raw mode leaves the line discipline to the other side.
    let raw = if command.terminal.is_some() { terminal::enter_both_ways()? } else { None };
    let process = host.start(command)?;
    let host = Arc::new(host);
    beside(Arc::downgrade(&host));
    {
        let mut remote = remote.lock().unwrap_or_else(PoisonError::into_inner);
        // One that came while there was a host and no command yet.
        if let Ok(News::Signal(number)) = told.try_recv() {
            let _ = process.remote().signal(number_of(number));
        }
        *remote = Some(process.remote());
    }
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
        log::tell(&format!("error: {}", unrunnable(&argv_name(argv), cause)));
    }
    Ok(Ended { lost: outputs.error(), ..Ended::with(ended.code()) })
}

/// Boots the host in a thread of its own, which may wait for a download, for a lock, for QEMU. `None` when the time is up
/// first. Who does not wait for it to the end ends the process: the thread dies with that, and its children with it.
fn boot(
    options: &Options,
    deadline: Option<Instant>,
    tell: Sender<News>,
    told: &Receiver<News>,
) -> Result<Option<News>> {
    let options = options.clone();
    let left = deadline.map_or(Duration::MAX, |deadline| deadline.saturating_duration_since(Instant::now()));
    std::thread::Builder::new()
        .name("boot".into())
        .spawn(move || tell.send(News::Booted(Host::boot(&options))))
        .doing(Why::Host, || "start a thread")?;
    match told.recv_timeout(left) {
        Ok(news) => Ok(Some(news)),
        Err(RecvTimeoutError::Timeout) => Ok(None),
        Err(RecvTimeoutError::Disconnected) => Err(Fail::new(Why::Host, "wait for the emulated host")),
    }
}

fn argv_name(argv: &[OsString]) -> String {
    argv.first().map_or_else(String::new, |name| name.display().to_string())
}

/// The failure to run the program `name` there, where its files are those of this machine.
fn unrunnable(name: &str, cause: io::Error) -> Fail {
    let hint = match cause.kind() {
        io::ErrorKind::NotFound if name.contains('/') => "check the name",
        io::ErrorKind::NotFound => "check the name; it is looked for in the directories of PATH",
        io::ErrorKind::PermissionDenied => "make it executable: chmod +x",
        _ if cause.raw_os_error() == Some(libc::ENOEXEC) => "name its interpreter: sh FILE",
        _ => "see whether it runs here",
    };
    Fail::new(Why::Missing, format!("run {name}")).because(cause).hint(hint)
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
        terminal: both.then(terminal::size),
        ..Command::here(argv.iter().cloned())?
    })
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

/// Passes signals on: to the command, or to whoever waits for it.
fn forward(signals: &impl AsFd, remote: &Mutex<Option<Remote>>, tell: &Sender<News>) {
    loop {
        if rustix::io::retry_on_intr(|| poll(&mut [PollFd::new(signals, PollFlags::IN)], None)).is_err() {
            return;
        }
        while let Some(number) = signals::next(signals) {
            // A command that has ended meanwhile needs no signal.
            match &*remote.lock().unwrap_or_else(PoisonError::into_inner) {
                Some(remote) if number == Signal::WINCH.as_raw() => drop(remote.resize(terminal::size())),
                Some(remote) => drop(remote.signal(number_of(number))),
                None if number == Signal::WINCH.as_raw() => {}
                None => drop(tell.send(News::Signal(number))),
            }
        }
    }
}

/// The number of a signal as the wire has it.
fn number_of(signal: i32) -> u8 {
    u8::try_from(signal).unwrap_or(u8::MAX)
}
