//! The report of a matrix as JUnit has it: a suite with one case for each cell.
//!
//! A cell that passed at last has its failures as `flakyFailure`, as Maven's Surefire writes them and Jenkins and others read them.

use std::fmt::Write;
use std::time::Duration;

use super::outcome::{Outcome, Try, Verdict};
use super::report::Report;
use crate::junit::escape;

/// Writes the report of the matrix `name`.
pub fn write(name: &str, report: &Report<'_>) -> String {
    let mut xml = String::from("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n");
    let counts = format!(
        "tests=\"{}\" failures=\"{}\" errors=\"{}\" skipped=\"{}\" time=\"{}\"",
        report.cells.len(),
        report.count(Verdict::Failed),
        report.count(Verdict::NotStarted),
        report.count(Verdict::Skipped),
        seconds(report.took)
    );
    let name = escape(name);
    let _ = writeln!(xml, "<testsuites name=\"mayfly\" {counts}>\n  <testsuite name=\"{name}\" {counts}>");
    for (cell, outcome) in report.pairs() {
        let case = format!(
            "classname=\"{name}\" name=\"{}\" time=\"{}\"",
            escape(&cell.name),
            seconds(outcome.took())
        );
        let inner = inner(outcome);
        let _ = match inner.as_str() {
            "" => writeln!(xml, "    <testcase {case}/>"),
            inner => writeln!(xml, "    <testcase {case}>\n{inner}    </testcase>"),
        };
    }
    xml + "  </testsuite>\n</testsuites>\n"
}

fn inner(outcome: &Outcome) -> String {
    let told = |kind: &str, one: &Try| {
        let cause = one.result.as_ref().and_then(|result| result.get("cause")?.as_str());
        format!(
            "      <{kind} type=\"{}\" message=\"{}\">{}</{kind}>\n",
            escape(cause.unwrap_or("no-result")),
            escape(&one.cause()),
            escape(&one.said.join("\n"))
        )
    };
    let failed = || outcome.tries.iter().filter(|one| !one.passed());
    match outcome.verdict() {
        Verdict::Passed => String::new(),
        Verdict::Skipped => "      <skipped/>\n".to_owned(),
        Verdict::Flaky => failed().map(|one| told("flakyFailure", one)).collect(),
        verdict => {
            let kind = if verdict == Verdict::NotStarted { "error" } else { "failure" };
            let mut text: String = failed().take(1).map(|one| told(kind, one)).collect();
            text.extend(failed().skip(1).map(|one| told("rerunFailure", one)));
            text
        }
    }
}

fn seconds(time: Duration) -> String {
    format!("{:.3}", time.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::super::report::tests::with_report;
    use super::*;

    #[test]
    fn each_cell_is_a_case() {
        with_report(|report| {
            let xml = write("k.toml", report);
            for line in [
                "<testsuites name=\"mayfly\" tests=\"4\" failures=\"1\" errors=\"0\" skipped=\"1\" time=\"8.000\">",
                "  <testsuite name=\"k.toml\" tests=\"4\" failures=\"1\" errors=\"0\" skipped=\"1\" time=\"8.000\">",
                "    <testcase classname=\"k.toml\" name=\"kernel=6.1,cpus=1\" time=\"1.500\"/>",
                "    <testcase classname=\"k.toml\" name=\"kernel=6.1,cpus=2\" time=\"3.000\">",
                "      <flakyFailure type=\"no-result\" message=\"exit code 7\"></flakyFailure>",
                "      <failure type=\"no-result\" message=\"run &lt;it&gt;:\u{fffd}[2J no\">said &amp; done</failure>",
                "      <rerunFailure type=\"no-result\" message=\"exit code 7\"></rerunFailure>",
                "      <skipped/>",
            ] {
                assert!(xml.lines().any(|found| found == line), "{line} is not in\n{xml}");
            }
            assert!(!xml.contains(|c: char| c.is_control() && c != '\n'), "{xml:?}");
        });
    }
}
