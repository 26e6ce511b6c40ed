//! QEMU, which emulates the host: found, started, listened to, and ended.

use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use base::sys::children::die_with_parent;
use base::{Doing, Fail, Result, Why};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::Options;
use super::kernel::Prepared;
use crate::host::program::in_path;
use crate::quote;

const PROGRAM: &str = "qemu-system-x86_64";
/// Debian's packages with QEMU and its firmware.
pub const PACKAGES: &str = "--no-install-recommends qemu-system-x86 seabios";
/// How much of the console is kept: enough for a panic with its trace.
const TAIL: usize = 8 << 10;

/// The kernel's command line. QEMU's time stamp counters agree, so they need no watchdog, which a busy machine would
/// only mislead. The last three make it come up sooner: no tests of its cryptography, no pages cleared twice, no
/// interpreter for the routes of interrupts that nobody uses (all devices have MSI-X).
const CMDLINE: &str = "console=ttyS0 quiet panic=-1 mitigations=off nokaslr tsc=reliable \
                       cryptomgr.notests=1 init_on_alloc=0 pci=noacpi";
/// A tick that repeats by itself. QEMU's AMD-V loses a timer interrupt now and then; a one-shot timer, which each
/// interrupt has to set anew, then stands still, and with it the host and its guests. Where instructions are counted
/// the timers stay exact unless the tick is asked for: boots have not been seen to need it. With much I/O the host was
/// seen to stand still without it, and once with it.
const STEADY_TICK: &str = "nohz=off highres=off";

/// A processor that does not promise fast string instructions: an emulated one moves a byte at a time, so kernels do
/// better to clear and copy pages by words. A guest that touches all of its memory takes half the time.
const CPU: &str = "max,+svm,-erms,-fsrm";
/// Where instructions are counted, the processor is the one that all figures were taken with.
const COUNTED_CPU: &str = "max,+svm";

/// A running QEMU. Dropping it kills it and waits until it is gone.
pub struct Qemu {
    pid: u32,
    pidfd: OwnedFd,
    /// Started it and waits for it: a child is killed when the thread that started it ends.
    keeper: Option<JoinHandle<()>>,
    /// Reads the console to its end.
    listener: Option<JoinHandle<()>>,
    console: Arc<Mutex<Vec<u8>>>,
}

/// Files of QEMU's that the computer starts with: its firmware, and what loads a kernel of either form.
const FIRMWARE: [&str; 3] = ["bios-256k.bin", "linuxboot_dma.bin", "pvh.bin"];

/// Finds QEMU in the `PATH`.
pub fn find() -> Result<PathBuf> {
    in_path(PROGRAM).ok_or_else(|| {
        Fail::new(Why::Missing, "emulate a host with AMD-V")
            .because(format!("{PROGRAM} is not installed"))
            .hint(format!("apt-get install {PACKAGES}"))
    })
}

/// Those of QEMU's files that are missing, by what QEMU itself says of where it looks.
///
/// # Errors
/// QEMU is not there, or does not run.
pub fn missing_firmware() -> Result<Vec<&'static str>> {
    let program = find()?;
    let asking = || format!("ask {} for its directories", program.display());
    let said = Command::new(&program).args(["-L", "help"]).output().doing(Why::Host, asking)?;
    if !said.status.success() {
        let cause = String::from_utf8_lossy(&said.stderr).trim().to_owned();
        return Err(Fail::new(Why::Host, asking()).because(cause));
    }
    let dirs: Vec<PathBuf> = String::from_utf8_lossy(&said.stdout).lines().map(PathBuf::from).collect();
    let missing = |file: &&str| !dirs.iter().any(|dir| dir.join(file).is_file());
    Ok(FIRMWARE.into_iter().filter(missing).collect())
}

impl Qemu {
    /// Starts QEMU; also returns this side of the wire.
    pub fn start(program: &Path, prepared: &Prepared, options: &Options) -> Result<(Qemu, OwnedFd)> {
        let starting = || format!("start {}", program.display());
        let ramdisk = memfd_create("mayfly-initrd", MemfdFlags::CLOEXEC).doing(Why::Host, starting)?;
        let mut ramdisk = std::fs::File::from(ramdisk);
        ramdisk.write_all(&prepared.initrd()?).doing(Why::Host, starting)?;
        let (wire, its_wire) = UnixStream::pair().doing(Why::Host, starting)?;
        let (console, its_console) = UnixStream::pair().doing(Why::Host, starting)?;

        let mut command = Command::new(program);
        arrange(&mut command, prepared, options);
        // By name, since a child inherits but its three standard streams.
        command.arg("-initrd").arg(format!("/proc/{}/fd/{}", std::process::id(), ramdisk.as_raw_fd()));
        // Descriptors 0 and 1, which `arrange` names, are no terminal's; and what QEMU complains of belongs to the console.
        let errors = its_console.try_clone().doing(Why::Host, starting)?;
        command
            .stdin(OwnedFd::from(its_wire))
            .stdout(OwnedFd::from(its_console))
            .stderr(OwnedFd::from(errors));
        command.process_group(0);
        die_with_parent(&mut command);
        let qemu = spawn(command, console, ramdisk).doing(Why::Host, starting)?;
        Ok((qemu, wire.into()))
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// What the console said last, on lines of its own, for the end of a message. Waits a moment for QEMU's end if
    /// that is near, so that the very last line is there.
    pub fn last_words(&self) -> String {
        let start = Instant::now();
        while self.listener.as_ref().is_some_and(|thread| !thread.is_finished()) && start.elapsed() < SETTLE {
            std::thread::sleep(Duration::from_millis(5));
        }
        let bytes = self.console.lock().unwrap_or_else(PoisonError::into_inner).clone();
        quote::below(&quote::last_lines(&bytes, 20))
    }
}

/// How long last words are waited for.
const SETTLE: Duration = Duration::from_millis(500);

impl Drop for Qemu {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
        for thread in [self.keeper.take(), self.listener.take()].into_iter().flatten() {
            // A thread that panicked has said so.
            let _ = thread.join();
        }
    }
}

/// The computer, but for its initial RAM disk.
fn arrange(command: &mut Command, prepared: &Prepared, options: &Options) {
    // A PC, although `microvm` comes up 0.3 s sooner: that has one timer only, and its kernel hangs when QEMU is
    // kept from running while the kernel measures it.
    command.args(["-machine", "pc"]);
    // Counting instructions needs all CPUs in one thread.
    let accel = if options.icount { "tcg,thread=single" } else { "tcg,thread=multi" };
    let cpu = if options.icount { COUNTED_CPU } else { CPU };
    command.args(["-accel", accel, "-cpu", cpu, "-smp", &options.cpus.to_string()]);
    command.args(["-m", &format!("{}k", options.memory.bytes() >> 10)]);
    if options.icount {
        command.args(["-icount", "shift=1,sleep=on"]);
    }
    command.args(["-display", "none", "-vga", "none", "-nodefaults", "-no-user-config", "-no-reboot"]);
    command.args(["-chardev", "socket,id=wire,fd=0", "-device", "virtio-serial-pci"]);
    command.args(["-device", "virtserialport,chardev=wire,name=mayfly.wire"]);
    command.args(["-chardev", "socket,id=console,fd=1", "-serial", "chardev:console"]);
    command.args(["-fsdev", "local,id=root,path=/,security_model=none,multidevs=remap"]);
    command.args(["-device", "virtio-9p-pci,fsdev=root,mount_tag=root"]);
    command.args(["-object", "rng-random,id=rng,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=rng"]);
    command.arg("-kernel").arg(&prepared.kernel);
    let tick = if options.icount && !options.tick { "" } else { STEADY_TICK };
    command.args(["-append", &format!("{CMDLINE} {tick} mayfly.mode=host")]);
}

/// Starts the child in a thread of its own, and another that listens to its console. `ramdisk` stays open as long.
fn spawn(mut command: Command, mut console: UnixStream, ramdisk: std::fs::File) -> std::io::Result<Qemu> {
    let (tell, told) = channel();
    let keeper = std::thread::Builder::new().name("qemu".into()).spawn(move || {
        let child = command.spawn();
        // Holds our copies of its ends: the console would never end.
        drop(command);
        match child {
            Err(error) => drop(tell.send(Err(error))),
            Ok(mut child) => {
                drop(
                    tell.send(
                        pidfd_open(Pid::from_child(&child), PidfdFlags::empty())
                            .map(|fd| (child.id(), fd))
                            .map_err(Into::into),
                    ),
                );
                // Not waited for by anybody else, so there is nothing to fail.
                let _ = child.wait();
            }
        }
        drop(ramdisk);
    })?;
    let (pid, pidfd) = told.recv().map_err(std::io::Error::other)??;
    let tail = Arc::new(Mutex::new(Vec::new()));
    let listener = std::thread::Builder::new().name("qemu-console".into()).spawn({
        let tail = tail.clone();
        move || {
            let mut bytes = [0; 4096];
            while let Ok(n @ 1..) = console.read(&mut bytes) {
                let mut tail = tail.lock().unwrap_or_else(PoisonError::into_inner);
                tail.extend_from_slice(bytes.get(..n).unwrap_or_default());
                let old = tail.len().saturating_sub(TAIL);
                tail.drain(..old);
            }
        }
    })?;
    Ok(Qemu { pid, pidfd, keeper: Some(keeper), listener: Some(listener), console: tail })
}
