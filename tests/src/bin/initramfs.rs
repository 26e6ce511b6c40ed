//! Writes the RAM disk of the tests for a stock kernel, and the kernel's vmlinux: for benchmarks and by hand.
//!
//!     initramfs cloud|generic|rt INITRD [VMLINUX]
//!     initramfs mark INITRD         one that says a mark and powers off
//!     initramfs traffic INITRD      what the benchmark of networks adds to that of the cloud kernel
//!     initramfs with PROGRAM ARGUMENTS FLAVOUR INITRD    to be put behind it: `test.do=PROGRAM` runs this crate's program
#![forbid(unsafe_code)]

use std::path::Path;
use std::process::ExitCode;

use tests::initramfs;
use tests::kernels::{Flavour, Kernel};

/// What the guest of the benchmark of networks does.
const TRAFFIC: &str =
    "word() { for w in $($B cat /proc/cmdline); do case $w in $1=*) echo ${w#*=};; esac; done; }
to=$(word test.to)
case $to in
  *192.168.77.*) $B ip addr add 192.168.77.2/24 dev eth0; $B ip link set eth0 up;;
  *10.0.2.2*) $B ip addr add 10.0.2.15/24 dev eth0; $B ip link set eth0 up;;
esac
/bin/traffic guest $to $(word test.mib) $(word test.trips) $(word test.calls)
";

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
    let known =
        |name: &str| Flavour::ALL.into_iter().find(|known| known.name() == name).ok_or("no such flavour");
    if let [with, program, words, flavour, initrd] = arguments
        && with == "with"
    {
        let kernel = Kernel::fetch(known(flavour)?)?;
        let script = format!("/bin/{program} {words}\n");
        return initramfs::write_more(&kernel, Path::new(initrd), program, &script, &[], &[program]);
    }
    let [flavour, initrd, vmlinux @ ..] = arguments else {
        return Err("initramfs mark|traffic|cloud|generic|rt INITRD [VMLINUX]".into());
    };
    if flavour == "mark" {
        return initramfs::write_mark(Path::new(initrd));
    }
    if flavour == "traffic" {
        let kernel = Kernel::fetch(Flavour::Cloud)?;
        let modules = ["vmw_vsock_virtio_transport"];
        return initramfs::write_more(&kernel, Path::new(initrd), "traffic", TRAFFIC, &modules, &["traffic"]);
    }
    let kernel = Kernel::fetch(known(flavour)?)?;
    initramfs::write(&kernel, Path::new(initrd))?;
    if let Some(path) = vmlinux.first() {
        std::fs::copy(kernel.vmlinux()?, path).map_err(|cause| format!("write {path}: {cause}"))?;
    }
    Ok(())
}
