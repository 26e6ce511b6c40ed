//! Guests that run, from the outside: in the background and by name, with commands, files and other settings while they do.

use std::path::Path;

use super::{expect, value};
use crate::ground::quote;
use crate::harness::{Case, Room, Stop, Verdict};
use crate::kernels::{Flavour, Kernel};

/// Programs in the RAM disk.
const PROGRAMS: &str = "sh cat echo true sleep id pwd sha256sum stty mkdir";

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("real::control::a_guest_in_the_background", background),
        Case::new("real::control::ends", ends),
    ]
}

/// What scripts begin with: `$M` is mayfly, `$V` a run of a guest.
fn prologue(room: &Room<'_>) -> Result<String, Stop> {
    let kernel = Kernel::fetch(Flavour::Cloud).map_err(Stop::Skipped)?;
    let initrd = room.dir.join("root.cpio");
    crate::initramfs::write_root(&initrd, PROGRAMS)?;
    let word = |path: &Path| quote(&path.display().to_string());
    Ok(format!(
        "export XDG_RUNTIME_DIR=$PWD\nM={}\nV=\"$M run {} --kernel {} --initrd {} --timeout 100s\"\n",
        word(room.mayfly),
        room.ground.options(),
        word(&kernel.bzimage()),
        word(&initrd)
    ))
}

/// One guest, and all that can be done with it.
fn background(room: &mut Room<'_>) -> Verdict {
    let prologue = prologue(room)?;
    let start = "truncate -s 1M d.img
        echo name=$($V -d --name box --disk d.img --balloon size=1M -- sh -c \
            'trap \"echo bye; exit 5\" TERM; echo started; echo err >&2; while :; do sleep 0.1; done')
        echo listed=$($M ps -q)
        ($M exec box -- sh -c 'sleep 0.3; exit 3'; echo a=$?) & ($M exec box -- sh -c 'exit 4'; echo b=$?) & wait
        echo streams=$(echo in | $M exec -e X=1 -w /tmp -u 12:34 box sh -c 'cat; echo $X; pwd; id -u; echo no >&2' 2>said)
        echo said=$(cat said)
        echo terminal=$($M exec -t box -- stty size </dev/null)
        $M exec box -- no-such-program 2>/dev/null; echo missing=$?";
    let output = room.shell(&format!("{prologue}{start}"))?;
    for (key, wanted) in [
        ("name", "box"),
        ("listed", "box"),
        ("a", "3"),
        ("b", "4"),
        ("streams", "in 1 /tmp 12"),
        ("said", "no"),
        ("terminal", "24 80"),
        ("missing", "127"),
    ] {
        expect(&output, key, wanted)?;
    }
    let change =
        "head -c 3000000 /dev/urandom >big; mkdir -p tree/sub; cp big tree/sub; ln -s sub/big tree/link
        echo sum=$(sha256sum <big)
        $M cp tree box:/tmp; echo there=$($M exec box -- sha256sum /tmp/tree/link)
        $M cp box:/tmp/tree/sub back; echo back=$(sha256sum back/big)
        $M cp box:/nope . 2>nope; echo nope=$?
        $M set box disk0 size=3M; echo sectors=$($M exec box -- cat /sys/block/vda/size)
        $M set box disk0 size=1M 2>shrink; echo shrink=$?
        $M set box balloon0 size=16M
        until $M inspect box --json | grep -q '\"actual_bytes\":16777216'; do sleep 0.1; done
        pid=$($M ps --json | sed 's/.*\"pid\":\\([0-9]*\\).*/\\1/')
        for fd in /proc/$pid/fd/*; do readlink $fd; done | grep ^/ | sort -u >open
        $M inspect box | sed -n 's/^  reaches   \\(.*\\) (.*)$/\\1/p' | grep ^/ | sort -u >told
        diff open told && grep -q /d.img told && echo objects=told";
    let output = room.shell(&format!("{prologue}{change}"))?;
    let sum = value(&output, "sum")?;
    let sum = sum.trim_end_matches(" -");
    if !value(&output, "there")?.starts_with(sum) || !value(&output, "back")?.starts_with(sum) {
        return Err(output.differs("the file as it was, there and back"));
    }
    for (key, wanted) in [("nope", "125"), ("sectors", "6144"), ("shrink", "2"), ("objects", "told")] {
        expect(&output, key, wanted)?;
    }
    let end = "echo stop=$($M stop box); echo wait=$($M wait box); $M logs box >out 2>err; echo out=$(cat out); echo err=$(head -n 1 err)
        echo kept=$($M ps -q)$($M ps -aq); echo rm=$($M rm box); echo left=$($M ps -aq)";
    let output = room.shell(&format!("{prologue}{end}"))?;
    output.code(0)?;
    for (key, wanted) in [
        ("stop", "box"),
        ("wait", "5"),
        ("out", "started bye"),
        ("err", "err"),
        ("kept", "box"),
        ("rm", "box"),
        ("left", ""),
    ] {
        expect(&output, key, wanted)?;
    }
    Ok(())
}

/// Guests that only wait, end by force, or leave nobody to clear up after them.
fn ends(room: &mut Room<'_>) -> Verdict {
    let prologue = prologue(room)?;
    let script = "$V -d --name lone --user 0 >/dev/null; echo hi=$($M exec lone -- echo hi)
        $V -d --name lone -- true 2>twice; echo twice=$?
        kill -9 $($M ps --json | sed 's/.*\"pid\":\\([0-9]*\\).*/\\1/')
        $M wait lone 2>/dev/null; echo lost=$?
        echo left=$($M ps -aq); ls -d mayfly /run/mayfly 2>/dev/null
        $M exec lone -- true 2>gone; echo gone=$?
        $V -d --kernel /nope -- true 2>unborn; echo unborn=$?
        $V --name front -- sh -c 'echo up; sleep 1000' >front.out & p=$!
        until grep -q up front.out; do sleep 0.1; done
        $M logs front 2>logs; echo logs=$?
        $M kill front >/dev/null; wait $p; echo killed=$?
        $V -d --name idle --user 0 >/dev/null; $M stop idle >/dev/null; echo idle=$($M wait idle); $M rm -f idle >/dev/null
        echo end=$($M ps -aq)";
    let output = room.shell(&format!("{prologue}{script}"))?;
    for (key, wanted) in [
        ("hi", "hi"),
        ("twice", "2"),
        ("lost", "125"),
        ("left", ""),
        ("gone", "125"),
        ("unborn", "125"),
        ("logs", "2"),
        ("killed", "137"),
        ("idle", "0"),
        ("end", ""),
    ] {
        expect(&output, key, wanted)?;
    }
    if output.text().contains("mayfly\n") {
        return Err(output.differs("no runtime directory when no VM is left"));
    }
    let output = room.shell("cat twice gone unborn")?;
    output.mentions("call the VM lone: there is a running VM of that name\n  hint: ")?;
    output.mentions("find the VM lone: there is none of that name\n  hint: ")?;
    output.mentions("open kernel /nope: No such file or directory")?;
    Ok(())
}
