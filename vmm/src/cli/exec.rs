//! `mayfly exec`: a command in a VM that runs already.

use std::ffi::OsString;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use agent::client::{Client, Remote, Streams};
use agent::wire::{Exec, Outcome};
use base::sys::signals;
use base::{Doing, Fail, Result, Why};
use clap::ArgMatches;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::Signal;
use serde::Deserialize;

use super::complain;
use super::guest::{text, variable};
use super::vm::told;
use crate::control::caller::{Caller, find};
use crate::control::wire::Request;
use crate::outcome::code;
use crate::session::keys;
use crate::terminal;

/// How long a guest may take to call: it does so at once, unless it hangs.
const PATIENCE: Duration = Duration::from_secs(20);
/// Signals that are meant for the command; the last tells of a new size of the terminal.
const SIGNALS: [Signal; 5] = [Signal::INT, Signal::TERM, Signal::HUP, Signal::QUIT, Signal::WINCH];

/// What a command finds in the guest unless it is told otherwise.
#[derive(Debug, Default, Deserialize)]
pub struct Usual {
    env: Vec<String>,
    workdir: String,
    user: String,
}

/// A wire of our own to the agent of a VM.
///
/// # Errors
/// There is no such VM, it has no agent, or that does not call.
pub fn reach(name: &str) -> Result<(Client, Usual)> {
    let mut caller = Caller::call(&find(name)?)?;
    let usual = caller.ask(&Request::Agent)?;
    let doing = || format!("reach the agent of {name}");
    let usual = serde_json::from_value(usual).doing(Why::Host, doing)?;
    let client = Client::connect(caller.into_socket()?.into(), PATIENCE).map_err(|cause| {
        let why = match cause.kind() {
            ErrorKind::TimedOut => format!("it has not called for {} s", PATIENCE.as_secs()),
            _ => crate::quote::line(cause.to_string().as_bytes()),
        };
        Fail::new(Why::Host, doing()).because(why)
    })?;
    Ok((client, usual))
}

/// Carries out `mayfly exec`; its exit code.
pub fn exec(matches: &ArgMatches) -> u8 {
    let name = matches.get_one::<String>("vm").map_or("", String::as_str);
    told(attempt(name, matches))
}

fn attempt(name: &str, matches: &ArgMatches) -> Result<u8> {
    let words = matches.get_many::<OsString>("command").into_iter().flatten();
    let argv = words.map(text).collect::<Result<Vec<_>>>()?;
    // Before any thread is started, so that all of them leave the signals to one.
    let signals = signals::divert(&SIGNALS.map(Signal::as_raw)).doing(Why::Host, || "divert signals")?;
    let running = Arc::new(OnceLock::new());
    let slot = running.clone();
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || forward(&signals, &slot))
        .doing(Why::Host, || "start a thread")?;
    let (client, usual) = reach(name)?;
    let mut wish = wish(matches, usual)?;
    wish.argv = argv.iter().map(|word| word.clone().into_bytes()).collect();
    let share = |fd: &dyn AsFd| fd.as_fd().try_clone_to_owned().ok();
    let mut streams =
        Streams { stdin: share(&io::stdin()), stdout: share(&io::stdout()), stderr: share(&io::stderr()) };
    let raw = if wish.terminal.is_some() { terminal::enter_both_ways()? } else { None };
    if raw.is_some() {
        streams.stdin = Some(keys::filter(|| leave(code::QUIT))?);
    }
    let lost = |cause: io::Error| {
        Fail::new(Why::Host, format!("run {} in {name}", argv.first().map_or("", String::as_str)))
            .because(crate::quote::line(cause.to_string().as_bytes()))
    };
    let sized = wish.terminal.is_some();
    let process = client.start(wish, streams).map_err(lost)?;
    let _ = running.set(process.remote());
    if sized {
        // Nobody has heard of another size since it was asked for.
        let _ = process.remote().resize(terminal::size());
    }
    let outputs = process.outputs();
    let ended = process.wait();
    drop(raw);
    let outcome = match ended {
        Ok(outcome) => outcome,
        Err(cause) => {
            complain(&lost(cause));
            return Ok(code::CRASHED);
        }
    };
    let program = argv.first().map_or("", String::as_str);
    refusal(program, outcome).iter().for_each(complain);
    match outputs.error().filter(|cause| cause.kind() != ErrorKind::BrokenPipe) {
        Some(cause) => {
            complain(&Fail::new(Why::Host, "write the output of the command").because(cause));
            Ok(if outcome.code() == code::DONE { code::HOST } else { outcome.code() })
        }
        None => Ok(outcome.code()),
    }
}

/// The command as the agent takes it, but for its words.
fn wish(matches: &ArgMatches, usual: Usual) -> Result<Exec> {
    let terminal = matches.get_flag("tty");
    let mut env = usual.env;
    if terminal && let Ok(term) = std::env::var("TERM") {
        env.push(format!("TERM={term}"));
    }
    for word in matches.get_many::<String>("env").into_iter().flatten() {
        env.extend(variable(word)?);
    }
    let pair = |text: &String| {
        let (name, value) = text.split_once('=').unwrap_or((text, ""));
        (name.as_bytes().to_vec(), value.as_bytes().to_vec())
    };
    let given = |key: &str, usual: String| matches.get_one::<String>(key).cloned().unwrap_or(usual);
    let user = given("user", usual.user);
    Ok(Exec {
        argv: Vec::new(),
        env: env.iter().map(pair).collect(),
        directory: given("workdir", usual.workdir).into_bytes(),
        user: if user.is_empty() { b"0".to_vec() } else { user.into_bytes() },
        terminal: terminal.then(terminal::size),
    })
}

/// What has to be told of a command that never ran.
fn refusal(program: &str, outcome: Outcome) -> Option<Fail> {
    let fail = |doing: String| Fail::new(Why::Missing, doing);
    let os = io::Error::from_raw_os_error;
    match outcome {
        Outcome::Code(_) | Outcome::Signal(_) => None,
        Outcome::NoProgram(errno) => Some(fail(format!("run {program} in the guest")).because(os(errno))),
        Outcome::NoDirectory(errno) => {
            Some(fail(format!("start {program} in its directory in the guest")).because(os(errno)))
        }
        Outcome::NoUser => {
            Some(fail(format!("run {program} in the guest")).because("it has no such user or group"))
        }
    }
}

/// Passes signals on. A second one that would end this process does, as the first does while no command runs: the guest may
/// hang, and with the wire its program ends.
fn forward(signals: &OwnedFd, running: &OnceLock<Remote>) {
    let mut passed = false;
    while rustix::io::retry_on_intr(|| poll(&mut [PollFd::new(signals, PollFlags::IN)], None)).is_ok() {
        while let Some(number) = signals::next(signals) {
            match running.get() {
                // A command that has ended has no terminal any more.
                Some(remote) if number == Signal::WINCH.as_raw() => drop(remote.resize(terminal::size())),
                None if number == Signal::WINCH.as_raw() => {}
                Some(remote) if !std::mem::replace(&mut passed, true) => {
                    let _ = remote.signal(u8::try_from(number).unwrap_or(u8::MAX));
                }
                _ => leave(code::signalled(number)),
            }
        }
    }
}

/// Ends this process, whatever its threads wait for.
fn leave(code: u8) {
    terminal::restore();
    std::process::exit(code.into());
}
