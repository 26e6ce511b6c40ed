//! What is done with running VMs from the outside: `ps`, `logs`, `set`, `stop`, `kill`, `wait`, `rm`.

use std::io::{Read, Write};
use std::path::Path;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, SystemTime};

use base::{Doing, Fail, Result, Why};
use clap::ArgMatches;
use rustix::process::{PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde_json::{Value, json};

pub use super::vm_flags::commands;
use super::{complain, say};
use crate::control::caller::{Caller, find};
use crate::control::wire::Request;
use crate::control::{Record, Registry, State, registry};
use crate::outcome::{code, code_before_start};
use crate::plan::{Period, Size};

/// How long a VM that is told to end at once may take: it has output to hand over.
const LAST: Duration = Duration::from_secs(10);

/// Carries out one of these commands; its exit code.
pub fn carry_out(command: &str, matches: &ArgMatches) -> u8 {
    let each = |f: &dyn Fn(&str) -> Result<u8>| {
        // Each is tried, whatever comes of the others.
        let codes = names(matches).map(|name| told(f(name)));
        codes.fold(code::DONE, |first, code| if first == code::DONE { code } else { first })
    };
    match command {
        "ps" => told(ps(matches)),
        "logs" => each(&|name| logs(name, matches.get_flag("follow"))),
        "set" => each(&|name| set(name, matches)),
        "stop" => {
            let patience = matches.get_one("time").map_or(LAST, |time: &Period| time.duration());
            each(&|name| stop(name, patience))
        }
        "kill" => each(&|name| kill(name, matches.get_one("signal").copied())),
        "wait" => each(&wait),
        "rm" => each(&|name| remove(name, matches.get_flag("force"))),
        _ => code::USAGE,
    }
}

/// The VMs that a command line names.
fn names(matches: &ArgMatches) -> impl Iterator<Item = &str> {
    matches.get_many::<String>("vm").into_iter().flatten().map(String::as_str)
}

/// The exit code of what was tried; a failure is told.
pub fn told(done: Result<u8>) -> u8 {
    done.unwrap_or_else(|fail| {
        complain(&fail);
        code_before_start(&fail)
    })
}

fn ps(matches: &ArgMatches) -> Result<u8> {
    let all = matches.get_flag("all");
    let mut list = registry::list(&Registry::look())?;
    list.retain(|record| all || record.state == State::Running);
    if matches.get_flag("json") {
        let objects: Vec<Value> = list.iter().map(object).collect();
        return Ok(say(&format!("{}\n", Value::from(objects))));
    }
    if matches.get_flag("quiet") {
        return Ok(say(&list.iter().map(|record| format!("{}\n", record.name)).collect::<String>()));
    }
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    Ok(say(&table(&list, now)))
}

/// A VM in `ps --json`.
fn object(record: &Record) -> Value {
    let (state, code) = match &record.state {
        State::Running => ("running", None),
        State::Ended(result) => ("ended", exit_code(result)),
    };
    let mut object = json!({ "name": record.name, "state": state, "exit_code": code });
    if let (Some(object), Ok(Value::Object(about))) =
        (object.as_object_mut(), serde_json::to_value(&record.about))
    {
        object.extend(about);
    }
    object
}

fn table(list: &[Record], now: u64) -> String {
    let mut text = format!(
        "{:<20} {:<16} {:>7} {:>4} {:>7}  {}\n",
        "NAME", "STATUS", "PID", "CPUS", "MEMORY", "COMMAND"
    );
    for Record { name, about, state, .. } in list {
        let status = match state {
            State::Running => format!("up {}", span(now.saturating_sub(about.started))),
            State::Ended(result) => {
                exit_code(result).map_or_else(|| "ended".to_owned(), |code| format!("ended ({code})"))
            }
        };
        let memory = Size::of(about.memory).to_string();
        let command = crate::quote::line(about.command.join(" ").as_bytes());
        text +=
            &format!("{name:<20} {status:<16} {:>7} {:>4} {memory:>7}  {command}\n", about.pid, about.cpus);
    }
    text
}

/// A span of time as people say it.
pub fn span(seconds: u64) -> String {
    match seconds {
        0..=119 => format!("{seconds} s"),
        120..=7199 => format!("{} min", seconds / 60),
        7200..=172_799 => format!("{} h", seconds / 3600),
        _ => format!("{} days", seconds / 86_400),
    }
}

fn exit_code(result: &Value) -> Option<u8> {
    result.get("exit_code")?.as_u64().and_then(|code| u8::try_from(code).ok())
}

/// Prints what a VM in the background has said; with `follow`, until it ends.
fn logs(name: &str, follow: bool) -> Result<u8> {
    let record = find(name)?;
    let doing = || format!("read the output of the VM {name}");
    if !record.about.detached {
        return Err(Fail::new(Why::Usage, doing())
            .because("it is not kept")
            .hint("it goes where the VM was started; that of a VM started with -d is kept"));
    }
    let open = |file: &str| std::fs::File::open(record.path.join(file)).doing(Why::Host, doing);
    let (mut stdout, mut stderr) = (open("stdout")?, open("stderr")?);
    let mut bytes = vec![0; 64 << 10];
    loop {
        // Asked first: what it says before it ends is read afterwards.
        let lives = record.lives();
        let pass = |from: &mut std::fs::File, to: &mut dyn Write, bytes: &mut [u8]| -> std::io::Result<()> {
            loop {
                let n = from.read(bytes)?;
                if n == 0 {
                    return to.flush();
                }
                to.write_all(bytes.get(..n).unwrap_or_default())?;
            }
        };
        let passed = pass(&mut stdout, &mut std::io::stdout().lock(), &mut bytes)
            .and_then(|()| pass(&mut stderr, &mut std::io::stderr().lock(), &mut bytes));
        match passed {
            Err(cause) if cause.kind() == std::io::ErrorKind::BrokenPipe => return Ok(code::DONE),
            passed => passed.doing(Why::Host, doing)?,
        }
        if !follow || !lives {
            return Ok(code::DONE);
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn set(name: &str, matches: &ArgMatches) -> Result<u8> {
    let device = matches.get_one::<String>("device").cloned().unwrap_or_default();
    let changes = matches.get_many::<String>("change").into_iter().flatten();
    let change = changes.cloned().collect::<Vec<_>>().join(",");
    Caller::call(&find(name)?)?.ask(&Request::Set { device, change })?;
    Ok(code::DONE)
}

/// Waits until a VM has ended, or the time is up: then it is handed back.
fn await_end(record: Record, patience: Duration) -> Result<Option<Record>> {
    let (tell, told) = channel();
    let name = record.name.clone();
    let again = find(&name);
    std::thread::Builder::new()
        .name("wait".into())
        .spawn(move || tell.send(record.wait()))
        .doing(Why::Host, || format!("wait for the VM {name}"))?;
    match told.recv_timeout(patience) {
        Ok(ended) => ended.map(|_| None),
        Err(RecvTimeoutError::Timeout) => again.map(Some),
        Err(RecvTimeoutError::Disconnected) => Ok(None),
    }
}

fn stop(name: &str, patience: Duration) -> Result<u8> {
    let record = find(name)?;
    if let State::Ended(_) = record.state {
        return Ok(say(&format!("{name}\n")));
    }
    let asked = Caller::call(&record).and_then(|mut caller| caller.ask(&Request::Stop));
    if let Err(fail) = asked
        && record.lives()
    {
        ::log::warn!("{}; it is ended at once", fail.summary());
        return end_at_once(record);
    }
    match await_end(record, patience)? {
        None => Ok(say(&format!("{name}\n"))),
        Some(record) => end_at_once(record),
    }
}

fn kill(name: &str, signal: Option<u8>) -> Result<u8> {
    let record = find(name)?;
    match signal.filter(|number| i32::from(*number) != libc::SIGKILL) {
        None => end_at_once(record),
        Some(signal) => {
            Caller::call(&record)?.ask(&Request::Kill { signal: Some(signal) })?;
            Ok(say(&format!("{name}\n")))
        }
    }
}

/// Ends a VM at once: it does so itself, or its process is killed.
fn end_at_once(record: Record) -> Result<u8> {
    let name = record.name.clone();
    let mut caller = Caller::call(&record)?;
    let process = caller.peer();
    let asked = caller.ask(&Request::Kill { signal: None });
    if let Err(fail) = &asked {
        ::log::debug!("{fail}");
    }
    let left = if asked.is_ok() { await_end(record, LAST)? } else { Some(record) };
    if let Some(record) = left.filter(Record::lives) {
        let doing = || format!("kill the VM {name}");
        let process = process.ok_or("nobody knows its process").doing(Why::Host, doing)?;
        ::log::warn!("the VM {name} does not end; its process {process} is killed");
        let process = pidfd_open(process, PidfdFlags::empty()).doing(Why::Host, doing)?;
        // While it holds its lock it is the one that answered at its socket.
        if record.lives() {
            pidfd_send_signal(&process, Signal::KILL).doing(Why::Host, doing)?;
        }
        record.wait()?;
    }
    Ok(say(&format!("{name}\n")))
}

fn wait(name: &str) -> Result<u8> {
    let record = find(name)?;
    let result = match &record.state {
        State::Ended(result) => Some(result.clone()),
        State::Running => record.wait()?,
    };
    match result.as_ref().and_then(exit_code) {
        Some(code) => Ok(say(&format!("{code}\n"))),
        None => Err(Fail::new(Why::Host, format!("wait for the VM {name}"))
            .because("it was killed and could not say how it ended")),
    }
}

fn remove(name: &str, force: bool) -> Result<u8> {
    let mut record = find(name)?;
    if force && record.state == State::Running {
        let keeps = record.about.detached;
        let code = end_at_once(record)?;
        record = match find(name) {
            Ok(record) if keeps => record,
            // It had nothing to leave.
            _ => return Ok(code),
        };
        return Registry::of(&record).remove(&record).map(|()| code);
    }
    Registry::of(&record).remove(&record)?;
    Ok(say(&format!("{name}\n")))
}

/// What a running VM says of itself, as JSON or for people; one that has ended says how.
///
/// # Errors
/// It does not answer.
pub fn inspect(name: &str, json: bool) -> Result<String> {
    let record = find(name)?;
    let answer = match &record.state {
        State::Ended(result) => {
            let mut answer = object(&record);
            if let Some(answer) = answer.as_object_mut() {
                answer.insert("result".to_owned(), result.clone());
            }
            answer
        }
        State::Running => Caller::call(&record)?.ask(&Request::Inspect)?,
    };
    if json {
        return Ok(format!("{answer}\n"));
    }
    Ok(portrait(&record, &answer))
}

/// What a VM says of itself, for people.
fn portrait(record: &Record, answer: &Value) -> String {
    let about = &record.about;
    let mut text = format!("{}\n", record.name);
    let mut fact = |name: &str, value: String| text += &format!("  {name:<10}{value}\n");
    let state = answer.get("state").and_then(Value::as_str).unwrap_or("unknown");
    fact("state", format!("{state}, process {}", about.pid));
    if let Some(code) = answer.get("exit_code").and_then(Value::as_u64) {
        fact("exit code", code.to_string());
    }
    fact("kernel", about.kernel.display().to_string());
    if !about.command.is_empty() {
        fact("command", crate::quote::line(about.command.join(" ").as_bytes()));
    }
    fact("machine", format!("{} CPUs, {} of memory", about.cpus, Size::of(about.memory)));
    let devices = answer.pointer("/plan/devices").and_then(Value::as_array);
    for device in devices.into_iter().flatten() {
        let part = |key: &str| device.get(key).and_then(Value::as_str).unwrap_or_default();
        let spec = device.get("spec").map(Value::to_string).unwrap_or_default();
        fact("device", format!("{} ({}) {spec}", part("name"), part("kind")));
    }
    for object in answer.get("host_objects").and_then(Value::as_array).into_iter().flatten() {
        let part = |key: &str| object.get(key).and_then(Value::as_str).unwrap_or_default();
        fact("reaches", format!("{} ({})", part("path"), part("access")));
    }
    text
}

/// Whether a word is meant for a VM, where it could be a file as well: one that is there, or is named by a path, is a file.
pub fn is_meant(word: &Path) -> bool {
    let name = word.to_str().filter(|name| !name.contains('/'));
    name.is_some_and(|name| !word.exists() && find(name).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_said_as_people_say_them() {
        let said = [0, 119, 120, 7199, 7200, 172_800].map(span);
        assert_eq!(said, ["0 s", "119 s", "2 min", "119 min", "2 h", "2 days"]);
    }
}
