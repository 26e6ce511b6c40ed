//! The emulated host: the real host's files as the root, its own `/dev/kvm`, and a wire to run commands by.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use agent::server::{Options, Server};
use kvm_bindings::{KVM_CAP_SPLIT_IRQCHIP, kvm_enable_cap};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::mount::mount_move;
use rustix::net::{AddressFamily, SendFlags, SocketType, netlink::SocketAddrNetlink};

use crate::init::mount_at;

/// Name of the virtio console port that is the wire.
const PORT: &str = "mayfly.wire";
/// Longest wait for the port: it is there as soon as the driver has spoken with the device.
const PATIENCE: Duration = Duration::from_secs(10);

/// Enters the real host's file system and serves the wire until it ends.
pub fn run() -> io::Result<()> {
    let port = find_port()?;
    mount_at("9p", "root", "/root", "trans=virtio,version=9p2000.L,msize=512000,cache=loose")?;
    enter("/root")?;
    for (kind, place, options) in [
        ("devpts", "/dev/pts", "mode=620,ptmxmode=666"),
        ("tmpfs", "/dev/shm", ""),
        ("tmpfs", "/run", "mode=755"),
        ("debugfs", "/sys/kernel/debug", ""),
        ("cgroup2", "/sys/fs/cgroup", ""),
    ] {
        // A host whose kernel or root has no such place works without.
        if let Err(error) = mount_at(kind, kind, place, options) {
            eprintln!("{error}");
        }
    }
    raise_loopback()?;
    let _idle = idle_vm().map_err(|error| eprintln!("keep a VM open: {error}"));
    let trampoline = vec![OsString::from("/proc/self/exe"), OsString::from(crate::ON_TERMINAL)];
    Server::new(port, Options { trampoline, init: true, sync: true, fresh: true })?.serve()?;
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

/// Makes `root` the root directory, with this kernel's own file systems in it.
fn enter(root: &str) -> io::Result<()> {
    for place in ["proc", "sys", "dev"] {
        mount_move(format!("/{place}"), format!("{root}/{place}"))?;
    }
    std::env::set_current_dir(root)?;
    // Over the initramfs rather than beneath it: then this root can be pivoted, as namespaces want to.
    mount_move(".", "/")?;
    rustix::process::chroot(".")?;
    std::env::set_current_dir("/")
}

/// Switches the loopback interface on: one RTM_NEWLINK message (rtnetlink(7)) for interface 1, which is always it.
fn raise_loopback() -> io::Result<()> {
    const RTM_NEWLINK: u16 = 16;
    const NLM_F_REQUEST: u16 = 1;
    const IFF_UP: u32 = 1;
    let socket = rustix::net::socket(AddressFamily::NETLINK, SocketType::RAW, None)?;
    let mut message = Vec::new();
    message.extend(32u32.to_ne_bytes());
    message.extend(RTM_NEWLINK.to_ne_bytes());
    message.extend(NLM_F_REQUEST.to_ne_bytes());
    // Sequence number and port of a `nlmsghdr`; family, padding and type of an `ifinfomsg`: none.
    message.extend([0; 12]);
    message.extend(1u32.to_ne_bytes());
    message.extend(IFF_UP.to_ne_bytes());
    message.extend(IFF_UP.to_ne_bytes());
    rustix::net::sendto(socket, &message, SendFlags::empty(), &SocketAddrNetlink::new(0, 0))?;
    Ok(())
}
