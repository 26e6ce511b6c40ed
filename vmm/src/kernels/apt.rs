//! Packages through apt, without its root and without a change to what it knows of this machine.
//!
//! What this machine's package lists say is asked first. Where they say nothing, or name what the mirror has no longer, apt
//! fetches lists of its own into a directory that goes away with them.

use std::fs::{self, File};
use std::io::{IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use base::sys::children::die_with_parent;
use base::{Doing, Fail, Result, Why};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::{log, quote};

/// Programs that are used.
pub const TOOLS: [&str; 2] = ["apt-get", "apt-cache"];
/// How often progress is shown.
const BEAT: Duration = Duration::from_millis(200);
/// Bytes and lines of its complaints that are told.
const SAID: u64 = 64 << 10;
const LINES: usize = 4;
/// Packages that only name another: so many in a row.
const DEPTH: usize = 4;
/// What every kernel's package begins with, and those of Ubuntu's modules.
const IMAGE: &str = "linux-image-";
const MODULES: &str = "linux-modules-";

/// A file that apt would fetch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// Its package.
    pub package: String,
    /// Its name.
    pub file: String,
    /// Its size.
    pub bytes: u64,
}

/// apt, with a choice of package lists.
pub struct Apt {
    options: Vec<String>,
}

impl Apt {
    /// apt with the lists of this machine.
    pub fn of_machine(scratch: &Path) -> Apt {
        // Its cache of lists is the machine's. Whether its user for fetching can write there, apt sees for itself.
        Apt { options: vec!["-o".to_owned(), format!("Dir::Cache={}", scratch.display())] }
    }

    /// apt with lists of its own below `scratch`, fetched now.
    ///
    /// # Errors
    /// They cannot be fetched.
    pub fn of_its_own(scratch: &Path) -> Result<Apt> {
        let lists = scratch.join("lists");
        fs::create_dir_all(lists.join("partial")).doing(Why::Host, || format!("make {}", lists.display()))?;
        let mut apt = Apt::of_machine(scratch);
        apt.options.extend(["-o".to_owned(), format!("Dir::State::lists={}", lists.display())]);
        apt.run("apt-get", &["update", "-q"])?;
        Ok(apt)
    }

    /// What apt would fetch for the kernel that `package` is or stands for; `None` if it knows none.
    ///
    /// # Errors
    /// apt cannot be run.
    pub fn look(&self, package: &str) -> Result<Option<Vec<Item>>> {
        let mut name = package.to_owned();
        let mut modules = Vec::new();
        for _ in 0..DEPTH {
            let Some(depends) = self.depends(&name)? else { return Ok(None) };
            modules = depends.iter().filter(|name| name.starts_with(MODULES)).cloned().collect();
            match depends.into_iter().find(|name| name.starts_with(IMAGE)) {
                Some(next) => name = next,
                None => break,
            }
        }
        let wanted = [name].into_iter().chain(modules);
        let items = wanted.map(|package| self.item(&package)).collect::<Result<Option<Vec<_>>>>()?;
        Ok(items)
    }

    /// The names that a package depends on; `None` if there is no such package.
    fn depends(&self, package: &str) -> Result<Option<Vec<String>>> {
        let said = self.ask("apt-cache", &["depends", package])?;
        Ok(said.map(|text| {
            let lines = text.lines().map(|line| line.trim().trim_start_matches('|'));
            lines.filter_map(|line| line.strip_prefix("Depends: ")).map(str::to_owned).collect()
        }))
    }

    fn item(&self, package: &str) -> Result<Option<Item>> {
        let said = self.ask("apt-get", &["download", "--print-uris", package])?;
        Ok(said.and_then(|text| text.lines().find_map(|line| item(package, line))))
    }

    /// Fetches an item into `dir`; the file. On a terminal its progress is shown.
    ///
    /// # Errors
    /// It cannot be fetched.
    pub fn fetch(&self, item: &Item, dir: &Path) -> Result<PathBuf> {
        let mut command = self.command("apt-get", &["download", "-q", &item.package]);
        // A file: a pipe would have to be read all the time.
        let words = dir.join("said");
        let said = File::create(&words).doing(Why::Host, || format!("make {}", words.display()))?;
        let child = command.current_dir(dir).stdout(Stdio::null()).stderr(said).spawn();
        let child = child.doing(Why::Missing, || "run apt-get")?;
        let path = dir.join(&item.file);
        let shown = std::io::stderr().is_terminal() && ::log::max_level() >= ::log::LevelFilter::Warn;
        if wait(child, shown.then_some((item, path.as_path())))? && path.is_file() {
            return Ok(path);
        }
        let mut said = Vec::new();
        let read = File::open(&words).and_then(|file| file.take(SAID).read_to_end(&mut said));
        read.doing(Why::Host, || format!("read {}", words.display()))?;
        Err(Fail::new(Why::Missing, format!("fetch {}", item.package)).because(complaint(&said)))
    }

    fn command(&self, program: &str, words: &[&str]) -> Command {
        let mut command = Command::new(program);
        command.args(&self.options).args(words).stdin(Stdio::null()).env("LC_ALL", "C");
        die_with_parent(&mut command);
        command
    }

    /// What a program answers on standard output; `None` if it refuses.
    fn ask(&self, program: &str, words: &[&str]) -> Result<Option<String>> {
        let output =
            self.command(program, words).output().doing(Why::Missing, || format!("run {program}"))?;
        Ok(output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned()))
    }

    /// Runs a program to its end; what it says is told only if it fails.
    fn run(&self, program: &str, words: &[&str]) -> Result<()> {
        let output =
            self.command(program, words).output().doing(Why::Missing, || format!("run {program}"))?;
        if output.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        let doing = format!("run {program} {}", words.join(" "));
        Err(Fail::new(Why::Missing, doing).because(format!("it ended with {}: {said}", output.status)))
    }
}

/// A line of `apt-get download --print-uris`: `'URI' FILE SIZE DIGEST`.
fn item(package: &str, line: &str) -> Option<Item> {
    let mut words = line.strip_prefix('\'')?.rsplit_once("' ")?.1.split_ascii_whitespace();
    let (file, bytes) = (words.next()?.to_owned(), words.next()?.parse().ok()?);
    let plain = !file.contains('/') && file.ends_with(".deb");
    plain.then(|| Item { package: package.to_owned(), file, bytes })
}

/// What apt complains of, without its warnings.
fn complaint(said: &[u8]) -> String {
    let lines = quote::last_lines(said, LINES);
    let errors: Vec<&str> = lines.iter().filter_map(|line| line.strip_prefix("E: ")).collect();
    match (errors.as_slice(), lines.as_slice()) {
        ([], []) => "apt-get left no file".to_owned(),
        ([], lines) => lines.join("; "),
        (errors, _) => errors.join("; "),
    }
}

/// Waits for a program: whether it ended well. Shows how much of the file is there meanwhile.
fn wait(mut child: Child, shown: Option<(&Item, &Path)>) -> Result<bool> {
    let waiting = || "wait for apt-get";
    if let Some((item, path)) = shown {
        let pidfd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).doing(Why::Host, waiting)?;
        let beat = Timespec::try_from(BEAT).doing(Why::Host, waiting)?;
        loop {
            let over = poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&beat));
            show(item, fs::metadata(path).map_or(0, |about| about.len()));
            if !matches!(over, Ok(0) | Err(rustix::io::Errno::INTR)) {
                break;
            }
        }
        log::tell("");
    }
    let status = child.wait().doing(Why::Host, waiting)?;
    Ok(status.success())
}

/// One line of a terminal, written over the last.
fn show(item: &Item, there: u64) {
    let mb = |bytes: u64| format!("{}.{}", bytes / 1_000_000, bytes / 100_000 % 10);
    let percent = there.saturating_mul(100).checked_div(item.bytes).unwrap_or(100).min(100);
    let line = format!("\r{}: {percent:>3} % of {} MB\x1b[K", item.package, mb(item.bytes));
    let _ = std::io::stderr().lock().write_all(line.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn apt_is_quoted_without_its_warnings_and_on_one_line() {
        let said = b"W: unsandboxed\nE: a\x1b[2J b\nE: c\n";
        assert_eq!(complaint(said), "a[2J b; c");
        assert_eq!(complaint(b"sh: no apt\n"), "sh: no apt");
        assert_eq!(complaint(b"\n"), "apt-get left no file");
    }

    #[test]
    fn a_line_of_apt_is_read() {
        let line = "'http://deb.debian.org/pool/l/linux_6.1%2b2.deb' linux-image-6.1_1%3a6.1_amd64.deb 26713492 SHA256:e7d0";
        let wanted =
            Item { package: "p".into(), file: "linux-image-6.1_1%3a6.1_amd64.deb".into(), bytes: 26_713_492 };
        assert_eq!(item("p", line), Some(wanted));
        for wrong in ["", "Get:1 x y 3", "'u' ../a.deb 3 x", "'u' a.deb many x", "'u' a.tar 3 x"] {
            assert_eq!(item("p", wrong), None, "{wrong}");
        }
    }
}
