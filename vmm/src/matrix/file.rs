//! The file of a matrix (TOML): what all cells have in common, the axes, what to leave out and what to add.

use base::{Fail, Result, Why};
use toml::{Table, Value};

/// How a flag of `mayfly run` takes its values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taking {
    /// It is there or not.
    Switch,
    /// It may have a value.
    Maybe,
    /// One value, the last one counts.
    One,
    /// Several add up.
    Many,
}

/// A flag that a matrix may set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flag {
    /// Its long name.
    pub name: String,
    /// How it takes values.
    pub taking: Taking,
}

/// A flag, or a variable, and its values.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    /// Its name.
    pub key: String,
    /// As they would be typed behind `--KEY=`; a switch that is on has one empty value, one that is off has none.
    pub values: Vec<String>,
}

/// A value of an axis.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// How it is called in the names of cells.
    pub label: String,
    /// As it stands in the file, if it is no table.
    pub plain: Option<String>,
    /// What it sets.
    pub settings: Vec<Setting>,
}

/// An axis: each cell has one of its choices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Axis {
    /// A flag, or a variable.
    pub name: String,
    /// At least one.
    pub choices: Vec<Choice>,
}

/// What is left out: axes, and the values of each that are meant.
pub type Rule = Vec<(String, Vec<String>)>;

/// What the file says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Matrix {
    /// The command of all cells, program and arguments.
    pub command: Vec<String>,
    /// How often a cell that failed is tried again.
    pub retries: u32,
    /// Flags of all cells.
    pub settings: Vec<Setting>,
    /// The axes, in their order.
    pub axes: Vec<Axis>,
    /// Combinations that are left out: axes, and the labels of each that are meant.
    pub exclude: Vec<Rule>,
    /// Cells besides: axes, flags and variables.
    pub include: Vec<Vec<Setting>>,
}

/// Keys of a file that are no flags.
const OWN: [&str; 5] = ["command", "retries", "matrix", "exclude", "include"];
/// Most choices of an axis, exclusions, inclusions.
const ITEMS: usize = 1024;

/// Reads the text of a file; `name` is how failures call it.
///
/// # Errors
/// [`Why::Usage`]: it is no TOML, or says what no matrix has.
pub fn read(name: &str, text: &str, flags: &[Flag]) -> Result<Matrix> {
    let doing = || format!("read the matrix {name}");
    let table: Table = text.parse().map_err(|cause: toml::de::Error| {
        // The whole of it has several lines: where it is, and what.
        let at = cause
            .span()
            .map_or(0, |span| text.get(..span.start).map_or(0, |before| before.lines().count().max(1)));
        Fail::new(Why::Usage, doing()).because(format!("line {at}: {}", cause.message().replace('\n', ", ")))
    })?;
    let reader = Reader { flags, doing: doing() };
    let mut matrix = Matrix::default();
    for (key, value) in &table {
        match key.as_str() {
            "command" => matrix.command = reader.command(value)?,
            "retries" => matrix.retries = reader.retries(value)?,
            "matrix" => matrix.axes = reader.axes(value)?,
            "exclude" => matrix.exclude = reader.exclude(value)?,
            "include" => matrix.include = reader.include(value)?,
            key => matrix.settings.push(reader.flag(key, value, &OWN)?),
        }
    }
    matrix.check().map_err(|cause| reader.wrong(cause))?;
    Ok(matrix)
}

/// Reads values, and knows the flags.
struct Reader<'a> {
    flags: &'a [Flag],
    doing: String,
}

impl Reader<'_> {
    fn wrong(&self, cause: String) -> Fail {
        Fail::new(Why::Usage, self.doing.clone()).because(cause)
    }

    fn known(&self, key: &str) -> Option<&Flag> {
        self.flags.iter().find(|flag| flag.name == key)
    }

    /// A setting that has to be a flag's.
    fn flag(&self, key: &str, value: &Value, besides: &[&str]) -> Result<Setting> {
        let Some(flag) = self.known(key) else {
            let names = besides.iter().copied().chain(self.flags.iter().map(|flag| flag.name.as_str()));
            let names: Vec<_> = names.collect();
            return Err(self.wrong(format!("it does not know `{key}`")).hint(format!(
                "it knows {} and the flags of mayfly run: {}",
                besides.join(", "),
                names.get(besides.len()..).unwrap_or_default().join(", ")
            )));
        };
        Ok(Setting { key: key.to_owned(), values: self.values(flag, value)? })
    }

    /// A setting of a flag, or else of a variable.
    fn setting(&self, key: &str, value: &Value) -> Result<Setting> {
        match self.known(key) {
            Some(flag) => Ok(Setting { key: key.to_owned(), values: self.values(flag, value)? }),
            None => Ok(Setting { key: key.to_owned(), values: vec![self.plain(key, value)?] }),
        }
    }

    fn values(&self, flag: &Flag, value: &Value) -> Result<Vec<String>> {
        match value {
            Value::Boolean(on) if matches!(flag.taking, Taking::Switch | Taking::Maybe) => {
                Ok(if *on { vec![String::new()] } else { Vec::new() })
            }
            _ if flag.taking == Taking::Switch => {
                Err(self.wrong(format!("`{}` is true or false", flag.name)))
            }
            Value::Array(items) => match flag.taking {
                Taking::Many => items
                    .iter()
                    .map(|item| self.one(flag, item))
                    .collect::<Result<Vec<_>>>()
                    .map(|v| v.concat()),
                _ => Err(self.wrong(format!("`{}` has one value only", flag.name)).hint(format!(
                    "several to choose from go into the table of axes: [matrix], {} = [...]",
                    flag.name
                ))),
            },
            value => self.one(flag, value),
        }
    }

    /// The values of a flag that one value of the file stands for.
    fn one(&self, flag: &Flag, value: &Value) -> Result<Vec<String>> {
        let Value::Table(table) = value else { return Ok(vec![self.plain(&flag.name, value)?]) };
        let pairs = table.iter().map(|(key, value)| Ok(format!("{key}={}", self.plain(key, value)?)));
        let pairs = pairs.collect::<Result<Vec<_>>>()?;
        // Variables of the environment are one to a flag; all else joins its keys.
        if flag.name == "env" {
            return Ok(pairs);
        }
        match pairs.iter().find(|pair| pair.contains(',')) {
            Some(pair) => Err(self
                .wrong(format!("`{}` cannot say `{pair}`: there is a comma in it", flag.name))
                .hint("put it into a plan file, and name that: plan = \"FILE.json\"")),
            None => Ok(vec![pairs.join(",")]),
        }
    }

    /// The text of a value.
    fn plain(&self, key: &str, value: &Value) -> Result<String> {
        Ok(match value {
            Value::String(text) => text.clone(),
            Value::Integer(number) => number.to_string(),
            Value::Float(number) => number.to_string(),
            Value::Boolean(on) => if *on { "on" } else { "off" }.to_owned(),
            _ => return Err(self.wrong(format!("`{key}` is no text, number, true or false"))),
        })
    }

    fn command(&self, value: &Value) -> Result<Vec<String>> {
        match value {
            // A line is for a shell.
            Value::String(line) => Ok(vec!["sh".to_owned(), "-c".to_owned(), line.clone()]),
            Value::Array(words) => words.iter().map(|word| self.plain("command", word)).collect(),
            _ => Err(self.wrong("`command` is a line for the shell, or a list of words".to_owned())),
        }
    }

    fn retries(&self, value: &Value) -> Result<u32> {
        let number = value.as_integer().and_then(|number| u32::try_from(number).ok());
        number
            .filter(|number| *number <= 100)
            .ok_or_else(|| self.wrong("`retries` is a number from 0 to 100".to_owned()))
    }

    fn items<'v>(&self, key: &str, value: &'v Value) -> Result<&'v [Value]> {
        let items = value.as_array().ok_or_else(|| self.wrong(format!("`{key}` is a list")))?;
        if items.len() > ITEMS {
            return Err(self.wrong(format!("`{key}` has more than {ITEMS} items")));
        }
        Ok(items)
    }

    fn tables<'v>(&self, key: &str, value: &'v Value) -> Result<Vec<&'v Table>> {
        let tables = self.items(key, value)?.iter().map(|item| {
            item.as_table().ok_or_else(|| self.wrong(format!("`{key}` is a list of tables: [[{key}]]")))
        });
        tables.collect()
    }

    fn axes(&self, value: &Value) -> Result<Vec<Axis>> {
        let table =
            value.as_table().ok_or_else(|| self.wrong("`matrix` is a table of axes: [matrix]".to_owned()))?;
        let axis = |(name, value): (&String, &Value)| {
            if OWN.contains(&name.as_str()) {
                return Err(self.wrong(format!("`{name}` cannot be an axis: it is for all cells")));
            }
            let choices = self.items(name, value)?;
            if choices.is_empty() {
                return Err(self.wrong(format!("the axis `{name}` has no value")));
            }
            let choices =
                choices.iter().map(|choice| self.choice(name, choice)).collect::<Result<Vec<_>>>()?;
            Ok(Axis { name: name.clone(), choices: labelled(choices) })
        };
        table.iter().map(axis).collect()
    }

    fn choice(&self, axis: &str, value: &Value) -> Result<Choice> {
        let Value::Table(table) = value else {
            let plain = self.plain(axis, value)?;
            let setting = self.setting(axis, value)?;
            return Ok(Choice { label: plain.clone(), plain: Some(plain), settings: vec![setting] });
        };
        let own = table.get(axis).map(|value| self.plain(axis, value)).transpose()?;
        let label = match table.get("name") {
            Some(name) => self.plain("name", name)?,
            None => own
                .clone()
                .ok_or_else(|| self.wrong(format!("a value of the axis `{axis}` has no `name`")))?,
        };
        let settings = table.iter().filter(|(key, _)| *key != "name");
        let mut settings =
            settings
                .map(|(key, value)| {
                    if key == axis {
                        self.setting(key, value)
                    } else {
                        self.flag(key, value, &["name", axis])
                    }
                })
                .collect::<Result<Vec<_>>>()?;
        if own.is_none() && self.known(axis).is_none() {
            settings.push(Setting { key: axis.to_owned(), values: vec![label.clone()] });
        }
        Ok(Choice { label, plain: own, settings })
    }

    fn exclude(&self, value: &Value) -> Result<Vec<Rule>> {
        let labels = |(key, value): (&String, &Value)| {
            let labels = match value {
                Value::Array(items) => {
                    items.iter().map(|item| self.plain(key, item)).collect::<Result<Vec<_>>>()?
                }
                value => vec![self.plain(key, value)?],
            };
            Ok((key.clone(), labels))
        };
        self.tables("exclude", value)?.into_iter().map(|table| table.iter().map(labels).collect()).collect()
    }

    fn include(&self, value: &Value) -> Result<Vec<Vec<Setting>>> {
        let tables = self.tables("include", value)?.into_iter();
        tables.map(|table| table.iter().map(|(key, value)| self.setting(key, value)).collect()).collect()
    }
}

/// Paths are called by their last parts where these differ.
fn labelled(mut choices: Vec<Choice>) -> Vec<Choice> {
    let short = |choice: &Choice| {
        let path = choice.plain.as_deref().filter(|plain| *plain == choice.label)?;
        path.trim_end_matches('/').rsplit_once('/').map(|(_, last)| last.to_owned())
    };
    let shorts: Vec<_> =
        choices.iter().map(|choice| short(choice).unwrap_or_else(|| choice.label.clone())).collect();
    for (choice, short) in choices.iter_mut().zip(&shorts) {
        if !short.is_empty() && shorts.iter().filter(|other| *other == short).count() == 1 {
            choice.label.clone_from(short);
        }
    }
    choices
}

impl Matrix {
    /// Sees to it that exclusions and variables mean something.
    fn check(&self) -> std::result::Result<(), String> {
        for axis in &self.axes {
            for (at, choice) in axis.choices.iter().enumerate() {
                if axis.choices.iter().take(at).any(|other| other.label == choice.label) {
                    return Err(format!("the axis `{}` has `{}` twice", axis.name, choice.label));
                }
            }
        }
        for (key, labels) in self.exclude.iter().flatten() {
            let Some(axis) = self.axes.iter().find(|axis| axis.name == *key) else {
                return Err(format!("`exclude` names `{key}`, which is no axis"));
            };
            for label in labels {
                if axis.find(label).is_none() {
                    return Err(format!("`exclude` names {key} = {label}, which the axis does not have"));
                }
            }
        }
        Ok(())
    }
}

impl Axis {
    /// The choice that is called so, or stands so in the file.
    pub fn find(&self, name: &str) -> Option<&Choice> {
        self.choices.iter().find(|choice| choice.label == name || choice.plain.as_deref() == Some(name))
    }
}

#[cfg(test)]
pub(super) mod tests;
