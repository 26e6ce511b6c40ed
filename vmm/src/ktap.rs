//! Test results in what a guest says: KTAP and TAP, as kselftest, KUnit and others write them.
//!
//! KTAP version 1 is Documentation/dev-tools/ktap.rst of Linux; TAP 13 and 14 are at testanything.org. What the guest says is a
//! claim: whatever it is, what is kept of it is bounded, and the rest counted.

mod level;
mod line;

use std::collections::{BTreeMap, VecDeque};

use memchr::{memchr, memmem, memrchr};
use serde::Serialize;

use self::level::Level;
use self::line::{Element, Item};
use crate::quote;

/// Bytes of a line that are looked at.
const LINE: usize = 1024;
/// Results that are kept one by one; of those beyond, only failures are, and not more of them than this.
const KEPT: usize = 10_000;
const FAILURES: usize = 1_000;
/// Lines before a failure that are kept with it, and the bytes of all such lines.
const DIAGNOSTICS: usize = 20;
const ROOM: usize = 4 << 20;
/// The longest name of a suite in suites.
const SUITE: usize = 512;

/// What came of a test.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// `ok`.
    Passed,
    /// `not ok`.
    Failed,
    /// `# SKIP`; and a failure that is expected (`# TODO`, `# XFAIL`).
    Skipped,
}

/// A result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Case {
    /// The tests of which it is one, from the outermost, with `.` between them.
    pub suite: String,
    /// Its name.
    pub name: String,
    /// What came of it.
    pub verdict: Verdict,
    /// What is said of it: why it was skipped, how it failed.
    pub reason: String,
    /// What was said before a failure.
    pub diagnostics: Vec<String>,
}

/// All results of a source.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tests {
    /// One by one.
    pub cases: Vec<Case>,
    /// How many have passed, failed and been skipped, those that are not among the cases too.
    pub passed: u64,
    /// The same.
    pub failed: u64,
    /// The same.
    pub skipped: u64,
}

impl Tests {
    /// How many there are.
    pub fn count(&self) -> u64 {
        self.passed.saturating_add(self.failed).saturating_add(self.skipped)
    }

    /// The names of those that failed, of those that are kept.
    pub fn failures(&self) -> impl Iterator<Item = String> {
        let failed = self.cases.iter().filter(|case| case.verdict == Verdict::Failed);
        failed.map(|case| {
            if case.suite.is_empty() { case.name.clone() } else { format!("{}.{}", case.suite, case.name) }
        })
    }

    fn tally(&mut self, verdict: Verdict) {
        let count = match verdict {
            Verdict::Passed => &mut self.passed,
            Verdict::Failed => &mut self.failed,
            Verdict::Skipped => &mut self.skipped,
        };
        *count = count.saturating_add(1);
    }
}

/// Where a listener stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Stage {
    /// There was nothing yet.
    #[default]
    Outside,
    /// There was a first result: a plan may come at the end, and without one it was none.
    Perhaps,
    /// There was a version or a plan.
    Inside,
}

/// Listens for results. Nothing is one without a version before it, or a plan (`1..3`) before or after.
#[derive(Clone, Debug, Default)]
pub struct Listener {
    /// What has come of the present line.
    line: Vec<u8>,
    stage: Stage,
    /// Results with the columns they stand in: those of a larger one belong to the next of a smaller one.
    open: Vec<(usize, Case)>,
    /// How many of them belong to nothing that follows.
    settled: usize,
    failures: usize,
    /// What was said since the last result.
    said: VecDeque<String>,
    room: usize,
    /// What was promised, and what came, by column.
    levels: BTreeMap<usize, Level>,
    /// Those that are counted and not kept.
    beyond: Tests,
}

impl Listener {
    /// Takes in what a program has written.
    pub fn feed(&mut self, bytes: &[u8]) {
        let Some(first) = memchr(b'\n', bytes) else { return self.hold(bytes) };
        let (head, rest) = bytes.split_at(first + 1);
        self.hold(head);
        let line = std::mem::take(&mut self.line);
        self.hear(&line);
        let whole = memrchr(b'\n', rest).map_or(0, |last| last + 1);
        let (mut lines, tail) = rest.split_at(whole);
        if self.stage == Stage::Outside {
            lines = beginning(lines);
        }
        while let Some(end) = memchr(b'\n', lines) {
            let (line, rest) = lines.split_at(end + 1);
            self.hear(line.get(..LINE).unwrap_or(line));
            lines = rest;
        }
        self.hold(tail);
    }

    fn hold(&mut self, bytes: &[u8]) {
        let room = LINE.saturating_sub(self.line.len());
        self.line.extend(bytes.iter().take(room));
    }

    /// Takes in a line.
    pub fn hear(&mut self, line: &[u8]) {
        let text = String::from_utf8_lossy(line);
        let text = text.trim_end_matches(['\n', '\r']);
        let inside = self.stage == Stage::Inside;
        let lax = |column| inside && (column == 0 || self.levels.get(&column).is_some_and(Level::is_lax));
        let Item { column, element } = line::read(text, lax);
        match element {
            Element::Version => self.begin(column),
            Element::Plan(count) => self.plan(column, count),
            Element::Result { number, verdict, name, reason } => {
                if self.stage == Stage::Outside {
                    if column > 0 || number != Some(1) {
                        return;
                    }
                    self.stage = Stage::Perhaps;
                }
                self.count(column, number);
                self.conclude(column, verdict, name, reason);
            }
            _ if self.stage == Stage::Outside => {}
            Element::BailOut(reason) => {
                self.level(column).give_up();
                self.conclude(column, Verdict::Failed, "Bail out!", reason);
            }
            Element::Text(text) => {
                if self.said.len() >= DIAGNOSTICS {
                    self.said.pop_front();
                }
                self.said.push_back(quote::line(text.as_bytes()));
            }
            Element::Nothing => {}
        }
    }

    fn level(&mut self, column: usize) -> &mut Level {
        self.levels.entry(column).or_default()
    }

    fn begin(&mut self, column: usize) {
        if self.stage == Stage::Perhaps {
            *self = Listener::default();
        }
        self.stage = Stage::Inside;
        if column == 0 {
            self.settle();
        }
        self.level(column).begin();
    }

    fn plan(&mut self, column: usize, count: u64) {
        if column == 0 {
            self.stage = Stage::Inside;
            if self.level(0).is_planned() {
                self.settle();
            }
        }
        if self.stage != Stage::Outside {
            self.level(column).plan(count);
        }
    }

    fn count(&mut self, column: usize, number: Option<u64>) {
        if self.level(column).is_over(number) {
            match column {
                0 => self.settle(),
                _ => self.level(column).end(),
            }
        }
        self.level(column).count(number);
    }

    /// Takes a result, and those under it.
    fn conclude(&mut self, column: usize, verdict: Verdict, name: &str, reason: &str) {
        let (name, reason) = (quote::line(name.as_bytes()), quote::line(reason.as_bytes()));
        for (under, mut level) in self.levels.split_off(&(column + 1)) {
            level.end();
            // One that was skipped or has failed says itself why not all came.
            if let Some(short) = level.take_short().filter(|_| verdict == Verdict::Passed) {
                self.keep(under, Verdict::Failed, "plan".into(), short);
            }
        }
        let first = self.open.iter().rposition(|(other, _)| *other <= column).map_or(0, |at| at + 1);
        let (mut any, mut failed) = (false, false);
        for (other, case) in self.open.iter_mut().skip(first) {
            (any, failed) = (true, failed || case.verdict == Verdict::Failed);
            *other = column;
            let room = SUITE.saturating_sub(case.suite.len());
            if name.len() < room {
                let dot = if case.suite.is_empty() { "" } else { "." };
                case.suite.insert_str(0, &format!("{name}{dot}"));
            }
        }
        // A suite is told of by its tests; one that failed without any of them is a failure of its own.
        if any && (failed || verdict != Verdict::Failed) {
            self.said.clear();
            return;
        }
        self.keep(column, verdict, name, reason);
    }

    /// Keeps a result, or counts it where there are too many.
    fn keep(&mut self, column: usize, verdict: Verdict, name: String, reason: String) {
        let said: Vec<String> = std::mem::take(&mut self.said).into();
        let full = self.open.len() >= KEPT;
        let dropped = match verdict {
            Verdict::Failed => self.failures >= FAILURES && full,
            _ => full,
        };
        if dropped {
            return self.beyond.tally(verdict);
        }
        let mut diagnostics = Vec::new();
        if verdict == Verdict::Failed {
            self.failures += 1;
            let bytes = said.iter().map(String::len).sum::<usize>();
            if self.room + bytes <= ROOM {
                self.room += bytes;
                diagnostics = said;
            }
        }
        self.open.push((column, Case { suite: String::new(), name, verdict, reason, diagnostics }));
    }

    /// The end of a document: what was promised has to have come.
    fn settle(&mut self) {
        // What is left open stands for itself, and belongs to nothing that follows.
        self.open.iter_mut().skip(self.settled).for_each(|(column, _)| *column = 0);
        let mut levels = std::mem::take(&mut self.levels);
        for level in levels.values_mut() {
            level.end();
            if let Some(short) = level.take_short() {
                self.keep(0, Verdict::Failed, "plan".into(), short);
            }
        }
        levels.retain(|column, _| *column == 0);
        self.levels = levels;
        self.said.clear();
        self.settled = self.open.len();
    }

    /// All results.
    pub fn tests(mut self) -> Tests {
        let line = std::mem::take(&mut self.line);
        self.hear(&line);
        if self.stage != Stage::Inside {
            return Tests::default();
        }
        self.settle();
        let mut tests = self.beyond;
        for (_, case) in self.open {
            tests.tally(case.verdict);
            tests.cases.push(case);
        }
        tests
    }
}

/// What of some lines begins with the first line that may be the beginning of results. It may not be, but that is for others
/// to say: this only has to be quick.
fn beginning(lines: &[u8]) -> &[u8] {
    let from_line = |at: usize| memrchr(b'\n', lines.get(..at).unwrap_or_default()).map_or(0, |at| at + 1);
    let version = memmem::find(lines, b"TAP version ").map(from_line);
    let others = ["\n1..", "\nok ", "\nnot ok "].into_iter().filter_map(|word| {
        let word = word.as_bytes();
        let at_once = word.get(1..).is_some_and(|word| lines.starts_with(word));
        if at_once { Some(0) } else { memmem::find(lines, word).map(|at| at + 1) }
    });
    let first = version.into_iter().chain(others).min();
    first.and_then(|at| lines.get(at..)).unwrap_or_default()
}

#[cfg(test)]
mod tests;
