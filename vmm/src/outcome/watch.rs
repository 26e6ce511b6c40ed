//! The watch on a console: a kernel's last words, and what was printed last.

use std::collections::VecDeque;
use std::fmt;

use crate::echo::Echo;
use crate::quote;

/// Listens to console output for a kernel's last words. Holds at most two times [`Watch::LINE`] bytes of a line, whatever
/// the guest prints.
#[derive(Default)]
pub struct Watch {
    /// The first bytes of the present line.
    line: Vec<u8>,
    /// Of what follows them, that in which the last words may be.
    rest: Vec<u8>,
    panic: Option<String>,
    open: bool,
    /// What was printed last, if that is kept.
    tail: Option<VecDeque<u8>>,
    /// Whether somebody else than the kernel has said something, if that is of interest.
    user_space: Option<bool>,
    /// Shows it, if somebody wants to see it.
    echo: Option<Echo>,
}

impl Watch {
    /// Bytes of a line that are kept from its beginning, and of a panic in it.
    pub const LINE: usize = 256;
    /// What Linux prints (`kernel/panic.c`), since 2.2 or so.
    const WORDS: &[u8] = b"Kernel panic - not syncing";

    /// What Linux ends the line with in which it names its first program (`init/main.c`).
    const FIRST: &[u8] = b" as init process";

    /// Bytes that are kept of what was printed last: enough for a panic with its trace.
    const TAIL: usize = 8 << 10;

    /// Keeps what is printed last from now on.
    pub fn keep_tail(&mut self) {
        self.tail.get_or_insert_default();
    }

    /// The lines that were printed last, printable, `count` at the most.
    pub fn last_lines(&self, count: usize) -> Vec<String> {
        let bytes: Vec<u8> = self.tail.iter().flatten().copied().collect();
        quote::last_lines(&bytes, count)
    }

    /// Has what is printed from now on shown, or with `None` no longer.
    pub fn show(&mut self, echo: Option<Echo>) {
        self.echo = echo;
    }

    /// Takes in what the guest printed.
    pub fn feed(&mut self, bytes: &[u8]) {
        let Some(last) = bytes.last() else { return };
        if let Some(echo) = &mut self.echo {
            echo.feed(bytes);
        }
        if let Some(tail) = &mut self.tail {
            let old = tail.len().saturating_add(bytes.len()).saturating_sub(Self::TAIL);
            tail.drain(..old.min(tail.len()));
            tail.extend(bytes);
        }
        self.open = *last != b'\n';
        if self.user_space == Some(false) {
            self.user_space = Some(self.hears_user_space(bytes));
        }
        if self.panic.is_some() {
            return;
        }
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            let (text, ends) = match piece.split_last() {
                Some((b'\n', text)) => (text, true),
                _ => (piece, false),
            };
            self.take(text);
            if ends {
                self.panic = self.panic();
                self.line.clear();
                self.rest.clear();
            }
        }
    }

    /// Takes in a piece of the present line. The kernel may end one that a program has begun, and that may be long.
    fn take(&mut self, text: &[u8]) {
        let carry = Self::WORDS.len().saturating_sub(1);
        let room = Self::LINE.saturating_sub(self.line.len());
        let (text, beyond) = text.split_at(room.min(text.len()));
        self.line.extend(text);
        if self.rest.is_empty() && !beyond.is_empty() {
            self.rest.extend(self.line.iter().skip(self.line.len().saturating_sub(carry)));
        }
        for piece in beyond.chunks(Self::LINE) {
            self.rest.extend(piece);
            let begin = find(&self.rest).unwrap_or(self.rest.len().saturating_sub(carry));
            self.rest.drain(..begin);
            self.rest.truncate(Self::LINE);
        }
    }

    /// Listens for the first sign of user space from now on.
    pub fn await_user_space(&mut self) {
        self.user_space.get_or_insert(false);
    }

    /// Whether the guest has reached user space, as far as this console tells: a line that does not begin with the time that
    /// the kernel puts before its own, or the one with which the kernel starts the first program. A kernel without times
    /// (`printk.time=0`) is taken for user space.
    pub fn user_space(&self) -> bool {
        self.user_space == Some(true)
    }

    /// Whether `bytes`, which follow on what is held of the present line, have such a line in them.
    fn hears_user_space(&self, bytes: &[u8]) -> bool {
        let mut held = self.line.as_slice();
        bytes.split_inclusive(|byte| *byte == b'\n').any(|piece| {
            let before = std::mem::take(&mut held);
            let first = before.iter().chain(piece).find(|byte| !byte.is_ascii_whitespace() && **byte != 0);
            if first.is_some_and(|byte| *byte != b'[') {
                return true;
            }
            let mut text = [before, piece].concat();
            text.truncate(Self::LINE);
            text.trim_ascii_end().ends_with(Self::FIRST) && piece.ends_with(b"\n")
        })
    }

    /// The line with which the kernel panicked, printable. A line still open counts.
    pub fn panic(&self) -> Option<String> {
        self.panic.clone().or_else(|| last_words(&self.line)).or_else(|| last_words(&self.rest))
    }

    /// Whether the last line is still open.
    pub fn mid_line(&self) -> bool {
        self.open
    }
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watch").field("panic", &self.panic).field("open", &self.open).finish()
    }
}

/// Where the panic begins.
fn find(line: &[u8]) -> Option<usize> {
    line.windows(Watch::WORDS.len()).position(|window| window == Watch::WORDS)
}

/// The words from where the panic begins, printable.
fn last_words(line: &[u8]) -> Option<String> {
    line.get(find(line)?..).map(quote::line)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PANIC: &[u8] =
        b"[    0.5] Kernel panic - not syncing: VFS: Unable to mount root\r\n[    0.6] CPU: 0\n";
    const LINE: &str = "Kernel panic - not syncing: VFS: Unable to mount root";

    #[test]
    fn a_panic_is_heard_however_the_bytes_arrive() {
        for chunk in 1..PANIC.len() {
            let mut watch = Watch::default();
            PANIC.chunks(chunk).for_each(|bytes| watch.feed(bytes));
            assert_eq!(watch.panic().as_deref(), Some(LINE), "in chunks of {chunk}");
            assert!(!watch.mid_line());
        }
    }

    #[test]
    fn what_a_guest_prints_is_bounded_and_harmless() {
        let mut watch = Watch::default();
        watch.feed(&[b'x'; 100_000]);
        assert!(watch.line.capacity() <= 2 * Watch::LINE && watch.rest.capacity() <= 4 * Watch::LINE);
        assert_eq!(watch.panic(), None);
        watch.feed(b"\nKernel panic - not syncing: \x1b]0;owned\x07\xff\n");
        assert_eq!(watch.panic().as_deref(), Some("Kernel panic - not syncing: ]0;owned\u{fffd}"));
    }

    #[test]
    fn a_panic_ends_a_line_that_a_program_has_begun() {
        for before in [0, 200, 230, 250, 256, 257, 300, 5000] {
            for chunk in [1, 7, 256, 9000] {
                let mut watch = Watch::default();
                let line = [&vec![b'.'; before][..], PANIC, b"Kernel panic: another"].concat();
                line.chunks(chunk).for_each(|bytes| watch.feed(bytes));
                let heard = watch.panic().unwrap();
                assert!(LINE.starts_with(&heard) && heard.len() >= 26, "{before}, {chunk}: {heard}");
            }
        }
    }

    #[test]
    fn the_last_lines_are_kept_where_they_are_wanted() {
        let mut watch = Watch::default();
        watch.feed(b"before\n");
        watch.keep_tail();
        (0..10_000).for_each(|n| watch.feed(format!("line {n}\x1b\r\n").as_bytes()));
        assert_eq!(watch.last_lines(2), ["line 9998", "line 9999"]);
        assert!(watch.tail.as_ref().unwrap().len() <= Watch::TAIL);
        assert!(!watch.last_lines(usize::MAX).contains(&"before".to_owned()));
    }

    #[test]
    fn user_space_is_heard_by_what_is_not_the_kernels() {
        for (said, reached) in [
            ("", false),
            (
                "\r\n[    0.000000] Linux version 6.1\r\n[    0.1] x86/fpu: a thing\r\n[    0.2] half a li",
                false,
            ),
            ("[    0.9] Run /init as init process\r\n", true),
            ("[    0.9] Run /init as init pro", false),
            ("[    0.9] Run /init as init process with 3 arguments\r\n[    1.0] x\r\n", false),
            ("[    0.9] x\r\nlogin: ", true),
            ("\x1b[0;32m  OK", true),
            ("#", true),
        ] {
            for chunk in [1, 5, 4096] {
                let mut watch = Watch::default();
                watch.await_user_space();
                said.as_bytes().chunks(chunk).for_each(|bytes| watch.feed(bytes));
                assert_eq!(watch.user_space(), reached, "{said:?} in chunks of {chunk}");
            }
        }
        let mut watch = Watch::default();
        watch.feed(b"login: ");
        assert!(!watch.user_space(), "nobody listens");
    }
}
