//! The operator's terminal: keys that are for mayfly, keys that are for the guest, and settings as before at every end.

use super::kernel;
use crate::harness::Case;

pub fn cases() -> Vec<Case> {
    let mut cases = vec![
        terminal("echo", "ctrl_a_x_ends_the_run", r"expect=ready 'send=\x01x'", 130, ""),
        terminal(
            "again --on-reset restart",
            "ctrl_a_x_ends_a_later_life",
            r"expect=alive expect=alive expect=alive 'send=\x01x'",
            130,
            "",
        ),
        terminal("echo", "ctrl_a_help", r"expect=ready 'send=\x01?' expect=x 'send=q'", 7, ""),
        terminal("echo", "ctrl_a_a_is_ctrl_a", r"expect=ready 'send=\x01aq'", 7, "\u{1}q"),
        terminal("echo", "ctrl_c_is_for_the_guest", r"expect=ready 'send=\x03q'", 7, "\u{3}q"),
    ];
    cases.extend(SIGNALS.map(|(name, code)| {
        let steps = format!("expect=ready signal={name}");
        terminal("echo", &format!("sig{}_restores_the_terminal", name.to_lowercase()), &steps, code, "")
    }));
    cases
}

/// Signals, and how a run ends that gets one. No core file is wanted here.
const SIGNALS: [(&str, i32); 12] = [
    ("TERM", 128 + 15),
    ("HUP", 128 + 1),
    ("ABRT", 128 + 6),
    ("SEGV", 128 + 11),
    ("BUS", 128 + 7),
    ("ILL", 128 + 4),
    ("FPE", 128 + 8),
    ("XCPU", 128 + 24),
    ("USR1", 128 + 10),
    ("USR2", 128 + 12),
    ("ALRM", 128 + 14),
    ("SYS", 128 + 31),
];

/// A case on a terminal, of the guest `run` with its arguments; the terminal's settings must be as before afterwards.
fn terminal(run: &'static str, case: &str, steps: &str, code: i32, said: &'static str) -> Case {
    let steps = steps.to_owned();
    Case::new(format!("bare::{case}"), move |room| {
        let (name, more) = run.split_once(' ').unwrap_or((run, ""));
        let (kernel, options) = (kernel(room, name)?, room.ground.options());
        let terminal = std::env::current_exe()
            .ok()
            .and_then(|me| Some(me.parent()?.parent()?.join("terminal")))
            .filter(|path| path.exists())
            .ok_or("find the program `terminal` beside the tests: cargo build -p tests")?;
        let command = format!(
            "ulimit -c 0; {} {steps} -- {} run {options} --kernel {kernel} {more}",
            terminal.display(),
            room.mayfly.display()
        );
        room.shell(&command)?.code(code)?.mentions(said)?;
        Ok(())
    })
}
