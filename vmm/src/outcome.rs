//! The outcome of a run: how it ended, what it cost, and the exit code that says so.

mod cause;
mod papers;
mod watch;

use std::collections::BTreeMap;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use base::{Fail, Why};
use serde::ser::SerializeStruct;
use serde::{Serialize, Serializer};

use crate::hang::Hang;
use crate::hv::Kind;
use crate::plan::{Accel, Period, Plan};
use crate::session::Ended;

pub use self::cause::Cause;
pub use self::papers::{Early, json_before_start, junit_before_start};
pub use self::watch::Watch;

/// Exit codes of `mayfly run`, besides the guest's own (debug-exit) and 128 + N for signal N.
pub mod code {
    /// The guest powered off, or reset.
    pub const DONE: u8 = 0;
    /// The command line or the plan makes no sense.
    pub const USAGE: u8 = 2;
    /// The command in the guest succeeded, but tests of which it told did not.
    pub const TESTS_FAILED: u8 = 119;
    /// The guest's kernel panicked.
    pub const PANICKED: u8 = 120;
    /// The command in the guest succeeded, but the kernel did not stay healthy.
    pub const UNHEALTHY: u8 = 121;
    /// The guest ended in a way that no guest means to: a triple fault, an instruction KVM cannot run.
    pub const CRASHED: u8 = 122;
    /// The host or mayfly failed while the guest ran.
    pub const HOST: u8 = 123;
    /// The time was up.
    pub const TIMED_OUT: u8 = 124;
    /// The machine could not be started.
    pub const NOT_STARTED: u8 = 125;
    /// The operator ended it (`Ctrl-a x`): as after `Ctrl-c`, 128 + SIGINT.
    pub const QUIT: u8 = 130;

    /// A signal ended it: as a shell says it.
    pub fn signalled(signal: i32) -> u8 {
        u8::try_from(signal).unwrap_or(0x7f).saturating_add(128)
    }
}

/// The exit code of a failure before the guest's first instruction.
pub fn code_before_start(fail: &Fail) -> u8 {
    if fail.why == Why::Usage { code::USAGE } else { code::NOT_STARTED }
}

/// The moment from which a run's times count: the first call, which `main` makes.
pub fn process_start() -> Instant {
    static START: OnceLock<Instant> = OnceLock::new();
    *START.get_or_init(Instant::now)
}

/// How a run ended.
#[derive(Debug)]
pub enum End {
    /// The guest powered off.
    PoweredOff,
    /// The guest asked for a reset, and resets end the run.
    Reset,
    /// The guest wrote this to a debug-exit port.
    DebugExit(u8),
    /// The guest's kernel panicked.
    Panicked {
        /// How that is known: `pvpanic`, or the line on the console.
        evidence: String,
    },
    /// The guest ended as no guest means to.
    Crashed {
        /// What happened, and where.
        detail: String,
    },
    /// The guest's agent broke off, and the guest did not end. Why.
    AgentLost(String),
    /// The time was up.
    TimedOut(Period),
    /// The time to user space was up.
    BootTimedOut(Period),
    /// The operator ended it.
    Quit,
    /// A signal ended it.
    Signalled(i32),
    /// The host or mayfly itself failed.
    HostError(Fail),
}

impl End {
    /// A panic that the console knows of explains a reset or a crash: with `panic=-1` a Linux guest resets after
    /// its last words, without a sign that the machine could see.
    #[must_use]
    pub fn explained_by(self, console: &Watch) -> End {
        match (self, console.panic()) {
            (End::Reset | End::Crashed { .. } | End::AgentLost(_), Some(evidence)) => {
                End::Panicked { evidence }
            }
            (end, _) => end,
        }
    }

    /// Output that the host did not take counts more than what the guest did afterwards: whether mayfly hears of it
    /// before the guest's end or behind it is chance.
    #[must_use]
    pub fn overruled_by(self, loss: Option<End>) -> End {
        match (self, loss) {
            (
                End::PoweredOff
                | End::Reset
                | End::DebugExit(_)
                | End::Panicked { .. }
                | End::Crashed { .. }
                | End::AgentLost(_),
                Some(loss),
            ) => loss,
            (end, _) => end,
        }
    }

    /// Whether it helps to know where the guest stood. `Ctrl-c` and a terminal that goes away are no questions about it; what
    /// ends a job from outside (SIGTERM) may be, and `Ctrl-\` is one.
    pub fn is_worth_a_look(&self) -> bool {
        match self {
            End::TimedOut(_) | End::BootTimedOut(_) => true,
            End::Signalled(signal) => [libc::SIGTERM, libc::SIGQUIT].contains(signal),
            _ => false,
        }
    }

    /// Its name in the result object.
    pub fn name(&self) -> &'static str {
        match self {
            End::PoweredOff => "powered-off",
            End::Reset => "reset",
            End::DebugExit(_) => "debug-exit",
            End::Panicked { .. } => "panicked",
            End::Crashed { .. } => "crashed",
            End::AgentLost(_) => "agent-lost",
            End::TimedOut(_) => "timed-out",
            End::BootTimedOut(_) => "boot-timed-out",
            End::Quit => "quit",
            End::Signalled(_) => "signalled",
            End::HostError(_) => "host-error",
        }
    }

    /// The exit code of the process.
    pub fn exit_code(&self) -> u8 {
        match self {
            End::PoweredOff | End::Reset => code::DONE,
            End::DebugExit(value) => *value,
            End::Panicked { .. } => code::PANICKED,
            End::Crashed { .. } | End::AgentLost(_) => code::CRASHED,
            End::TimedOut(_) | End::BootTimedOut(_) => code::TIMED_OUT,
            End::Quit => code::QUIT,
            End::Signalled(signal) => code::signalled(*signal),
            End::HostError(_) => code::HOST,
        }
    }

    /// What the operator has to be told about it; nothing where the guest or the operator ended the run on purpose.
    pub fn complaint(&self) -> Option<Fail> {
        let because = |why, cause: String| Some(Fail::new(why, "run the guest").because(cause));
        match self {
            End::PoweredOff | End::Reset | End::DebugExit(_) | End::Quit => None,
            End::Panicked { evidence } => {
                let fail = because(Why::Host, format!("its kernel panicked ({evidence})"));
                // What Linux says when it can free nothing for its first programs (`mm/oom_kill.c`).
                let short = evidence.contains("deadlocked on memory");
                if short { fail.map(|fail| fail.hint("pass more --memory")) } else { fail }
            }
            End::Crashed { detail } => because(Why::Host, detail.clone()),
            End::AgentLost(why) => because(Why::Host, format!("its agent is lost: {why}")),
            End::TimedOut(limit) => because(Why::Host, format!("it was not over after {limit}")),
            End::BootTimedOut(limit) => {
                Some(Fail::new(Why::Host, "boot the guest").because(format!("no user space after {limit}")))
            }
            End::Signalled(signal) => because(Why::Host, format!("signal {signal} ended the run")),
            End::HostError(fail) => {
                let told = Fail::new(fail.why, fail.summary());
                Some(fail.remedy().into_iter().fold(told, |told, hint| told.hint(hint)))
            }
        }
    }
}

/// What a run came to. The machine fills it, `--json` prints it.
#[derive(Debug)]
pub struct Report {
    /// How it ended.
    pub end: End,
    /// What ran the vCPUs: [`Accel::Kvm`], [`Accel::Emulated`] or [`Accel::Unchecked`].
    pub accel: Accel,
    /// Number of vCPUs.
    pub cpus: u32,
    /// Times.
    pub times: Times,
    /// Exits to user space of all vCPUs, by kind.
    pub exits: BTreeMap<&'static str, u64>,
    /// RAM.
    pub memory: Ram,
    /// How the command ended, if the plan had one.
    pub command: Option<Ended>,
    /// The console's last line is open: what is printed next to it needs a fresh line.
    pub mid_line: bool,
    /// What the console of a command's guest said last, if the run went wrong.
    pub last_lines: Vec<String>,
    /// Where the vCPUs stood, if they had to be ended.
    pub hang: Option<Hang>,
}

/// Times of a run, from [`process_start`].
#[derive(Clone, Copy, Debug, Default)]
pub struct Times {
    /// To the guest's first instruction; `None` if it came to none.
    pub first_instruction: Option<Duration>,
    /// To the end of the guest.
    pub end: Duration,
    /// What all threads of this process have computed, if that is known: the guest's processors too.
    pub cpu: Option<Duration>,
}

/// RAM of a run, in bytes.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Ram {
    /// What the guest was given.
    pub size: u64,
    /// What of it was backed by host memory in the end.
    pub touched: u64,
}

impl Serialize for Times {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let millis = |time: Duration| (time.as_secs_f64() * 1e6).round() / 1e3;
        let mut object = serializer.serialize_struct("Times", 3)?;
        object.serialize_field("first_instruction", &self.first_instruction.map(millis))?;
        object.serialize_field("end", &millis(self.end))?;
        object.serialize_field("cpu", &self.cpu.map(millis))?;
        object.end()
    }
}

impl Report {
    /// What a run came to that ended before its guest began.
    pub fn unborn(plan: &Plan, end: End, started: Instant) -> Report {
        Report {
            end,
            accel: plan.accel.here(),
            cpus: plan.cpus,
            times: Times { end: started.elapsed(), ..Times::default() },
            exits: Kind::NAMES.iter().map(|(_, name)| (*name, 0)).collect(),
            memory: Ram { size: plan.memory.bytes(), touched: 0 },
            mid_line: false,
            last_lines: Vec::new(),
            hang: None,
            command: plan.command.clone().map(|command| Ended { command, ..Ended::default() }),
        }
    }

    /// The same run, which went on and came to another end.
    #[must_use]
    pub fn but(self, end: End, started: Instant) -> Report {
        Report { end, times: Times { end: started.elapsed(), ..self.times }, ..self }
    }

    /// The command, where its end decides: the machine ended as it was told to. That a guest says 0 at the debug port says
    /// nothing of a command, which may be one that tries all ports.
    fn decisive(&self) -> Option<&Ended> {
        self.command.as_ref().filter(|_| matches!(self.end, End::PoweredOff | End::Reset | End::DebugExit(0)))
    }

    /// Why the run is what it is.
    pub fn cause(&self) -> Cause {
        self.decisive().map_or_else(|| self.end.cause(), Ended::cause)
    }

    /// The exit code of the process.
    pub fn exit_code(&self) -> u8 {
        self.decisive().map_or_else(|| self.end.exit_code(), Ended::exit_code)
    }

    /// What the operator has to be told about it.
    pub fn complaint(&self) -> Option<Fail> {
        self.decisive().map_or_else(|| self.end.complaint(), Ended::complaint)
    }

    /// What the console said last, where that helps to understand the end: the machine's own, and not the command's.
    pub fn last_words(&self) -> &[String] {
        let unfinished = self.command.as_ref().is_some_and(|ended| ended.outcome.is_none());
        let wanted = !matches!(self.end, End::Quit | End::Signalled(_)) || self.hang.is_some();
        if unfinished && wanted { &self.last_lines } else { &[] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PANIC: &[u8] =
        b"[    0.5] Kernel panic - not syncing: VFS: Unable to mount root\r\n[    0.6] CPU: 0\n";

    #[test]
    fn every_end_has_its_code() {
        for (end, code, told) in [
            (End::PoweredOff, 0, None),
            (End::Reset, 0, None),
            (End::DebugExit(33), 33, None),
            (End::Panicked { evidence: "pvpanic".into() }, 120, Some("its kernel panicked (pvpanic)")),
            (End::Crashed { detail: "triple fault at 0x10".into() }, 122, Some("triple fault at 0x10")),
            (End::TimedOut("90s".parse().unwrap()), 124, Some("it was not over after 90s")),
            (End::BootTimedOut("2m".parse().unwrap()), 124, Some("no user space after 2m")),
            (End::Quit, 130, None),
            (End::Signalled(15), 143, Some("signal 15 ended the run")),
        ] {
            assert_eq!(end.exit_code(), code, "{end:?}");
            let complaint = end.complaint().map(|fail| fail.to_string());
            assert_eq!(
                complaint,
                told.map(|told| {
                    let doing = if matches!(end, End::BootTimedOut(_)) { "boot" } else { "run" };
                    format!("{doing} the guest: {told}")
                })
            );
        }
        let failed = End::HostError(Fail::new(Why::Host, "write disk0").hint("make room"));
        assert_eq!(failed.exit_code(), 123);
        assert_eq!(failed.complaint().unwrap().to_string(), "write disk0\n  hint: make room");
        assert_eq!(code_before_start(&Fail::new(Why::Usage, "x")), 2);
        assert_eq!(code_before_start(&Fail::new(Why::Missing, "x")), 125);
    }

    #[test]
    fn a_panic_explains_a_reset_but_not_a_poweroff() {
        let mut watch = Watch::default();
        watch.feed(&PANIC[..60]);
        assert!(watch.mid_line());
        assert_eq!(End::Reset.explained_by(&watch).exit_code(), 120);
        assert_eq!(End::PoweredOff.explained_by(&watch).exit_code(), 0);
        assert_eq!(End::Reset.explained_by(&Watch::default()).exit_code(), 0);
    }

    #[test]
    fn lost_output_counts_more_than_the_guests_own_end() {
        for end in [End::PoweredOff, End::DebugExit(3), End::Crashed { detail: "triple fault".into() }] {
            assert_eq!(end.overruled_by(Some(End::Quit)).exit_code(), 130);
        }
        assert_eq!(End::Signalled(15).overruled_by(Some(End::Quit)).exit_code(), 143);
        assert_eq!(End::DebugExit(3).overruled_by(None).exit_code(), 3);
    }

    #[test]
    fn the_result_object_has_the_same_keys_always() {
        let report = Report {
            end: End::DebugExit(3),
            accel: Accel::Kvm,
            cpus: 1,
            times: Times {
                first_instruction: Some(Duration::from_micros(1900)),
                end: Duration::from_micros(12345),
                cpu: Some(Duration::from_micros(7100)),
            },
            exits: BTreeMap::from([("io", 3)]),
            memory: Ram { size: 1 << 20, touched: 4096 },
            mid_line: false,
            last_lines: Vec::new(),
            hang: None,
            command: None,
        };
        assert_eq!(
            report.json(),
            r#"{"end":"debug-exit","exit_code":3,"command":null,"cause":"debug-exit","error":null,"hint":null,"accel":"kvm","cpus":1,"times_ms":{"first_instruction":1.9,"end":12.345,"cpu":7.1},"exits":{"io":3},"memory_bytes":{"size":1048576,"touched":4096},"hang":null}"#
        );
        // Who asks is told what it was, not that it was left open.
        let unborn = Report::unborn(&Plan::default(), End::Signalled(15), Instant::now());
        assert!(unborn.json().contains(r#""accel":"kvm""#), "{}", unborn.json());
        let early = json_before_start(&Fail::new(Why::Missing, "open k").hint("look"));
        let keys = |text: &str| {
            let object: serde_json::Map<_, _> = serde_json::from_str(text).unwrap();
            object.keys().cloned().collect::<Vec<_>>()
        };
        assert_eq!(keys(&early), keys(&report.json()));
    }
}
