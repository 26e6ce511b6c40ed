//! Disks of every make under a file system: churned and found whole by the host; and what the guest had synced is there
//! when mayfly is ended with no time to say goodbye.

use super::{boot, expect, stock, value};
use crate::ground::quote;
use crate::harness::{Case, Room, Stop, Verdict};
use crate::kernels::Flavour;

/// How a disk is made.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Make {
    Raw,
    Direct,
    Queues,
    Threads,
    Qcow2,
    Backed,
    Kept,
    Throwaway,
}

impl Make {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Make::Raw => "raw",
            Make::Direct => "direct",
            Make::Queues => "queues",
            Make::Threads => "threads",
            Make::Qcow2 => "qcow2",
            Make::Backed => "qcow2_over_qcow2",
            Make::Kept => "kept_overlay",
            Make::Throwaway => "overlay",
        }
    }

    /// Makes the image out of `STEM.img`, a raw one.
    pub(crate) fn prepare(self, stem: &str) -> String {
        match self {
            Make::Qcow2 => format!("qemu-img convert -O qcow2 {stem}.img {stem}.qcow2"),
            Make::Backed => format!(
                "qemu-img convert -c -O qcow2 {stem}.img {stem}-base.qcow2 && \
                 qemu-img create -q -f qcow2 -F qcow2 -b {stem}-base.qcow2 {stem}.qcow2"
            ),
            _ => "true".to_owned(),
        }
    }

    /// The options of a machine with it.
    pub(crate) fn flags(self, stem: &str) -> String {
        let more = match self {
            Make::Raw => ".img",
            Make::Direct => ".img,direct=on",
            Make::Queues => ".img,queues=2 --cpus 2",
            Make::Threads => ".img,io=threads",
            Make::Qcow2 => ".qcow2,format=qcow2",
            Make::Backed => ".qcow2,format=qcow2,backing=on",
            Make::Kept => return format!("--disk path={stem}.img,overlay={stem}-over.qcow2"),
            Make::Throwaway => ".img,overlay=on",
        };
        format!("--disk path={stem}{more}")
    }

    /// The file that stays as it is.
    pub(crate) fn base(self, stem: &str) -> Option<String> {
        match self {
            Make::Backed => Some(format!("{stem}-base.qcow2")),
            Make::Kept | Make::Throwaway => Some(format!("{stem}.img")),
            _ => None,
        }
    }

    /// Turns what the guest has left into the raw image `STEM-after.img`. An image may have lost track of free clusters
    /// when its machine was ended (`qemu-img check` answers 3), but nothing else.
    pub(crate) fn after(self, stem: &str, torn: bool) -> Option<String> {
        let image = match self {
            Make::Raw | Make::Direct | Make::Queues | Make::Threads => {
                return Some(format!("mv {stem}.img {stem}-after.img"));
            }
            Make::Qcow2 | Make::Backed => format!("{stem}.qcow2"),
            Make::Kept => format!("{stem}-over.qcow2"),
            Make::Throwaway => return None,
        };
        let leaks = if torn { " || [ $? = 3 ]" } else { "" };
        Some(format!(
            "{{ qemu-img check -q {image}{leaks}; }} && qemu-img convert -O raw {image} {stem}-after.img"
        ))
    }
}

pub fn cases() -> Vec<Case> {
    let all =
        [Make::Direct, Make::Queues, Make::Threads, Make::Qcow2, Make::Backed, Make::Kept, Make::Throwaway];
    let churned = [Make::Raw]
        .into_iter()
        .chain(all)
        .map(|make| Case::new(format!("real::images::churn_{}", make.name()), move |room| churn(room, make)));
    let killed = [Make::Raw, Make::Threads, Make::Qcow2, Make::Kept].map(|make| {
        Case::new(format!("real::images::killed_{}", make.name()), move |room| killed(room, make))
    });
    churned.chain(killed).collect()
}

/// An ext4 file system of so many MiB in a disk of this make, and the sum of what must stay.
pub(crate) fn prepare(room: &mut Room<'_>, make: Make, stem: &str, mib: u64) -> Result<String, Stop> {
    room.shell(&format!(
        "mkdir d && echo by-the-host >d/given && truncate -s {mib}M {stem}.img && mkfs.ext4 -q -d d {stem}.img && \
         {}",
        make.prepare(stem)
    ))?
    .code(0)?;
    sum(room, make, stem)
}

/// The sum of what must stay of a disk of this make.
pub(crate) fn sum(room: &mut Room<'_>, make: Make, stem: &str) -> Result<String, Stop> {
    let Some(base) = make.base(stem) else { return Ok(String::new()) };
    Ok(room.shell(&format!("sha256sum <{base}"))?.code(0)?.text())
}

fn churn(room: &mut Room<'_>, make: Make) -> Verdict {
    let (kernel, initrd) = stock(Flavour::Cloud)?;
    let before = prepare(room, make, "disk", 64)?;
    let arguments = format!("{} --cmdline 'quiet test.do=churn'", make.flags("disk"));
    let output = boot(room, &kernel.bzimage(), &initrd, &arguments)?;
    output.code(0)?;
    expect(&output, "mounted", "by-the-host")?;
    expect(&output, "intact", "7")?;
    expect(&output, "trimmed", "yes")?;
    expect(&output, "unmounted", "yes")?;
    let sums = value(&output, "sums")?;
    if sum(room, make, "disk")? != before {
        return Err("the base of the overlay has changed".into());
    }
    if let Some(after) = make.after("disk", false) {
        room.shell(&after)?.code(0)?;
        room.shell("e2fsck -f -n disk-after.img")?.code(0)?;
        room.shell("debugfs -R 'dump sums copy' disk-after.img && sha256sum <copy")?
            .code(0)?
            .mentions(&sums)?;
        // The files as they are in the image, beside the sums that the guest took.
        let rest = "mkdir out && debugfs -R 'rdump / out' disk-after.img && cd out && sha256sum -c sums";
        room.shell(rest)?.code(0)?;
    }
    // And the next machine can use it.
    if make.base("disk").is_some() {
        let again = boot(room, &kernel.bzimage(), &initrd, &arguments)?;
        again.code(0)?;
        expect(&again, "intact", "7")?;
    }
    Ok(())
}

fn killed(room: &mut Room<'_>, make: Make) -> Verdict {
    let (kernel, initrd) = stock(Flavour::Cloud)?;
    let before = prepare(room, make, "disk", 64)?;
    let run = format!(
        "{} run {} --kernel {} --initrd {} --timeout 240s {} --cmdline 'quiet test.do=synced'",
        quote(&room.mayfly.display().to_string()),
        room.ground.options(),
        kernel.bzimage().display(),
        initrd.display(),
        make.flags("disk"),
    );
    // `kill -0` fails once mayfly has ended by itself, which is wrong.
    let output = room.shell(&format!(
        "{run} >out 2>err & pid=$!
         until grep -q '^synced=.' out; do kill -0 $pid || break; sleep 0.1; done
         kill -9 $pid; wait $pid; echo code=$?; cat out; cat err >&2"
    ))?;
    expect(&output, "code", "137")?;
    let kept = value(&output, "synced")?;
    if sum(room, make, "disk")? != before {
        return Err("the base of the overlay has changed".into());
    }
    let after = make.after("disk", true).ok_or("this make keeps nothing")?;
    room.shell(&after)?.code(0)?;
    // The first look replays the journal, the second finds nothing to mend.
    room.shell("e2fsck -p disk-after.img >/dev/null; e2fsck -f -n disk-after.img")?.code(0)?;
    room.shell("debugfs -R 'dump kept copy' disk-after.img && sha256sum <copy")?.code(0)?.mentions(&kept)?;
    Ok(())
}
