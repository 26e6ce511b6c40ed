//! Disks of every make under a file system: churned and found whole by the host; and what the guest had synced is there
//! when mayfly is ended with no time to say goodbye.

use super::{boot, expect, stock, value};
use crate::ground::quote;
use crate::harness::{Case, Room, Stop, Verdict};
use crate::kernels::Flavour;

/// How a disk is made.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Make {
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
    fn name(self) -> &'static str {
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

    /// Makes the image out of `disk.img`, a raw one.
    fn prepare(self) -> &'static str {
        match self {
            Make::Qcow2 => "qemu-img convert -O qcow2 disk.img disk.qcow2",
            Make::Backed => {
                "qemu-img convert -c -O qcow2 disk.img base.qcow2 && \
                 qemu-img create -q -f qcow2 -F qcow2 -b base.qcow2 disk.qcow2"
            }
            _ => "true",
        }
    }

    fn flag(self) -> &'static str {
        match self {
            Make::Raw => "path=disk.img",
            Make::Direct => "path=disk.img,direct=on",
            Make::Queues => "path=disk.img,queues=2 --cpus 2",
            Make::Threads => "path=disk.img,io=threads",
            Make::Qcow2 => "path=disk.qcow2,format=qcow2",
            Make::Backed => "path=disk.qcow2,format=qcow2,backing=on",
            Make::Kept => "path=disk.img,overlay=over.qcow2",
            Make::Throwaway => "path=disk.img,overlay=on",
        }
    }

    /// The file that stays as it is.
    fn base(self) -> Option<&'static str> {
        match self {
            Make::Backed => Some("base.qcow2"),
            Make::Kept | Make::Throwaway => Some("disk.img"),
            _ => None,
        }
    }

    /// Turns what the guest has left into the raw image `after.img`. An image may have lost track of free clusters when
    /// its machine was ended (`qemu-img check` answers 3), but nothing else.
    fn after(self, torn: bool) -> Option<String> {
        let image = match self {
            Make::Raw | Make::Direct | Make::Queues | Make::Threads => {
                return Some("mv disk.img after.img".into());
            }
            Make::Qcow2 | Make::Backed => "disk.qcow2",
            Make::Kept => "over.qcow2",
            Make::Throwaway => return None,
        };
        let leaks = if torn { " || [ $? = 3 ]" } else { "" };
        Some(format!("{{ qemu-img check -q {image}{leaks}; }} && qemu-img convert -O raw {image} after.img"))
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

/// An ext4 file system in a disk of this make, and the sum of what must stay.
fn prepare(room: &mut Room<'_>, make: Make) -> Result<String, Stop> {
    room.shell(
        "mkdir d && echo by-the-host >d/given && truncate -s 64M disk.img && mkfs.ext4 -q -d d disk.img",
    )?
    .code(0)?;
    room.shell(make.prepare())?.code(0)?;
    sum(room, make)
}

fn sum(room: &mut Room<'_>, make: Make) -> Result<String, Stop> {
    let Some(base) = make.base() else { return Ok(String::new()) };
    Ok(room.shell(&format!("sha256sum <{base}"))?.code(0)?.text())
}

fn churn(room: &mut Room<'_>, make: Make) -> Verdict {
    let (kernel, initrd) = stock(Flavour::Cloud)?;
    let before = prepare(room, make)?;
    let arguments = format!("--disk {} --cmdline 'quiet test.do=churn'", make.flag());
    let output = boot(room, &kernel.bzimage(), &initrd, &arguments)?;
    output.code(0)?;
    expect(&output, "mounted", "by-the-host")?;
    expect(&output, "intact", "7")?;
    expect(&output, "trimmed", "yes")?;
    expect(&output, "unmounted", "yes")?;
    let sums = value(&output, "sums")?;
    if sum(room, make)? != before {
        return Err("the base of the overlay has changed".into());
    }
    if let Some(after) = make.after(false) {
        room.shell(&after)?.code(0)?;
        room.shell("e2fsck -f -n after.img")?.code(0)?;
        room.shell("debugfs -R 'dump sums copy' after.img && sha256sum <copy")?.code(0)?.mentions(&sums)?;
        // The files as they are in the image, beside the sums that the guest took.
        let rest = "mkdir out && debugfs -R 'rdump / out' after.img && cd out && sha256sum -c sums";
        room.shell(rest)?.code(0)?;
    }
    // And the next machine can use it.
    if make.base().is_some() {
        let again = boot(room, &kernel.bzimage(), &initrd, &arguments)?;
        again.code(0)?;
        expect(&again, "intact", "7")?;
    }
    Ok(())
}

fn killed(room: &mut Room<'_>, make: Make) -> Verdict {
    let (kernel, initrd) = stock(Flavour::Cloud)?;
    let before = prepare(room, make)?;
    let run = format!(
        "{} run {} --kernel {} --initrd {} --timeout 90s --disk {} --cmdline 'quiet test.do=synced'",
        quote(&room.mayfly.display().to_string()),
        room.ground.options(),
        kernel.bzimage().display(),
        initrd.display(),
        make.flag(),
    );
    // `kill -0` fails once mayfly has ended by itself, which is wrong.
    let output = room.shell(&format!(
        "{run} >out 2>err & pid=$!
         until grep -q '^synced=.' out; do kill -0 $pid || break; sleep 0.1; done
         kill -9 $pid; wait $pid; echo code=$?; cat out; cat err >&2"
    ))?;
    expect(&output, "code", "137")?;
    let kept = value(&output, "synced")?;
    if sum(room, make)? != before {
        return Err("the base of the overlay has changed".into());
    }
    let after = make.after(true).ok_or("this make keeps nothing")?;
    room.shell(&after)?.code(0)?;
    // The first look replays the journal, the second finds nothing to mend.
    room.shell("e2fsck -p after.img >/dev/null; e2fsck -f -n after.img")?.code(0)?;
    room.shell("debugfs -R 'dump kept copy' after.img && sha256sum <copy")?.code(0)?.mentions(&kept)?;
    Ok(())
}
