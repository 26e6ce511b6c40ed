//! The result of a run as JUnit has it: one case for the run itself, and one for each test that the guest told of.
//!
//! There is no standard, only readers: Jenkins, GitLab and others take `testsuites`, `testsuite`, `testcase`, `failure`, `error`,
//! `skipped` and `system-err` with these attributes.

use std::fmt::Write;
use std::time::Duration;

use crate::ktap::{Case, Tests, Verdict};

/// The run itself.
#[derive(Clone, Debug, Default)]
pub struct Run<'a> {
    /// What was run.
    pub name: &'a str,
    /// How long it took.
    pub took: Duration,
    /// What is known of it besides: names and values.
    pub properties: Vec<(&'a str, String)>,
    /// Why it was no success.
    pub trouble: Option<Trouble<'a>>,
}

/// Why a run was no success.
#[derive(Clone, Debug)]
pub struct Trouble<'a> {
    /// Nobody can say what would have come of the run, for it was not carried out to its end.
    pub aborted: bool,
    /// The cause, in one word.
    pub cause: &'a str,
    /// The cause in a line.
    pub message: &'a str,
    /// What else there is to say.
    pub details: String,
}

/// Writes the report of a run and the tests of some sources, each with its name.
pub fn write(run: &Run<'_>, sources: &[(&str, &Tests)]) -> String {
    let mut xml = String::from("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n");
    let seconds = format!("{:.3}", run.took.as_secs_f64());
    let (failed, aborted) = match &run.trouble {
        None => (0, 0),
        Some(trouble) => (u64::from(!trouble.aborted), u64::from(trouble.aborted)),
    };
    let sum = |count: fn(&Tests) -> u64| sources.iter().map(|(_, tests)| count(tests)).sum::<u64>();
    let _ = writeln!(
        xml,
        "<testsuites name=\"mayfly\" tests=\"{}\" failures=\"{}\" errors=\"{aborted}\" skipped=\"{}\" time=\"{seconds}\">",
        1 + sum(Tests::count),
        failed + sum(|tests| tests.failed),
        sum(|tests| tests.skipped),
    );
    let _ = writeln!(
        xml,
        "  <testsuite name=\"mayfly\" tests=\"1\" failures=\"{failed}\" errors=\"{aborted}\" skipped=\"0\" time=\"{seconds}\">"
    );
    xml.push_str("    <properties>\n");
    for (name, value) in &run.properties {
        let _ = writeln!(xml, "      <property name=\"{}\" value=\"{}\"/>", escape(name), escape(value));
    }
    xml.push_str("    </properties>\n");
    let _ =
        write!(xml, "    <testcase classname=\"mayfly\" name=\"{}\" time=\"{seconds}\"", escape(run.name));
    match &run.trouble {
        None => xml.push_str("/>\n"),
        Some(trouble) => {
            let kind = if trouble.aborted { "error" } else { "failure" };
            let (cause, message) = (escape(trouble.cause), escape(trouble.message));
            let details = escape(&trouble.details);
            let _ =
                writeln!(xml, ">\n      <{kind} type=\"{cause}\" message=\"{message}\">{details}</{kind}>");
            xml.push_str("    </testcase>\n");
        }
    }
    xml.push_str("  </testsuite>\n");
    for (source, tests) in sources.iter().filter(|(_, tests)| tests.count() > 0) {
        suite(&mut xml, source, tests);
    }
    xml.push_str("</testsuites>\n");
    xml
}

fn suite(xml: &mut String, source: &str, tests: &Tests) {
    let _ = writeln!(
        xml,
        "  <testsuite name=\"{}\" tests=\"{}\" failures=\"{}\" errors=\"0\" skipped=\"{}\">",
        escape(source),
        tests.count(),
        tests.failed,
        tests.skipped
    );
    for case in &tests.cases {
        test(xml, source, case);
    }
    let beyond = tests.count().saturating_sub(u64::try_from(tests.cases.len()).unwrap_or(u64::MAX));
    if beyond > 0 {
        let _ = writeln!(xml, "    <system-err>{beyond} more results were counted only</system-err>");
    }
    xml.push_str("  </testsuite>\n");
}

fn test(xml: &mut String, source: &str, case: &Case) {
    let class = if case.suite.is_empty() { source } else { &case.suite };
    let name = if case.name.is_empty() { "unnamed" } else { &case.name };
    let _ = write!(xml, "    <testcase classname=\"{}\" name=\"{}\"", escape(class), escape(name));
    let reason = escape(&case.reason);
    let _ = match case.verdict {
        Verdict::Passed => writeln!(xml, "/>"),
        Verdict::Skipped => writeln!(xml, "><skipped message=\"{reason}\"/></testcase>"),
        Verdict::Failed => {
            let said = escape(&case.diagnostics.join("\n"));
            writeln!(xml, "><failure type=\"not-ok\" message=\"{reason}\">{said}</failure></testcase>")
        }
    };
}

/// Text in an attribute or between tags. What XML 1.0 has no way to say (section 2.2) becomes U+FFFD; so does the carriage
/// return, which readers change anyway.
pub fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\n' => escaped.push_str("&#10;"),
            '\t' => escaped.push_str("&#9;"),
            '\u{fffe}' | '\u{ffff}' => escaped.push('\u{fffd}'),
            c if c.is_control() => escaped.push('\u{fffd}'),
            c => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ktap::Listener;

    fn tests(text: &str) -> Tests {
        let mut listener = Listener::default();
        listener.feed(text.as_bytes());
        listener.tests()
    }

    #[test]
    fn a_run_without_tests_is_one_case() {
        let run = Run {
            name: "true",
            took: Duration::from_millis(1234),
            properties: vec![("cause", "ok".into())],
            trouble: None,
        };
        assert_eq!(
            write(&run, &[("command", &Tests::default())]),
            "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n\
             <testsuites name=\"mayfly\" tests=\"1\" failures=\"0\" errors=\"0\" skipped=\"0\" time=\"1.234\">\n\
             \x20 <testsuite name=\"mayfly\" tests=\"1\" failures=\"0\" errors=\"0\" skipped=\"0\" time=\"1.234\">\n\
             \x20   <properties>\n\
             \x20     <property name=\"cause\" value=\"ok\"/>\n\
             \x20   </properties>\n\
             \x20   <testcase classname=\"mayfly\" name=\"true\" time=\"1.234\"/>\n\
             \x20 </testsuite>\n\
             </testsuites>\n"
        );
    }

    #[test]
    fn each_test_is_a_case_and_numbers_add_up() {
        let from_command =
            tests("TAP version 13\n1..3\nok 1 a\n# why\nnot ok 2 b # exit=1\nok 3 c # SKIP no disk\n");
        let from_kernel =
            tests("KTAP version 1\n1..1\n    KTAP version 1\n    1..1\n    ok 1 x\nok 1 suite\n");
        let trouble =
            Trouble { aborted: false, cause: "tests-failed", message: "1 of 4", details: "b".into() };
        let run = Run { name: "sh", trouble: Some(trouble), ..Run::default() };
        let xml = write(&run, &[("command", &from_command), ("kernel", &from_kernel)]);
        for line in [
            "<testsuites name=\"mayfly\" tests=\"5\" failures=\"2\" errors=\"0\" skipped=\"1\" time=\"0.000\">",
            "      <failure type=\"tests-failed\" message=\"1 of 4\">b</failure>",
            "  <testsuite name=\"command\" tests=\"3\" failures=\"1\" errors=\"0\" skipped=\"1\">",
            "    <testcase classname=\"command\" name=\"a\"/>",
            "    <testcase classname=\"command\" name=\"b\"><failure type=\"not-ok\" message=\"exit=1\">why</failure></testcase>",
            "    <testcase classname=\"command\" name=\"c\"><skipped message=\"SKIP no disk\"/></testcase>",
            "    <testcase classname=\"suite\" name=\"x\"/>",
        ] {
            assert!(xml.lines().any(|found| found == line), "{line} is not in\n{xml}");
        }
    }

    #[test]
    fn no_text_breaks_the_form() {
        let evil = "]]><x a='\"&\u{0}\u{1b}[2J\u{85}\u{ffff}\r\n\té";
        let trouble = Trouble { aborted: true, cause: evil, message: evil, details: evil.into() };
        let run = Run {
            name: evil,
            properties: vec![(evil, evil.into())],
            trouble: Some(trouble),
            ..Run::default()
        };
        let told = tests(&format!("TAP version 13\n# {evil}\nnot ok 1 {evil}\n"));
        let xml = write(&run, &[(evil, &told)]);
        let shown = "]]&gt;&lt;x a='&quot;&amp;\u{fffd}\u{fffd}[2J\u{fffd}\u{fffd}\u{fffd}&#10;&#9;é";
        assert!(
            xml.contains(&format!("<error type=\"{shown}\" message=\"{shown}\">{shown}</error>")),
            "{xml}"
        );
        assert!(!xml.contains(|c: char| c.is_control() && c != '\n'), "{xml:?}");
        // Whatever stands between tags, as many are opened as closed.
        let opened =
            xml.matches("<test").count() - xml.matches("/>\n").count() + xml.matches("<property ").count();
        assert_eq!(opened, xml.matches("</test").count(), "{xml}");
    }
}
