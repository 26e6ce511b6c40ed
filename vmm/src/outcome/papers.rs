//! What is written down of a run: the result object, and the report as JUnit has it.

use std::collections::BTreeMap;

use agent::wire::Outcome;
use base::Fail;
use serde::Serialize;

use super::{Cause, End, Ram, Report, Times, code_before_start};
use crate::hang::Hang;
use crate::health::Finding;
use crate::junit::{self, Run, Trouble};
use crate::ktap::Tests;
use crate::plan::{Accel, Command};
use crate::session::Ended;

/// Names of failed tests in the result object.
const FAILURES: usize = 32;

/// The one-line result object: the same keys for every run, those that do not apply are null.
#[derive(Serialize)]
struct Line<'a> {
    end: &'a str,
    exit_code: u8,
    command: Option<CommandLine>,
    cause: Cause,
    error: Option<String>,
    hint: Option<&'a str>,
    accel: Option<Accel>,
    cpus: Option<u32>,
    times_ms: Option<Times>,
    exits: Option<&'a BTreeMap<&'static str, u64>>,
    memory_bytes: Option<Ram>,
    hang: Option<&'a Hang>,
}

/// How the command ended, in the result object.
#[derive(Serialize)]
struct CommandLine {
    end: &'static str,
    exit_code: Option<u8>,
    signal: Option<u8>,
    healthy: bool,
    findings: Vec<Finding>,
    tests: Option<TestsLine>,
}

/// Tests that the command and its kernel told of, in the result object.
#[derive(Serialize)]
struct TestsLine {
    passed: u64,
    failed: u64,
    skipped: u64,
    failures: Vec<String>,
}

impl TestsLine {
    fn of(ended: &Ended) -> Option<TestsLine> {
        let both = [&ended.tests, &ended.kernel_tests];
        let sum =
            |count: fn(&Tests) -> u64| both.iter().map(|tests| count(tests)).fold(0, u64::saturating_add);
        (sum(Tests::count) > 0).then(|| TestsLine {
            passed: sum(|tests| tests.passed),
            failed: sum(|tests| tests.failed),
            skipped: sum(|tests| tests.skipped),
            failures: both.iter().flat_map(|tests| tests.failures()).take(FAILURES).collect(),
        })
    }
}

impl CommandLine {
    fn of(ended: &Ended, end: &End) -> CommandLine {
        let (exit_code, signal) = match ended.outcome {
            Some(Outcome::Code(code)) => (Some(code), None),
            Some(Outcome::Signal(signal)) => (None, Some(signal)),
            _ => (None, None),
        };
        let healthy = ended.health.is_good() && !matches!(end, End::Panicked { .. });
        let findings = ended.health.findings.clone();
        CommandLine { end: ended.name(), exit_code, signal, healthy, findings, tests: TestsLine::of(ended) }
    }
}

impl Report {
    /// The result object, on one line, without its newline.
    pub fn json(&self) -> String {
        let complaint = self.complaint();
        line(&Line {
            end: self.end.name(),
            exit_code: self.exit_code(),
            cause: self.cause(),
            command: self.command.as_ref().map(|ended| CommandLine::of(ended, &self.end)),
            error: complaint.as_ref().map(Fail::summary),
            hint: complaint.as_ref().and_then(Fail::remedy),
            accel: Some(self.accel),
            cpus: Some(self.cpus),
            times_ms: Some(self.times),
            exits: Some(&self.exits),
            memory_bytes: Some(self.memory),
            hang: self.hang.as_ref(),
        })
    }

    /// The report as JUnit has it.
    pub fn junit(&self) -> String {
        let complaint = self.complaint();
        let message = complaint.as_ref().map_or_else(|| self.plain_end(), Fail::summary);
        let cause = self.cause();
        let hung = self.hang.iter().flat_map(Hang::lines);
        let said = self.last_words().iter().map(|line| format!("  | {line}"));
        let findings = self.command.iter().flat_map(|ended| &ended.health.findings);
        let complaints = findings.map(|finding| format!("{:.3} {}", finding.seconds(), finding.text));
        let details: Vec<String> = complaints.chain(hung).chain(said).collect();
        // The first line of a message is its summary; what stands below is for the details.
        let (first, below) = message.split_once('\n').unwrap_or((message.as_str(), ""));
        let details = [below, &details.join("\n")].join("\n").trim_matches('\n').to_owned();
        let trouble = Trouble { aborted: cause.aborts(), cause: cause.name(), message: first, details };
        let name = self.command.as_ref().map_or_else(|| "guest".to_owned(), |ended| title(&ended.command));
        let run = Run {
            name: &name,
            took: self.times.end,
            properties: self.properties(cause),
            trouble: (cause != Cause::Ok).then_some(trouble),
        };
        let none = Tests::default();
        let (command, kernel) =
            self.command.as_ref().map_or((&none, &none), |ended| (&ended.tests, &ended.kernel_tests));
        junit::write(&run, &[("command", command), ("kernel", kernel)])
    }

    /// How it ended, where there is nothing to complain of.
    fn plain_end(&self) -> String {
        match (&self.end, self.command.as_ref().and_then(|ended| ended.outcome)) {
            (End::DebugExit(value), _) => format!("the guest ended with {value}"),
            (End::PoweredOff | End::Reset, Some(Outcome::Code(code))) => {
                format!("the command ended with {code}")
            }
            (End::PoweredOff | End::Reset, Some(Outcome::Signal(number))) => {
                format!("signal {number} ended the command")
            }
            (end, _) => format!("the run ended: {}", end.name()),
        }
    }

    fn properties(&self, cause: Cause) -> Vec<(&'static str, String)> {
        let millis = |name, time: Option<std::time::Duration>| {
            time.map(|time| (name, format!("{:.3}", time.as_secs_f64() * 1e3)))
        };
        let mut properties = vec![
            ("cause", cause.name().to_owned()),
            ("end", self.end.name().to_owned()),
            ("exit_code", self.exit_code().to_string()),
            ("cpus", self.cpus.to_string()),
            ("memory_bytes", self.memory.size.to_string()),
            ("memory_touched_bytes", self.memory.touched.to_string()),
            ("exits", self.exits.values().copied().fold(0, u64::saturating_add).to_string()),
        ];
        properties.extend(millis("first_instruction_ms", self.times.first_instruction));
        properties.extend(millis("cpu_ms", self.times.cpu));
        properties
    }
}

/// A command in one line.
fn title(command: &Command) -> String {
    command.argv.join(" ")
}

/// Why a run came to nothing, or what it has come to so far.
pub enum Early<'a> {
    /// It was not started.
    Failed(&'a Fail),
    /// It goes on: whoever reads that later knows that it was cut short.
    Unfinished,
}

/// The report, as JUnit has it, of a run that came to nothing, or has not come to anything yet.
pub fn junit_before_start(early: &Early<'_>) -> String {
    let (cause, message) = match early {
        Early::Failed(fail) => (Cause::NotStarted.name(), fail.to_string()),
        Early::Unfinished => ("unfinished", "the run did not come to its end".to_owned()),
    };
    let (message, details) = message.split_once('\n').unwrap_or((message.as_str(), ""));
    let trouble = Trouble { aborted: true, cause, message, details: details.to_owned() };
    let properties = vec![("cause", cause.to_owned())];
    junit::write(&Run { name: "guest", trouble: Some(trouble), properties, ..Run::default() }, &[])
}

/// The result object of a run that came to nothing because of `fail`.
pub fn json_before_start(fail: &Fail) -> String {
    line(&Line {
        end: "not-started",
        cause: Cause::NotStarted,
        exit_code: code_before_start(fail),
        command: None,
        error: Some(fail.summary()),
        hint: fail.remedy(),
        accel: None,
        cpus: None,
        times_ms: None,
        exits: None,
        memory_bytes: None,
        hang: None,
    })
}

fn line(line: &Line<'_>) -> String {
    // Strings and numbers only: there is nothing that JSON could not say.
    serde_json::to_string(line).unwrap_or_default()
}
