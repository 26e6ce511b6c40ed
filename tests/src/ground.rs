//! The ground that guests run on: this machine, or the emulated host, started once and kept to the end.
//!
//! Either is a shell that takes one script after another, so that a case reads the same on both, and what it did
//! can be typed in by hand.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tempfile::TempDir;

/// Time for a script unless it says otherwise.
pub const LIMIT: Duration = Duration::from_secs(300);
/// Time for the ground itself to start, beyond what its first script may take.
const START: Duration = Duration::from_secs(120);
/// Time for the ground itself to answer, beyond what a later script may take.
const GRACE: Duration = Duration::from_secs(30);

/// What came of a script.
#[derive(Clone, Debug, Default)]
pub struct Output {
    /// Its exit code; 137 when it overran its limit.
    pub code: i32,
    /// What it wrote to standard output.
    pub stdout: Vec<u8>,
    /// What it wrote to standard error.
    pub stderr: Vec<u8>,
    /// How long it took.
    pub took: Duration,
}

impl Output {
    /// Standard output as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Standard error as text.
    pub fn complaint(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }
}

/// A place where scripts run.
pub trait Ground {
    /// What it is, for the report.
    fn name(&self) -> &'static str;
    /// Options for `mayfly run` here.
    fn options(&self) -> &'static str;
    /// Runs `script` in `dir`, without standard input.
    ///
    /// # Errors
    /// The ground is gone or does not answer; what the script itself does wrong is in the [`Output`].
    fn run(&mut self, dir: &Path, script: &str, limit: Duration) -> Result<Output, String>;
    /// Why it runs scripts no more, if so.
    fn lost(&self) -> Option<String>;
    /// Starts it anew after a loss.
    ///
    /// # Errors
    /// It does not start.
    fn restart(&mut self) -> Result<(), String>;
}

/// A ground that is a shell.
pub struct Shell {
    name: &'static str,
    options: &'static str,
    command: Command,
    process: Child,
    /// What a script says, until it is told; gone with the ground, however that ends.
    said: TempDir,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
    answered: bool,
    broken: Option<String>,
}

impl Shell {
    /// This machine: whatever /dev/kvm it has is used as it is.
    ///
    /// # Errors
    /// There is no shell.
    pub fn local() -> Result<Shell, String> {
        Shell::start("this machine", "--accel unchecked", Command::new("sh"))
    }

    /// The emulated host.
    ///
    /// # Errors
    /// `mayfly` cannot be started; what it says later comes with the first script.
    pub fn emulated(mayfly: &Path) -> Result<Shell, String> {
        let mut command = Command::new(mayfly);
        // One CPU, however many the guests have: what QEMU gets wrong, it gets wrong between CPUs.
        command.args(["lab", "--memory", "8G", "--", "sh"]);
        Shell::start("the emulated host", "--accel kvm", command)
    }

    fn start(name: &'static str, options: &'static str, mut command: Command) -> Result<Shell, String> {
        let (process, input, output) = spawn(&mut command)?;
        let said = room()?;
        Ok(Shell { name, options, command, process, said, input, output, answered: false, broken: None })
    }

    fn exchange(&mut self, dir: &Path, script: &str, limit: Duration) -> Result<Output, String> {
        let started = Instant::now();
        let order = format!(
            "o={0}/o; e={0}/e; cd {1} && timeout -s KILL {2} sh -c {3} </dev/null >$o 2>$e; s=$?\n\
             echo @done $s $(wc -c <$o) $(wc -c <$e); cat $o $e; rm -f $o $e\n",
            quote(&self.said.path().display().to_string()),
            quote(&dir.display().to_string()),
            limit.as_secs_f64(),
            quote(script),
        );
        let input = self.input.as_mut().ok_or("the shell has been closed")?;
        input
            .write_all(order.as_bytes())
            .and_then(|()| input.flush())
            .map_err(|e| format!("tell the shell: {e}"))?;
        let deadline = started + limit + if self.answered { GRACE } else { START };
        let mut head = String::new();
        // What the ground itself says before its answer is not ours.
        while !head.starts_with("@done ") {
            head = String::from_utf8_lossy(&self.bytes_until(b'\n', deadline)?).into_owned();
        }
        let numbers: Vec<usize> = head.split_whitespace().skip(1).filter_map(|n| n.parse().ok()).collect();
        let &[code, out, err] = numbers.as_slice() else { return Err(format!("the shell answers {head:?}")) };
        let (stdout, stderr) = (self.bytes(out, deadline)?, self.bytes(err, deadline)?);
        self.answered = true;
        Ok(Output { code: i32::try_from(code).unwrap_or(-1), stdout, stderr, took: started.elapsed() })
    }

    fn bytes(&mut self, count: usize, deadline: Instant) -> Result<Vec<u8>, String> {
        let mut bytes = Vec::new();
        while bytes.len() < count {
            let buffer = self.buffer(deadline)?;
            let taken = buffer.len().min(count - bytes.len());
            bytes.extend(&buffer[..taken]);
            self.output.consume(taken);
        }
        Ok(bytes)
    }

    fn bytes_until(&mut self, last: u8, deadline: Instant) -> Result<Vec<u8>, String> {
        let mut bytes = Vec::new();
        loop {
            let buffer = self.buffer(deadline)?;
            let end = buffer.iter().position(|byte| *byte == last);
            let taken = end.map_or(buffer.len(), |at| at + 1);
            bytes.extend(&buffer[..taken]);
            self.output.consume(taken);
            if end.is_some() {
                return Ok(bytes);
            }
        }
    }

    /// What the shell has said next, waited for until `deadline`.
    fn buffer(&mut self, deadline: Instant) -> Result<&[u8], String> {
        if self.output.buffer().is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            let left = Timespec::try_from(left).unwrap_or_default();
            let mut fds = [PollFd::new(self.output.get_ref(), PollFlags::IN)];
            if poll(&mut fds, Some(&left)).map_err(|e| format!("wait for the shell: {e}"))? == 0 {
                return Err("it did not answer in time".into());
            }
        }
        let buffer = self.output.fill_buf().map_err(|e| format!("read from the shell: {e}"))?;
        if buffer.is_empty() { Err("it has ended".into()) } else { Ok(buffer) }
    }
}

/// A directory for what scripts say.
fn room() -> Result<TempDir, String> {
    let room = tempfile::Builder::new().prefix("mayfly-ground-").tempdir();
    room.map_err(|cause| format!("make a directory: {cause}"))
}

/// A process of `command`, and the pipes to and from it.
fn spawn(command: &mut Command) -> Result<(Child, Option<ChildStdin>, BufReader<ChildStdout>), String> {
    let mut process = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|cause| format!("start {command:?}: {cause}"))?;
    let input = process.stdin.take();
    let output = BufReader::new(process.stdout.take().ok_or("no pipe from the shell")?);
    Ok((process, input, output))
}

impl Ground for Shell {
    fn name(&self) -> &'static str {
        self.name
    }
    fn options(&self) -> &'static str {
        self.options
    }
    fn run(&mut self, dir: &Path, script: &str, limit: Duration) -> Result<Output, String> {
        if let Some(cause) = &self.broken {
            return Err(cause.clone());
        }
        self.exchange(dir, script, limit).map_err(|cause| {
            let cause = format!("{} is lost: {cause}", self.name);
            self.broken = Some(cause.clone());
            cause
        })
    }
    fn lost(&self) -> Option<String> {
        self.broken.clone()
    }
    fn restart(&mut self) -> Result<(), String> {
        self.end();
        (self.process, self.input, self.output) = spawn(&mut self.command)?;
        // A script of the ground that was lost may still be writing to its own.
        self.said = room()?;
        (self.answered, self.broken) = (false, None);
        Ok(())
    }
}

impl Shell {
    /// The shell ends at the end of its input, and the emulated host with it; what does not end is ended.
    fn end(&mut self) {
        drop(self.input.take());
        let patience = Instant::now() + Duration::from_secs(if self.broken.is_some() { 1 } else { 20 });
        while Instant::now() < patience {
            if !matches!(self.process.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        self.end();
    }
}

/// `text` as one word of a shell.
pub fn quote(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,+@%".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        return text.to_owned();
    }
    format!("'{}'", text.replace('\'', "'\\''"))
}

/// The `mayfly` under test: `$MAYFLY`, or the release build of this tree, brought up to date.
///
/// # Errors
/// It does not build.
pub fn mayfly() -> Result<PathBuf, String> {
    if let Some(path) = std::env::var_os("MAYFLY") {
        return Ok(path.into());
    }
    let build = Command::new(env!("CARGO"))
        .args(["build", "--release", "--package", "vmm", "--message-format", "json-render-diagnostics"])
        .current_dir(crate::house::root())
        .stderr(Stdio::inherit())
        .output()
        .map_err(|cause| format!("run cargo: {cause}"))?;
    let said = String::from_utf8_lossy(&build.stdout).into_owned();
    said.lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter_map(|message| message["executable"].as_str().map(PathBuf::from))
        .find(|path| path.ends_with("mayfly"))
        .ok_or_else(|| "build mayfly: cargo build --release did not make it".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shell_answers_with_codes_and_bytes() {
        let mut ground = Shell::local().unwrap();
        let here = Path::new("/");
        let output = ground.run(here, "pwd; printf 'it'\\''s \\0' >&2; exit 7", LIMIT).unwrap();
        assert_eq!(
            (output.code, output.text().as_str(), output.stderr.as_slice()),
            (7, "/\n", &b"it's \0"[..])
        );
        let output = ground.run(here, "sleep 60", Duration::from_millis(50)).unwrap();
        assert_eq!(output.code, 137, "a script that overruns is ended");
        assert_eq!(ground.run(here, "cat; echo \"$0\"", LIMIT).unwrap().text(), "sh\n", "it has no input");
    }

    #[test]
    fn a_ground_that_ends_says_so_once_and_for_all() {
        let mut command = Command::new("sh");
        command.args(["-c", "read order; echo noise"]);
        let mut ground = Shell::start("a short life", "", command).unwrap();
        for _ in 0..2 {
            assert_eq!(
                ground.run(Path::new("/"), "true", LIMIT).unwrap_err(),
                "a short life is lost: it has ended"
            );
        }
        assert!(ground.lost().is_some());
        let said = ground.said.path().to_owned();
        assert!(said.exists());
        drop(ground);
        assert!(!said.exists(), "a ground that is lost leaves nothing behind");
    }

    #[test]
    fn a_ground_starts_anew_after_a_loss() {
        let mut ground = Shell::local().unwrap();
        assert!(
            ground.run(Path::new("/"), "kill -9 $(cut -d' ' -f4 /proc/$PPID/stat)", LIMIT).is_err(),
            "its shell is gone"
        );
        assert_eq!(ground.run(Path::new("/"), "echo here", LIMIT).unwrap_err(), ground.lost().unwrap());
        ground.restart().unwrap();
        assert_eq!(ground.run(Path::new("/"), "echo here", LIMIT).unwrap().text(), "here\n");
        assert_eq!(ground.lost(), None);
    }

    #[test]
    fn a_ground_that_cannot_start_anew_is_no_other_ground_the_next_time() {
        let place = tempfile::tempdir().unwrap();
        let program = place.path().join("ground");
        // A link, since no program that was just written is sure to run: another test may fork meanwhile.
        let install = || std::os::unix::fs::symlink("/bin/sh", &program).unwrap();
        install();
        let mut ground = Shell::start("a program", "", Command::new(&program)).unwrap();
        std::fs::remove_file(&program).unwrap();
        for _ in 0..2 {
            let cause = ground.restart().unwrap_err();
            assert!(cause.contains(place.path().to_str().unwrap()), "{cause}");
        }
        install();
        ground.restart().unwrap();
        assert_eq!(ground.run(Path::new("/"), "echo here", LIMIT).unwrap().text(), "here\n");
    }

    #[test]
    fn an_answer_that_stops_half_way_is_not_waited_for() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo abc; read order"]);
        let mut ground = Shell::start("half an answer", "", command).unwrap();
        let soon = Instant::now() + LIMIT;
        assert_eq!(ground.bytes(2, soon).unwrap(), b"ab");
        assert_eq!(ground.bytes(2, soon).unwrap(), b"c\n");
        assert_eq!(ground.bytes(1, Instant::now()).unwrap_err(), "it did not answer in time");
    }
}
