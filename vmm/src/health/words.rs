//! The words by which a complaint is known: how Linux begins the line that says what is wrong.

use super::Kind;

/// What stands before a warning, and after it.
pub const CUT: &str = "------------[ cut here ]";
pub const END: &str = "---[ end trace";

/// How a line has to begin for each kind; the first that fits counts.
const BEGINNINGS: [(&str, Kind); 33] = [
    ("Kernel panic - not syncing", Kind::Panic),
    ("BUG: KASAN:", Kind::MemoryError),
    ("BUG: KFENCE:", Kind::MemoryError),
    ("BUG: KMSAN:", Kind::MemoryError),
    ("BUG: KCSAN:", Kind::DataRace),
    ("UBSAN:", Kind::UndefinedBehaviour),
    ("BUG: soft lockup", Kind::Lockup),
    ("BUG: workqueue lockup", Kind::Lockup),
    ("Watchdog detected hard LOCKUP", Kind::Lockup),
    ("BUG: unable to handle", Kind::Oops),
    ("BUG: kernel NULL pointer dereference", Kind::Oops),
    ("PANIC: double fault", Kind::Oops),
    ("Oops:", Kind::Oops),
    ("BUG: Invalid wait context", Kind::Locking),
    ("BUG: ", Kind::Bug),
    // SLUB: `BUG kmalloc-64 (Not tainted): Redzone overwritten`.
    ("BUG ", Kind::Bug),
    ("kernel BUG at ", Kind::Bug),
    ("WARNING: possible ", Kind::Locking),
    ("WARNING: suspicious RCU usage", Kind::Locking),
    ("WARNING: inconsistent lock state", Kind::Locking),
    ("WARNING: bad unlock balance", Kind::Locking),
    ("WARNING: lock held", Kind::Locking),
    ("WARNING: held lock freed", Kind::Locking),
    ("WARNING: Nested lock was not taken", Kind::Locking),
    ("INFO: possible ", Kind::Locking),
    ("INFO: trying to register non-static key", Kind::Locking),
    ("WARNING: ", Kind::Warning),
    ("Out of memory: Kill", Kind::OutOfMemory),
    ("Out of memory (oom_kill_allocating_task): Kill", Kind::OutOfMemory),
    ("Memory cgroup out of memory: Kill", Kind::OutOfMemory),
    ("Memory cgroup out of memory (oom_kill_allocating_task): Kill", Kind::OutOfMemory),
    ("kmemleak: ", Kind::Leak),
    ("INFO: task ", Kind::HungTask),
];

/// What kind of complaint a line is, if it is one.
pub fn judge(line: &str) -> Option<Kind> {
    // RCU and others put their name before what is common to all.
    let names = ["rcu: ", "NMI watchdog: ", "watchdog: ", "[ "];
    let plain = names.iter().find_map(|name| line.strip_prefix(name)).unwrap_or(line);
    // `watchdog: CPU1: Watchdog detected hard LOCKUP on cpu 1`, since 6.5.
    let plain = match plain.strip_prefix("CPU").and_then(|rest| rest.split_once(": ")) {
        Some((number, rest)) if number.parse::<u32>().is_ok() => rest,
        _ => plain,
    };
    if plain.starts_with("INFO: rcu") && plain.contains("stall") {
        return Some(Kind::RcuStall);
    }
    let found = BEGINNINGS.iter().find(|(words, _)| plain.starts_with(words)).map(|(_, kind)| *kind);
    match found {
        // `task x:1 blocked for more than 120 seconds`, `blocked in I/O wait for more than`, and whatever comes between next.
        Some(Kind::HungTask) if !(plain.contains(" blocked ") && plain.contains(" for more than ")) => None,
        Some(Kind::Leak) if !plain.contains("suspected memory leak") => None,
        Some(Kind::Warning) if plain.ends_with(" still has locks held!") => Some(Kind::Locking),
        // A program may have any name, and the kernel puts that first.
        Some(Kind::Bug | Kind::Warning) if plain.contains("]: segfault at ") => None,
        // `general protection fault: 0000 [#1]`: the kernel counts its own faults, and no program's.
        None if has_count(plain) => Some(Kind::Oops),
        found => found,
    }
}

/// Whether a line has the count of the faults of a kernel: `[#1]`.
fn has_count(line: &str) -> bool {
    line.split(" [#").skip(1).any(|rest| {
        rest.split_once(']')
            .is_some_and(|(number, _)| !number.is_empty() && number.chars().all(|c| c.is_ascii_digit()))
    })
}
