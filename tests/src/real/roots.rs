//! Roots of commands: this machine's own, a directory, a disk image, and volumes in them; what is written there goes
//! where it was said to, and the verdict on the kernel.

use super::{expect, value};
use crate::ground::{Output, quote};
use crate::harness::{Case, Room, Stop, Verdict};
use crate::kernels::{Flavour, Kernel};

pub fn cases() -> Vec<Case> {
    let mut cases: Vec<Case> = Flavour::ALL
        .into_iter()
        .map(|flavour| {
            Case::new(format!("real::roots::this_machine_{}", flavour.name()), move |room| own(room, flavour))
        })
        .collect();
    cases.push(Case::new("real::roots::directory", directory));
    cases.push(Case::new("real::roots::image", image));
    cases.push(Case::new("real::roots::volumes", volumes));
    cases.push(Case::new("real::roots::modules_that_are_missing", missing));
    cases.push(Case::new("real::verdict::memory_ran_out", memory_ran_out));
    cases.push(Case::new("real::verdict::what_programs_say_is_none", told));
    cases
}

/// The command line, as shell text, of a run of `command` (shell text too).
pub(crate) fn line(
    room: &Room<'_>,
    flavour: Flavour,
    arguments: &str,
    command: &str,
) -> Result<String, Stop> {
    let kernel = Kernel::fetch(flavour).map_err(Stop::Skipped)?;
    let mayfly = quote(&room.mayfly.display().to_string());
    let kernel = quote(&kernel.bzimage().display().to_string());
    let options = room.ground.options();
    Ok(format!("{mayfly} run {options} --kernel {kernel} --timeout 100s {arguments} -- {command}"))
}

pub(crate) fn run(room: &mut Room<'_>, arguments: &str, command: &str) -> Result<Output, Stop> {
    let line = line(room, Flavour::Cloud, arguments, command)?;
    room.shell(&line)
}

/// The files of this machine are there, in this directory; what is written stays in the guest.
fn own(room: &mut Room<'_>, flavour: Flavour) -> Verdict {
    room.shell("echo before >file && mkdir sub && echo kept >sub/kept && find . -type f | sort | xargs sha256sum >../sums")?
        .code(0)?;
    let command = "sh -c 'echo dir=$PWD; echo file=$(cat file); echo after >file; echo now=$(cat file); rm sub/kept; \
                   echo new >/etc/mayfly-was-here && echo written=$(cat /etc/mayfly-was-here); echo user=$(id -u); \
                   echo here=$HERE; echo os=$(uname -r); mkfifo f && echo fifo=yes'";
    let line = line(room, flavour, "", command)?;
    let output = room.shell(&format!("HERE=set {line}"))?;
    output.code(0)?;
    let release = Kernel::fetch(flavour).map_err(Stop::Skipped)?.release;
    let dir = room.dir.display().to_string();
    for (key, wanted) in [
        ("dir", dir.as_str()),
        ("file", "before"),
        ("now", "after"),
        ("written", "new"),
        ("user", "0"),
        ("here", "set"),
        ("os", &release),
        ("fifo", "yes"),
    ] {
        expect(&output, key, wanted)?;
    }
    let after = room.shell(
        "sha256sum --quiet -c ../sums && echo unchanged=yes; ls | tr '\\n' ' ' | sed 's/^/left=/'; echo
         ls /etc/mayfly-was-here 2>&1 | grep -c 'No such' | sed 's/^/absent=/'; rm ../sums",
    )?;
    expect(&after, "unchanged", "yes")?;
    expect(&after, "left", "file sub")?;
    expect(&after, "absent", "1")
}

/// A directory with nothing but a program and a user.
fn directory(room: &mut Room<'_>) -> Verdict {
    room.shell(
        "mkdir -p root/bin root/etc && cp /bin/busybox root/bin/sh && echo by-the-host >root/given && \
         echo ann:x:1000:1001::/home/ann: >root/etc/passwd",
    )?
    .code(0)?;
    let output = run(
        room,
        "--root root",
        "sh -c 'echo dir=$(pwd); echo home=$HOME; read g </given; echo given=$g; echo x >/given; read g </given; \
         echo now=$g; echo all=$(echo /*)'",
    )?;
    output.code(0)?;
    for (key, wanted) in [
        ("dir", "/"),
        ("home", "/root"),
        ("given", "by-the-host"),
        ("now", "x"),
        ("all", "/bin /dev /etc /given /proc /run /sys /tmp"),
    ] {
        expect(&output, key, wanted)?;
    }
    room.shell("cat root/given; ls root")?.says("by-the-host\nbin\netc\ngiven\n")?;
    run(room, "--root root --user ann", "sh -c 'echo home=$HOME'")?
        .code(0)?
        .says("home=/home/ann\n")
        .map(drop)
}

/// The file system on an image, which stays as it is.
fn image(room: &mut Room<'_>) -> Verdict {
    room.shell(
        "mkdir -p d/bin && cp /bin/busybox d/bin/sh && echo by-the-host >d/given && truncate -s 32M root.img && \
         mkfs.ext4 -q -d d root.img && sha256sum root.img >sum",
    )?
    .code(0)?;
    let script = "sh -c 'read g </given; echo given=$g; echo x >/given && read g </given; echo now=$g'";
    let output = run(room, "--root root.img", script)?;
    output.code(0)?;
    expect(&output, "given", "by-the-host")?;
    expect(&output, "now", "x")?;
    room.shell("sha256sum --quiet -c sum")?.code(0)?;
    // The kernel knows what this is, and finds its first group of blocks nowhere.
    room.shell(
        "truncate -s 0 bad.img && truncate -s 32M bad.img && mkfs.ext4 -q -b 4096 bad.img && \
         dd if=/dev/zero of=bad.img bs=64 seek=64 count=1 conv=notrunc status=none && truncate -s 1M none.img",
    )?
    .code(0)?;
    let told = "error: set up the guest: mount /dev/vda at /.root: ";
    run(room, "--root bad.img", "true")?
        .code(125)?
        .complains(&format!("{told}as ext4: Structure needs cleaning"))?;
    run(room, "--root none.img", "true")?
        .code(125)?
        .complains(&format!("{told}it has no file system that this kernel knows\n"))
        .map(drop)
}

/// Read-only, copied on write, and written through.
fn volumes(room: &mut Room<'_>) -> Verdict {
    let made =
        room.shell("d=$(mktemp -d /dev/shm/volumes.XXXXXX); mkdir $d/ro $d/rw $d/cow $d/same; echo at=$d")?;
    let place = value(&made, "at")?;
    let arguments = format!(
        "--volume {place}/ro:/mnt/a/ro:ro --volume {place}/rw:/mnt/a/rw --volume {place}/cow:/mnt/cow:cow --rw {place}/same"
    );
    let output = run(
        room,
        &arguments,
        &format!(
            "sh -c 'for d in /mnt/a/ro /mnt/a/rw /mnt/cow {place}/same; do echo $d >$d/f && echo wrote=$d=$(cat $d/f); done'"
        ),
    )?;
    output.code(0)?;
    for place in ["/mnt/a/rw", "/mnt/cow", &format!("{place}/same")] {
        output.mentions(&format!("wrote={place}={place}\n"))?;
    }
    if output.text().contains("wrote=/mnt/a/ro") {
        return Err(output.differs("a read-only volume that refuses writes"));
    }
    let after = room.shell(&format!("cd {place} && cat rw/f same/f; ls ro cow; cd /; rm -rf {place}"))?;
    after.says(&format!("/mnt/a/rw\n{place}/same\ncow:\n\nro:\n")).map(drop)
}

/// A kernel whose modules are nowhere is told before the boot.
fn missing(room: &mut Room<'_>) -> Verdict {
    let kernel = Kernel::fetch(Flavour::Cloud).map_err(Stop::Skipped)?;
    let boot = kernel.bzimage();
    let boot = quote(&boot.parent().unwrap_or(&boot).display().to_string());
    room.shell(&format!("mkdir k && cp {boot}/vmlinuz-* {boot}/config-* k"))?.code(0)?;
    let mayfly = quote(&room.mayfly.display().to_string());
    let options = room.ground.options();
    let output = room.shell(&format!("{mayfly} run {options} --kernel k/vmlinuz-* -- true"))?;
    output
        .code(125)?
        .complains("virtio_mmio is a module and not found in ")?
        .complains("CONFIG_VIRTIO_MMIO=y\n")?;
    Ok(())
}

/// A command that succeeds on a kernel that killed for lack of memory has not: unless that is expected.
fn memory_ran_out(room: &mut Room<'_>) -> Verdict {
    let command = "sh -c 'cd /sys/fs/cgroup && echo +memory >cgroup.subtree_control && mkdir g && echo 8M >g/memory.max \
                   && (echo 0 >g/cgroup.procs; exec tail /dev/zero); echo done'";
    let output = run(room, "--json=result", command)?;
    output.code(121)?.says("done\n")?;
    output.complains("error: judge the guest's kernel: Memory cgroup out of memory: Killed process")?;
    room.shell("cat result")?.mentions(
        "\"exit_code\":0,\"signal\":null,\"healthy\":false,\"findings\":[{\"kind\":\"out-of-memory\"",
    )?;
    run(room, "--allow 'cgroup out of memory'", command)?.code(0)?.says("done\n").map(drop)
}

/// What user space writes, on the console or into the kernel's log, is no complaint of the kernel's.
fn told(room: &mut Room<'_>) -> Verdict {
    let command = "sh -c 'for f in /dev/kmsg /dev/console; do echo \"BUG: unable to handle page fault [#1]\" >$f; done'";
    run(room, "", command)?.code(0).map(drop)
}
