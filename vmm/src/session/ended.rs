//! How a session ended, and what that makes of the run.

use std::io::{self, ErrorKind};

use agent::wire::Outcome;
use base::{Fail, Why};

use crate::health::Health;
use crate::ktap::Tests;
use crate::outcome::{Cause, code};
use crate::plan::{Command, Ktap};

/// Names of failed tests in a message.
const TOLD: usize = 5;
/// Why a guest may not call.
const NEEDS: &str =
    "its kernel needs CONFIG_VIRTIO_VSOCKETS for that, and CONFIG_VIRTIO_MMIO or CONFIG_VIRTIO_PCI";
/// Signals that end a program without a word of its own. The others are sent by somebody who knows.
const DEADLY: [(i32, &str); 10] = [
    (libc::SIGILL, "SIGILL"),
    (libc::SIGTRAP, "SIGTRAP"),
    (libc::SIGABRT, "SIGABRT"),
    (libc::SIGBUS, "SIGBUS"),
    (libc::SIGFPE, "SIGFPE"),
    (libc::SIGKILL, "SIGKILL"),
    (libc::SIGSEGV, "SIGSEGV"),
    (libc::SIGXCPU, "SIGXCPU"),
    (libc::SIGXFSZ, "SIGXFSZ"),
    (libc::SIGSYS, "SIGSYS"),
];

/// How a session ended.
#[derive(Debug, Default)]
pub struct Ended {
    /// What was to run.
    pub command: Command,
    /// The guest's agent has called, so there was a guest that could have run it.
    pub called: bool,
    /// How the command did; `None` if the machine ended before it.
    pub outcome: Option<Outcome>,
    /// Why there was no command: the guest could not be set up for it.
    pub trouble: Option<String>,
    /// Why this host could not have the guest run it.
    pub unable: Option<io::Error>,
    /// Why some of its output could not be written.
    pub lost: Option<io::Error>,
    /// Why what the guest has changed could not be kept.
    pub unexported: Option<Fail>,
    /// Why the agent was cut off before the end of the command, or was gone.
    pub broken: Option<String>,
    /// What the guest's kernel said of itself.
    pub health: Health,
    /// Tests that the command told of on its standard output.
    pub tests: Tests,
    /// Tests that the kernel told of in its log (KUnit).
    pub kernel_tests: Tests,
}

impl Ended {
    /// Why a run whose machine ended as it was told to is what it is.
    pub fn cause(&self) -> Cause {
        match (self.outcome, &self.trouble) {
            (Some(Outcome::Code(code::DONE)), _) if self.lost_output().is_some() => Cause::HostError,
            (Some(Outcome::Code(code::DONE)), _) if self.unexported.is_some() => Cause::HostError,
            (Some(Outcome::Code(code::DONE)), _) if !self.health.is_good() => Cause::Unhealthy,
            (Some(Outcome::Code(code::DONE)), _) if self.fails_by_tests() => Cause::TestsFailed,
            (Some(Outcome::Code(code::DONE)), _) => Cause::Ok,
            (Some(Outcome::Code(_)), _) => Cause::CommandFailed,
            (Some(Outcome::Signal(_)), _) => Cause::CommandKilled,
            (Some(_), _) => Cause::NotRun,
            (None, Some(_)) => Cause::NotStarted,
            (None, None) if self.unable.is_some() => Cause::HostError,
            (None, None) if !self.called => Cause::NotStarted,
            (None, None) => Cause::GuestEnded,
        }
    }

    /// Whether the guest has nothing more to do.
    pub fn is_over(&self) -> bool {
        self.outcome.is_some() || self.trouble.is_some() || self.unable.is_some()
    }

    /// The exit code of such a run.
    pub fn exit_code(&self) -> u8 {
        match (self.cause(), self.outcome) {
            (Cause::HostError, _) => code::HOST,
            (Cause::Unhealthy, _) => code::UNHEALTHY,
            (Cause::TestsFailed, _) => code::TESTS_FAILED,
            (Cause::NotStarted, _) => code::NOT_STARTED,
            (_, Some(outcome)) => outcome.code(),
            (_, None) => code::CRASHED,
        }
    }

    /// Why some of the output could not be written, where that is no reader who has had enough.
    fn lost_output(&self) -> Option<&io::Error> {
        self.lost.as_ref().filter(|cause| cause.kind() != ErrorKind::BrokenPipe)
    }

    /// Whether tests that failed count.
    fn fails_by_tests(&self) -> bool {
        let failed = self.tests.failed.saturating_add(self.kernel_tests.failed);
        failed > 0 && self.command.ktap == Ktap::Strict
    }

    /// What has to be told of it, for a machine that ended as it was told to.
    pub fn complaint(&self) -> Option<Fail> {
        let about = |doing: &str| Fail::new(Why::Host, doing);
        match self.cause() {
            Cause::NotStarted => {
                let fail = about("set up the guest");
                Some(match &self.trouble {
                    Some(trouble) => fail.because(trouble.clone()),
                    None => fail.because("it ended before its agent called").hint(NEEDS),
                })
            }
            Cause::GuestEnded => {
                // That it is gone goes without saying; other reasons do not.
                let why = self.broken.as_ref().filter(|why| !why.contains("the guest is gone"));
                let why = why.map_or(String::new(), |why| format!(" ({why})"));
                Some(about("run the guest").because(format!("it ended before its command did{why}")))
            }
            _ => self
                .unable
                .as_ref()
                .map(|cause| about("start the command in the guest").because(cause.to_string()))
                .or_else(|| {
                    let cause = self.lost_output()?;
                    Some(about("write the output of the command").because(cause.to_string()))
                })
                .or_else(|| self.unexported.as_ref().map(again))
                .or_else(|| self.refusal())
                .or_else(|| self.death())
                .or_else(|| {
                    let fail = about("judge the guest's kernel").because(self.health.summary()?);
                    Some(fail.hint("pass --allow TEXT if that is expected"))
                })
                .or_else(|| self.failures()),
        }
    }

    /// What has to be told of a command that a signal ended, for which it has no words itself.
    fn death(&self) -> Option<Fail> {
        let Some(Outcome::Signal(number)) = self.outcome else { return None };
        let (_, signal) = DEADLY.iter().find(|(deadly, _)| *deadly == i32::from(number))?;
        let name = self.command.argv.first().map_or("", String::as_str);
        let also = self.health.summary().map_or(String::new(), |said| format!("; its kernel said {said}"));
        Some(
            Fail::new(Why::Host, format!("run {name} in the guest"))
                .because(format!("signal {number} ({signal}) ended it{also}")),
        )
    }

    /// What has to be told of tests that failed.
    fn failures(&self) -> Option<Fail> {
        if self.cause() != Cause::TestsFailed {
            return None;
        }
        let failed = self.tests.failed.saturating_add(self.kernel_tests.failed);
        let count = self.tests.count().saturating_add(self.kernel_tests.count());
        let some: Vec<_> = self.tests.failures().chain(self.kernel_tests.failures()).take(TOLD).collect();
        let more = if u64::try_from(some.len()).is_ok_and(|told| told < failed) { ", ..." } else { "" };
        Some(
            Fail::new(Why::Host, "judge the tests")
                .because(format!("{failed} of {count} failed: {}{more}", some.join(", ")))
                .hint("the command itself ended with 0; pass --ktap report to have that alone count"),
        )
    }

    /// What has to be told of a command that never ran.
    fn refusal(&self) -> Option<Fail> {
        let Command { argv, workdir, user, .. } = &self.command;
        let name = argv.first().map_or("", String::as_str);
        let os = io::Error::from_raw_os_error;
        let fail = |doing: String| Fail::new(Why::Missing, doing);
        match self.outcome? {
            Outcome::Code(_) | Outcome::Signal(_) => None,
            Outcome::NoProgram(errno) => Some(fail(format!("run {name} in the guest")).because(os(errno))),
            Outcome::NoDirectory(errno) => {
                let doing = format!("start {name} in {} of the guest", workdir.display());
                Some(fail(doing).because(os(errno)))
            }
            Outcome::NoUser => {
                Some(fail(format!("run {name} as {user}")).because("the guest has no such user or group"))
            }
        }
    }

    /// Its name in the result object.
    pub fn name(&self) -> &'static str {
        match self.outcome {
            Some(Outcome::Code(_)) => "exited",
            Some(Outcome::Signal(_)) => "signalled",
            Some(_) => "not-run",
            None if self.trouble.is_some() || !self.called => "not-started",
            None => "unfinished",
        }
    }
}

/// The same once more, to be told.
fn again(fail: &Fail) -> Fail {
    let told = Fail::new(fail.why, fail.summary());
    fail.remedy().into_iter().fold(told, |told, hint| told.hint(hint))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ktap::Listener;
    use agent::wire::Message;

    fn ended(outcome: Outcome, ktap: Ktap, said: &str, kernel: &[&str]) -> Ended {
        let mut listener = Listener::default();
        listener.feed(said.as_bytes());
        let mut health = Health::default();
        kernel
            .iter()
            .for_each(|line| health.hear(&Message { text: line.as_bytes().to_vec(), ..Message::default() }));
        let command = Command { argv: vec!["x".into()], ktap, ..Command::default() };
        Ended {
            command,
            called: true,
            outcome: Some(outcome),
            health,
            tests: listener.tests(),
            ..Ended::default()
        }
    }

    const FAILING: &str = "TAP version 13\n1..3\nok 1 a\nnot ok 2 b\nnot ok 3 c\n";
    const BUG: &[&str] = &["BUG: x"];

    #[test]
    fn each_end_has_one_cause() {
        let done = Outcome::Code(0);
        for (ended, cause, code, told) in [
            (ended(done, Ktap::Strict, "", &[]), Cause::Ok, 0, None),
            (ended(done, Ktap::Report, FAILING, &[]), Cause::Ok, 0, None),
            (
                ended(done, Ktap::Strict, FAILING, &[]),
                Cause::TestsFailed,
                119,
                Some(
                    "judge the tests: 2 of 3 failed: b, c\n  hint: the command itself ended with 0; pass --ktap report to have that alone count",
                ),
            ),
            (
                ended(done, Ktap::Strict, FAILING, BUG),
                Cause::Unhealthy,
                121,
                Some("judge the guest's kernel: BUG: x\n  hint: pass --allow TEXT if that is expected"),
            ),
            (ended(Outcome::Code(3), Ktap::Strict, FAILING, &[]), Cause::CommandFailed, 3, None),
            (
                ended(Outcome::Code(3), Ktap::Strict, "", BUG),
                Cause::CommandFailed,
                3,
                Some("judge the guest's kernel: BUG: x\n  hint: pass --allow TEXT if that is expected"),
            ),
            (ended(Outcome::Signal(15), Ktap::Strict, "", &[]), Cause::CommandKilled, 143, None),
            (
                ended(Outcome::Signal(9), Ktap::Strict, "", &["Out of memory: Killed process 7 (x)"]),
                Cause::CommandKilled,
                137,
                Some(
                    "run x in the guest: signal 9 (SIGKILL) ended it; its kernel said Out of memory: Killed process 7 (x)",
                ),
            ),
            (
                ended(Outcome::NoProgram(2), Ktap::Strict, "", &[]),
                Cause::NotRun,
                127,
                Some("run x in the guest: No such file or directory"),
            ),
            (
                Ended { outcome: None, ..ended(done, Ktap::Strict, "", &[]) },
                Cause::GuestEnded,
                122,
                Some("run the guest: it ended before its command did"),
            ),
            (
                Ended {
                    lost: Some(io::Error::from_raw_os_error(libc::ENOSPC)),
                    ..ended(done, Ktap::Strict, "", BUG)
                },
                Cause::HostError,
                123,
                Some("write the output of the command: No space left on device"),
            ),
            (
                Ended {
                    lost: Some(io::Error::from_raw_os_error(libc::EPIPE)),
                    ..ended(done, Ktap::Strict, "", &[])
                },
                Cause::Ok,
                0,
                None,
            ),
        ] {
            assert_eq!((ended.cause(), ended.exit_code()), (cause, code), "{ended:?}");
            assert_eq!(ended.complaint().map(|fail| fail.to_string()).as_deref(), told, "{ended:?}");
        }
    }

    #[test]
    fn a_host_that_cannot_have_it_run_is_no_guest_that_ended() {
        let unable = Some(io::Error::from_raw_os_error(libc::EMFILE));
        let ended = Ended { called: true, unable, ..Ended::default() };
        assert_eq!((ended.cause(), ended.exit_code()), (Cause::HostError, 123));
        let told = ended.complaint().unwrap().to_string();
        assert_eq!(told, "start the command in the guest: Too many open files");
    }

    #[test]
    fn many_failures_are_not_all_told() {
        let mut said = String::from("TAP version 13\n");
        (0..100).for_each(|n| said.push_str(&format!("not ok {n} t{n}\n")));
        let told = ended(Outcome::Code(0), Ktap::Strict, &said, &[]).complaint().unwrap().summary();
        assert_eq!(told, "judge the tests: 100 of 100 failed: t0, t1, t2, t3, t4, ...");
    }
}
