//! What is told of a matrix: a table for people, an object for programs.

use std::time::Duration;

use serde_json::{Map, Value, json};

use super::cells::Cell;
use super::outcome::{Outcome, Verdict, exit_code};

/// All that there is to tell.
pub struct Report<'a> {
    /// The names of the axes.
    pub axes: &'a [String],
    /// The cells.
    pub cells: &'a [Cell],
    /// What became of each.
    pub outcomes: &'a [Outcome],
    /// From the start to the end of it all.
    pub took: Duration,
    /// The exit code, where a signal says another than the cells.
    pub code: Option<u8>,
}

/// The verdicts in the order of their importance for a summary.
const VERDICTS: [Verdict; 5] =
    [Verdict::Passed, Verdict::Flaky, Verdict::Failed, Verdict::NotStarted, Verdict::Skipped];

/// A time as people read it.
pub fn seconds(time: Duration) -> String {
    format!("{:.1} s", time.as_secs_f64())
}

impl Report<'_> {
    /// Each cell with its outcome.
    pub fn pairs(&self) -> impl Iterator<Item = (&Cell, &Outcome)> {
        self.cells.iter().zip(self.outcomes)
    }

    /// The exit code.
    pub fn exit_code(&self) -> u8 {
        self.code.unwrap_or_else(|| exit_code(self.outcomes))
    }

    /// How many cells have that verdict.
    pub fn count(&self, verdict: Verdict) -> usize {
        self.outcomes.iter().filter(|outcome| outcome.verdict() == verdict).count()
    }

    /// The table, and the sum below it.
    pub fn table(&self) -> String {
        let headings = self.axes.iter().map(String::as_str).chain(["RESULT", "TIME", "CAUSE"]);
        let mut rows: Vec<Vec<String>> = vec![headings.map(str::to_uppercase).collect()];
        // A cell that is on no axis is told by its name.
        let nameless = self.axes.is_empty();
        if nameless && let Some(first) = rows.first_mut() {
            first.insert(0, "CELL".to_owned());
        }
        for (cell, outcome) in self.pairs() {
            let labels = cell.labels.iter().map(|label| label.clone().unwrap_or_else(|| "-".to_owned()));
            let mut row: Vec<String> = if nameless { vec![cell.name.clone()] } else { labels.collect() };
            row.extend([outcome.verdict().name().to_owned(), seconds(outcome.took()), cause(outcome)]);
            rows.push(row);
        }
        let width = |column: usize| {
            rows.iter()
                .filter_map(|row| row.get(column))
                .map(|text| text.chars().count())
                .max()
                .unwrap_or_default()
        };
        let widths: Vec<usize> = (0..rows.first().map_or(0, Vec::len)).map(width).collect();
        let mut text = String::new();
        for row in &rows {
            let padded = row.iter().zip(&widths).map(|(text, width)| format!("{text:<width$}"));
            text += padded.collect::<Vec<_>>().join("  ").trim_end();
            text.push('\n');
        }
        text + &self.sum() + "\n"
    }

    /// `4 cells in 8.1 s: 3 ok, 1 failed`
    pub fn sum(&self) -> String {
        let counts = VERDICTS.into_iter().map(|verdict| (self.count(verdict), verdict.name()));
        let counts = counts.filter(|(count, _)| *count > 0).map(|(count, name)| format!("{count} {name}"));
        let cells = if self.cells.len() == 1 { "cell" } else { "cells" };
        format!(
            "{} {cells} in {}: {}",
            self.cells.len(),
            seconds(self.took),
            counts.collect::<Vec<_>>().join(", ")
        )
    }

    /// The object, on one line, without its newline.
    pub fn json(&self) -> String {
        let cells: Vec<Value> = self.pairs().map(|(cell, outcome)| self.cell(cell, outcome)).collect();
        let counts: Map<String, Value> = VERDICTS
            .into_iter()
            .map(|verdict| (verdict.name().to_owned(), json!(self.count(verdict))))
            .collect();
        json!({ "exit_code": self.exit_code(), "time_ms": millis(self.took), "counts": counts, "cells": cells })
            .to_string()
    }

    fn cell(&self, cell: &Cell, outcome: &Outcome) -> Value {
        let labels: Map<String, Value> =
            self.axes.iter().cloned().zip(cell.labels.iter().map(|label| json!(label))).collect();
        let tries = outcome.tries.iter().map(|one| {
            let cause = (!one.passed()).then(|| one.cause());
            json!({ "exit_code": one.code, "signal": one.signal, "cause": cause, "time_ms": millis(one.took),
                "result": one.result })
        });
        let tries: Vec<Value> = tries.collect();
        let logs: Vec<_> = outcome.logs.iter().map(|dir| dir.display().to_string()).collect();
        json!({ "name": cell.name, "axes": labels, "verdict": outcome.verdict().name(), "tries": tries, "logs": logs })
    }
}

fn millis(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}

/// What the table says of a cell that is not simply all right.
fn cause(outcome: &Outcome) -> String {
    let Some(failure) = outcome.failure() else { return String::new() };
    let cause = crate::quote::line(failure.cause().as_bytes());
    match (outcome.verdict(), outcome.tries.len()) {
        (Verdict::Flaky, tries) => format!("passed at try {tries}, before: {cause}"),
        (_, 1) => cause,
        (_, tries) => format!("{cause} ({tries} tries)"),
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::matrix::outcome::Try;

    fn cell(kernel: &str, cpus: Option<&str>) -> Cell {
        let labels = vec![Some(kernel.to_owned()), cpus.map(str::to_owned)];
        Cell {
            name: format!("kernel={kernel},cpus={}", cpus.unwrap_or("-")),
            labels,
            flags: Vec::new(),
            command: Vec::new(),
        }
    }

    fn outcome(codes: &[u8]) -> Outcome {
        let one = |code: &u8| Try { code: Some(*code), took: Duration::from_millis(1500), ..Try::default() };
        Outcome { tries: codes.iter().map(one).collect(), logs: Vec::new() }
    }

    /// A report of four cells, one of each kind.
    pub fn with_report(with: impl FnOnce(&Report<'_>)) {
        let axes = ["kernel".to_owned(), "cpus".to_owned()];
        let cells =
            [cell("6.1", Some("1")), cell("6.1", Some("2")), cell("mine", Some("1")), cell("mine", None)];
        let mut failed = outcome(&[7, 7]);
        failed.logs.push("logs/a".into());
        if let Some(first) = failed.tries.first_mut() {
            first.result = Some(json!({ "error": "run <it>:\u{1b}[2J no" }));
            first.said = vec!["said & done".to_owned()];
        }
        let outcomes = [outcome(&[0]), outcome(&[7, 0]), failed, outcome(&[])];
        with(&Report {
            axes: &axes,
            cells: &cells,
            outcomes: &outcomes,
            took: Duration::from_secs(8),
            code: None,
        });
    }

    #[test]
    fn a_table_has_a_row_for_each_cell_and_a_sum() {
        with_report(|report| {
            let table = report.table();
            let lines: Vec<_> = table.lines().collect();
            assert_eq!(
                lines,
                [
                    "KERNEL  CPUS  RESULT   TIME   CAUSE",
                    "6.1     1     ok       1.5 s",
                    "6.1     2     flaky    3.0 s  passed at try 2, before: exit code 7",
                    "mine    1     failed   3.0 s  run <it>:[2J no (2 tries)",
                    "mine    -     skipped  0.0 s",
                    "4 cells in 8.0 s: 1 ok, 1 flaky, 1 failed, 1 skipped",
                ]
            );
            assert_eq!(report.exit_code(), 1);
        });
    }

    #[test]
    fn an_object_has_all_of_it() {
        with_report(|report| {
            let object: Value = serde_json::from_str(&report.json()).unwrap();
            assert_eq!((&object["exit_code"], &object["time_ms"]), (&json!(1), &json!(8000.0)));
            assert_eq!(
                object["counts"],
                json!({"ok": 1, "flaky": 1, "failed": 1, "not-started": 0, "skipped": 1})
            );
            let cell = &object["cells"][1];
            assert_eq!(cell["axes"], json!({"kernel": "6.1", "cpus": "2"}));
            assert_eq!(
                (&cell["verdict"], &cell["tries"][0]["cause"]),
                (&json!("flaky"), &json!("exit code 7"))
            );
            assert_eq!(object["cells"][2]["logs"], json!(["logs/a"]));
            assert_eq!(object["cells"][3]["axes"]["cpus"], Value::Null);
        });
    }
}
