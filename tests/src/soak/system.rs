//! A Debian system as it is installed, with systemd: booted by a stock kernel, used by somebody who types a name and a
//! password, powered off by its own command, and left clean.

use super::{LIMIT, debian};
use crate::ground::{Output, quote};
use crate::harness::{Case, Room, Stop, Verdict};
use crate::initramfs;
use crate::kernels::Flavour;
use crate::real::stock;

/// The RAM disk hands over to the system, with what the kernel has mounted.
const SCRIPT: &str = "$B mount -t ext4 -o ro /dev/vda /disk || echo mount=failed
for d in proc sys dev; do $B mount --move /$d /disk/$d; done
exec $B switch_root /disk /sbin/init
";

/// What is seen and typed. The system is up when all that it starts is up; a wrong password is none.
const STEPS: &[&str] = &[
    "patience=400",
    "expect=debian-guest login: ",
    r"send=root\n",
    "expect=Password: ",
    r"send=mosquito\n",
    "expect=Login incorrect",
    "expect=debian-guest login: ",
    r"send=root\n",
    "expect=Password: ",
    r"send=mayfly\n",
    "expect=# ",
    r"send=echo state=$(systemctl is-system-running --wait)\n",
    "expect=state=running",
    r"send=echo tty=$(tty) root=$(findmnt -no SOURCE,OPTIONS /); echo by-the-guest >/etc/written\n",
    "expect=root=/dev/vda rw",
    "expect=# ",
    r"send=systemctl poweroff\n",
    // The kernel's own last line is for the serial port: before it, it resets virtio devices.
    "expect=Powering off.",
];

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("soak::system::debian_on_qcow2_mmio", |room| {
            room.limit = LIMIT;
            let image = debian()?;
            room.shell(&format!("qemu-img convert -O qcow2 {} disk.qcow2", image.display()))?.code(0)?;
            let disk = "--disk path=disk.qcow2,format=qcow2";
            let output =
                live(room, Flavour::Cloud, &format!("--transport mmio {disk} --cmdline test.do=debian"))?;
            output.mentions("tty=/dev/ttyS0")?.mentions("reboot: Power down")?;
            clean(room, "disk.qcow2")
        }),
        Case::new("soak::system::debian_on_an_overlay_pci", |room| {
            room.limit = LIMIT;
            let image = debian()?;
            let sum = format!("sha256sum <{}", image.display());
            let before = room.shell(&sum)?.code(0)?.text();
            // The console is virtio's here, and the serial port has nobody.
            let arguments = format!(
                "--transport pci --disk path={},overlay=over.qcow2 --cpus 2 --serial file=serial --console to=stdio \
                 --cmdline 'console=hvc0 test.do=debian'",
                image.display()
            );
            live(room, Flavour::Generic, &arguments)?.mentions("tty=/dev/hvc0")?;
            room.shell("cat serial")?.mentions("reboot: Power down")?;
            if room.shell(&sum)?.code(0)?.text() != before {
                return Err("the base of the overlay has changed".into());
            }
            clean(room, "over.qcow2")
        }),
    ]
}

/// One life of the system.
fn live(room: &mut Room<'_>, flavour: Flavour, arguments: &str) -> Result<Output, Stop> {
    let (kernel, initrd) = stock(flavour)?;
    let more = room.dir.join("more.cpio");
    initramfs::write_more(&kernel, &more, "debian", SCRIPT, &["virtio_console"], &[])?;
    let terminal = initramfs::program_path("terminal")?;
    let steps: Vec<String> = STEPS.iter().map(|step| quote(step)).collect();
    let output = room.shell(&format!(
        "{} {} -- {} run {} --kernel {} --initrd {} --initrd more.cpio --memory 512M --net user {arguments}",
        quote(&terminal.display().to_string()),
        steps.join(" "),
        quote(&room.mayfly.display().to_string()),
        room.ground.options(),
        kernel.bzimage().display(),
        initrd.display(),
    ))?;
    output.code(0)?;
    Ok(output)
}

/// The image is whole, and so is the file system in it, with what was written there.
fn clean(room: &mut Room<'_>, image: &str) -> Verdict {
    room.shell(&format!("qemu-img check -q {image} && qemu-img convert -O raw {image} after.img"))?
        .code(0)?;
    room.shell("e2fsck -f -n after.img")?.code(0)?;
    room.shell("debugfs -R 'cat /etc/written' after.img")?.code(0)?.mentions("by-the-guest")?;
    Ok(())
}
