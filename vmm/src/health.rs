//! The health of a guest's kernel, by what it says of itself: each kind of complaint is recognised by the words with which
//! Linux begins it.
//!
//! The agent passes on what the kernel says and leaves out what programs write into its log, so nothing that user space
//! prints is taken for a complaint.

use agent::wire::Message;
use serde::Serialize;

use crate::quote;

/// Complaints that are kept; those beyond them are counted.
const KEPT: usize = 32;
/// Lines after the first complaint that are kept to be shown: its trace.
const EXCERPT: usize = 40;

/// A kind of complaint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// An oops: a fault in the kernel's own code.
    Oops,
    /// `BUG:` and `BUG_ON`.
    Bug,
    /// `WARN_ON`.
    Warning,
    /// A memory error that KASAN, KFENCE or KMSAN found.
    MemoryError,
    /// Undefined behaviour (UBSAN).
    UndefinedBehaviour,
    /// A data race (KCSAN).
    DataRace,
    /// What lockdep or RCU's checks complain of.
    Locking,
    /// A stall of RCU.
    RcuStall,
    /// A task that waits for too long.
    HungTask,
    /// A processor that does nothing else any more.
    Lockup,
    /// A process killed for lack of memory.
    OutOfMemory,
    /// Memory that nobody refers to (kmemleak).
    Leak,
    /// The end.
    Panic,
}

/// How a line has to begin, or what has to be in it, for each kind; the first that fits counts.
const BEGINNINGS: [(&str, Kind); 29] = [
    ("Kernel panic - not syncing", Kind::Panic),
    ("BUG: KASAN:", Kind::MemoryError),
    ("BUG: KFENCE:", Kind::MemoryError),
    ("BUG: KMSAN:", Kind::MemoryError),
    ("BUG: KCSAN:", Kind::DataRace),
    ("UBSAN:", Kind::UndefinedBehaviour),
    ("watchdog: BUG: soft lockup", Kind::Lockup),
    ("BUG: soft lockup", Kind::Lockup),
    ("NMI watchdog: Watchdog detected hard LOCKUP", Kind::Lockup),
    ("watchdog: Watchdog detected hard LOCKUP", Kind::Lockup),
    ("Watchdog detected hard LOCKUP", Kind::Lockup),
    ("BUG: unable to handle", Kind::Oops),
    ("BUG: kernel NULL pointer dereference", Kind::Oops),
    ("Oops:", Kind::Oops),
    ("BUG: ", Kind::Bug),
    // SLUB: `BUG kmalloc-64 (Not tainted): Redzone overwritten`.
    ("BUG ", Kind::Bug),
    ("kernel BUG at ", Kind::Bug),
    ("WARNING: possible ", Kind::Locking),
    ("WARNING: suspicious RCU usage", Kind::Locking),
    ("WARNING: inconsistent lock state", Kind::Locking),
    ("WARNING: bad unlock balance", Kind::Locking),
    ("WARNING: lock held", Kind::Locking),
    ("WARNING: Nested lock was not taken", Kind::Locking),
    ("INFO: possible ", Kind::Locking),
    ("WARNING: ", Kind::Warning),
    ("Out of memory: Killed process", Kind::OutOfMemory),
    ("Memory cgroup out of memory: Killed process", Kind::OutOfMemory),
    ("kmemleak: ", Kind::Leak),
    ("INFO: task ", Kind::HungTask),
];

/// A complaint of the kernel's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Its kind.
    pub kind: Kind,
    /// Its first line, printable.
    pub text: String,
    /// When, in milliseconds from the kernel's start.
    pub time_ms: u64,
}

impl Finding {
    /// When, in seconds, as kernels print it.
    pub fn seconds(&self) -> f64 {
        std::time::Duration::from_millis(self.time_ms).as_secs_f64()
    }
}

/// What is known of a kernel's health.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Health {
    /// The complaints, the first ones first.
    pub findings: Vec<Finding>,
    /// Those that are not among them.
    pub more: u64,
    /// Text in complaints that are expected.
    #[serde(skip)]
    allowed: Vec<String>,
    /// The first complaint and what followed.
    #[serde(skip)]
    excerpt: Vec<String>,
}

impl Health {
    /// Nothing is known yet; complaints with one of the texts `allowed` in them are none.
    pub fn new(allowed: Vec<String>) -> Health {
        Health { allowed, ..Health::default() }
    }

    /// Hears a line.
    pub fn hear(&mut self, message: &Message) {
        let text = quote::line(&message.text);
        if !self.excerpt.is_empty() && self.excerpt.len() < EXCERPT {
            self.excerpt.push(text.clone());
        }
        let Some(kind) = judge(&text) else { return };
        if self.allowed.iter().any(|allowed| text.contains(allowed.as_str())) {
            return;
        }
        if self.excerpt.is_empty() {
            self.excerpt.push(text.clone());
        }
        if self.findings.len() < KEPT {
            self.findings.push(Finding { kind, text, time_ms: message.time / 1000 });
        } else {
            self.more = self.more.saturating_add(1);
        }
    }

    /// Whether the kernel has complained of nothing.
    pub fn is_good(&self) -> bool {
        self.findings.is_empty()
    }

    /// The first complaint, how many more there are, and what the kernel said next, each on a line of its own; for the end
    /// of a message.
    pub fn summary(&self) -> Option<String> {
        let first = self.findings.first()?;
        let others = u64::try_from(self.findings.len())
            .unwrap_or(u64::MAX)
            .saturating_sub(1)
            .saturating_add(self.more);
        let more = if others > 0 { format!(" (and {others} more)") } else { String::new() };
        let trace = quote::below(self.excerpt.get(1..).unwrap_or_default());
        Some(format!("{}{more}{trace}", first.text))
    }
}

/// What kind of complaint a line is, if it is one.
fn judge(line: &str) -> Option<Kind> {
    // RCU and others put their name before what is common to all.
    let plain = line.strip_prefix("rcu: ").unwrap_or(line);
    if plain.starts_with("INFO: rcu") && plain.contains("stall") {
        return Some(Kind::RcuStall);
    }
    let found = BEGINNINGS.iter().find(|(words, _)| plain.starts_with(words)).map(|(_, kind)| *kind);
    match found {
        Some(Kind::HungTask) if !plain.contains(" blocked for more than ") => None,
        Some(Kind::Leak) if !plain.contains("suspected memory leak") => None,
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

#[cfg(test)]
mod tests {
    use super::*;

    fn health(lines: &[&str], allowed: &[&str]) -> Health {
        let mut health = Health::new(allowed.iter().map(|text| (*text).to_owned()).collect());
        for line in lines {
            health.hear(&Message { level: 4, time: 1_500_000, text: line.as_bytes().to_vec() });
        }
        health
    }

    /// Lines as kernels have printed them.
    #[test]
    fn each_kind_of_complaint_is_recognised() {
        for (line, kind) in [
            ("Kernel panic - not syncing: sysrq triggered crash", Kind::Panic),
            ("BUG: kernel NULL pointer dereference, address: 0000000000000000", Kind::Oops),
            ("BUG: unable to handle page fault for address: ffffc90000e3bd60", Kind::Oops),
            ("Oops: 0002 [#1] PREEMPT SMP NOPTI", Kind::Oops),
            (
                "Oops: general protection fault, probably for non-canonical address 0x1: 0000 [#1] SMP",
                Kind::Oops,
            ),
            (
                "general protection fault, probably for non-canonical address 0xdead000000000108: 0000 [#1] SMP",
                Kind::Oops,
            ),
            ("invalid opcode: 0000 [#1] PREEMPT SMP NOPTI", Kind::Oops),
            ("divide error: 0000 [#2] SMP PTI", Kind::Oops),
            ("kernel BUG at mm/slub.c:4023!", Kind::Bug),
            ("BUG: Bad page state in process cc1  pfn:1a2b3", Kind::Bug),
            ("BUG: sleeping function called from invalid context at kernel/locking/mutex.c:580", Kind::Bug),
            ("BUG: scheduling while atomic: swapper/0/1/0x00000002", Kind::Bug),
            ("BUG kmalloc-64 (Not tainted): Right Redzone overwritten", Kind::Bug),
            ("BUG: KASAN: slab-out-of-bounds in kmalloc_oob_right+0x6d/0x93 [test_kasan]", Kind::MemoryError),
            ("BUG: KFENCE: use-after-free read in test_use_after_free_read+0xb3/0x143", Kind::MemoryError),
            ("BUG: KMSAN: uninit-value in test_uninit_kmsan_check_memory+0x1be/0x380", Kind::MemoryError),
            ("BUG: KCSAN: data-race in test_kernel_read / test_kernel_write", Kind::DataRace),
            ("UBSAN: shift-out-of-bounds in lib/test_ubsan.c:88:20", Kind::UndefinedBehaviour),
            ("WARNING: CPU: 1 PID: 412 at net/core/dev.c:6423 __napi_poll+0x1a/0x1b0", Kind::Warning),
            ("WARNING: kernel/sched/core.c:1234 at schedule+0x1/0x2, CPU#0: kworker/0:1/12", Kind::Warning),
            ("WARNING: possible circular locking dependency detected", Kind::Locking),
            ("WARNING: possible recursive locking detected", Kind::Locking),
            ("WARNING: suspicious RCU usage", Kind::Locking),
            ("WARNING: inconsistent lock state", Kind::Locking),
            ("WARNING: bad unlock balance detected!", Kind::Locking),
            ("INFO: possible circular locking dependency detected", Kind::Locking),
            ("rcu: INFO: rcu_preempt self-detected stall on CPU", Kind::RcuStall),
            ("rcu: INFO: rcu_sched detected stalls on CPUs/tasks:", Kind::RcuStall),
            ("rcu: INFO: rcu_preempt detected expedited stalls on CPUs/tasks: { 1-... }", Kind::RcuStall),
            ("INFO: task sh:143 blocked for more than 120 seconds.", Kind::HungTask),
            ("watchdog: BUG: soft lockup - CPU#1 stuck for 26s! [insmod:151]", Kind::Lockup),
            ("NMI watchdog: Watchdog detected hard LOCKUP on cpu 3", Kind::Lockup),
            ("watchdog: Watchdog detected hard LOCKUP on cpu 3", Kind::Lockup),
            (
                "Out of memory: Killed process 312 (hog) total-vm:2104572kB, anon-rss:412304kB",
                Kind::OutOfMemory,
            ),
            ("Memory cgroup out of memory: Killed process 99 (hog) total-vm:1kB", Kind::OutOfMemory),
            ("kmemleak: 3 new suspected memory leaks (see /sys/kernel/debug/kmemleak)", Kind::Leak),
        ] {
            let heard = health(&[line], &[]);
            assert_eq!(
                heard.findings.iter().map(|finding| finding.kind).collect::<Vec<_>>(),
                [kind],
                "{line}"
            );
        }
    }

    #[test]
    fn what_is_no_complaint_is_taken_for_none() {
        for line in [
            "traps: sh[123] general protection fault ip:401000 sp:7ffe error:0 in sh[401000+1000]",
            "sh[12]: segfault at 0 ip 0000000000401136 sp 00007ffc error 4 in sh[401000+1000]",
            "RAS: Correctable Errors collector initialized.",
            "rcu: Hierarchical RCU implementation.",
            "kmemleak: Kernel memory leak detector initialized (mem pool available: 15748)",
            "INFO: task scheduler says hello",
            "Spectre V2 : WARNING: Unprivileged eBPF is enabled with eIBRS on",
            "systemd[1]: Started BUG: tracker.",
            "a list [#abc] of things",
            "------------[ cut here ]------------",
        ] {
            assert!(health(&[line], &[]).is_good(), "{line}");
        }
    }

    #[test]
    fn expected_complaints_are_left_out_and_many_are_counted() {
        let line = "WARNING: CPU: 0 PID: 0 at arch/x86/kernel/fpu/xstate.c:878 x";
        assert!(health(&[line, line], &["fpu/xstate.c"]).is_good());
        let many = health(&vec![line; 100], &["other"]);
        assert_eq!((many.findings.len(), many.more), (KEPT, 100 - KEPT as u64));
        let text = health(&["fine", line, "Call Trace:", " a+1/2\u{1b}[0m"], &[]).summary().unwrap();
        assert_eq!(text, format!("{line}\n  | Call Trace:\n  |  a+1/2[0m"));
        assert!(health(&[line, line], &[]).summary().unwrap().starts_with(&format!("{line} (and 1 more)\n")));
    }
}
