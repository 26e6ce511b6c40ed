//! Commands in whole systems that know nothing of mayfly: a Debian with its own systemd, and apt over this machine's own files.

use super::{LIMIT, debian};
use crate::ground::quote;
use crate::harness::{Case, Room, Stop, Verdict};
use crate::real::expect;
use crate::real::inside::run;

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("soak::injected::command_in_a_debian_with_systemd", systemd),
        Case::new("soak::injected::apt_over_the_hosts_own_root", apt),
    ]
}

/// The image's own systemd is process 1, the command one of its services, when the system is up; it ends in good order, and the image
/// is as it was.
fn systemd(room: &mut Room<'_>) -> Verdict {
    room.limit = LIMIT;
    let image = debian()?;
    let root = format!(
        "--systemd --root {} --timeout 800s --memory 1G --net user",
        quote(&image.display().to_string())
    );
    let sum = format!("sha256sum <{}", quote(&image.display().to_string()));
    let before = room.shell(&sum)?.code(0)?.text();
    let script = "echo init=$(cat /proc/1/comm); echo unit=$(systemctl is-active multi-user.target)
        echo cgroup=$(cat /proc/self/cgroup); echo failed=$(systemctl list-units --failed --no-legend | wc -l)
        echo route=$(grep -c eth0 /proc/net/route); echo in=$(cat); echo new >/etc/written
        systemd-run --wait --pipe echo ran=yes; exit 9";
    let line = crate::real::inside::line(
        room,
        &format!("{root} --export-changes out.tar"),
        &format!("sh -c {}", quote(script)),
    )?;
    let output = room.shell(&format!("echo typed | {line}"))?;
    output.code(9)?;
    for (key, wanted) in [
        ("init", "systemd"),
        ("unit", "active"),
        ("cgroup", "0::/system.slice/mayfly.service"),
        ("failed", "0"),
        ("in", "typed"),
        ("ran", "yes"),
    ] {
        expect(&output, key, wanted)?;
    }
    room.shell("tar xOf out.tar etc/written")?.says("new\n")?;
    if room.shell(&sum)?.code(0)?.text() != before {
        return Err(Stop::Failed("the image has changed".into()));
    }
    // One that does not come up says so.
    let output = run(room, &format!("{root} --cmdline systemd.unit=emergency.target"), "true")?;
    output
        .code(125)?
        .complains("error: set up the guest: start the system: the system came up in rescue or emergency")?;
    room.shell("mkdir -p none/bin && cp /bin/busybox none/bin/sh")?.code(0)?;
    run(room, "--systemd --root none", "true")?
        .code(125)?
        .complains("error: set up the guest: start systemd: the root has none")
        .map(drop)
}

/// apt installs a package of this directory over this machine's own files, with all its own looks at what is installed.
fn apt(room: &mut Room<'_>) -> Verdict {
    room.limit = LIMIT;
    room.shell(
        "mkdir -p p/DEBIAN && printf 'Package: mayfly-test\\nVersion: 1.0\\nArchitecture: all\\nMaintainer: nobody <nobody@example.org>\\nDescription: a test\\n' \
         >p/DEBIAN/control && dpkg-deb --root-owner-group -b p test.deb >/dev/null",
    )?
    .code(0)?;
    let script = "apt-get install -y $PWD/test.deb >log 2>&1 || { cat log; exit 1; }; echo status=$(dpkg-query -W -f '${db:Status-Abbrev}' mayfly-test)";
    let output = run(room, "--memory 1G --timeout 600s", &format!("sh -c {}", quote(script)))?;
    output.code(0)?;
    expect(&output, "status", "ii")?;
    room.shell("dpkg-query -W mayfly-test 2>&1")?.mentions("no packages found")?;
    Ok(())
}
