//! Stock kernels, and the bare-metal cases once more, on hardware virtualization: this machine's where it has it, else
//! that of the emulated host, which is started once for all of them.
#![forbid(unsafe_code)]

use std::path::Path;
use std::process::{Command, ExitCode};

use tests::ground::{Ground, Shell};
use tests::harness::{self, Stop};

fn main() -> ExitCode {
    let mut cases = tests::real::cases();
    cases.extend(tests::bare::cases());
    harness::main("real", &cases, ground)
}

fn ground(mayfly: &Path) -> Result<Box<dyn Ground>, Stop> {
    if runs_linux(mayfly)? {
        return Ok(Box::new(Shell::local()?));
    }
    Ok(Box::new(Shell::emulated(mayfly)?))
}

/// Whether this machine's KVM runs kernels: `--accel kvm` refuses before the boot where it does not.
fn runs_linux(mayfly: &Path) -> Result<bool, Stop> {
    let dir = tempfile::tempdir().map_err(|cause| format!("make a directory: {cause}"))?;
    let kernel = dir.path().join("tiny.elf");
    let code = tests::guests::all()["tiny"];
    std::fs::write(&kernel, tests::image::elf(code, false))
        .map_err(|cause| format!("write a kernel: {cause}"))?;
    let run = Command::new(mayfly)
        .args(["run", "--accel", "kvm", "--serial", "none", "--kernel"])
        .arg(&kernel)
        .output()
        .map_err(|cause| format!("run {}: {cause}", mayfly.display()))?;
    Ok(run.status.success())
}
