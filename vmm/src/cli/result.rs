//! The result of a run, written down: the object of `--json` and the report of `--junit`.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use base::host::{Access, Host};
use base::{Doing, Fail, Result, Why};
use clap::ArgMatches;
use devices::outlet::{Flow, Outlet};
use rustix::time::{ClockId, clock_gettime};

use super::complain;
use crate::host::{self, LinuxHost};
use crate::outcome::{self, Early, Report, code};

/// How long the reader of the result may take nothing of it.
const PATIENCE: Duration = Duration::from_secs(5);

/// What is to be written of a run.
pub struct Papers {
    json: Option<Sink>,
    junit: Option<Junit>,
}

impl Papers {
    /// Opens what the flags ask for.
    ///
    /// # Errors
    /// It cannot be written there.
    pub fn open(matches: &ArgMatches) -> Result<Papers> {
        let asked = |flag| matches.get_one::<PathBuf>(flag).filter(|_| !matches.get_flag("dry-run"));
        let json = asked("json").map(|path| Sink::open(path)).transpose()?;
        let junit = asked("junit").map(|path| Junit::open(path)).transpose()?;
        Ok(Papers { json, junit })
    }

    /// Whether standard output has the last word.
    pub fn on_stdout(&self) -> bool {
        matches!(self.json, Some(Sink::Stdout)) || matches!(self.junit, Some(Junit::Sink(Sink::Stdout)))
    }

    /// Writes what a run came to; its exit code.
    pub fn tell(self, mut report: Report) -> u8 {
        if self.json.is_some() || self.junit.is_some() {
            report.times.cpu = Some(computed());
        }
        // On standard output the result has a line of its own.
        let fresh = if report.mid_line && self.on_stdout() { "\n" } else { "" };
        self.write(
            || format!("{fresh}{}", report.junit()),
            |after| format!("{}{}\n", if after { "" } else { fresh }, report.json()),
            report.exit_code(),
        )
    }

    /// The same of a run that came to nothing.
    pub fn tell_failure(self, fail: &Fail) -> u8 {
        self.write(
            || outcome::junit_before_start(&Early::Failed(fail)),
            |_| outcome::json_before_start(fail) + "\n",
            outcome::code_before_start(fail),
        )
    }

    /// The object comes last: it is the last line, wherever the report goes.
    fn write(self, junit: impl FnOnce() -> String, json: impl FnOnce(bool) -> String, code: u8) -> u8 {
        let on_stdout = matches!(self.junit, Some(Junit::Sink(Sink::Stdout)));
        let code = self.junit.map_or(code, |paper| paper.deliver(&junit(), code));
        self.json.map_or(code, |sink| sink.deliver(&json(on_stdout), code))
    }
}

/// What this process has computed so far, on all its threads.
fn computed() -> Duration {
    Duration::try_from(clock_gettime(ClockId::ProcessCPUTime)).unwrap_or_default()
}

/// Where the report goes.
enum Junit {
    /// A file that always is whole: it is replaced by another.
    File(PathBuf),
    /// What cannot be replaced: standard output, a pipe.
    Sink(Sink),
}

impl Junit {
    /// Makes the file at once: what it says holds until the end of the run puts another in its place, also if nobody is left to
    /// do that.
    fn open(path: &Path) -> Result<Junit> {
        let other = fs::metadata(path).is_ok_and(|about| !about.is_file());
        if path == Path::new("-") || other {
            return Sink::open(path).map(Junit::Sink);
        }
        // What a symbolic link leads to is replaced, not the link.
        let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        replace(&path, &outcome::junit_before_start(&Early::Unfinished))?;
        Ok(Junit::File(path))
    }

    /// Writes it to the end of a run that would end with `code`; the code with which it does end.
    fn deliver(self, xml: &str, code: u8) -> u8 {
        let path = match self {
            Junit::Sink(sink) => return sink.deliver(xml, code),
            Junit::File(path) => path,
        };
        match replace(&path, xml) {
            Ok(()) => code,
            Err(fail) => {
                complain(&fail);
                if code == code::DONE { code::HOST } else { code }
            }
        }
    }
}

/// Puts a file with this text in the place of the one at `path`: whoever looks finds either, and each whole.
fn replace(path: &Path, text: &str) -> Result<()> {
    let doing = || format!("write the report to {}", path.display());
    let name = path.file_name().ok_or("it has no name").doing(Why::Usage, doing)?;
    let new = path.with_file_name(format!(".{}.{}", name.display(), std::process::id()));
    let written = File::create_new(&new)
        .and_then(|mut file| file.write_all(text.as_bytes()))
        .and_then(|()| fs::rename(&new, path));
    written.map_err(|cause| {
        // It may be there in part, or not at all.
        let _ = fs::remove_file(&new);
        base::fail::unreadable(doing(), path, cause)
    })
}

/// Where a result goes that is written in one piece at the end.
enum Sink {
    Stdout,
    File(PathBuf, Outlet),
}

impl Sink {
    /// Opens it once, as an output of a device is opened: a pipe needs its reader first, and nothing waits for one.
    fn open(path: &Path) -> Result<Sink> {
        if path == Path::new("-") {
            return Ok(Sink::Stdout);
        }
        let file = LinuxHost::default().open(
            "result file",
            path,
            Access { create: true, write: true, ..Access::default() },
        )?;
        let outlet = Outlet::new(file.into())
            .doing(Why::Host, || format!("look at the result file {}", path.display()))?;
        Ok(Sink::File(path.to_owned(), outlet))
    }

    /// Writes a text to the end of a run that would end with `code`; the code with which it does end.
    fn deliver(self, text: &str, code: u8) -> u8 {
        let to_stdout = matches!(self, Sink::Stdout);
        let failed = match self.write(text) {
            Ok(Flow::Drained | Flow::Stuck) => return code,
            // As with the output of the guest: the reader has had enough.
            Ok(Flow::Closed) if to_stdout => code::QUIT,
            Ok(Flow::Closed) => {
                complain(&Fail::new(Why::Host, "write the result").because("its reader has gone"));
                code::HOST
            }
            Ok(Flow::Broken(cause)) => {
                complain(&Fail::new(Why::Host, "write the result").because(cause));
                code::HOST
            }
            Err(fail) => {
                complain(&fail);
                code::HOST
            }
        };
        if code == code::DONE { failed } else { code }
    }

    fn write(self, text: &str) -> Result<Flow> {
        let (name, mut outlet) = match self {
            Sink::Stdout => {
                let outlet = host::share::output().and_then(Outlet::new);
                ("the result".to_owned(), outlet.doing(Why::Host, || "write the result")?)
            }
            Sink::File(path, outlet) => (format!("the result to {}", path.display()), outlet),
        };
        text.bytes().for_each(|byte| outlet.push(byte));
        outlet.finish(&name, PATIENCE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outcome::End;
    use crate::plan::Plan;
    use std::time::Instant;

    fn read(path: &Path) -> String {
        fs::read_to_string(path).unwrap()
    }

    #[test]
    fn a_report_is_whole_at_any_time() {
        let dir = tempfile::tempdir().unwrap();
        let (path, link) = (dir.path().join("r.xml"), dir.path().join("link"));
        fs::write(&path, "of yesterday, when all was well").unwrap();
        std::os::unix::fs::symlink("r.xml", &link).unwrap();
        let papers = || Papers { json: None, junit: Some(Junit::open(&link).unwrap()) };
        let open = papers();
        assert!(read(&path).contains("<error type=\"unfinished\""), "{}", read(&path));
        let report = Report::unborn(&Plan::default(), End::PoweredOff, Instant::now());
        assert_eq!(open.tell(report), 0);
        let told = read(&path);
        assert!(told.contains("<property name=\"cause\" value=\"ok\"/>"), "{told}");
        assert!(told.contains("name=\"cpu_ms\"") && !told.contains("<error"), "{told}");
        assert!(link.is_symlink());
        let timed_out = End::TimedOut("2s".parse().unwrap());
        assert_eq!(papers().tell(Report::unborn(&Plan::default(), timed_out, Instant::now())), 124);
        let failure =
            "<failure type=\"timeout\" message=\"run the guest: it was not over after 2s\"></failure>";
        assert!(read(&path).contains(failure), "{}", read(&path));
        let fail = Fail::new(Why::Missing, "open k").because("no <such> file").hint("look");
        assert_eq!(papers().tell_failure(&fail), 125);
        assert!(
            read(&path).contains(
                "<error type=\"not-started\" message=\"open k: no &lt;such&gt; file\">  hint: look</error>"
            ),
            "{}",
            read(&path)
        );
        let names: Vec<_> =
            fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names.len(), 2, "nothing is left: {names:?}");
    }

    #[test]
    fn a_report_that_cannot_be_written_costs_no_run() {
        let dir = tempfile::tempdir().unwrap();
        let told = |path: &Path| Junit::open(path).err().unwrap().to_string();
        let path = dir.path().join("no/r.xml");
        assert!(
            told(&path).starts_with(&format!("write the report to {}: ", path.display())),
            "{}",
            told(&path)
        );
        assert!(told(dir.path()).contains("irectory"), "{}", told(dir.path()));
        let path = dir.path().join("r.xml");
        let open = Papers { json: None, junit: Some(Junit::open(&path).unwrap()) };
        // What was a directory at the beginning is none any more.
        fs::remove_dir_all(dir.path()).unwrap();
        let report = Report::unborn(&Plan::default(), End::PoweredOff, Instant::now());
        assert_eq!(open.tell(report), code::HOST);
    }
}
