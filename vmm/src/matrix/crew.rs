//! Carries out cells: each is a process of its own, several run at once, and one that crashes takes no other with it.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs::{self, File};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use base::sys::children::{die_with_parent, hear_signals};
use base::sys::signals;
use base::{Doing, Fail, Result, Why};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};

use super::budget::Load;
use super::outcome::{Outcome, Try};
use super::stream::Stream;
use crate::quote;

/// Signals that end a matrix.
const ENDING: [i32; 4] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT];
/// When a run that has been asked to end is asked again, and when it is killed.
const PATIENCE: [Duration; 2] = [Duration::from_secs(3), Duration::from_secs(10)];
/// Lines of the last output of a try.
const SAID: usize = 20;
/// Bytes of a result object.
const RESULT: u64 = 1 << 20;

/// A cell to be carried out.
#[derive(Clone, Debug)]
pub struct Task {
    /// Its name, and that of its logs.
    pub name: String,
    /// The words of its command line, up to `--`.
    pub flags: Vec<OsString>,
    /// What follows `--`; nothing if there is no command.
    pub command: Vec<OsString>,
    /// What it takes.
    pub load: Load,
}

/// How cells are carried out.
#[derive(Clone, Debug)]
pub struct Order {
    /// mayfly.
    pub program: PathBuf,
    /// The cells.
    pub tasks: Vec<Task>,
    /// What they may take together.
    pub budget: Load,
    /// How often one that failed is tried again.
    pub retries: u32,
    /// The first one that fails for good ends all.
    pub fail_fast: bool,
    /// A directory for the output of those that fail.
    pub logs: Option<PathBuf>,
}

/// What there is to tell while cells run.
pub enum News<'a> {
    /// So many are over, and these run.
    Progress(usize, Vec<&'a str>),
    /// A try of this cell failed; whether it is tried again.
    Failed(&'a str, &'a Try, bool),
    /// Something else went wrong.
    Trouble(Fail),
}

/// Carries out the cells: their outcomes in the order given, and the signal that ended it all, if one did.
///
/// # Errors
/// The host refuses what all of them need.
pub fn run(order: &Order, tell: &mut dyn FnMut(News<'_>)) -> Result<(Vec<Outcome>, Option<i32>)> {
    let signals = signals::divert(&ENDING).doing(Why::Host, || "divert signals")?;
    let mut crew = Crew {
        order,
        tell,
        signals,
        waiting: (0..order.tasks.len()).collect(),
        running: Vec::new(),
        outcomes: vec![Outcome::default(); order.tasks.len()],
        over: 0,
        ending: None,
        signal: None,
    };
    crew.work()?;
    Ok((crew.outcomes, crew.signal))
}

struct Crew<'a> {
    order: &'a Order,
    tell: &'a mut dyn FnMut(News<'_>),
    signals: OwnedFd,
    waiting: VecDeque<usize>,
    running: Vec<Running>,
    outcomes: Vec<Outcome>,
    over: usize,
    /// Since when everything is to end, and how often the runs have been asked to.
    ending: Option<(Instant, usize)>,
    signal: Option<i32>,
}

/// A try that is under way.
struct Running {
    task: usize,
    child: Child,
    pidfd: OwnedFd,
    result: File,
    out: Stream,
    err: Stream,
    began: Instant,
    logs: Option<PathBuf>,
}

impl Crew<'_> {
    fn work(&mut self) -> Result<()> {
        loop {
            self.start_what_fits();
            if self.running.is_empty() {
                return Ok(());
            }
            self.progress();
            self.wait()?;
            while let Some(number) = signals::next(&self.signals) {
                self.signal.get_or_insert(number);
                self.end();
            }
            self.press();
            self.collect();
        }
    }

    fn start_what_fits(&mut self) {
        if self.ending.is_some() {
            self.waiting.clear();
        }
        let load = |task: usize| self.order.tasks.get(task).map_or_else(Load::default, |task| task.load);
        let mut sum = self.running.iter().fold(Load::default(), |sum, running| sum.and(load(running.task)));
        let budget = self.order.budget;
        while let Some(at) = self.waiting.iter().position(|task| budget.admits(sum, load(*task))) {
            let Some(task) = self.waiting.remove(at) else { return };
            match self.start(task) {
                Ok(running) => {
                    sum = sum.and(load(task));
                    self.running.push(running);
                }
                Err(fail) => {
                    (self.tell)(News::Trouble(fail));
                    self.conclude(task, Try::default(), None);
                }
            }
        }
    }

    fn start(&mut self, number: usize) -> Result<Running> {
        let task = self.order.tasks.get(number).ok_or_else(|| Fail::new(Why::Host, "find a cell"))?;
        let starting = || format!("start {}", task.name);
        let tries = self.outcomes.get(number).map_or(0, |outcome| outcome.tries.len());
        let logs = self.order.logs.as_ref().map(|top| place(top, &task.name, number, tries));
        if let Some(dir) = &logs {
            fs::create_dir_all(dir).doing(Why::Denied, || format!("make {}", dir.display()))?;
        }
        let log = |name: &str| {
            let file = logs.as_ref().map(|dir| File::create(dir.join(name)));
            file.transpose().doing(Why::Denied, || format!("write the logs of {}", task.name))
        };
        let (out, err) = (log("stdout")?, log("stderr")?);
        // In memory, and reached by the kernel's name for it: nothing to clean up.
        let result: File = rustix::fs::memfd_create("result", rustix::fs::MemfdFlags::CLOEXEC)
            .doing(Why::Host, starting)?
            .into();
        let mut command = Command::new(&self.order.program);
        command.args(&task.flags);
        command.arg(format!("--json=/proc/{}/fd/{}", std::process::id(), result.as_raw_fd()));
        if !task.command.is_empty() {
            command.arg("--").args(&task.command);
        }
        // A terminal's `Ctrl-c` is for us, who pass it on.
        command.process_group(0).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        die_with_parent(&mut command);
        hear_signals(&mut command);
        let began = Instant::now();
        let mut child = command.spawn().doing(Why::Host, starting)?;
        let lost = || Fail::new(Why::Host, starting());
        let watch = || {
            let pidfd =
                pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).doing(Why::Host, starting)?;
            let out = Stream::new(child.stdout.take().ok_or_else(lost)?.into(), out)?;
            Ok((pidfd, out, Stream::new(child.stderr.take().ok_or_else(lost)?.into(), err)?))
        };
        let (pidfd, out, err) = match watch() {
            Ok(watched) => watched,
            Err(fail) => {
                // Nobody would see its end.
                let _ = child.kill();
                let _ = child.wait();
                return Err(fail);
            }
        };
        Ok(Running { task: number, child, pidfd, result, out, err, began, logs })
    }

    /// Waits until something happens.
    fn wait(&mut self) -> Result<()> {
        let mut fds = vec![PollFd::new(&self.signals, PollFlags::IN)];
        for running in &self.running {
            fds.push(PollFd::new(&running.pidfd, PollFlags::IN));
            let pipes = [running.out.fd(), running.err.fd()].into_iter().flatten();
            fds.extend(pipes.map(|pipe| PollFd::from_borrowed_fd(pipe, PollFlags::IN)));
        }
        let left = self.ending.and_then(|(since, asked)| {
            let next = PATIENCE.get(asked.checked_sub(1)?)?;
            Some(next.saturating_sub(since.elapsed()))
        });
        let left = left.and_then(|left| Timespec::try_from(left).ok());
        match poll(&mut fds, left.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(cause) => Err(Fail::new(Why::Host, "wait for the runs of the matrix").because(cause)),
        }
    }

    /// Has everything end: once more, the more urgent.
    fn end(&mut self) {
        let (since, asked) = self.ending.unwrap_or((Instant::now(), 0));
        for running in &mut self.running {
            if asked < PATIENCE.len() {
                // The first one is for the command in the guest, the second for the machine.
                let _ = kill_process(Pid::from_child(&running.child), Signal::TERM);
            } else {
                let _ = running.child.kill();
            }
        }
        self.ending = Some((since, asked.saturating_add(1)));
    }

    /// Asks again where nothing has come of it.
    fn press(&mut self) {
        let due = |(since, asked): (Instant, usize)| {
            asked
                .checked_sub(1)
                .and_then(|at| PATIENCE.get(at))
                .is_some_and(|patience| since.elapsed() >= *patience)
        };
        if self.ending.is_some_and(due) {
            self.end();
        }
    }

    /// Takes output, and what has ended.
    fn collect(&mut self) {
        let mut ended = Vec::new();
        for (at, running) in self.running.iter_mut().enumerate() {
            for stream in [&mut running.out, &mut running.err] {
                if let Err(fail) = stream.take() {
                    (self.tell)(News::Trouble(fail));
                }
            }
            match running.child.try_wait() {
                Ok(Some(status)) => ended.push((at, Some(status))),
                Ok(None) => {}
                Err(_) => ended.push((at, None)),
            }
        }
        for (at, status) in ended.into_iter().rev() {
            let mut running = self.running.swap_remove(at);
            for stream in [&mut running.out, &mut running.err] {
                if let Err(fail) = stream.finish() {
                    (self.tell)(News::Trouble(fail));
                }
            }
            let asked = self.ending.is_some();
            let (one, logs) = running.close(status, asked);
            self.conclude(running.task, one, logs);
        }
    }

    /// Notes what a try came to, and what follows from it.
    fn conclude(&mut self, number: usize, one: Try, logs: Option<PathBuf>) {
        let Some(outcome) = self.outcomes.get_mut(number) else { return };
        outcome.tries.push(one);
        outcome.logs.extend(logs);
        let Some(one) = outcome.tries.last().filter(|one| !one.passed() && !one.ended) else {
            self.over += 1;
            return;
        };
        let name = self.order.tasks.get(number).map_or("", |task| &task.name);
        let retries = usize::try_from(self.order.retries).unwrap_or(usize::MAX);
        let again = outcome.tries.len() <= retries && self.ending.is_none();
        (self.tell)(News::Failed(name, one, again));
        if again {
            // Behind the others: what made it fail may be over by then.
            self.waiting.push_back(number);
        } else {
            self.over += 1;
            if self.order.fail_fast && self.ending.is_none() {
                self.end();
            }
        }
    }

    fn progress(&mut self) {
        let names = self.running.iter().filter_map(|running| self.order.tasks.get(running.task));
        let names = names.map(|task| task.name.as_str()).collect();
        (self.tell)(News::Progress(self.over, names));
    }
}

impl Running {
    /// What it came to, and where its output is, if that is kept.
    fn close(&mut self, status: Option<ExitStatus>, asked: bool) -> (Try, Option<PathBuf>) {
        let code = status.and_then(|status| status.code()).and_then(|code| u8::try_from(code).ok());
        let result = read(&self.result);
        let passed = code == Some(0);
        let mut said = quote::last_lines(self.err.tail(), SAID);
        if said.is_empty() {
            said = quote::last_lines(self.out.tail(), SAID);
        }
        if let Some(dir) = &self.logs {
            if passed {
                forget(dir);
            } else if let Some(result) = &result {
                let _ = fs::write(dir.join("result.json"), format!("{result}\n"));
            }
        }
        let one = Try {
            code,
            signal: status.and_then(|status| status.signal()),
            result,
            took: self.began.elapsed(),
            said,
            ended: asked && !passed,
        };
        (one, self.logs.take().filter(|_| !passed))
    }
}

fn read(mut file: &File) -> Option<serde_json::Value> {
    use std::io::{Read, Seek, SeekFrom};
    let mut text = Vec::new();
    file.seek(SeekFrom::Start(0)).ok()?;
    file.take(RESULT).read_to_end(&mut text).ok()?;
    serde_json::from_slice(&text).ok()
}

/// Removes the files that were made, and the directory unless somebody else has something in it.
fn forget(dir: &Path) {
    for name in ["stdout", "stderr", "result.json"] {
        let _ = fs::remove_file(dir.join(name));
    }
    let _ = fs::remove_dir(dir);
}

/// The directory for the output of a try. Names that differ only in what no name of a file has are told apart by number.
fn place(top: &Path, name: &str, number: usize, tries: usize) -> PathBuf {
    let plain = |c: char| c.is_ascii_alphanumeric() || "=,.+-_".contains(c);
    let mut text: String = name.chars().map(|c| if plain(c) { c } else { '_' }).take(200).collect();
    if text != name {
        text = format!("{text}.cell{number}");
    }
    if tries > 0 {
        text = format!("{text}.try{}", tries.saturating_add(1));
    }
    top.join(text)
}

#[cfg(test)]
mod tests;
