//! The operator's terminal: raw while a guest has it, and as it was before in every case but `kill -9`.
//!
//! [`restore`] works at any moment and any number of times; it is called when [`Raw`] goes out of scope, by every
//! panic, and by every signal that ends the process. Output processing stays on, so that a line feed of ours still returns the
//! carriage, but for [`enter_both_ways`].

use std::io::{self, IsTerminal};
use std::os::fd::AsFd;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use agent::wire::Size;
use base::sys::death;
use base::{Doing, Result, Why};
use rustix::process::getpgrp;
use rustix::stdio::stdin;
use rustix::termios::{OptionalActions, OutputModes, Termios, tcgetattr, tcgetpgrp, tcgetwinsize, tcsetattr};

/// The modes before the first [`enter`].
static BEFORE: OnceLock<Termios> = OnceLock::new();
/// Whether the terminal is raw now.
static RAW: AtomicBool = AtomicBool::new(false);

/// The terminal is raw as long as this lives.
#[derive(Debug)]
pub struct Raw(());

impl Drop for Raw {
    fn drop(&mut self) {
        restore();
    }
}

/// Sets the terminal at standard input to raw mode. `None`: another job of the shell has the terminal, and the
/// host would stop this process for touching it.
///
/// # Errors
/// Standard input is no terminal, or the host refuses.
pub fn enter() -> io::Result<Option<Raw>> {
    let before = tcgetattr(stdin())?;
    if !in_foreground(stdin()) {
        return Ok(None);
    }
    if BEFORE.set(before.clone()).is_ok() {
        restore_on_panic();
        death::prepare(restore);
    }
    RAW.store(true, Ordering::SeqCst);
    let raw = Raw(());
    tcsetattr(stdin(), OptionalActions::Now, &raw_modes(before))?;
    Ok(Some(raw))
}

/// Makes the terminal raw in both directions, for a command with a terminal of its own, which does its part for output, too.
/// `None` if standard input is no terminal, or none of ours now.
///
/// # Errors
/// The host refuses.
pub fn enter_both_ways() -> Result<Option<Raw>> {
    if !stdin().is_terminal() {
        return Ok(None);
    }
    let switching = || "switch the terminal to raw mode";
    let raw = enter().doing(Why::Host, switching)?;
    if raw.is_some() {
        let mut modes = tcgetattr(stdin()).doing(Why::Host, switching)?;
        modes.output_modes.remove(OutputModes::OPOST);
        tcsetattr(stdin(), OptionalActions::Now, &modes).doing(Why::Host, switching)?;
    }
    Ok(raw)
}

/// The size of the terminal at standard output; the usual one where there is none.
pub fn size() -> Size {
    match tcgetwinsize(io::stdout()) {
        Ok(size) if size.ws_row > 0 && size.ws_col > 0 => Size { rows: size.ws_row, columns: size.ws_col },
        _ => Size { rows: 24, columns: 80 },
    }
}

/// Puts the terminal back as it was, if it is raw. Takes no lock and no memory: a signal handler may call it.
pub fn restore() {
    if let Some(before) = BEFORE.get()
        && RAW.swap(false, Ordering::SeqCst)
        && in_foreground(stdin())
    {
        // A terminal that has gone needs no care.
        let _ = tcsetattr(stdin(), OptionalActions::Now, before);
    }
}

/// Whether this process may change the terminal: it belongs to the job in the foreground, or the terminal does not
/// control it at all.
fn in_foreground(terminal: impl AsFd) -> bool {
    tcgetpgrp(terminal).map_or(true, |group| group == getpgrp())
}

/// Every key goes to the guest at once and unchanged; lines of output still return the carriage.
fn raw_modes(mut modes: Termios) -> Termios {
    let output = modes.output_modes & OutputModes::all();
    modes.make_raw();
    modes.output_modes = output;
    modes
}

/// A panic aborts the process in a release, so nothing goes out of scope then.
fn restore_on_panic() {
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        restore();
        before(panic);
    }));
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};
    use rustix::termios::{ControlModes, InputModes, LocalModes, SpecialCodeIndex};

    #[test]
    fn raw_keys_are_nobodys_business_and_output_keeps_its_carriage_returns() {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = openpt(flags).unwrap();
        unlockpt(&master).unwrap();
        let terminal = ioctl_tiocgptpeer(&master, flags).unwrap();
        let before = tcgetattr(&terminal).unwrap();
        assert!(before.output_modes.contains(OutputModes::OPOST | OutputModes::ONLCR), "a usual terminal");
        tcsetattr(&terminal, OptionalActions::Now, &raw_modes(before.clone())).unwrap();

        let raw = tcgetattr(&terminal).unwrap();
        assert!(
            !raw.local_modes
                .intersects(LocalModes::ECHO | LocalModes::ICANON | LocalModes::ISIG | LocalModes::IEXTEN)
        );
        assert!(!raw.input_modes.intersects(InputModes::ICRNL | InputModes::IXON));
        assert_eq!(raw.output_modes, before.output_modes);
        assert!(raw.control_modes.contains(ControlModes::CS8));
        assert_eq!(raw.special_codes[SpecialCodeIndex::VMIN], 1);

        rustix::io::write(&master, b"\x03\x01\r").unwrap();
        let mut keys = [0; 8];
        assert_eq!(rustix::io::read(&terminal, &mut keys).unwrap(), 3);
        assert_eq!(keys[..3], *b"\x03\x01\r");
        rustix::io::write(&terminal, b"a\n").unwrap();
        assert_eq!(rustix::io::read(&master, &mut keys).unwrap(), 3, "and no echo before it");
        assert_eq!(keys[..3], *b"a\r\n");
    }

    #[test]
    fn restoring_what_was_never_raw_is_nothing() {
        restore();
        restore();
        assert!(!RAW.load(Ordering::SeqCst));
    }
}
