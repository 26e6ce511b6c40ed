//! `mayfly bisect`: one step of `git bisect run`, a run whose verdict becomes the exit code that git wants.
//!
//! git takes 0 for good, 125 for a commit that cannot be tested, 1 to 127 else for bad, and stops at 128 and more. What says
//! nothing of the commit must not make it bad: a host that fails, a command that is not there, an operator who has enough.

use std::ffi::OsString;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};

use base::sys::children::{die_with_parent, hear_signals};
use base::sys::signals;
use base::{Doing, Fail, Result, Why};
use clap::{Arg, ArgMatches, Command as Clap};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use serde_json::Value;

use super::command::{Detail, command};
use super::complain;
use super::lab::with_flags;
use crate::kernels::{self, Cache};
use crate::outcome::code;
use crate::{log, machine};

/// git goes on, to the other half.
const BAD: u8 = 1;
/// git tries another commit.
const SKIP: u8 = 125;
/// git stops.
const ABORT: u8 = 128;
/// Signals that end a step, and with it the search.
const ENDING: [i32; 4] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT];
/// Flags of a run that make no sense here, by their names as arguments.
const NOT_HERE: [&str; 4] = ["json", "dry-run", "detach", "name"];

/// Adds the flags to those of a run.
pub fn flags(bisect: Clap) -> Clap {
    let bisect = NOT_HERE.into_iter().fold(bisect, |bisect, name| {
        let there = bisect.get_arguments().any(|arg| arg.get_id() == name);
        if there { bisect.mut_arg(name, |arg| arg.hide(true)) } else { bisect }
    });
    bisect.after_help(EXIT_CODES).arg(
        Arg::new("build")
            .long("build")
            .value_name("LINE")
            .help_heading("Bisect")
            .help("Build the kernel with this line for sh first; a commit that does not build is skipped"),
    )
}

const EXIT_CODES: &str = "\
Exit codes, as git bisect run wants them: 0 good, 1 bad (the command failed, the kernel did not stay healthy, or the \
guest did not come so far), 125 skip (no kernel was built, it lacks what the command needs, or the command ended with \
125), 128 and more: stop (the command is not there, the host failed, a signal)";

/// Carries out `mayfly bisect`; its exit code.
pub fn bisect(matches: &ArgMatches) -> u8 {
    let (code, why) = match attempt(matches) {
        Ok(step) => (step.code, step.why),
        Err(fail) => {
            complain(&fail);
            (ABORT, "this says nothing of the commit".to_owned())
        }
    };
    let word = match code {
        code::DONE => "good",
        BAD => "bad",
        SKIP => "skipped",
        _ => "stopped",
    };
    log::note(&if why.is_empty() { word.to_owned() } else { format!("{word}: {why}") });
    code
}

/// What a step comes to.
#[derive(Debug, PartialEq, Eq)]
struct Step {
    code: u8,
    why: String,
}

impl Step {
    fn new(code: u8, why: impl Into<String>) -> Step {
        Step { code, why: why.into() }
    }
}

fn attempt(matches: &ArgMatches) -> Result<Step> {
    let given = |name: &&&str| {
        matches.try_contains_id(name).unwrap_or(false)
            && matches.value_source(name) == Some(clap::parser::ValueSource::CommandLine)
    };
    if let Some(flag) = NOT_HERE.iter().find(given) {
        return Err(
            Fail::new(Why::Usage, format!("bisect with --{flag}")).because("that is no flag of a step")
        );
    }
    let signals = signals::divert(&ENDING).doing(Why::Host, || "divert signals")?;
    if let Some(line) = matches.get_one::<String>("build")
        && let Some(step) = build(line, &signals)?
    {
        return Ok(step);
    }
    // Not this machine's own kernel, which is the same at each commit.
    let named = matches.contains_id("kernel") || matches.contains_id("plan");
    let mut words = run_words(std::env::args_os().skip(1));
    if !named {
        let Some(built) = super::kernel::built(Path::new(".")) else {
            return Ok(Step::new(
                SKIP,
                "no kernel was built here: there is no vmlinux and no arch/x86/boot/bzImage",
            ));
        };
        words = with_flags(words.into_iter(), ["--kernel".into(), built.into()].into_iter());
    }
    let parsed = [OsString::from("mayfly")].into_iter().chain(words.iter().cloned());
    let parsed = command(Detail::Names)
        .try_get_matches_from(parsed)
        .doing(Why::Usage, || "read the flags of the run")?;
    let plan = super::run::planned(parsed.subcommand_matches("run").unwrap_or(&parsed))?;
    if let Err(fail) = kernels::open(&plan.kernel).and_then(|kernel| machine::check(&plan, &kernel)) {
        return Ok(Step::new(SKIP, fail.summary()));
    }
    // In the cache, which an emulated host sees as well.
    Cache::find()?.with_scratch(|dir| {
        let result = dir.join("result.json");
        let more = ["--kernel".into(), plan.kernel.clone().into(), join("--json=", &result)];
        let mut command = Command::new(std::env::current_exe().doing(Why::Host, || "find mayfly itself")?);
        command.args(with_flags(words.into_iter(), more.into_iter()));
        let (status, signal) = run(&mut command, &signals)?;
        let result = fs::read(&result).ok().and_then(|text| serde_json::from_slice(&text).ok());
        Ok(judge(result.as_ref(), status, signal))
    })
}

fn join(flag: &str, path: &Path) -> OsString {
    let mut word = OsString::from(flag);
    word.push(path);
    word
}

/// The words of the run: these ones, without what is only ours.
fn run_words(words: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let mut words = words.peekable();
    let mut ours = true;
    let mut kept: Vec<OsString> = Vec::new();
    while let Some(word) = words.next() {
        ours &= word != "--";
        match word.to_str() {
            Some("bisect") if !kept.iter().any(|word| word == "run") => kept.push("run".into()),
            Some("--build") if ours => drop(words.next()),
            Some(text) if ours && text.starts_with("--build=") => {}
            _ => kept.push(word),
        }
    }
    kept
}

/// Builds; what it means, unless it went well.
fn build(line: &str, signals: &impl std::os::fd::AsFd) -> Result<Option<Step>> {
    let (status, signal) = run(Command::new("sh").args(["-c", line]), signals)?;
    Ok(built(status, signal))
}

fn built(status: ExitStatus, signal: Option<i32>) -> Option<Step> {
    match (signal.or(status.signal()), status.code()) {
        (Some(number), _) => {
            Some(Step::new(code::signalled(number), format!("signal {number} ended the build")))
        }
        (None, Some(0)) => None,
        // A shell's words for a program that is not there: no commit is to blame.
        (None, Some(code @ 126..)) => Some(Step::new(ABORT, format!("the build ended with {code}"))),
        (None, code) => Some(Step::new(SKIP, format!("the build ended with {}", code.unwrap_or(1)))),
    }
}

/// Runs a program to its end, with our streams: how it ended, and the signal that came meanwhile.
fn run(command: &mut Command, signals: &impl std::os::fd::AsFd) -> Result<(ExitStatus, Option<i32>)> {
    let name = PathBuf::from(command.get_program());
    let running = || format!("run {}", name.display());
    die_with_parent(command);
    hear_signals(command);
    let mut child: Child = command.spawn().doing(Why::Host, running)?;
    let pid = Pid::from_child(&child);
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).doing(Why::Host, running)?;
    let mut signal = None;
    loop {
        let mut fds = [PollFd::new(&pidfd, PollFlags::IN), PollFd::new(signals, PollFlags::IN)];
        rustix::io::retry_on_intr(|| poll(&mut fds, None)).doing(Why::Host, running)?;
        let over = !fds.first().is_none_or(|fd| fd.revents().is_empty());
        while let Some(number) = signals::next(signals) {
            signal.get_or_insert(number);
            // Those of a terminal reach the child as well as us.
            let passed = match number {
                libc::SIGTERM => Some(Signal::TERM),
                libc::SIGHUP => Some(Signal::HUP),
                _ => None,
            };
            passed.filter(|_| !over).into_iter().for_each(|number| _ = kill_process(pid, number));
        }
        if over {
            return Ok((child.wait().doing(Why::Host, running)?, signal));
        }
    }
}

/// What the result of a run means for the commit.
fn judge(result: Option<&Value>, status: ExitStatus, signal: Option<i32>) -> Step {
    let text = |key: &str| result.and_then(|result| result.get(key)?.as_str()).unwrap_or_default();
    let number = |pointer: &str| result.and_then(|result| result.pointer(pointer)?.as_u64());
    if let Some(signal) = signal.or(status.signal()) {
        return Step::new(code::signalled(signal), format!("signal {signal}"));
    }
    let error = crate::quote::line(text("error").as_bytes());
    match text("cause") {
        "ok" => Step::new(code::DONE, ""),
        "command-failed" if number("/command/exit_code") == Some(SKIP.into()) => {
            Step::new(SKIP, "the command ended with 125")
        }
        "command-failed" => {
            Step::new(BAD, format!("the command ended with {}", number("/command/exit_code").unwrap_or(1)))
        }
        "debug-exit" => Step::new(BAD, format!("the guest ended with {}", number("/exit_code").unwrap_or(1))),
        "command-killed" | "unhealthy" | "tests-failed" | "panicked" | "crashed" | "guest-ended"
        | "agent-lost" | "timeout" | "boot-timeout" => Step::new(BAD, error),
        // There was a guest, which could not be asked for its command: for lack of a driver.
        "not-started" if text("end") != "not-started" => Step::new(SKIP, error),
        "quit" => Step::new(code::QUIT, "the operator ended it"),
        "" => Step::new(ABORT, format!("mayfly ended with {status} and no result")),
        _ => Step::new(ABORT, "this says nothing of the commit"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn every_cause_means_one_thing_to_git() {
        let judged = |result: Value| judge(Some(&result), ExitStatus::from_raw(0), None).code;
        assert_eq!(judged(json!({"cause": "ok"})), 0);
        for cause in [
            "unhealthy",
            "tests-failed",
            "panicked",
            "crashed",
            "guest-ended",
            "agent-lost",
            "timeout",
            "boot-timeout",
            "command-killed",
            "debug-exit",
        ] {
            assert_eq!(judged(json!({ "cause": cause })), 1, "{cause}");
        }
        let ended = |code: u8| judged(json!({"cause": "command-failed", "command": {"exit_code": code}}));
        assert_eq!((ended(1), ended(2), ended(255), ended(125)), (1, 1, 1, 125));
        assert_eq!(judged(json!({"cause": "not-started", "end": "powered-off"})), 125);
        for (cause, code) in
            [("not-started", 128), ("not-run", 128), ("host-error", 128), ("signal", 128), ("quit", 130)]
        {
            assert_eq!(judged(json!({"cause": cause, "end": "not-started"})), code, "{cause}");
        }
        let ok = json!({"cause": "ok"});
        assert_eq!(
            judge(Some(&ok), ExitStatus::from_raw(0), Some(2)).code,
            130,
            "whoever ends it has not judged it"
        );
        assert_eq!(judge(None, ExitStatus::from_raw(libc::SIGSEGV), None).code, 139);
        assert_eq!(judge(None, ExitStatus::from_raw(1 << 8), None).code, 128);
    }

    #[test]
    fn a_build_that_fails_skips_and_one_that_cannot_be_tried_stops() {
        let built = |raw: i32| built(ExitStatus::from_raw(raw), None).map(|step| step.code);
        assert_eq!(built(0), None);
        assert_eq!((built(1 << 8), built(2 << 8)), (Some(125), Some(125)));
        assert_eq!((built(127 << 8), built(libc::SIGINT)), (Some(128), Some(130)));
    }

    #[test]
    fn the_words_of_the_run_are_those_that_were_typed() {
        let words = |text: &str| {
            let kept = run_words(text.split(' ').map(OsString::from));
            kept.iter().map(|word| word.to_str().unwrap()).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(
            words("-v bisect --build make --cpus 2 -- bisect --build x"),
            "-v run --cpus 2 -- bisect --build x"
        );
        assert_eq!(words("bisect --build=make -- ./test.sh"), "run -- ./test.sh");
    }
}
