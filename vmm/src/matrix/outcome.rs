//! What became of the cells of a matrix.

use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;

use crate::outcome::code;

/// One try of a cell.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Try {
    /// The exit code of its process; none if a signal ended it.
    pub code: Option<u8>,
    /// The signal that ended its process.
    pub signal: Option<i32>,
    /// The result object of the run, if it told one.
    pub result: Option<Value>,
    /// From its start to its end.
    pub took: Duration,
    /// What it said last, on standard error or else on standard output.
    pub said: Vec<String>,
    /// It was ended from here, and says nothing of the cell.
    pub ended: bool,
}

impl Try {
    fn text(&self, key: &str) -> Option<&str> {
        self.result.as_ref()?.get(key)?.as_str()
    }

    /// The cell is all right.
    pub fn passed(&self) -> bool {
        self.code == Some(code::DONE)
    }

    /// There was no guest, or it could not be set up for its command.
    pub fn not_started(&self) -> bool {
        self.text("cause") == Some("not-started")
    }

    /// Why it did not pass, in one line.
    pub fn cause(&self) -> String {
        match (self.text("error"), self.code, self.signal) {
            (Some(error), ..) => error.to_owned(),
            (None, Some(code), _) => format!("exit code {code}"),
            (None, None, Some(signal)) => format!("signal {signal} ended mayfly"),
            (None, None, None) => "it could not be run".to_owned(),
        }
    }
}

/// What the tries of a cell come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It passed at once.
    Passed,
    /// It failed, and then it passed.
    Flaky,
    /// It failed as often as it was tried.
    Failed,
    /// Its machine could not be started.
    NotStarted,
    /// It was not tried, or not to its end.
    Skipped,
}

impl Verdict {
    /// As reports have it.
    pub fn name(self) -> &'static str {
        match self {
            Verdict::Passed => "ok",
            Verdict::Flaky => "flaky",
            Verdict::Failed => "failed",
            Verdict::NotStarted => "not-started",
            Verdict::Skipped => "skipped",
        }
    }
}

/// A cell's tries, and where their output is.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outcome {
    /// In their order.
    pub tries: Vec<Try>,
    /// The directories of those that failed.
    pub logs: Vec<PathBuf>,
}

impl Outcome {
    /// The verdict.
    pub fn verdict(&self) -> Verdict {
        match self.tries.last() {
            Some(last) if last.passed() && self.tries.len() == 1 => Verdict::Passed,
            Some(last) if last.passed() => Verdict::Flaky,
            Some(last) if last.ended => Verdict::Skipped,
            Some(last) if last.not_started() => Verdict::NotStarted,
            Some(_) => Verdict::Failed,
            None => Verdict::Skipped,
        }
    }

    /// The first try that failed.
    pub fn failure(&self) -> Option<&Try> {
        self.tries.iter().find(|one| !one.passed() && !one.ended)
    }

    /// All tries together.
    pub fn took(&self) -> Duration {
        self.tries.iter().map(|one| one.took).sum()
    }
}

/// The exit code for all cells.
pub fn exit_code(cells: &[Outcome]) -> u8 {
    let count = |verdict| cells.iter().filter(|cell| cell.verdict() == verdict).count();
    let good = count(Verdict::Passed) + count(Verdict::Flaky);
    if good == cells.len() {
        code::DONE
    } else if good + count(Verdict::Failed) == 0 && count(Verdict::NotStarted) > 0 {
        code::NOT_STARTED
    } else {
        1
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn ended(code: u8) -> Try {
        Try { code: Some(code), ..Try::default() }
    }

    fn outcome(tries: &[Try]) -> Outcome {
        Outcome { tries: tries.to_vec(), logs: Vec::new() }
    }

    #[test]
    fn tries_come_to_a_verdict_and_verdicts_to_a_code() {
        let with = |code, result| Try { result: Some(result), ..ended(code) };
        let lost = with(125, json!({"cause": "not-started", "error": "no kernel"}));
        let own = with(125, json!({"cause": "command-failed"}));
        let stopped = Try { ended: true, ..ended(143) };
        for (tries, verdict) in [
            (vec![ended(0)], Verdict::Passed),
            (vec![ended(7), ended(0)], Verdict::Flaky),
            (vec![ended(0), ended(7)], Verdict::Failed),
            (vec![lost.clone()], Verdict::NotStarted),
            (vec![own], Verdict::Failed),
            (vec![ended(7), stopped], Verdict::Skipped),
            (vec![], Verdict::Skipped),
        ] {
            assert_eq!(outcome(&tries).verdict(), verdict, "{tries:?}");
        }
        let (good, bad, lost) = (outcome(&[ended(0)]), outcome(&[ended(7)]), outcome(&[lost]));
        let flaky = outcome(&[ended(7), ended(0)]);
        assert_eq!(exit_code(&[good.clone(), flaky]), 0);
        assert_eq!(exit_code(&[good.clone(), lost.clone()]), 1);
        assert_eq!(exit_code(&[bad, lost.clone()]), 1);
        assert_eq!(exit_code(&[lost.clone(), lost]), 125);
        assert_eq!(exit_code(&[good, outcome(&[])]), 1);
    }

    #[test]
    fn a_try_that_failed_says_why() {
        assert_eq!(ended(7).cause(), "exit code 7");
        let told = Try { result: Some(json!({"error": "run the guest: its kernel panicked"})), ..ended(120) };
        assert_eq!(told.cause(), "run the guest: its kernel panicked");
        assert_eq!(Try { signal: Some(9), ..Try::default() }.cause(), "signal 9 ended mayfly");
    }
}
