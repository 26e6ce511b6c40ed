//! Programs of the guest: started with pipes or with a terminal.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use rustix::process::{Pid, PidfdFlags, pidfd_open};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use crate::user::{self, User};
use crate::wire::{Exec, Outcome, Size};

/// A program that runs, and this side's ends of its streams, none of which ever blocks.
pub(crate) struct Started {
    pub(crate) pid: Pid,
    /// Readable when the program has ended.
    pub(crate) pidfd: OwnedFd,
    pub(crate) stdin: Option<OwnedFd>,
    pub(crate) stdout: Option<OwnedFd>,
    pub(crate) stderr: Option<OwnedFd>,
    /// The master side, if it has a terminal.
    pub(crate) terminal: Option<OwnedFd>,
}

/// Starts a program. `trampoline` is the command that runs [`enter_terminal`] on the arguments that follow it.
pub(crate) fn start(exec: &Exec, trampoline: &[OsString]) -> Result<Started, Outcome> {
    let directory = OsStr::from_bytes(&exec.directory);
    match std::fs::metadata(directory) {
        Ok(found) if found.is_dir() => {}
        Ok(_) => return Err(Outcome::NoDirectory(rustix::io::Errno::NOTDIR.raw_os_error())),
        Err(error) => return Err(Outcome::NoDirectory(errno(&error))),
    }
    let user = match exec.user.as_slice() {
        [] => None,
        text => Some(std::str::from_utf8(text).ok().and_then(user::find).ok_or(Outcome::NoUser)?),
    };
    let started = match user {
        None => spawn(exec, directory, None, trampoline),
        Some(user) if user.is_here() => spawn(exec, directory, Some(&user), trampoline),
        // In Linux who one is is a matter of the thread. So pipes and terminal are the user's, too.
        Some(user) => std::thread::scope(|scope| {
            let work = || user.take_on().and_then(|()| spawn(exec, directory, Some(&user), trampoline));
            let done = std::thread::Builder::new().spawn_scoped(scope, work)?.join();
            done.unwrap_or_else(|_| Err(io::ErrorKind::Other.into()))
        }),
    };
    started.map_err(|error| Outcome::NoProgram(errno(&error)))
}

fn spawn(
    exec: &Exec,
    directory: &OsStr,
    user: Option<&User>,
    trampoline: &[OsString],
) -> io::Result<Started> {
    let mut words = exec.argv.iter().map(|word| OsStr::from_bytes(word));
    let mut command = match trampoline.split_first().filter(|_| exec.terminal.is_some()) {
        Some((program, first)) => {
            let mut command = Command::new(program);
            command.args(first);
            command
        }
        None => {
            let mut command = Command::new(words.next().unwrap_or_default());
            // A group of its own, so that a signal reaches what it has started, too.
            command.process_group(0);
            command
        }
    };
    command.args(words).env_clear().current_dir(directory);
    command.envs(exec.env.iter().map(|(name, value)| (OsStr::from_bytes(name), OsStr::from_bytes(value))));
    if let Some(user) = user.filter(|_| !exec.env.iter().any(|(name, _)| name == b"HOME")) {
        command.env("HOME", user.home());
    }
    match exec.terminal {
        Some(size) => spawn_on_terminal(command, size),
        None => spawn_on_pipes(command),
    }
}

fn spawn_on_pipes(mut command: Command) -> io::Result<Started> {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn()?;
    let started = Started {
        pidfd: pidfd_open(Pid::from_child(&child), PidfdFlags::empty())?,
        pid: Pid::from_child(&child),
        stdin: child.stdin.take().map(OwnedFd::from),
        stdout: child.stdout.take().map(OwnedFd::from),
        stderr: child.stderr.take().map(OwnedFd::from),
        terminal: None,
    };
    for end in [&started.stdin, &started.stdout, &started.stderr].into_iter().flatten() {
        rustix::io::ioctl_fionbio(end, true)?;
    }
    Ok(started)
}

fn spawn_on_terminal(mut command: Command, size: Size) -> io::Result<Started> {
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    unlockpt(&master)?;
    let slave = ioctl_tiocgptpeer(&master, OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    resize(&master, size)?;
    command.stdin(slave.try_clone()?).stdout(slave.try_clone()?).stderr(slave);
    let child = command.spawn()?;
    rustix::io::ioctl_fionbio(&master, true)?;
    Ok(Started {
        pid: Pid::from_child(&child),
        pidfd: pidfd_open(Pid::from_child(&child), PidfdFlags::empty())?,
        stdin: Some(master.try_clone()?),
        stdout: Some(master.try_clone()?),
        stderr: None,
        terminal: Some(master),
    })
}

/// Starts the server of another wire, if `command` names one: a process of its own, so that what it starts is its alone
/// to wait for, and ends with its wire.
pub(crate) fn start_another(command: &[OsString]) -> Option<(Pid, OwnedFd)> {
    let (program, arguments) = command.split_first()?;
    // Without one the host waits in vain, and says so.
    let child = Command::new(program).args(arguments).stdin(Stdio::null()).spawn().ok()?;
    let pid = Pid::from_child(&child);
    Some((pid, pidfd_open(pid, PidfdFlags::empty()).ok()?))
}

/// Tells a terminal its size; the program on it gets a `SIGWINCH`.
pub(crate) fn resize(master: impl AsFd, size: Size) -> io::Result<()> {
    Ok(tcsetwinsize(master, Winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 })?)
}

/// Becomes the leader of a session with the terminal on standard input, then the program `argv`; the child's
/// half of starting on a terminal, which needs a process of its own because nothing may run between fork and exec.
/// Returns only if that fails, with the exit code.
pub fn enter_terminal(argv: &[OsString]) -> u8 {
    let Some((program, arguments)) = argv.split_first() else { return 126 };
    let entered = rustix::process::setsid()
        .and_then(|_| rustix::process::ioctl_tiocsctty(rustix::stdio::stdin()))
        .map_err(io::Error::from);
    let error = match entered {
        Ok(()) => Command::new(program).args(arguments).exec(),
        Err(error) => error,
    };
    eprintln!("error: run {}: {error}", program.display());
    Outcome::NoProgram(errno(&error)).code()
}

/// The number of an I/O error.
fn errno(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(rustix::io::Errno::IO.raw_os_error())
}
