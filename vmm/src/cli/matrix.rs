//! `mayfly matrix`: the cells of a file become command lines of `mayfly run`, carried out here or all on one emulated host.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use base::{Doing, Fail, Result, Why};
use clap::{Arg, ArgAction, ArgMatches, Command as Clap, ValueHint, value_parser};

use super::command::{Detail, command};
use super::lab::{Taken, hand_over};
use super::{complain, say};
use crate::machine::Scout;
use crate::matrix::budget::Load;
use crate::matrix::cells::Cell;
use crate::matrix::crew::{self, News, Order, Task};
use crate::matrix::file::{self, Flag, Matrix, Taking};
use crate::matrix::junit;
use crate::matrix::outcome::Outcome;
use crate::matrix::report::Report;
use crate::outcome::{code, code_before_start};
use crate::plan::{Accel, Plan, Size};
use crate::{kernels, log, quote};

/// The flag with which one mayfly hands a matrix to another.
const HANDED: &str = "handed-matrix";

/// Flags of `mayfly run` that are none of a cell's: what a run tells, and where it runs, is the matrix's own matter.
const OURS: [&str; 12] = [
    "json",
    "junit",
    "dry-run",
    "help",
    "verbose",
    "quiet",
    "tty",
    "interactive",
    "accel",
    "detach",
    "name",
    "rm",
];
/// Memory that a run takes besides its guest's.
const BESIDE: u64 = 32 << 20;

/// Adds the flags.
pub fn flags(matrix: Clap) -> Clap {
    let path = |name: &'static str, value: &'static str| {
        Arg::new(name)
            .long(name)
            .value_name(value)
            .value_hint(ValueHint::AnyPath)
            .value_parser(value_parser!(PathBuf))
    };
    let count =
        |name: &'static str| Arg::new(name).long(name).value_name("N").value_parser(value_parser!(u32));
    matrix
        .args_override_self(true)
        .arg(
            Arg::new("file")
                .required(true)
                .value_name("FILE.toml")
                .value_hint(ValueHint::FilePath)
                .value_parser(value_parser!(PathBuf))
                .help("The matrix: flags of mayfly run, axes, a command (docs/matrix.md)"),
        )
        .arg(
            Arg::new("filter").long("filter").value_name("TEXT").action(ArgAction::Append).help(
                "Only cells with this text in their name, or AXIS=VALUE; several narrow it down further",
            ),
        )
        .arg(count("jobs").short('j').help("Cells that run at once, at most [default: as many as fit]"))
        .arg(count("cpus").help("CPUs that the cells may have together [default: those of this machine]"))
        .arg(
            Arg::new("memory")
                .long("memory")
                .value_name("SIZE")
                .value_parser(|text: &str| text.parse::<Size>())
                .help("Memory that the cells may have together [default: three quarters of what is free]"),
        )
        .arg(count("retries").help("Try a cell that failed so often again [default: as the file says, or 0]"))
        .arg(
            Arg::new("fail-fast")
                .long("fail-fast")
                .action(ArgAction::SetTrue)
                .help("End all when the first cell has failed"),
        )
        .arg(path("logs", "DIR").help("Keep the output of cells that failed in directories below this one"))
        .arg(path("junit", "FILE").help("Write the report as JUnit XML"))
        .arg(
            path("json", "FILE")
                .num_args(0..=1)
                .require_equals(true)
                .default_missing_value("-")
                .help("Write the report as JSON: to FILE, or on standard output instead of the table"),
        )
        .arg(
            Arg::new("accel")
                .long("accel")
                .value_name("WHAT")
                .value_parser(value_parser!(Accel))
                .help("What runs the virtual CPUs of all cells [default: auto]"),
        )
        .arg(
            Arg::new("list")
                .long("list")
                .action(ArgAction::SetTrue)
                .help("Print the command line of each cell and run nothing"),
        )
        .arg(
            Arg::new(HANDED)
                .long(HANDED)
                .hide(true)
                .value_name("JSON")
                .help("Take this matrix, not that of the file"),
        )
        .arg(
            Arg::new("on-emulated-host")
                .long("on-emulated-host")
                .hide(true)
                .action(ArgAction::SetTrue)
                .help("This is the emulated host"),
        )
}

/// Carries out `mayfly matrix`; its exit code.
pub fn matrix(matches: &ArgMatches) -> u8 {
    let began = Instant::now();
    match attempt(matches, began) {
        Ok(code) => code,
        Err(fail) => {
            complain(&fail);
            code_before_start(&fail)
        }
    }
}

fn attempt(matches: &ArgMatches, began: Instant) -> Result<u8> {
    let path = matches.get_one::<PathBuf>("file").cloned().unwrap_or_default();
    let handed = handed(matches)?;
    let text = match &handed {
        Some(handed) => handed.text.clone(),
        None => std::fs::read_to_string(&path).map_err(|cause| {
            base::fail::unreadable(format!("read the matrix {}", path.display()), &path, cause)
        })?,
    };
    let flags = flags_of_run();
    let matrix = file::read(&path.display().to_string(), &text, &flags)?;
    let filters = matches.get_many::<String>("filter").into_iter().flatten();
    let filters = filters.map(|text| matrix.filter(text)).collect::<Result<Vec<_>>>()?;
    let cells = matrix.cells(&flags, &filters)?;
    if matches.get_flag("list") {
        return Ok(list(&cells));
    }
    let mut kernels = handed.map(|handed| handed.kernels).unwrap_or_default();
    let runs = cells.iter().map(|cell| run_of(cell, &mut kernels)).collect::<Result<Vec<_>>>()?;
    let budget = budget(matches);
    if let Some(code) = go_elsewhere(matches, &Handed { text, kernels }, &runs)? {
        return Ok(code);
    }
    let sinks = Sinks::open(matches)?;
    let order = Order {
        program: std::env::current_exe().doing(Why::Host, || "find mayfly itself")?,
        tasks: cells.iter().zip(runs).map(|(cell, run)| task(matches, cell, &run)).collect(),
        budget,
        retries: matches.get_one("retries").copied().unwrap_or(matrix.retries),
        fail_fast: matches.get_flag("fail-fast"),
        logs: matches.get_one::<PathBuf>("logs").cloned(),
    };
    let mut teller = Teller::new(cells.len());
    let (outcomes, signal) = crew::run(&order, &mut |news| teller.tell(&news))?;
    teller.clear();
    conclude(&matrix, &cells, &outcomes, signal, began, &path, sinks)
}

/// What one mayfly hands to another.
#[derive(Default, serde::Serialize, serde::Deserialize)]
struct Handed {
    /// The text of the file, which may have come out of a pipe.
    text: String,
    /// The kernels that names in it mean here.
    kernels: BTreeMap<String, PathBuf>,
}

fn handed(matches: &ArgMatches) -> Result<Option<Handed>> {
    let text = matches.get_one::<String>(HANDED);
    text.map(|text| serde_json::from_str(text).doing(Why::Usage, || format!("read --{HANDED}"))).transpose()
}

/// The flags that cells may have, as the command line of a run has them.
fn flags_of_run() -> Vec<Flag> {
    let mut all = command(Detail::Names);
    all.build();
    let Some(run) = all.find_subcommand("run") else { return Vec::new() };
    let flags = run.get_arguments().filter(|arg| !arg.is_hide_set());
    let flag = |arg: &Arg| {
        let name = arg.get_long()?.to_owned();
        let taking = match arg.get_action() {
            ArgAction::SetTrue => Taking::Switch,
            ArgAction::Append => Taking::Many,
            ArgAction::Set if arg.get_num_args().is_some_and(|range| range.min_values() == 0) => {
                Taking::Maybe
            }
            ArgAction::Set => Taking::One,
            _ => return None,
        };
        (!OURS.contains(&name.as_str())).then_some(Flag { name, taking })
    };
    flags.filter_map(flag).collect()
}

fn list(cells: &[Cell]) -> u8 {
    let quoted =
        |word: &String| match word.chars().all(|c| c.is_ascii_alphanumeric() || "-_=./,:+@%".contains(c)) {
            true if !word.is_empty() => word.clone(),
            _ => format!("'{}'", word.replace('\'', r"'\''")),
        };
    let line = |cell: &Cell| {
        let words = ["mayfly".to_owned(), "run".to_owned()].into_iter().chain(cell.flags.iter().map(quoted));
        let command = cell.command.iter().map(quoted);
        let dashes = (!cell.command.is_empty()).then(|| "--".to_owned());
        format!("{}\n", words.chain(dashes).chain(command).collect::<Vec<_>>().join(" "))
    };
    say(&cells.iter().map(line).collect::<String>())
}

/// The run of a cell: its plan, checked as far as that can be done without a machine.
fn run_of(cell: &Cell, kernels: &mut BTreeMap<String, PathBuf>) -> Result<Plan> {
    let given = cell
        .flags
        .iter()
        .rev()
        .find_map(|word| word.strip_prefix("--kernel="))
        .unwrap_or_default()
        .to_owned();
    let mut words: Vec<OsString> = vec!["mayfly".into(), "run".into()];
    words.extend(cell.flags.iter().map(OsString::from));
    if let Some(found) = kernels.get(&given) {
        words.extend(["--kernel".into(), found.clone().into()]);
    }
    if !cell.command.is_empty() {
        words.push("--".into());
        words.extend(cell.command.iter().map(OsString::from));
    }
    let wrong = |fail: Fail| {
        let told = Fail::new(fail.why, format!("lay out the cell {}", cell.name)).because(fail.summary());
        fail.remedy().into_iter().fold(told, Fail::hint)
    };
    let matches = command(Detail::Names).try_get_matches_from(words).map_err(|error| {
        let text = error.render().to_string();
        let line = text.lines().next().unwrap_or_default().trim_start_matches("error: ").to_owned();
        wrong(Fail::new(Why::Usage, line))
    })?;
    let matches = matches.subcommand_matches("run").ok_or_else(|| wrong(Fail::new(Why::Usage, "run")))?;
    let plan = super::run::planned(matches).map_err(wrong)?;
    kernels.insert(given, plan.kernel.clone());
    Ok(plan)
}

fn task(matches: &ArgMatches, cell: &Cell, plan: &Plan) -> Task {
    let accel = match matches.get_one("accel") {
        Some(Accel::Unchecked) => "unchecked",
        _ => "kvm",
    };
    let mut flags: Vec<OsString> = vec!["run".into()];
    flags.extend(cell.flags.iter().map(OsString::from));
    flags.extend(["--kernel".into(), plan.kernel.clone().into(), "--accel".into(), accel.into()]);
    if matches.get_flag("on-emulated-host") {
        flags.push("--on-emulated-host".into());
    }
    Task {
        name: cell.name.clone(),
        flags,
        command: cell.command.iter().map(OsString::from).collect(),
        load: load(plan),
    }
}

fn load(plan: &Plan) -> Load {
    Load { cells: 1, cpus: plan.cpus, memory: plan.memory.bytes().saturating_add(BESIDE) }
}

/// What the cells may have together.
fn budget(matches: &ArgMatches) -> Load {
    let number = |name: &str| matches.get_one::<u32>(name).copied().filter(|number| *number > 0);
    let here = || {
        std::thread::available_parallelism().map_or(1, |count| u32::try_from(count.get()).unwrap_or(u32::MAX))
    };
    Load {
        cells: number("jobs").and_then(|jobs| usize::try_from(jobs).ok()).unwrap_or(usize::MAX),
        cpus: number("cpus").unwrap_or_else(here),
        memory: matches.get_one::<Size>("memory").map_or_else(free_memory, |size| size.bytes()),
    }
}

/// Three quarters of the memory that programs could have now, or no limit where nobody says.
fn free_memory() -> u64 {
    let info = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = info.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kib.map_or(u64::MAX, |kib| kib.saturating_mul(768))
}

/// Has all of it run on one emulated host, if it has to.
fn go_elsewhere(matches: &ArgMatches, handed: &Handed, runs: &[Plan]) -> Result<Option<u8>> {
    if matches.get_flag("on-emulated-host") {
        return Ok(None);
    }
    let accel = matches.get_one("accel").copied().unwrap_or_default();
    let text = serde_json::to_string(handed).doing(Why::Invalid, || "write the matrix down")?;
    // It has one CPU: unless they are told to, cells do not run at once there.
    let number = |name: &str| matches.get_one::<u32>(name).copied();
    let at_once = number("jobs").or(number("cpus")).unwrap_or(1).max(1);
    let most = runs.iter().map(|plan| load(plan).memory).max().unwrap_or_default();
    let most = most
        .saturating_mul(u64::from(at_once))
        .min(matches.get_one::<Size>("memory").map_or(u64::MAX, |s| s.bytes()));
    let more = vec![format!("--{HANDED}={text}").into()];
    let scout = Scout::send()?;
    // One that is no kernel is told by its cells.
    let images = handed.kernels.values().map(PathBuf::as_path).filter(|image| kernels::open(image).is_ok());
    match hand_over(accel, images, Size::of(most), &scout, more)? {
        None => Ok(None),
        Some(Taken::Ended(code)) => Ok(Some(code)),
        Some(Taken::Unborn(signal)) => {
            complain(&Fail::new(Why::Host, "run the matrix").because(format!("signal {signal} ended it")));
            Ok(Some(code::signalled(signal)))
        }
    }
}

/// Where the report goes besides the terminal: opened first, for a report that cannot be written should not cost a run.
struct Sinks {
    json: Option<(PathBuf, Option<File>)>,
    junit: Option<(PathBuf, File)>,
}

impl Sinks {
    fn open(matches: &ArgMatches) -> Result<Sinks> {
        let open = |path: &PathBuf| {
            File::create(path).doing(Why::Denied, || format!("open the report {}", path.display()))
        };
        let json = matches.get_one::<PathBuf>("json");
        let json =
            json.map(|path| Ok((path.clone(), (path != Path::new("-")).then(|| open(path)).transpose()?)));
        let junit = matches.get_one::<PathBuf>("junit").map(|path| Ok((path.clone(), open(path)?)));
        Ok(Sinks { json: json.transpose()?, junit: junit.transpose()? })
    }
}

fn conclude(
    matrix: &Matrix,
    cells: &[Cell],
    outcomes: &[Outcome],
    signal: Option<i32>,
    began: Instant,
    path: &Path,
    sinks: Sinks,
) -> Result<u8> {
    let axes: Vec<String> = matrix.axes.iter().map(|axis| axis.name.clone()).collect();
    let report =
        Report { axes: &axes, cells, outcomes, took: began.elapsed(), code: signal.map(code::signalled) };
    let write = |path: &Path, file: &mut File, text: &str| {
        file.write_all(text.as_bytes()).doing(Why::Host, || format!("write the report {}", path.display()))
    };
    let mut written = Ok(());
    if let Some((place, mut file)) = sinks.junit {
        let name = path.file_stem().unwrap_or_default().display().to_string();
        written = write(&place, &mut file, &junit::write(&name, &report));
    }
    let told = match sinks.json {
        Some((place, Some(mut file))) => {
            written = written.and(write(&place, &mut file, &(report.json() + "\n")));
            say(&report.table())
        }
        Some((_, None)) => say(&(report.json() + "\n")),
        None => say(&report.table()),
    };
    let code = report.exit_code();
    if let Err(fail) = written {
        complain(&fail);
        return Ok(if code == code::DONE { code::HOST } else { code });
    }
    Ok(if code == code::DONE { told } else { code })
}

/// Tells what happens while cells run: failures, and on a terminal what is under way.
struct Teller {
    cells: usize,
    /// The columns of the terminal, if it is one.
    terminal: Option<usize>,
    shown: bool,
}

impl Teller {
    fn new(cells: usize) -> Teller {
        let shows = std::io::stderr().is_terminal() && ::log::max_level() >= ::log::LevelFilter::Warn;
        Teller {
            cells,
            terminal: shows.then(|| usize::from(crate::terminal::size().columns).max(20)),
            shown: false,
        }
    }

    fn tell(&mut self, news: &News<'_>) {
        match news {
            News::Progress(over, running) => self.show(*over, running),
            News::Failed(name, one, again) => {
                self.clear();
                let cause = quote::line(one.cause().as_bytes());
                let next = if *again { ", and is tried again" } else { "" };
                log::tell(&format!("{name} failed{next}: {cause}{}", quote::below(&one.said)));
            }
            News::Trouble(fail) => {
                self.clear();
                complain(fail);
            }
        }
    }

    fn show(&mut self, over: usize, running: &[&str]) {
        let Some(columns) = self.terminal else { return };
        let line = format!("{over} of {} over; running {}", self.cells, running.join(" "));
        let line: String = line.chars().take(columns.saturating_sub(1)).collect();
        let _ = std::io::stderr().lock().write_all(format!("\r{line}\x1b[K").as_bytes());
        self.shown = true;
    }

    fn clear(&mut self) {
        if std::mem::take(&mut self.shown) {
            let _ = std::io::stderr().lock().write_all(b"\r\x1b[K");
        }
    }
}
