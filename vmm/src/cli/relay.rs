//! The way to a VM on an emulated host: its socket is there, and who asks is here. Each connection becomes a program there,
//! a hidden command of mayfly's, which carries it on.

use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Weak;
use std::thread::Builder;
use std::time::Duration;

use base::{Doing, Fail, Result, Why};
use clap::{Arg, ArgAction, ArgMatches, Command as Clap};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{SocketFlags, accept_with};

use crate::control::caller::{Caller, find};
use crate::control::presence::Presence;
use crate::control::wire::Request;
use crate::lab::{Command, Host};
use crate::outcome::{code, code_before_start};

/// The hidden command.
pub const NAME: &str = "relay";
/// How often it is looked whether the VM is there: nothing tells, and it takes seconds.
const PAUSE: Duration = Duration::from_millis(50);
/// How long descriptors are waited for.
const RELIEF: Duration = Duration::from_secs(1);

/// The hidden command, as clap has it.
pub fn command() -> Clap {
    Clap::new(NAME)
        .hide(true)
        .about("Carry a connection to a VM on this emulated host")
        .arg(Arg::new("vm").required(true))
        .arg(Arg::new("up").long("up").action(ArgAction::SetTrue).help("Wait until it is up instead"))
}

/// Lets the VM that `presence` stands for, and that runs on `host`, be found here.
pub fn begin(presence: &Presence, host: &Weak<Host>) {
    let started = Builder::new().name("relay".into()).spawn({
        let (presence, host) = (presence.clone(), host.clone());
        move || {
            if let Some(socket) = presence.socket() {
                serve(&socket, &presence.name(), &host);
            }
        }
    });
    if !presence.is_awaited() {
        // To ask costs the host there more than anybody would have of the answer.
        _ = presence.rise();
        return started.map(drop).unwrap_or_else(refused);
    }
    let (presence, host) = (presence.clone(), host.clone());
    let waits = Builder::new().name("up".into()).spawn(move || {
        let process = start(&host, &presence.name(), true, None);
        if process.is_some_and(|process| process.wait().is_ok_and(|outcome| outcome.code() == 0))
            && !presence.rise()
            && let Ok(mut caller) = find(&presence.name()).and_then(|record| Caller::call(&record))
        {
            // Whoever wanted it has gone.
            let _ = caller.ask(&Request::Kill { signal: None });
        }
    });
    [started.err(), waits.err()].into_iter().flatten().for_each(refused);
}

fn refused(cause: io::Error) {
    ::log::warn!("let others find this VM: {cause}");
}

/// Carries each connection over.
fn serve(socket: &OwnedFd, name: &str, host: &Weak<Host>) {
    loop {
        let ready = rustix::io::retry_on_intr(|| poll(&mut [PollFd::new(socket, PollFlags::IN)], None));
        if ready.is_err() {
            return;
        }
        match accept_with(socket, SocketFlags::CLOEXEC) {
            Ok(connection) => drop(start(host, name, false, Some(connection))),
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => {}
            Err(cause) => {
                // Out of descriptors: whoever calls goes on waiting, and must not keep a CPU busy.
                ::log::debug!("accept a connection: {cause}");
                std::thread::sleep(RELIEF);
            }
        }
    }
}

/// Starts the hidden command on the host.
fn start(
    host: &Weak<Host>,
    name: &str,
    up: bool,
    connection: Option<OwnedFd>,
) -> Option<agent::client::Process> {
    let program = std::env::current_exe().ok()?.into_os_string();
    let words = [program, NAME.into(), name.into()];
    let command = Command::here(words.into_iter().chain(up.then(|| OsString::from("--up")))).ok()?;
    let stdin = connection.as_ref().map(OwnedFd::try_clone).transpose().ok()?;
    // A host that has ended has no VM to reach.
    host.upgrade()?.start(Command { stdin, stdout: connection, ..command }).ok()
}

/// Carries out the hidden command; its exit code.
pub fn relay(matches: &ArgMatches) -> u8 {
    let name = matches.get_one::<String>("vm").map_or("", String::as_str);
    let done = if matches.get_flag("up") { await_up(name) } else { carry(name) };
    match done {
        Ok(()) => code::DONE,
        Err(fail) => {
            super::complain(&fail);
            code_before_start(&fail)
        }
    }
}

/// Waits until a VM is up. One that never is ends with its host, and this with it.
fn await_up(name: &str) -> Result<()> {
    loop {
        let state = find(name).and_then(|record| Caller::call(&record)?.ask(&Request::Inspect));
        if state.is_ok_and(|state| state.get("state").is_some_and(|state| state == "running")) {
            return Ok(());
        }
        std::thread::sleep(PAUSE);
    }
}

/// Carries standard input to a VM, and what it says to standard output, until it hangs up.
fn carry(name: &str) -> Result<()> {
    let socket = find(name).and_then(|record| Caller::call(&record)?.into_socket())?;
    let doing = || format!("carry a connection to the VM {name}");
    let mut there = socket.try_clone().doing(Why::Host, doing)?;
    Builder::new()
        .name("there".into())
        .spawn(move || {
            let _ = pass(&mut io::stdin().lock(), &mut there);
            // The other direction may have more to say.
            let _ = there.shutdown(std::net::Shutdown::Write);
        })
        .doing(Why::Host, doing)?;
    let mut back: &UnixStream = &socket;
    pass(&mut back, &mut io::stdout().lock()).map_err(|cause| Fail::new(Why::Host, doing()).because(cause))
}

/// Passes on what comes, as it comes.
fn pass(from: &mut impl Read, to: &mut impl Write) -> io::Result<()> {
    let mut bytes = vec![0; 64 << 10];
    loop {
        match from.read(&mut bytes) {
            Ok(0) => return Ok(()),
            Ok(n) => {
                to.write_all(bytes.get(..n).unwrap_or_default())?;
                to.flush()?;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}
