//! Cases with stock Linux kernels: every flavour, form and size, every end, a disk with a file system on it, and a network.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::ground::{Ground, Output, Shell};
use crate::harness::{Case, Room, Stop, Verdict};
use crate::initramfs;
use crate::kernels::{Flavour, Kernel};

mod boots;
mod changes;
pub(crate) mod commands;
mod consoles;
mod containers;
mod control;
mod disks;
pub(crate) mod drivers;
mod ends;
mod identity;
pub(crate) mod images;
pub(crate) mod inside;
mod leftovers;
mod matrix;
mod memory;
pub(crate) mod network;
mod pci;
pub(crate) mod random;
mod roots;
mod shares;
mod sockets;
mod verdict;
mod vhost;

/// All of them.
pub fn cases() -> Vec<Case> {
    [
        boots::cases(),
        changes::cases(),
        commands::cases(),
        roots::cases(),
        containers::cases(),
        ends::cases(),
        disks::cases(),
        images::cases(),
        random::cases(),
        drivers::cases(),
        network::cases(),
        pci::cases(),
        shares::cases(),
        sockets::cases(),
        vhost::cases(),
        verdict::cases(),
        consoles::cases(),
        memory::cases(),
        matrix::cases(),
        identity::cases(),
        inside::cases(),
        control::cases(),
        leftovers::cases(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// The ground for real guests.
///
/// # Errors
/// It cannot be told whether this machine runs kernels, or the emulated host cannot be started.
pub fn ground(mayfly: &Path) -> Result<Box<dyn Ground>, Stop> {
    if runs_linux(mayfly)? {
        return Ok(Box::new(Shell::local()?));
    }
    Ok(Box::new(Shell::emulated(mayfly)?))
}

/// Whether this machine's KVM runs kernels: `--accel kvm` refuses before the boot where it does not.
fn runs_linux(mayfly: &Path) -> Result<bool, Stop> {
    let dir = tempfile::tempdir().map_err(|cause| format!("make a directory: {cause}"))?;
    let kernel = dir.path().join("tiny.elf");
    let code = crate::guests::all()["tiny"];
    std::fs::write(&kernel, crate::image::elf(code, false))
        .map_err(|cause| format!("write a kernel: {cause}"))?;
    let run = Command::new(mayfly)
        .args(["run", "--accel", "kvm", "--serial", "none", "--kernel"])
        .arg(&kernel)
        .output()
        .map_err(|cause| format!("run {}: {cause}", mayfly.display()))?;
    Ok(run.status.success())
}

/// A kernel and a RAM disk for it. A kernel that cannot be had is a reason to skip.
pub(crate) fn stock(flavour: Flavour) -> Result<(Kernel, PathBuf), Stop> {
    let kernel = Kernel::fetch(flavour).map_err(Stop::Skipped)?;
    let initrd = kernel.beside("test.cpio");
    // Written anew by every process: it is part of what is under test.
    static WRITTEN: std::sync::Mutex<Vec<&str>> = std::sync::Mutex::new(Vec::new());
    let mut written = WRITTEN.lock().map_err(|_| "another case panicked")?;
    if !written.contains(&flavour.name()) {
        initramfs::write(&kernel, &initrd).map_err(Stop::Skipped)?;
        written.push(flavour.name());
    }
    Ok((kernel, initrd))
}

/// Boots `kernel` with the RAM disk `initrd`.
pub(crate) fn boot(
    room: &mut Room<'_>,
    kernel: &Path,
    initrd: &Path,
    arguments: &str,
) -> Result<Output, Stop> {
    let (kernel, initrd) = (kernel.display(), initrd.display());
    room.guest(&format!("--kernel {kernel} --initrd {initrd} --timeout 240s {arguments}"))
}

/// The value that the guest said for `key`.
pub(crate) fn value(output: &Output, key: &str) -> Result<String, Stop> {
    let text = output.text();
    text.lines()
        .find_map(|line| line.trim_end().strip_prefix(key)?.strip_prefix('=').map(str::to_owned))
        .ok_or_else(|| output.differs(&format!("a line {key}=...")))
}

/// Demands that the guest said `key=wanted`.
pub(crate) fn expect(output: &Output, key: &str, wanted: &str) -> Verdict {
    let found = value(output, key)?;
    if found == wanted { Ok(()) } else { Err(output.differs(&format!("{key}={wanted} (it is {found})"))) }
}
