//! A line of KTAP: in which column it stands, and what it says.

use super::Verdict;

/// Columns beyond this are all one: tests in tests in tests end somewhere.
const DEEPEST: usize = 64;

/// A line that was read.
pub struct Item<'a> {
    /// How far it is indented; that `# ` stands before it counts too.
    pub column: usize,
    /// What it is.
    pub element: Element<'a>,
}

/// What a line says.
pub enum Element<'a> {
    /// `KTAP version 1`, `TAP version 13`.
    Version,
    /// `1..N`.
    Plan(u64),
    /// A result.
    Result {
        /// Which one it is.
        number: Option<u64>,
        /// What came of it.
        verdict: Verdict,
        /// The name of the test.
        name: &'a str,
        /// What is said of it.
        reason: &'a str,
    },
    /// The whole was given up.
    BailOut(&'a str),
    /// Something that somebody may want to read.
    Text(&'a str),
    /// Nothing of interest.
    Nothing,
}

/// Reads a line. In a column that is `lax` a result needs no number: TAP leaves it out, KTAP does not.
pub fn read(line: &str, lax: impl Fn(usize) -> bool) -> Item<'_> {
    let (mut column, mut marked, mut rest) = (0, false, line);
    loop {
        let text = rest.trim_start_matches(' ');
        column += rest.len() - text.len();
        let found = element(text, lax(column.min(DEEPEST)));
        match text.strip_prefix("# ") {
            // kselftest puts `# ` before what its tests write.
            Some(under) if found.is_none() && leads_on(under, column + 2, &lax) => {
                (column, marked, rest) = (column + 2, true, under)
            }
            _ => {
                let element = found.unwrap_or_else(|| if marked { Element::Nothing } else { remark(text) });
                return Item { column: column.min(DEEPEST), element };
            }
        }
    }
}

/// Whether a remark holds a line of a test under it, after any number of further marks.
fn leads_on(text: &str, column: usize, lax: impl Fn(usize) -> bool) -> bool {
    let inner = text.trim_start_matches(['#', ' ']);
    let column = column + (text.len() - inner.len());
    element(inner, lax(column.min(DEEPEST))).is_some()
}

/// What a line without its indentation is, if it is more than text. Results without a number are `lax`.
fn element(text: &str, lax: bool) -> Option<Element<'_>> {
    if let Some(version) = text.strip_prefix("KTAP version ").or_else(|| text.strip_prefix("TAP version ")) {
        return version.starts_with(|c: char| c.is_ascii_digit()).then_some(Element::Version);
    }
    if let Some(plan) = text.strip_prefix("1..") {
        let end = plan.find(|c: char| !c.is_ascii_digit()).unwrap_or(plan.len());
        let (count, rest) = plan.split_at(end);
        let rest = rest.trim_start();
        return (rest.is_empty() || rest.starts_with('#')).then(|| count.parse().ok().map(Element::Plan))?;
    }
    if let Some(reason) = text.strip_prefix("Bail out!") {
        return lax.then(|| Element::BailOut(reason.trim()));
    }
    result(text, lax)
}

fn result(text: &str, lax: bool) -> Option<Element<'_>> {
    let (passed, rest) = match text.strip_prefix("not ok") {
        Some(rest) => (false, rest),
        None => (true, text.strip_prefix("ok")?),
    };
    if !rest.is_empty() && !rest.starts_with(' ') {
        return None;
    }
    let rest = rest.trim_start();
    let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
    let (number, said) = rest.split_at(end);
    let separate = said.is_empty() || said.starts_with(' ');
    // Older runners count as in `1..3`.
    let ranged = said.strip_prefix("..").map(|said| said.trim_start_matches(|c: char| c.is_ascii_digit()));
    match ranged.or(separate.then_some(said)) {
        Some(said) if !number.is_empty() => {
            Some(judge(passed, Some(number.parse().unwrap_or(u64::MAX)), said.trim_start()))
        }
        _ => lax.then(|| judge(passed, None, rest)),
    }
}

/// What came of a test, by what follows its number.
fn judge(passed: bool, number: Option<u64>, said: &str) -> Element<'_> {
    let said = said.strip_prefix("- ").unwrap_or(said);
    let bare = said.strip_prefix("# ").map(|remark| ("", remark));
    let (name, remark) = bare.or_else(|| said.split_once(" # ")).unwrap_or((said, ""));
    let (mut name, remark) = (name.trim(), remark.trim());
    let word = remark.split(|c: char| !c.is_ascii_alphabetic()).next().unwrap_or_default();
    let is = |wanted: &str| word.eq_ignore_ascii_case(wanted);
    let mut skipped = is("SKIP") || is("SKIPPED");
    for (mark, skips) in [(" [PASS]", false), (" [FAIL]", false), (" [SKIP]", true)] {
        if let Some(plain) = name.strip_suffix(mark) {
            (name, skipped) = (plain.trim_end(), skipped || skips);
        }
    }
    let verdict = match passed {
        // kselftest says `ok` of a failure that it expects.
        _ if skipped || is("XFAIL") => Verdict::Skipped,
        false if is("TODO") => Verdict::Skipped,
        true => Verdict::Passed,
        false => Verdict::Failed,
    };
    Element::Result { number, verdict, name, reason: remark }
}

/// What a line that is no result is worth.
fn remark(text: &str) -> Element<'_> {
    let said = text.trim_start_matches(['#', ' ']);
    let headings = ["Subtest: ", "Totals: ", "module: "];
    if said.is_empty() || headings.iter().any(|words| said.starts_with(words)) {
        return Element::Nothing;
    }
    Element::Text(text.strip_prefix("# ").unwrap_or(text))
}
