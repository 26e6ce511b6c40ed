//! Runs a command on a terminal of its own and plays the operator.
//!
//!     terminal [expect=TEXT | send=TEXT | size=ROWSxCOLUMNS | signal=NAME | patience=SECONDS]... -- COMMAND...
//!
//! Steps are taken in order; `\n`, `\\` and `\xHH` stand for bytes. It copies what the command writes, ends with the
//! command's exit code or 128 and the number of the signal that ended it, with 97 when an expected text does not come, and with 98 when the command left the terminal
//! in another state than it found it in.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitCode};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcgetattr, tcsetwinsize};

/// Time for a text to come, and for the end, unless a step says otherwise.
const PATIENCE: Duration = Duration::from_secs(20);

fn main() -> ExitCode {
    match play(&std::env::args().skip(1).collect::<Vec<_>>()) {
        Ok(code) => ExitCode::from(code),
        Err(why) => {
            eprintln!("terminal: {why}");
            ExitCode::from(97)
        }
    }
}

fn play(arguments: &[String]) -> Result<u8, String> {
    let told = |what: &str, cause: &dyn std::fmt::Display| format!("{what}: {cause}");
    let (steps, command) = arguments
        .iter()
        .position(|word| word == "--")
        .map(|at| arguments.split_at(at))
        .ok_or("no -- COMMAND")?;
    let mut master = File::from(open().map_err(|e| told("open a terminal", &e))?);
    let name = ptsname(&master, Vec::new()).map_err(|e| told("name the terminal", &e))?;
    let name = name.to_str().map_err(|e| told("name the terminal", &e))?.to_owned();
    // Held open, so that the terminal and its settings outlive the command.
    let slave = File::options().read(true).write(true).open(&name).map_err(|e| told(&name, &e))?;
    let before = tcgetattr(&slave).map_err(|e| told("read the terminal's settings", &e))?;
    let stdio = || slave.try_clone().map_err(|e| told("share the terminal", &e));
    let mut child = Command::new("setsid")
        .args(["--ctty", "--wait"])
        .args(&command[1..])
        .stdin(stdio()?)
        .stdout(stdio()?)
        .stderr(stdio()?)
        .spawn()
        .map_err(|e| told("start setsid", &e))?;
    let mut seen = Vec::new();
    let mut patience = PATIENCE;
    for step in steps {
        let taken = match step.split_once('=') {
            Some(("expect", text)) => expect(&mut master, &bytes(text)?, &mut seen, &mut child, patience),
            Some(("patience", seconds)) => seconds
                .parse()
                .map(|seconds| patience = Duration::from_secs(seconds))
                .map_err(|e| told(step, &e)),
            Some(("send", text)) => master.write_all(&bytes(text)?).map_err(|e| told("send", &e)),
            Some(("size", size)) => resize(&master, size),
            Some(("signal", name)) => signal(name, &child),
            _ => Err(format!("what is the step {step:?}?")),
        };
        if let Err(why) = taken {
            let _ = child.kill();
            let _ = child.wait();
            return Err(why);
        }
    }
    let code = finish(&mut master, &mut child, patience)?;
    let after = tcgetattr(&slave).map_err(|e| told("read the terminal's settings", &e))?;
    if format!("{before:?}") != format!("{after:?}") {
        eprintln!("terminal: the settings were not restored\nbefore {before:?}\nafter {after:?}");
        return Ok(98);
    }
    Ok(code)
}

/// Sends a signal to the command: `setsid` does not fork for a process that leads no group, so it has become the command.
fn signal(name: &str, child: &Child) -> Result<(), String> {
    let sent = Command::new("kill").args(["-s", name, &child.id().to_string()]).status();
    match sent {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("kill -s {name}: {status}")),
        Err(cause) => Err(format!("run kill: {cause}")),
    }
}

/// Gives the terminal a size, of which the command is told by a signal.
fn resize(master: &File, size: &str) -> Result<(), String> {
    let parts =
        size.split_once('x').and_then(|(rows, columns)| Some((rows.parse().ok()?, columns.parse().ok()?)));
    let (ws_row, ws_col) = parts.ok_or_else(|| format!("what is the size {size:?}?"))?;
    tcsetwinsize(master, Winsize { ws_row, ws_col, ws_xpixel: 0, ws_ypixel: 0 })
        .map_err(|e| format!("resize: {e}"))
}

fn open() -> rustix::io::Result<OwnedFd> {
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    Ok(master)
}

/// Reads until `text` has come; later texts are looked for behind it.
fn expect(
    master: &mut File,
    text: &[u8],
    seen: &mut Vec<u8>,
    child: &mut Child,
    patience: Duration,
) -> Result<(), String> {
    let deadline = Instant::now() + patience;
    loop {
        if let Some(at) = seen.windows(text.len()).position(|window| window == text) {
            seen.drain(..at + text.len());
            return Ok(());
        }
        let more = receive(master, Duration::from_millis(100))?;
        let ended = more.is_empty() && !matches!(child.try_wait(), Ok(None));
        if ended || Instant::now() > deadline {
            return Err(format!(
                "{:?} did not come{}",
                String::from_utf8_lossy(text),
                if ended { ": it ended" } else { "" }
            ));
        }
        seen.extend(more);
    }
}

/// Copies what comes until the command has ended.
fn finish(master: &mut File, child: &mut Child, patience: Duration) -> Result<u8, String> {
    let deadline = Instant::now() + patience;
    loop {
        let more = receive(master, Duration::from_millis(20))?;
        if let (true, Ok(Some(status))) = (more.is_empty(), child.try_wait()) {
            let code = status.code().or(status.signal().map(|signal| 128 + signal));
            return Ok(code.and_then(|code| u8::try_from(code).ok()).unwrap_or(255));
        }
        if Instant::now() > deadline {
            let _ = child.kill();
            let _ = child.wait();
            return Err("the command did not end".into());
        }
    }
}

/// What has come, copied to standard output; nothing when `wait` is over.
fn receive(master: &mut File, wait: Duration) -> Result<Vec<u8>, String> {
    let wait = Timespec::try_from(wait).unwrap_or_default();
    let mut fds = [PollFd::new(&*master, PollFlags::IN)];
    if poll(&mut fds, Some(&wait)).map_err(|e| format!("wait: {e}"))? == 0 {
        return Ok(Vec::new());
    }
    let mut buffer = [0; 4096];
    let len = master.read(&mut buffer).map_err(|e| format!("read: {e}"))?;
    std::io::stdout().write_all(&buffer[..len]).map_err(|e| format!("write: {e}"))?;
    Ok(buffer[..len].to_vec())
}

/// The bytes that `text` stands for.
fn bytes(text: &str) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    let mut rest = text.chars();
    while let Some(c) = rest.next() {
        if c != '\\' {
            bytes.extend(c.to_string().bytes());
            continue;
        }
        match rest.next() {
            Some('n') => bytes.push(b'\n'),
            Some('x') => {
                let digits: String = rest.by_ref().take(2).collect();
                bytes.push(u8::from_str_radix(&digits, 16).map_err(|e| format!("read \\x{digits}: {e}"))?);
            }
            Some(other) => bytes.extend(other.to_string().bytes()),
            None => return Err("a lone backslash".into()),
        }
    }
    Ok(bytes)
}
