//! Writes the RAM disk of the tests for a stock kernel, and the kernel's vmlinux: for benchmarks and by hand.
//!
//!     initramfs cloud|generic|rt INITRD [VMLINUX]
#![forbid(unsafe_code)]

use std::path::Path;
use std::process::ExitCode;

use tests::initramfs;
use tests::kernels::{Flavour, Kernel};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match write(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("initramfs: {why}");
            ExitCode::FAILURE
        }
    }
}

fn write(arguments: &[String]) -> Result<(), String> {
    let [flavour, initrd, vmlinux @ ..] = arguments else {
        return Err("initramfs mark|cloud|generic|rt INITRD [VMLINUX]".into());
    };
    if flavour == "mark" {
        return initramfs::write_mark(Path::new(initrd));
    }
    let flavour = Flavour::ALL.into_iter().find(|known| known.name() == flavour).ok_or("no such flavour")?;
    let kernel = Kernel::fetch(flavour)?;
    initramfs::write(&kernel, Path::new(initrd))?;
    if let Some(path) = vmlinux.first() {
        std::fs::copy(kernel.vmlinux()?, path).map_err(|cause| format!("write {path}: {cause}"))?;
    }
    Ok(())
}
