//! `mayfly doctor`: prints what [`crate::doctor`] finds.

use clap::ArgMatches;

use super::say;
use crate::doctor::{self, Findings};
use crate::outcome::code;

/// Carries out `mayfly doctor`; its exit code.
pub fn doctor(matches: &ArgMatches) -> u8 {
    let findings = doctor::examine(&doctor::ThisHost::default());
    let text = if matches.get_flag("json") { findings.json() } else { render(&findings) };
    match (say(&text), findings.exit_code()) {
        (failed, code::DONE) => failed,
        (_, code) => code,
    }
}

fn render(findings: &Findings) -> String {
    let mut text = String::new();
    for check in &findings.checks {
        text.push_str(&format!("{:<4}  {:<13}  {}\n", check.state.word(), check.name, check.detail));
        if let Some(fix) = &check.fix {
            text.push_str(&format!("{:21}fix: {fix}\n", ""));
        }
    }
    text
}
