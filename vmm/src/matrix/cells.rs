//! The cells of a matrix: each combination of choices is a run of its own.

use base::{Fail, Result, Why};

use super::file::{Axis, Choice, Flag, Matrix, Rule, Setting, Taking};

/// Most cells of one matrix.
const MOST: usize = 4096;

/// A run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cell {
    /// `kernel=6.1,cpus=2`
    pub name: String,
    /// The label for each axis; none where a cell that was added has none.
    pub labels: Vec<Option<String>>,
    /// The words of its command line: flags of `mayfly run`.
    pub flags: Vec<String>,
    /// The command and its arguments.
    pub command: Vec<String>,
}

/// What of a matrix is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Filter {
    /// Cells with this label on this axis.
    Label(String, String),
    /// Cells with this text in their name.
    Text(String),
}

impl Matrix {
    /// Understands a filter: `AXIS=LABEL`, or a text.
    ///
    /// # Errors
    /// [`Why::Usage`]: the axis has no such label.
    pub fn filter(&self, text: &str) -> Result<Filter> {
        let named = text
            .split_once('=')
            .and_then(|(key, label)| Some((self.axes.iter().find(|axis| axis.name == key)?, label)));
        let Some((axis, label)) = named else { return Ok(Filter::Text(text.to_owned())) };
        let added = self
            .include
            .iter()
            .flatten()
            .any(|setting| setting.key == axis.name && setting.values.iter().any(|value| value == label));
        match axis.find(label) {
            Some(choice) => Ok(Filter::Label(axis.name.clone(), choice.label.clone())),
            None if added => Ok(Filter::Label(axis.name.clone(), label.to_owned())),
            None => {
                let labels: Vec<_> = axis.choices.iter().map(|choice| choice.label.as_str()).collect();
                Err(Fail::new(Why::Usage, format!("use --filter {text}"))
                    .because(format!("`{}` has no such value", axis.name))
                    .hint(format!("it has {}", labels.join(", "))))
            }
        }
    }

    /// All cells that pass each of the filters.
    ///
    /// # Errors
    /// [`Why::Usage`]: there are none, or too many, or a variable stands nowhere.
    pub fn cells(&self, flags: &[Flag], filters: &[Filter]) -> Result<Vec<Cell>> {
        let wrong = |cause: String| Fail::new(Why::Usage, "lay out the matrix").because(cause);
        let count = self.axes.iter().try_fold(1usize, |count, axis| count.checked_mul(axis.choices.len()));
        if count.is_none_or(|count| count > MOST) {
            return Err(wrong(format!("it has more than {MOST} cells")));
        }
        // Without axes a matrix is its added cells, and one run if there are none.
        let bare = self.axes.is_empty() && !self.include.is_empty();
        let mut rows: Vec<Row<'_>> = if bare { Vec::new() } else { combinations(&self.axes) };
        rows.retain(|row| !self.exclude.iter().any(|rule| row.matches(rule)));
        rows.extend(self.include.iter().map(|settings| self.added(settings)));
        let mut used = Used::default();
        let cells = rows.iter().map(|row| self.cell(row, flags, &mut used));
        let mut cells = cells.collect::<std::result::Result<Vec<_>, _>>().map_err(wrong)?;
        let is_flag = |key: &str| flags.iter().any(|flag| flag.name == key);
        let idle = rows.iter().flat_map(Row::variables).find(|key| !is_flag(key) && !used.has(key));
        if let Some(key) = idle {
            let known: Vec<_> = flags.iter().map(|flag| flag.name.as_str()).collect();
            return Err(wrong(format!("`{key}` is no flag of mayfly run, and {{{key}}} stands nowhere"))
                .hint(format!(
                    "write {{{key}}} where its value belongs; the flags are {}",
                    known.join(", ")
                )));
        }
        if let Some(twice) = cells
            .iter()
            .enumerate()
            .find(|(at, cell)| cells.iter().take(*at).any(|other| other.name == cell.name))
        {
            return Err(wrong(format!("it has the cell {} twice", twice.1.name)));
        }
        cells.retain(|cell| filters.iter().all(|filter| self.passes(cell, filter)));
        if cells.is_empty() {
            return Err(wrong("no cell is left".to_owned()).hint("see what `exclude` and --filter leave out"));
        }
        Ok(cells)
    }

    fn passes(&self, cell: &Cell, filter: &Filter) -> bool {
        match filter {
            Filter::Text(text) => cell.name.contains(text.as_str()),
            Filter::Label(key, label) => {
                let mut labels = self.axes.iter().zip(&cell.labels);
                labels.any(|(axis, own)| axis.name == *key && own.as_ref() == Some(label))
            }
        }
    }

    /// A cell that was added. What it says of an axis is one of its choices, or a value of its own.
    fn added<'a>(&'a self, settings: &'a [Setting]) -> Row<'a> {
        let named = |axis: &'a Axis| {
            let setting = settings.iter().find(|setting| setting.key == axis.name)?;
            let value = setting.values.first()?;
            Some(match axis.find(value) {
                Some(choice) => Part::Choice(axis, choice),
                None => Part::Value(&axis.name, value, setting),
            })
        };
        let parts = self.axes.iter().map(named).collect();
        let more =
            settings.iter().filter(|setting| self.axes.iter().all(|axis| axis.name != setting.key)).collect();
        Row { parts, more }
    }

    fn cell(&self, row: &Row<'_>, flags: &[Flag], used: &mut Used) -> std::result::Result<Cell, String> {
        let mut names = Vec::new();
        let mut settings: Vec<&Setting> = self.settings.iter().collect();
        for part in row.parts.iter().flatten() {
            names.push(format!("{}={}", part.axis(), part.label()));
            settings.extend(part.settings());
        }
        settings.extend(row.more.iter().copied());
        let own = |setting: &&&Setting| !setting.values.is_empty();
        names.extend(
            row.more
                .iter()
                .filter(own)
                .map(|setting| format!("{}={}", setting.key, setting.values.join("+"))),
        );
        let name = if names.is_empty() { "all".to_owned() } else { names.join(",") };
        if name.len() > 1000 || name.chars().any(char::is_control) {
            return Err(format!("the cell {name:?} has a name that nobody can read"));
        }
        let variables: Vec<(&str, &str)> =
            settings.iter().filter_map(|s| Some((s.key.as_str(), s.values.last()?.as_str()))).collect();
        let labels: Vec<(&str, &str)> =
            row.parts.iter().flatten().map(|part| (part.axis(), part.label())).collect();
        // An axis stands for its label: a kernel's path would be of no use in a file's name.
        let lookup = |key: &str| {
            let found = labels.iter().find(|(name, _)| *name == key);
            found.or_else(|| variables.iter().rev().find(|(name, _)| *name == key)).map(|(_, value)| *value)
        };
        let mut words = Vec::new();
        for (at, setting) in settings.iter().enumerate() {
            let Some(flag) = flags.iter().find(|flag| flag.name == setting.key) else { continue };
            let replaced = settings.iter().skip(at + 1).any(|later| later.key == setting.key);
            if replaced && flag.taking != Taking::Many {
                continue;
            }
            words.extend(setting.values.iter().map(|value| match value.as_str() {
                "" if matches!(flag.taking, Taking::Switch | Taking::Maybe) => format!("--{}", flag.name),
                value => format!("--{}={}", flag.name, used.fill(value, lookup)),
            }));
        }
        let command = self.command.iter().map(|word| used.fill(word, lookup)).collect();
        let labels = row.parts.iter().map(|part| part.as_ref().map(|part| part.label().to_owned())).collect();
        Ok(Cell { name, labels, flags: words, command })
    }
}

/// What a cell has on an axis.
#[derive(Clone)]
enum Part<'a> {
    Choice(&'a Axis, &'a Choice),
    Value(&'a str, &'a str, &'a Setting),
}

impl<'a> Part<'a> {
    fn axis(&self) -> &'a str {
        match self {
            Part::Choice(axis, _) => &axis.name,
            Part::Value(axis, ..) => axis,
        }
    }

    fn label(&self) -> &'a str {
        match self {
            Part::Choice(_, choice) => &choice.label,
            Part::Value(_, label, _) => label,
        }
    }

    fn settings(&self) -> &'a [Setting] {
        match self {
            Part::Choice(_, choice) => &choice.settings,
            Part::Value(_, _, setting) => std::slice::from_ref(*setting),
        }
    }
}

/// A combination: a part for each axis, and what else it sets.
#[derive(Clone)]
struct Row<'a> {
    parts: Vec<Option<Part<'a>>>,
    more: Vec<&'a Setting>,
}

impl Row<'_> {
    fn matches(&self, rule: &Rule) -> bool {
        let fits = |part: &Part<'_>, labels: &[String]| match part {
            Part::Choice(axis, choice) => labels.iter().any(|label| axis.find(label) == Some(*choice)),
            Part::Value(_, value, _) => labels.iter().any(|label| label == value),
        };
        let holds = |(key, labels): &(String, Vec<String>)| {
            self.parts.iter().flatten().any(|part| part.axis() == key && fits(part, labels))
        };
        // A rule that says nothing is none.
        !rule.is_empty() && rule.iter().all(holds)
    }

    fn variables(&self) -> impl Iterator<Item = &str> {
        let parts = self.parts.iter().flatten().flat_map(|part| part.settings());
        parts.chain(self.more.iter().copied()).map(|setting| setting.key.as_str())
    }
}

fn combinations(axes: &[Axis]) -> Vec<Row<'_>> {
    let mut rows = vec![Row { parts: Vec::new(), more: Vec::new() }];
    for axis in axes {
        let grown = rows.iter().flat_map(|row| {
            axis.choices.iter().map(move |choice| {
                let mut row = row.clone();
                row.parts.push(Some(Part::Choice(axis, choice)));
                row
            })
        });
        rows = grown.collect();
    }
    rows
}

/// Puts values where they belong, and remembers which had a place.
#[derive(Default)]
struct Used {
    keys: Vec<String>,
}

impl Used {
    fn has(&self, key: &str) -> bool {
        self.keys.iter().any(|used| used == key)
    }

    /// The text with each `{KEY}` replaced that `lookup` knows. All other braces, and `${KEY}`, are a shell's.
    fn fill<'a>(&mut self, text: &str, lookup: impl Fn(&str) -> Option<&'a str>) -> String {
        let mut filled = String::new();
        let mut rest = text;
        while let Some((before, after)) = rest.split_once('{') {
            filled.push_str(before);
            let known = after.split_once('}').and_then(|(key, end)| Some((key, lookup(key)?, end)));
            match known.filter(|_| !before.ends_with('$')) {
                Some((key, value, end)) => {
                    filled.push_str(value);
                    if !self.has(key) {
                        self.keys.push(key.to_owned());
                    }
                    rest = end;
                }
                None => {
                    filled.push('{');
                    rest = after;
                }
            }
        }
        filled + rest
    }
}

#[cfg(test)]
mod tests;
