//! The emulated host: the real host's files as the root, its own `/dev/kvm`, and a wire to run commands by.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use agent::server::{Options, Server};
use kvm_bindings::{KVM_CAP_SPLIT_IRQCHIP, kvm_enable_cap};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use rustix::event::{PollFd, PollFlags, poll};

use crate::mounts::mount_at;
use crate::{network, root};

/// Name of the virtio console port that is the wire.
const PORT: &str = "mayfly.wire";
/// Longest wait for the port: it is there as soon as the driver has spoken with the device.
const PATIENCE: Duration = Duration::from_secs(10);

/// Enters the real host's file system and serves the wire until it ends.
pub fn run() -> io::Result<()> {
    let port = find_port()?;
    mount_at("9p", "root", Path::new("/root"), "trans=virtio,version=9p2000.L,msize=512000,cache=loose")?;
    root::enter("/root")?;
    root::furnish();
    network::build(&[])?;
    let _idle = idle_vm().map_err(|error| eprintln!("keep a VM open: {error}"));
    let trampoline = vec![OsString::from("/proc/self/exe"), OsString::from(crate::ON_TERMINAL)];
    Server::new(
        port,
        Options { trampoline, init: true, sync: true, fresh: true, messages: false, another: Vec::new() },
    )?
    .serve()?;
    Ok(())
}

/// Where the kernel says which clock it uses.
const CLOCK: &str = "/sys/devices/system/clocksource/clocksource0/current_clocksource";

/// Waits until the kernel has measured the frequency of its time stamp counter for good, which it says by going over
/// to it; that takes some two seconds from its start.
///
/// The first measurement may be wrong by more than KVM tolerates. A KVM that was loaded before the second takes its
/// guests for ones that want another frequency than the processor's, which AMD-V cannot do here: it then takes their
/// counters to stand at zero, and their timers fire late by as long as this host is up (`kvm_set_tsc_khz`).
pub fn await_clock() -> io::Result<()> {
    let start = Instant::now();
    while fs::read_to_string(CLOCK)?.trim_end() == "tsc-early" {
        if start.elapsed() >= PATIENCE {
            eprintln!("{CLOCK} is tsc-early after {} s: timers of guests may fire late", PATIENCE.as_secs());
            break;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// A VM that is never run, kept open for as long as this host lives.
///
/// KVM patches the kernel's code whenever the number of VMs, or of local APICs that are switched off, leaves or reaches
/// zero (the static keys `preempt_notifier_key` and `apic_sw_disabled`). QEMU before 8 may keep a translation of an
/// instruction that is patched on another CPU meanwhile; that CPU then takes the same breakpoint for ever, and the host
/// is lost. With this VM neither number is ever zero again.
fn idle_vm() -> Result<(VmFd, VcpuFd), kvm_ioctls::Error> {
    let vm = Kvm::new()?.create_vm()?;
    // Local APICs in the kernel, 24 pins of an I/O APIC that is not.
    vm.enable_cap(&kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, args: [24, 0, 0, 0], ..Default::default() })?;
    let vcpu = vm.create_vcpu(0)?;
    Ok((vm, vcpu))
}

/// Opens the port once the other side is there.
fn find_port() -> io::Result<OwnedFd> {
    let start = Instant::now();
    loop {
        if let Some(path) = port_path()? {
            let port = File::options().read(true).write(true).open(path)?;
            let mut fds = [PollFd::new(&port, PollFlags::OUT)];
            poll(&mut fds, None)?;
            if !fds[0].revents().contains(PollFlags::HUP) {
                return Ok(port.into());
            }
        }
        if start.elapsed() > PATIENCE {
            return Err(io::Error::new(io::ErrorKind::NotFound, format!("there is no port {PORT}")));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn port_path() -> io::Result<Option<PathBuf>> {
    for entry in fs::read_dir("/sys/class/virtio-ports").into_iter().flatten() {
        let entry = entry?;
        let name = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
        if name.trim_end() == PORT {
            return Ok(Some(PathBuf::from("/dev").join(entry.file_name())));
        }
    }
    Ok(None)
}
