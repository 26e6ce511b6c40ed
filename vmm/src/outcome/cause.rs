//! The cause of a run's end: one word of a fixed list, for those who sort results.

use serde::{Serialize, Serializer};

use super::End;

/// Why a run is what it is. Exactly one holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// It succeeded.
    Ok,
    /// The command ended with a code of its own.
    CommandFailed,
    /// A signal ended the command.
    CommandKilled,
    /// The command could not be executed.
    NotRun,
    /// The command succeeded, and its kernel complained.
    Unhealthy,
    /// The command succeeded, and tests did not.
    TestsFailed,
    /// The guest's kernel panicked.
    Panicked,
    /// The guest ended as no guest means to.
    Crashed,
    /// The guest powered off or reset under its command.
    GuestEnded,
    /// The guest's agent broke off.
    AgentLost,
    /// The guest wrote something else than 0 to a debug-exit port.
    DebugExit,
    /// The time was up.
    Timeout,
    /// The time to user space was up.
    BootTimeout,
    /// The operator ended it.
    Quit,
    /// A signal to mayfly ended it.
    Signal,
    /// The host failed while the guest ran.
    HostError,
    /// There was no guest, or it could not be set up.
    NotStarted,
}

impl Cause {
    /// The word.
    pub fn name(self) -> &'static str {
        match self {
            Cause::Ok => "ok",
            Cause::CommandFailed => "command-failed",
            Cause::CommandKilled => "command-killed",
            Cause::NotRun => "not-run",
            Cause::Unhealthy => "unhealthy",
            Cause::TestsFailed => "tests-failed",
            Cause::Panicked => "panicked",
            Cause::Crashed => "crashed",
            Cause::GuestEnded => "guest-ended",
            Cause::AgentLost => "agent-lost",
            Cause::DebugExit => "debug-exit",
            Cause::Timeout => "timeout",
            Cause::BootTimeout => "boot-timeout",
            Cause::Quit => "quit",
            Cause::Signal => "signal",
            Cause::HostError => "host-error",
            Cause::NotStarted => "not-started",
        }
    }

    /// Whether it says nothing of what was to be tested: the run was not carried out.
    pub fn aborts(self) -> bool {
        matches!(self, Cause::NotRun | Cause::Quit | Cause::Signal | Cause::HostError | Cause::NotStarted)
    }
}

impl Serialize for Cause {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

impl End {
    /// The cause of a run that ended so, if no command has a say.
    pub fn cause(&self) -> Cause {
        match self {
            End::PoweredOff | End::Reset | End::DebugExit(0) => Cause::Ok,
            End::DebugExit(_) => Cause::DebugExit,
            End::Panicked { .. } => Cause::Panicked,
            End::Crashed { .. } => Cause::Crashed,
            End::AgentLost(_) => Cause::AgentLost,
            End::TimedOut(_) => Cause::Timeout,
            End::BootTimedOut(_) => Cause::BootTimeout,
            End::Quit => Cause::Quit,
            End::Signalled(_) => Cause::Signal,
            End::HostError(_) => Cause::HostError,
        }
    }
}
