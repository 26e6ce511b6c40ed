//! Disks under random work: files that are written, mapped, cut and punched beside a copy in memory, and a disk without a
//! file system in the same way. The host finds the file system clean, and every byte in its place.

use super::images::{Make, prepare, sum};
use super::{expect, stock, value};
use crate::ground::quote;
use crate::harness::{Case, Room, Verdict};
use crate::initramfs;
use crate::kernels::Flavour;

/// The disk with a file system is `vda`, the one without is `vdb`; programs are on `vdc` where there is one.
const SCRIPT: &str =
    "word() { for w in $($B cat /proc/cmdline); do case $w in $1=*) echo ${w#*=};; esac; done; }
count=$(word test.count); seed=$(word test.seed)
$B mount -t ext4 /dev/vda /disk && echo mounted=$($B cat /disk/given)
if [ -b /dev/vdc ]; then
  $B mkdir /debian; $B mount -t ext4 -o ro /dev/vdc /debian
  $B mount -t proc proc /debian/proc; $B mount --bind /dev /debian/dev; $B mount --bind /disk /debian/mnt
  $B chroot /debian fio - </fio >/fio.out 2>&1; echo fio=$?
  $B grep -E 'err=|READ:|WRITE:|verify|fio:' /fio.out
fi
for n in 1 2 3; do /bin/churn /disk/r$n $((seed + n)) $count >/out.$n & done
/bin/churn /dev/vdb $seed $count >/out.4 & wait
$B cat /out.*; echo right=$($B grep -x churned=$count /out.* | $B wc -l)
echo bare=$($B sha256sum </dev/vdb | $B cut -c1-64)
cd /disk; $B sha256sum r* >sums; cd /; [ -b /dev/vdc ] && $B umount /debian/mnt; $B umount /disk
$B mount -t ext4 /dev/vda /disk && cd /disk && $B sha256sum -c sums >/dev/null && echo intact=$($B wc -l <sums)
cd /; $B umount /disk && echo unmounted=yes
";

/// How much is to be done.
#[derive(Clone, Copy)]
pub(crate) struct Load {
    /// Operations on each file, and on the disk without a file system.
    pub count: u32,
    /// MiB of the file system.
    pub mib: u64,
    /// The seed of it all.
    pub seed: u32,
    /// What fio is to do before, on the image that has it.
    pub fio: Option<&'static str>,
}

pub fn cases() -> Vec<Case> {
    let load = Load { count: 150, mib: 64, seed: 1, fio: None };
    [
        (Make::Raw, "pci"),
        (Make::Queues, "mmio"),
        (Make::Direct, "pci"),
        (Make::Qcow2, "mmio"),
        (Make::Qcow2, "pci"),
        (Make::Backed, "pci"),
        (Make::Kept, "pci"),
        (Make::Throwaway, "pci"),
    ]
    .map(|(make, transport)| {
        let name = format!("real::random::{}_{transport}", make.name());
        Case::new(name, move |room| work(room, make, Flavour::Cloud, transport, load))
    })
    .into()
}

/// Two disks of this make over this transport.
pub(crate) fn work(
    room: &mut Room<'_>,
    make: Make,
    flavour: Flavour,
    transport: &str,
    load: Load,
) -> Verdict {
    let (kernel, initrd) = stock(flavour)?;
    let more = room.dir.join("more.cpio");
    initramfs::write_more(&kernel, &more, "random", SCRIPT, &[], &["churn"])?;
    // What is there before counts as well.
    room.shell(&format!("head -c 6M /dev/urandom >bare.img && {}", make.prepare("bare")))?.code(0)?;
    let before = (prepare(room, make, "disk", load.mib)?, sum(room, make, "bare")?);
    let (mut programs, mut initrds) =
        (String::new(), format!("--initrd {} --initrd more.cpio", initrd.display()));
    if let Some(job) = load.fio {
        let image = crate::soak::debian()?;
        programs = format!("--disk path={},readonly=on", image.display());
        initramfs::write_file(&room.dir.join("fio.cpio"), "fio", job.as_bytes())?;
        initrds += " --initrd fio.cpio";
    }
    let seconds = room.limit.as_secs().saturating_sub(20);
    let output = room.guest(&format!(
        "--kernel {} {initrds} --memory 512M --timeout {seconds}s --transport {transport} {} {} {programs} \
         --cmdline {}",
        kernel.bzimage().display(),
        make.flags("disk"),
        make.flags("bare").replace(" --cpus 2", ""),
        quote(&format!("quiet test.do=random test.count={} test.seed={}", load.count, load.seed)),
    ))?;
    output.code(0)?;
    expect(&output, "mounted", "by-the-host")?;
    if load.fio.is_some() {
        expect(&output, "fio", "0")?;
    }
    expect(&output, "right", "4")?;
    expect(&output, "intact", "3")?;
    expect(&output, "unmounted", "yes")?;
    let bare = value(&output, "bare")?;
    if (sum(room, make, "disk")?, sum(room, make, "bare")?) != before {
        return Err("the base of the overlay has changed".into());
    }
    if let (Some(disk), Some(after)) = (make.after("disk", false), make.after("bare", false)) {
        room.shell(&format!("{disk} && {after}"))?.code(0)?;
        room.shell("e2fsck -f -n disk-after.img")?.code(0)?;
        let rest = "mkdir out && debugfs -R 'rdump / out' disk-after.img && cd out && sha256sum -c sums";
        room.shell(rest)?.code(0)?;
        room.shell("sha256sum <bare-after.img")?.code(0)?.mentions(&bare)?;
    }
    Ok(())
}
