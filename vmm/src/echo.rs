//! What the console of a command's guest says, shown on standard error while it says it (`-v`).

use std::io::IsTerminal;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::Duration;

use base::{Doing, Result, Why};

use crate::{log, quote};

/// Lines that wait to be shown. A guest that says more than its reader takes is not held up; lines are left out.
const WAITING: usize = 1024;

/// Takes what the guest says.
pub struct Echo {
    lines: SyncSender<String>,
    /// What has come of the present line.
    line: Vec<u8>,
    left_out: u64,
}

/// Shows it; ends when the last [`Echo`] has gone.
pub struct Shown(Receiver<()>);

impl Shown {
    /// Waits until all is shown, or the reader has taken nothing for so long.
    pub fn wait(self, patience: Duration) {
        // Nothing is ever sent: the other end goes with the thread.
        let _ = self.0.recv_timeout(patience);
    }
}

impl Echo {
    /// Starts to show lines, dim on a terminal, and marked as none of ours.
    ///
    /// # Errors
    /// The host has no thread for it.
    pub fn start() -> Result<(Echo, Shown)> {
        let (echo, waiting) = Echo::new();
        let dim = std::io::stderr().is_terminal();
        let (over, shown) = sync_channel(0);
        let show = move || {
            let _over = over;
            waiting.iter().for_each(|line| log::tell(&render(&line, dim)));
        };
        let thread = std::thread::Builder::new().name("echo".into()).spawn(show);
        thread.doing(Why::Host, || "show the guest's console")?;
        Ok((echo, Shown(shown)))
    }

    fn new() -> (Echo, Receiver<String>) {
        let (lines, waiting) = sync_channel(WAITING);
        (Echo { lines, line: Vec::new(), left_out: 0 }, waiting)
    }

    /// Takes in what the guest printed.
    pub fn feed(&mut self, bytes: &[u8]) {
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            let room = quote::LINE.saturating_sub(self.line.len());
            self.line.extend(piece.iter().take(room));
            if piece.ends_with(b"\n") {
                let line = std::mem::take(&mut self.line);
                self.say(quote::line(&line));
            }
        }
    }

    fn say(&mut self, line: String) {
        if self.left_out > 0
            && self.lines.try_send(format!("({} lines were left out)", self.left_out)).is_ok()
        {
            self.left_out = 0;
        }
        if let Err(TrySendError::Full(_)) = self.lines.try_send(line) {
            self.left_out = self.left_out.saturating_add(1);
        }
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        if !self.line.is_empty() {
            let line = std::mem::take(&mut self.line);
            self.say(quote::line(&line));
        }
    }
}

fn render(line: &str, dim: bool) -> String {
    if dim { format!("\x1b[2m  | {line}\x1b[0m") } else { format!("  | {line}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_shown_whole_and_harmless() {
        let (mut echo, waiting) = Echo::new();
        for byte in b"[    0.1] a\r\n\x1b[2Jb\n" {
            echo.feed(&[*byte]);
        }
        echo.feed(&[b'x'; 100_000]);
        echo.feed(b"\nlast words");
        drop(echo);
        let shown: Vec<_> = waiting.iter().collect();
        assert_eq!(shown, ["[    0.1] a", "[2Jb", "x".repeat(quote::LINE).as_str(), "last words"]);
        assert_eq!(render("a", false), "  | a");
        assert_eq!(render("a", true), "\x1b[2m  | a\x1b[0m");
    }

    #[test]
    fn a_reader_that_is_slow_holds_up_nobody() {
        let (mut echo, waiting) = Echo::new();
        (0..WAITING + 5).for_each(|n| echo.feed(format!("{n}\n").as_bytes()));
        assert_eq!(waiting.try_iter().count(), WAITING);
        echo.feed(b"again\n");
        assert_eq!(waiting.try_iter().collect::<Vec<_>>(), ["(5 lines were left out)", "again"]);
    }
}
