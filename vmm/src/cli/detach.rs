//! `mayfly run` as others will find it: by a name, and in the background.
//!
//! A run in the background is another process with the same command line, which leaves the terminal. It has its own end of
//! a pipe for standard input, through which it says its name once it is up; whoever started it waits for that, or for
//! its end.

use std::ffi::OsString;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use base::{Doing, Fail, Result, Why};
use clap::{Arg, ArgAction, ArgMatches, Command as Clap};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};

use super::{complain, say};
use crate::control::presence::{Presence, herald};
use crate::control::registry;
use crate::outcome::code;
use crate::plan::Plan;

/// The flag of the process in the background.
const DETACHED: &str = "detached";
/// The flag of the mayfly on an emulated host: what is to be done about names is done outside.
const THERE: &str = "on-emulated-host";

/// Adds the flags.
pub fn flags(run: Clap) -> Clap {
    let switch = |name| Arg::new(name).long(name).action(ArgAction::SetTrue);
    run.next_help_heading("Background")
        .arg(
            Arg::new("name")
                .long("name")
                .value_name("NAME")
                .help("What `mayfly ps`, `exec` and others call the VM [default: vm-PID]"),
        )
        .arg(switch("detach").short('d').help(
            "Leave the VM in the background once it is up, and print its name; `mayfly logs` shows its output",
        ))
        .arg(switch("rm").help("Keep neither its exit code nor its output; without -d nothing is kept anyway"))
        .arg(switch(DETACHED).hide(true).help("This is the process in the background"))
}

/// Whether this process is to start another in the background.
pub fn is_asked(matches: &ArgMatches) -> bool {
    matches.get_flag("detach") && !matches.get_flag(DETACHED) && !matches.get_flag(THERE)
}

/// Starts the run in the background, and waits until it is up; the exit code. `more` are words for it.
///
/// # Errors
/// The host has no process for it.
pub fn send(more: Vec<OsString>) -> Result<u8> {
    let doing = || "start a VM in the background";
    let (mut told, theirs) = pipe_with(PipeFlags::CLOEXEC)
        .map(|(told, theirs)| (File::from(told), theirs))
        .doing(Why::Host, doing)?;
    let program = std::env::current_exe().doing(Why::Host, doing)?;
    let flags = [format!("--{DETACHED}").into()].into_iter().chain(more);
    let words = super::lab::with_flags(std::env::args_os().skip(1), flags);
    let mut command = Command::new(program);
    let mut child = command.args(words).stdin(Stdio::from(theirs)).spawn().doing(Why::Host, doing)?;
    // It holds the other end.
    drop(command);
    let mut name = String::new();
    told.read_to_string(&mut name).doing(Why::Host, doing)?;
    if !name.is_empty() {
        return Ok(say(&name));
    }
    // It has said why.
    let ended = child.wait().doing(Why::Host, doing)?;
    Ok(ended.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(code::NOT_STARTED))
}

/// The process in the background, as far as whoever started it is concerned.
pub struct Detached {
    /// Where errors are seen until the VM is up.
    shown: Arc<Mutex<Option<OwnedFd>>>,
    /// Where the name goes.
    pipe: Option<OwnedFd>,
    /// The other end of a standard input without keys and without an end.
    keys: Option<OwnedFd>,
}

/// Leaves the terminal, if this is the process in the background. The first thing it does: no thread has started.
///
/// # Errors
/// The host refuses.
pub fn leave(matches: &ArgMatches) -> Result<Option<Detached>> {
    if !matches.get_flag(DETACHED) || matches.get_flag(THERE) {
        return Ok(None);
    }
    let doing = || "go into the background";
    let share = |fd: &dyn AsFd| fd.as_fd().try_clone_to_owned().doing(Why::Host, doing);
    // One that leads a group of processes leads a session as well, or has been started by hand.
    let _ = rustix::process::setsid();
    let (shown, pipe) = (share(&std::io::stderr())?, share(&std::io::stdin())?);
    let empty = File::open("/dev/null").doing(Why::Host, doing)?;
    dup2_stdin(&empty).doing(Why::Host, doing)?;
    Ok(Some(Detached { shown: Arc::new(Mutex::new(Some(shown))), pipe: Some(pipe), keys: None }))
}

impl Detached {
    /// Has its output kept, and its name told once it is up.
    fn settle(&mut self, presence: &Presence, plan: &Plan) -> Result<()> {
        let doing = || format!("keep the output of the VM {}", presence.name());
        if let Some([stdout, stderr]) =
            presence.with(|entry| entry.logs()).transpose().doing(Why::Host, doing)?
        {
            dup2_stdout(&stdout).doing(Why::Host, doing)?;
            dup2_stderr(&stderr).doing(Why::Host, doing)?;
        }
        if plan.command.as_ref().is_some_and(|command| command.terminal) {
            // A terminal at which nobody types: its shell waits, and does not end.
            let (keys, typed) = pipe_with(PipeFlags::CLOEXEC).doing(Why::Host, doing)?;
            dup2_stdin(&keys).doing(Why::Host, doing)?;
            self.keys = Some(typed);
        }
        if let Some(pipe) = self.pipe.take() {
            let (tell, shown) = (herald(pipe), self.shown.clone());
            presence.announce(Box::new(move |name| {
                shown.lock().unwrap_or_else(PoisonError::into_inner).take();
                tell(name)
            }));
        }
        Ok(())
    }

    /// Has errors seen by whoever started it, if that one still waits.
    pub fn recall(&self) {
        if let Some(shown) = self.shown.lock().unwrap_or_else(PoisonError::into_inner).take() {
            // Then they stay with its output, which goes.
            let _ = dup2_stderr(&shown);
        }
    }
}

/// How others will find the run of this command line; `None`: nobody will. One that was given a name, or goes into the
/// background, enters now.
///
/// # Errors
/// It cannot be found under that name.
pub fn presence(
    matches: &ArgMatches,
    plan: &Plan,
    detached: Option<&mut Detached>,
) -> Result<Option<Presence>> {
    let name = matches.get_one::<String>("name").map(String::as_str);
    name.map_or(Ok(()), registry::check_name)?;
    let presence = Presence::new(plan, name, detached.is_some());
    match detached {
        None if name.is_none() => return Ok(plan.command.is_some().then_some(presence)),
        None => presence.enter(false)?,
        Some(detached) => {
            presence.enter(!matches.get_flag("rm"))?;
            detached.settle(&presence, plan)?;
        }
    }
    Ok(Some(presence))
}

/// Tells about a failure, to whoever waits for it.
pub fn complain_to(detached: Option<&Detached>, fail: &Fail) {
    detached.into_iter().for_each(Detached::recall);
    complain(fail);
}
