//! A file system on a disk: written, synced, mounted again, and found clean by the host afterwards.

use super::{boot, expect, stock, value};
use crate::harness::{Case, Verdict};
use crate::kernels::Flavour;

pub fn cases() -> Vec<Case> {
    let mut cases: Vec<Case> = ["mmio", "pci"]
        .iter()
        .flat_map(|way| Flavour::ALL.map(|flavour| file_system(flavour, way)))
        .collect();
    cases.push(Case::new("real::disks::ext4_with_4_cpus", |room| ext4(room, Flavour::Cloud, "--cpus 4")));
    cases.push(Case::new("real::disks::two_disks_one_read_only", |room| {
        let (kernel, initrd) = stock(Flavour::Cloud)?;
        room.shell("truncate -s 3M a.img && truncate -s 5M b.img && chmod a-w b.img")?.code(0)?;
        let disks = "--disk path=a.img,id=mayfly-1 --disk path=b.img,readonly=on";
        let output =
            boot(room, &kernel.bzimage(), &initrd, &format!("{disks} --cmdline 'quiet test.do=disks'"))?;
        output.code(0)?;
        expect(&output, "sizes", "6144,10240")?;
        expect(&output, "ro", "0,1")?;
        expect(&output, "serial", "mayfly-1")?;
        expect(&output, "refused", "yes")
    }));
    cases.push(root());
    cases
}

fn file_system(flavour: Flavour, transport: &'static str) -> Case {
    Case::new(format!("real::disks::ext4_{}_{transport}", flavour.name()), move |room| {
        ext4(room, flavour, &format!("--transport {transport}"))
    })
}

fn ext4(room: &mut crate::harness::Room<'_>, flavour: Flavour, arguments: &str) -> Verdict {
    let (kernel, initrd) = stock(flavour)?;
    room.shell(
        "mkdir d && echo by-the-host >d/given && truncate -s 64M disk.img && mkfs.ext4 -q -d d disk.img",
    )?
    .code(0)?;
    let arguments = format!("{arguments} --disk path=disk.img --cmdline 'quiet test.do=disk'");
    let output = boot(room, &kernel.bzimage(), &initrd, &arguments)?;
    output.code(0)?;
    expect(&output, "mounted", "by-the-host")?;
    let sum = value(&output, "sum")?;
    expect(&output, "again", &sum)?;
    expect(&output, "trimmed", "yes")?;
    expect(&output, "unmounted", "yes")?;
    // The host finds the file system clean, and in it the bytes that the guest wrote.
    room.shell("e2fsck -f -n disk.img")?.code(0)?;
    room.shell("debugfs -R 'dump written copy' disk.img && sha256sum <copy")?.code(0)?.mentions(&sum)?;
    Ok(())
}

/// The disk is the root of a system: the kernel's own mount, no RAM disk's help after the modules.
fn root() -> Case {
    Case::new("real::disks::ext4_root", |room| {
        let (kernel, initrd) = stock(Flavour::Cloud)?;
        let init = "#!/bin/busybox sh\n/bin/busybox touch /was-here && echo root=mounted\n/bin/busybox mount -o remount,ro /\n\
                    /bin/busybox poweroff -f\n";
        room.shell("mkdir -p d/bin d/dev d/proc && cp /bin/busybox d/bin/")?.code(0)?;
        room.file("d/sbin-init", init)?;
        room.shell("chmod 755 d/sbin-init && truncate -s 64M disk.img && mkfs.ext4 -q -d d disk.img")?
            .code(0)?;
        let arguments = "--disk path=disk.img --cmdline 'quiet test.do=root'";
        let output = boot(room, &kernel.bzimage(), &initrd, arguments)?;
        output.code(0)?;
        expect(&output, "root", "mounted")?;
        room.shell("e2fsck -f -n disk.img")?.code(0)?;
        room.shell("debugfs -R 'ls -p /' disk.img")?.mentions("was-here")?;
        Ok(())
    })
}
