//! Runs cases one after another on one ground, and tells what came of each.
//!
//! It takes the arguments that `cargo test` people know: words that names must contain, `--exact`, `--skip WORD`,
//! `--list`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use crate::ground::{Ground, LIMIT, Output, quote};

/// Why a case did not pass.
#[derive(Debug)]
pub enum Stop {
    /// What should have been, and what was.
    Failed(String),
    /// Why it could not be tried here.
    Skipped(String),
}

impl From<String> for Stop {
    fn from(why: String) -> Self {
        Stop::Failed(why)
    }
}

impl From<&str> for Stop {
    fn from(why: &str) -> Self {
        Stop::Failed(why.to_owned())
    }
}

/// What a case comes to.
pub type Verdict = Result<(), Stop>;

/// One case.
pub struct Case {
    /// Its name, unique.
    pub name: String,
    /// What it does.
    pub run: Box<dyn Fn(&mut Room<'_>) -> Verdict>,
}

impl Case {
    /// A case called `name`.
    pub fn new(name: impl Into<String>, run: impl Fn(&mut Room<'_>) -> Verdict + 'static) -> Case {
        Case { name: name.into(), run: Box::new(run) }
    }

    /// The first word of its name: `real` of `real::ends::panic`.
    fn group(&self) -> &str {
        self.name.split("::").next().unwrap_or_default()
    }
}

/// What a case may use.
pub struct Room<'a> {
    /// Where scripts run.
    pub ground: &'a mut dyn Ground,
    /// The program under test.
    pub mayfly: &'a Path,
    /// A directory of its own, gone afterwards.
    pub dir: PathBuf,
    /// The last command, to be run again by hand.
    pub last: String,
    /// Time for each script.
    pub limit: Duration,
}

impl Room<'_> {
    /// Runs `mayfly` with `arguments` (shell text) on the ground.
    ///
    /// # Errors
    /// The ground is lost.
    pub fn mayfly(&mut self, arguments: &str) -> Result<Output, Stop> {
        let command = format!("{} {arguments}", quote(&self.mayfly.display().to_string()));
        self.shell(&command)
    }

    /// Runs `mayfly run` with the options of this ground.
    ///
    /// # Errors
    /// The ground is lost.
    pub fn guest(&mut self, arguments: &str) -> Result<Output, Stop> {
        let options = self.ground.options();
        self.mayfly(&format!("run {options} {arguments}"))
    }

    /// Runs a script on the ground, in the directory of the case.
    ///
    /// # Errors
    /// The ground is lost.
    pub fn shell(&mut self, script: &str) -> Result<Output, Stop> {
        self.last = format!("cd {} && {script}", quote(&self.dir.display().to_string()));
        Ok(self.ground.run(&self.dir, script, self.limit)?)
    }

    /// Writes a file into the directory of the case.
    ///
    /// # Errors
    /// The host refuses.
    pub fn file(&self, name: &str, bytes: impl AsRef<[u8]>) -> Result<PathBuf, Stop> {
        let path = self.dir.join(name);
        std::fs::write(&path, bytes).map_err(|cause| format!("write {}: {cause}", path.display()))?;
        Ok(path)
    }
}

impl Output {
    /// Demands this exit code.
    ///
    /// # Errors
    /// It is another: all that was said is told.
    pub fn code(&self, wanted: i32) -> Result<&Output, Stop> {
        if self.code == wanted { Ok(self) } else { Err(self.differs(&format!("the exit code {wanted}"))) }
    }

    /// Demands that standard output is exactly this.
    ///
    /// # Errors
    /// It is not.
    pub fn says(&self, wanted: &str) -> Result<&Output, Stop> {
        if self.stdout == wanted.as_bytes() {
            Ok(self)
        } else {
            Err(self.differs(&format!("the output {wanted:?}")))
        }
    }

    /// Demands that standard output contains this.
    ///
    /// # Errors
    /// It does not.
    pub fn mentions(&self, wanted: &str) -> Result<&Output, Stop> {
        if self.text().contains(wanted) {
            Ok(self)
        } else {
            Err(self.differs(&format!("{wanted:?} in the output")))
        }
    }

    /// Demands that standard error contains this.
    ///
    /// # Errors
    /// It does not.
    pub fn complains(&self, wanted: &str) -> Result<&Output, Stop> {
        if self.complaint().contains(wanted) {
            Ok(self)
        } else {
            Err(self.differs(&format!("{wanted:?} in the complaint")))
        }
    }

    /// A failure: `wanted` is not what was found.
    pub fn differs(&self, wanted: &str) -> Stop {
        let tail = |text: String| {
            let lines: Vec<&str> = text.lines().collect();
            let from = lines.len().saturating_sub(40);
            let cut = if from > 0 { format!("[{from} lines before]\n") } else { String::new() };
            format!("{cut}{}", lines[from..].join("\n"))
        };
        Stop::Failed(format!(
            "expected {wanted}, got code {} after {:.1} s\n--- stdout\n{}\n--- stderr\n{}",
            self.code,
            self.took.as_secs_f64(),
            tail(self.text()),
            tail(self.complaint())
        ))
    }
}

/// What was asked for on the command line of a test program.
struct Wish {
    words: Vec<String>,
    skip: Vec<String>,
    exact: bool,
    list: bool,
}

impl Wish {
    fn read(arguments: impl Iterator<Item = String>) -> Wish {
        let mut wish = Wish { words: Vec::new(), skip: Vec::new(), exact: false, list: false };
        let mut arguments = arguments.skip(1);
        while let Some(argument) = arguments.next() {
            match argument.as_str() {
                "--exact" => wish.exact = true,
                "--list" => wish.list = true,
                "--skip" => wish.skip.extend(arguments.next()),
                "--test-threads" | "--format" | "--color" => drop(arguments.next()),
                word if word.starts_with('-') => {}
                word => wish.words.push(word.to_owned()),
            }
        }
        wish
    }

    fn wants(&self, name: &str) -> bool {
        let fits = |word: &String| if self.exact { name == word } else { name.contains(word.as_str()) };
        (self.words.is_empty() || self.words.iter().any(fits)) && !self.skip.iter().any(fits)
    }
}

/// Runs what the command line asks for out of `cases`. The ground is prepared once, when the first case needs it; a
/// reason not to have one skips them all.
///
/// A run in which all cases of a group were skipped (`real::...`) is not green, whatever passed in another.
pub fn main(
    suite: &str,
    cases: &[Case],
    ground: impl FnOnce(&Path) -> Result<Box<dyn Ground>, Stop>,
) -> ExitCode {
    let wish = Wish::read(std::env::args());
    let wanted: Vec<&Case> = cases.iter().filter(|case| wish.wants(&case.name)).collect();
    if wish.list {
        wanted.iter().for_each(|case| println!("{}: test", case.name));
        return ExitCode::SUCCESS;
    }
    println!("\nrunning {} tests", wanted.len());
    if wanted.is_empty() {
        return summary(&Count { filtered: cases.len(), ..Count::default() }, Duration::ZERO);
    }
    let started = Instant::now();
    let prepared =
        crate::ground::mayfly().map_err(Stop::Failed).and_then(|mayfly| Ok((ground(&mayfly)?, mayfly)));
    let mut count = Count { filtered: cases.len() - wanted.len(), ..Count::default() };
    let (mut ground, mayfly) = match prepared {
        Ok(prepared) => prepared,
        Err(stop) => {
            let verdict = Err(stop);
            wanted.iter().for_each(|case| count.take(suite, case, &verdict, "", 0.0));
            return summary(&count, started.elapsed());
        }
    };
    println!("on {}, with {}", ground.name(), mayfly.display());
    for case in wanted {
        let begun = Instant::now();
        let (mut verdict, mut last) = run(case, ground.as_mut(), &mayfly);
        // What an emulator does wrong is no case's fault; but it is told, and has a limit.
        if let Some(cause) = ground.lost().filter(|_| count.lost < LOSSES) {
            count.lost += 1;
            println!("    {cause}\n    it is started anew, and {} tried again", case.name);
            (verdict, last) = match ground.restart() {
                Ok(()) => run(case, ground.as_mut(), &mayfly),
                Err(cause) => (Err(cause.into()), last),
            };
        }
        let took = begun.elapsed().as_secs_f64();
        count.take(suite, case, &verdict, &last, took);
    }
    drop(ground);
    summary(&count, started.elapsed())
}

fn run(case: &Case, ground: &mut dyn Ground, mayfly: &Path) -> (Verdict, String) {
    let dir = match tempfile::Builder::new().prefix("mayfly-test-").tempdir() {
        Ok(dir) => dir,
        Err(cause) => return (Err(format!("make a directory: {cause}").into()), String::new()),
    };
    let mut room = Room { ground, mayfly, dir: dir.path().to_owned(), last: String::new(), limit: LIMIT };
    let verdict = (case.run)(&mut room);
    (verdict, room.last)
}

/// How often a ground may be lost and started anew in one run.
const LOSSES: usize = 3;

#[derive(Default)]
struct Count {
    /// Groups of which a case was skipped or passed, and whether one passed.
    groups: BTreeMap<String, bool>,
    passed: usize,
    failed: usize,
    skipped: usize,
    filtered: usize,
    lost: usize,
}

impl Count {
    /// Counts what came of a case, and tells it.
    fn take(&mut self, suite: &str, case: &Case, verdict: &Verdict, last: &str, took: f64) {
        match verdict {
            Ok(()) => {
                self.passed += 1;
                self.groups.insert(case.group().to_owned(), true);
                println!("test {} ... ok ({took:.1} s)", case.name);
            }
            Err(Stop::Skipped(why)) => {
                self.skipped += 1;
                self.groups.entry(case.group().to_owned()).or_insert(false);
                println!("test {} ... skipped: {why}", case.name);
            }
            Err(Stop::Failed(why)) => {
                self.failed += 1;
                println!("test {} ... FAILED ({took:.1} s)", case.name);
                println!("    {}", why.replace('\n', "\n    "));
                println!("    alone: cargo test -p tests --test {suite} -- --exact {}", case.name);
                if !last.is_empty() {
                    println!("    by hand: {last}");
                }
            }
        }
    }
}

fn summary(count: &Count, took: Duration) -> ExitCode {
    let Count { groups, passed, failed, skipped, filtered, lost } = count;
    let untested: Vec<&str> =
        groups.iter().filter(|(_, tested)| !**tested).map(|(group, _)| group.as_str()).collect();
    let green = *failed == 0 && untested.is_empty();
    if *lost > 0 {
        println!("\n{lost} times the ground was lost and started anew");
    }
    let word = if green { "ok" } else { "FAILED" };
    println!(
        "\ntest result: {word}. {passed} passed; {failed} failed; {skipped} skipped; {filtered} filtered out; \
         finished in {:.1}s\n",
        took.as_secs_f64()
    );
    if *failed == 0 && !green {
        println!("nothing was tested of {}: every case was skipped\n", untested.join(", "));
    }
    if green { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// For cases that need no ground.
    struct Nowhere;

    impl Ground for Nowhere {
        fn name(&self) -> &'static str {
            "nowhere"
        }
        fn options(&self) -> &'static str {
            ""
        }
        fn run(&mut self, _: &Path, _: &str, _: Duration) -> Result<Output, String> {
            Err("there is no ground".to_owned())
        }
        fn lost(&self) -> Option<String> {
            None
        }
        fn restart(&mut self) -> Result<(), String> {
            Ok(())
        }
    }

    #[test]
    fn a_run_that_skipped_all_of_a_group_is_not_green() {
        let green = format!("{:?}", ExitCode::SUCCESS);
        let code = |names: &[(&str, &str)]| {
            let mut count = Count::default();
            for (name, end) in names {
                let end = end.to_string();
                let case = Case::new(*name, move |_| match end.as_str() {
                    "ok" => Ok(()),
                    "skip" => Err(Stop::Skipped("there is no kernel".to_owned())),
                    _ => Err("it is wrong".into()),
                });
                let (verdict, _) = run(&case, &mut Nowhere, Path::new("mayfly"));
                count.take("suite", &case, &verdict, "", 0.0);
            }
            format!("{:?}", summary(&count, Duration::ZERO))
        };
        assert_eq!(code(&[("real::a", "ok"), ("real::b", "skip"), ("bare::a", "ok")]), green);
        assert_eq!(code(&[("real::b", "skip"), ("real::a", "ok")]), green);
        assert_ne!(code(&[("real::a", "skip"), ("real::b", "skip"), ("bare::a", "ok")]), green);
        assert_ne!(code(&[("real::a", "skip")]), green);
        assert_ne!(code(&[("real::a", "ok"), ("real::b", "wrong")]), green);
    }

    #[test]
    fn cases_are_chosen_by_words() {
        let wish = |text: &str| Wish::read(["me"].into_iter().chain(text.split(' ')).map(str::to_owned));
        assert!(wish("--nocapture --test-threads 2 boot").wants("boots"));
        assert!(!wish("--exact boot").wants("boots"));
        assert!(!wish("--skip oot").wants("boots") && wish("--skip oot").wants("hello"));
    }
}
