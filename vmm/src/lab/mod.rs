//! The emulated host: this machine's files and environment, with a KVM that can run Linux.
//!
//! QEMU emulates a computer with AMD-V, instruction by instruction. It boots a stock kernel, whose root is this
//! machine's own file system shared over 9p, so a command finds everything where it is here, and a real `/dev/kvm`
//! besides. The guest agent is process 1 there; commands and their streams go over its wire ([`agent`]), which is a
//! virtio console port. Nothing is written on this side but the cache: wire and console are socket pairs, the initial
//! RAM disk is in memory, and QEMU dies with the thread that started it.
//!
//! What differs: `/dev`, `/proc`, `/sys` and `/run` are the emulated host's own, everybody is root there, with the
//! rights that we have here, and there is no network but the loopback. FIFOs, sockets and device nodes cannot be made
//! in shared directories (QEMU before 10 refuses them over 9p); `/run` and `/dev/shm` are the places for those.

mod kernel;
mod qemu;
mod run;

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::time::Duration;

use agent::client::{Client, Process, Streams};
use agent::wire::{Exec, Outcome, Size as TerminalSize};
use base::{Doing, Fail, Result, Why};

use self::qemu::Qemu;
pub use self::run::{Ended, run};
use crate::plan::Size;
use crate::quote;

/// Longest wait for an emulated host to come up: it takes about two seconds on an idle machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// What an emulated host needs and this machine lacks: program, firmware, a kernel. Each failure has its remedy.
pub fn lacks() -> Vec<Fail> {
    let firmware = qemu::missing_firmware().and_then(|missing| match missing.as_slice() {
        [] => Ok(()),
        files => Err(Fail::new(Why::Missing, format!("find QEMU's {}", files.join(", ")))
            .hint(format!("apt-get install {}", qemu::PACKAGES))),
    });
    [firmware, kernel::check_source()].into_iter().filter_map(Result::err).collect()
}

/// Whether this process runs on an emulated host.
pub fn is_here() -> bool {
    std::fs::read_to_string("/proc/cmdline").is_ok_and(|line| line.contains("mayfly.mode=host"))
}

/// Looks whether an emulated host could be started, as far as that takes no time.
///
/// # Errors
/// QEMU is missing, or there is no place for the kernel.
pub fn check() -> Result<()> {
    qemu::find()?;
    kernel::check_cache().map(drop)
}

/// The directory of the cache, in which the kernel of the emulated host is or can be kept.
///
/// # Errors
/// It cannot be kept there; the remedy is told.
pub fn cache() -> Result<PathBuf> {
    kernel::check_cache()
}

/// Most RAM that an emulated host can have on this machine, in whole MiB: as much as there is, swap included, since
/// Linux lets nobody reserve more. No limit where it was told to grant everything.
pub fn room() -> Size {
    let mode = std::fs::read_to_string("/proc/sys/vm/overcommit_memory");
    if mode.is_ok_and(|mode| mode.trim() == "1") {
        return Size::of(u64::MAX);
    }
    let info = rustix::system::sysinfo();
    let units = info.totalram.saturating_add(info.totalswap);
    let bytes = units.saturating_mul(info.mem_unit.into());
    Size::of(bytes & !((1 << 20) - 1))
}

/// Most CPUs of it.
const CPUS: u32 = 64;

/// Least RAM of it: what its kernel and its RAM disk take, and little more.
const LEAST: Size = Size::mib(256);

/// The emulated computer.
#[derive(Clone, Debug)]
pub struct Options {
    /// CPUs.
    pub cpus: u32,
    /// RAM.
    pub memory: Size,
    /// Virtual time counts executed instructions, 2 ns each, so that timings repeat. One CPU only.
    pub icount: bool,
    /// Its timers come with a steady tick of 4 ms also where instructions are counted.
    pub tick: bool,
}

impl Default for Options {
    fn default() -> Self {
        Options { cpus: 1, memory: Size::mib(4096), icount: false, tick: false }
    }
}

impl Options {
    /// Sees to it that there can be such a computer, where `room` is all that it may have.
    fn check(&self, room: Size) -> Result<()> {
        let Options { cpus, memory, icount, tick: _ } = *self;
        if !(1..=CPUS).contains(&cpus) {
            return Err(Fail::new(Why::Usage, format!("give the emulated host {cpus} CPUs"))
                .because(format!("it takes 1 to {CPUS}")));
        }
        if icount && cpus != 1 {
            return Err(Fail::new(Why::Usage, format!("count instructions of {cpus} CPUs"))
                .because("--icount takes one CPU"));
        }
        let doing = || format!("give the emulated host {memory} of memory");
        if memory < LEAST {
            return Err(Fail::new(Why::Usage, doing()).because(format!("the least is {LEAST}")));
        }
        if memory > room {
            return Err(Fail::new(Why::Unsupported, doing())
                .because(format!("this machine has {room}"))
                .hint(format!("pass --memory {room} or less")));
        }
        Ok(())
    }
}

/// A command for the emulated host.
#[derive(Debug, Default)]
pub struct Command {
    /// The program, searched for in the `PATH` of `env`, and its arguments.
    pub argv: Vec<OsString>,
    /// The whole environment.
    pub env: Vec<(OsString, OsString)>,
    /// The directory to start in.
    pub directory: PathBuf,
    /// Standard input; empty without.
    pub stdin: Option<OwnedFd>,
    /// Where standard output goes; nowhere without.
    pub stdout: Option<OwnedFd>,
    /// Where standard error goes; nowhere without.
    pub stderr: Option<OwnedFd>,
    /// Give it a terminal of this size; its output then is all standard output.
    pub terminal: Option<TerminalSize>,
}

impl Command {
    /// A command with this process's directory and environment, and no streams.
    ///
    /// # Errors
    /// This process's directory is gone.
    pub fn here<W: Into<OsString>>(argv: impl IntoIterator<Item = W>) -> Result<Command> {
        Ok(Command {
            argv: argv.into_iter().map(Into::into).collect(),
            env: std::env::vars_os().collect(),
            directory: std::env::current_dir().doing(Why::Host, || "find the current directory")?,
            ..Command::default()
        })
    }
}

/// An emulated host that is up. Dropping it ends it, with all that runs on it.
pub struct Host {
    client: Client,
    qemu: Qemu,
}

impl Host {
    /// Boots an emulated host; the first time on a machine, its kernel is fetched and unpacked.
    ///
    /// # Errors
    /// QEMU or a kernel is missing (the hint names the package), or the host does not come up: the failure ends with
    /// what its console said last.
    pub fn boot(options: &Options) -> Result<Host> {
        options.check(room())?;
        let program = qemu::find()?;
        let prepared = kernel::prepare()?;
        let (qemu, wire) = Qemu::start(&program, &prepared, options)?;
        let client = Client::connect(wire, PATIENCE).map_err(|cause| {
            // It has more to say than the wire; once it has ended, all of it is known.
            let words = qemu.last_words();
            let cause = quote::line(cause.to_string().as_bytes());
            Fail::new(Why::Host, "boot the emulated host").because(format!("{cause}{words}"))
        })?;
        Ok(Host { client, qemu })
    }

    /// Starts a command. Several run at once; each is waited for by itself.
    ///
    /// # Errors
    /// The emulated host is gone.
    pub fn start(&self, command: Command) -> Result<Process> {
        let name = name_of(&command);
        let exec = Exec {
            argv: command.argv.into_iter().map(OsString::into_vec).collect(),
            env: command.env.into_iter().map(|(name, value)| (name.into_vec(), value.into_vec())).collect(),
            directory: command.directory.into_os_string().into_vec(),
            user: Vec::new(),
            terminal: command.terminal,
        };
        let streams = Streams { stdin: command.stdin, stdout: command.stdout, stderr: command.stderr };
        self.client.start(exec, streams).map_err(|cause| self.lost(&name, &cause))
    }

    /// Runs a command to its end. Its files are written back by then, and seen by this machine.
    ///
    /// # Errors
    /// The emulated host is gone, or ends meanwhile.
    pub fn exec(&self, command: Command) -> Result<Outcome> {
        let name = name_of(&command);
        self.start(command)?.wait().map_err(|cause| self.lost(&name, &cause))
    }

    /// The process id of QEMU.
    pub fn pid(&self) -> u32 {
        self.qemu.pid()
    }

    fn lost(&self, name: &str, cause: &std::io::Error) -> Fail {
        let words = self.qemu.last_words();
        Fail::new(Why::Host, format!("run {name} on the emulated host")).because(format!("{cause}{words}"))
    }
}

fn name_of(command: &Command) -> String {
    command.argv.first().map_or_else(|| "nothing".to_owned(), |name| name.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_computer_that_cannot_be_is_refused_before_it_is_started() {
        let room = Size::mib(8192);
        let told = |cpus, memory, icount| {
            Options { cpus, memory: Size::mib(memory), icount, tick: false }
                .check(room)
                .err()
                .map(|fail| fail.to_string())
        };
        let refused = |text: &str| Some(text.to_owned());
        assert_eq!(told(0, 4096, false), refused("give the emulated host 0 CPUs: it takes 1 to 64"));
        assert_eq!(told(65, 4096, false), refused("give the emulated host 65 CPUs: it takes 1 to 64"));
        assert_eq!(told(2, 4096, true), refused("count instructions of 2 CPUs: --icount takes one CPU"));
        assert_eq!(told(1, 1, false), refused("give the emulated host 1M of memory: the least is 256M"));
        let much =
            "give the emulated host 9G of memory: this machine has 8G\n  hint: pass --memory 8G or less";
        assert_eq!(told(1, 9216, false), refused(much));
        assert_eq!((told(1, 256, true), told(64, 8192, false)), (None, None));
    }
}
