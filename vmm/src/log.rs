//! The log: what mayfly tells on standard error besides errors.
//!
//! Lines a guest can cause carry the target `guest` (`log::warn!(target: "guest", ...)`) and are rationed, so that no
//! guest fills a disk through our log.

use std::io::{IsTerminal, Write};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use log::{Level, LevelFilter, Log, Metadata, Record};

/// The target of lines that a guest can cause.
pub const GUEST: &str = "guest";

/// The logger of the process. Started once, by [`start`].
struct Stderr {
    began: Instant,
    terminal: OnceLock<bool>,
    guest: Mutex<Ration>,
}

static STDERR: OnceLock<Stderr> = OnceLock::new();

/// Starts the log at `level`. Before that, and a second time, nothing happens.
pub fn start(level: LevelFilter) {
    if STDERR.set(Stderr::new()).is_ok()
        && let Some(logger) = STDERR.get()
        && log::set_logger(logger).is_ok()
    {
        log::set_max_level(level);
    }
}

/// The level for so many `-v`, or for `-q`.
pub fn level(verbose: u8, quiet: bool) -> LevelFilter {
    match (quiet, verbose) {
        (true, _) => LevelFilter::Error,
        (false, 0) => LevelFilter::Warn,
        (false, 1) => LevelFilter::Info,
        (false, 2) => LevelFilter::Debug,
        (false, _) => LevelFilter::Trace,
    }
}

/// One line that the operator should see unless `-q` was given: nothing is wrong, but something is not as expected.
pub fn note(text: &str) {
    if log::max_level() >= LevelFilter::Warn {
        tell(&format!("note: {text}"));
    }
}

/// Prints a line on standard error, whole. While the terminal is raw, a newline alone would not return the carriage.
pub fn tell(line: &str) {
    let terminal = |stderr: &Stderr| *stderr.terminal.get_or_init(|| std::io::stderr().is_terminal());
    let end = if STDERR.get().is_some_and(terminal) { "\r\n" } else { "\n" };
    let text = line.replace('\n', end) + end;
    // Nobody is left to tell when this fails.
    let _ = std::io::stderr().lock().write_all(text.as_bytes());
}

impl Stderr {
    fn new() -> Stderr {
        Stderr { began: Instant::now(), terminal: OnceLock::new(), guest: Mutex::default() }
    }

    /// The lines that `record` becomes at time `now`.
    fn lines(&self, record: &Record<'_>, now: Duration) -> impl Iterator<Item = String> {
        let left_out = match record.target() {
            GUEST => self.guest.lock().unwrap_or_else(PoisonError::into_inner).ask(now),
            _ => Some(0),
        };
        let remark = left_out
            .filter(|count| *count > 0)
            .map(|count| format!("warning: {count} more lines that the guest caused were left out"));
        remark.into_iter().chain(left_out.map(|_| render(record, now)))
    }
}

impl Log for Stderr {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            self.lines(record, self.began.elapsed()).for_each(|line| tell(&line));
        }
    }

    fn flush(&self) {}
}

fn render(record: &Record<'_>, now: Duration) -> String {
    match record.level() {
        Level::Error => format!("error: {}", record.args()),
        Level::Warn => format!("warning: {}", record.args()),
        level => {
            let word = level.as_str().to_ascii_lowercase();
            format!("{:>10.3} ms {word} {}: {}", now.as_secs_f64() * 1e3, record.target(), record.args())
        }
    }
}

/// A token bucket: [`Ration::BURST`] lines at once, then one for each [`Ration::EVERY`].
struct Ration {
    tokens: u32,
    refilled: Duration,
    left_out: u64,
}

impl Default for Ration {
    fn default() -> Self {
        Ration { tokens: Self::BURST, refilled: Duration::ZERO, left_out: 0 }
    }
}

impl Ration {
    const BURST: u32 = 10;
    const EVERY: Duration = Duration::from_secs(1);

    /// Asks for one line at time `now`: `None` to leave it out, else how many were left out since the last one.
    fn ask(&mut self, now: Duration) -> Option<u64> {
        let due = now.saturating_sub(self.refilled).as_secs() / Self::EVERY.as_secs();
        if due > 0 {
            let due = u32::try_from(due).unwrap_or(u32::MAX);
            self.tokens = self.tokens.saturating_add(due).min(Self::BURST);
            self.refilled = now;
        }
        match self.tokens.checked_sub(1) {
            Some(tokens) => {
                self.tokens = tokens;
                Some(std::mem::take(&mut self.left_out))
            }
            None => {
                self.left_out += 1;
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_gets_a_burst_and_then_a_line_a_second() {
        let mut ration = Ration::default();
        let mut asked = |now, times: u32| (0..times).filter_map(|_| ration.ask(now)).collect::<Vec<_>>();
        assert_eq!(asked(Duration::ZERO, 1000), [0; 10]);
        assert_eq!(asked(Duration::from_millis(900), 10), [0; 0]);
        assert_eq!(asked(Duration::from_millis(1100), 10), [1000], "it says how many were left out");
        assert_eq!(asked(Duration::from_secs(3600), 11), [9, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn only_lines_that_a_guest_caused_are_rationed() {
        let stderr = Stderr::new();
        let storm = |target: &str, now| -> Vec<String> {
            let mut lines = Vec::new();
            for n in 0..1000 {
                let mut said = Record::builder();
                let said = said.level(Level::Warn).target(target);
                lines.extend(stderr.lines(&said.args(format_args!("{n}")).build(), now));
            }
            lines
        };
        assert_eq!(storm(GUEST, Duration::ZERO).len(), 10);
        let later = storm(GUEST, Duration::from_secs(1));
        assert_eq!(later, ["warning: 990 more lines that the guest caused were left out", "warning: 0"]);
        assert_eq!(storm("machine", Duration::ZERO).len(), 1000);
    }

    #[test]
    fn lines_say_what_they_are() {
        let line = |level, text: &str| {
            render(
                &Record::builder().level(level).target("machine").args(format_args!("{text}")).build(),
                Duration::from_micros(1500),
            )
        };
        assert_eq!(line(Level::Warn, "odd"), "warning: odd");
        assert_eq!(line(Level::Debug, "fine"), "     1.500 ms debug machine: fine");
    }

    #[test]
    fn flags_choose_the_level() {
        let levels = [(0, true), (0, false), (1, false), (2, false), (9, false)].map(|(v, q)| level(v, q));
        use LevelFilter::{Debug, Error, Info, Trace, Warn};
        assert_eq!(levels, [Error, Warn, Info, Debug, Trace]);
    }
}
