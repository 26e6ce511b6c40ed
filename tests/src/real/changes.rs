//! What a guest changes of its root: kept in a file that is a layer of an image, and nothing of it on the host.

use super::inside::run;
use super::{expect, value};
use crate::ground::quote;
use crate::harness::{Case, Room, Stop, Verdict};

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("real::changes::exported", exported),
        Case::new("real::changes::package_in_the_hosts_own_root", package),
    ]
}

/// Files, links, modes, owners, attributes and deletions arrive, also when the command failed; over the same root the layer
/// makes what the guest had. A large file is not held in memory.
fn exported(room: &mut Room<'_>) -> Verdict {
    room.shell(
        "mkdir -p root/bin root/data/old root/data/kept && cp /bin/busybox root/bin/sh && cd root/data && \
         echo 1 >old/x && echo 2 >kept/y && echo 3 >gone && cd ../bin && \
         for p in ln rm mkdir chown chmod mknod dd truncate sha256sum mv touch; do ln -s sh $p; done",
    )?
    .code(0)?;
    let script =
        "cd /data; echo changed >kept/y; rm gone; rm -r old; mkdir old; echo new >old/z; ln kept/y kept/again
        ln -s /nowhere link; mkdir -p a/b; chown 1234:5678 a/b; chmod 2711 a/b; mknod fifo p
        dd if=/dev/urandom of=large bs=1M count=40 2>/dev/null; sha256sum large; exit 3";
    let peak = "--json=result --export-changes out.tar --root root";
    let output = run(room, peak, &format!("sh -c {}", quote(script)))?;
    output.code(3)?;
    let sum = output.text();
    let listed = room.shell("tar tvf out.tar | awk '{print $1, $2, $6, $7, $8}' | sed 's/ *$//'; ls -A")?;
    listed.code(0)?;
    for line in [
        "prw-r--r-- 0/0 data/fifo",
        "drwx--s--x 1234/5678 data/a/b/",
        "lrwxrwxrwx 0/0 data/link -> /nowhere",
        "hrw-r--r-- 0/0 data/kept/y link to",
        "---------- 0/0 data/.wh.gone",
        "---------- 0/0 data/old/.wh..wh..opq",
        "-rw-r--r-- 0/0 data/old/z",
        "-rw-r--r-- 0/0 data/large",
        "out.tar\nresult\nroot",
    ] {
        listed.mentions(&format!("{line}\n"))?;
    }
    if listed.text().contains("data/old/x") || listed.text().contains("bin") {
        return Err(listed.differs("what was changed alone"));
    }
    room.shell("tar xOf out.tar data/large | sha256sum | sed 's/-/large/'")?.says(&sum)?;
    room.shell("cat root/data/kept/y root/data/gone; ls root/data root/data/old")?
        .says("2\n3\nroot/data:\ngone\nkept\nold\n\nroot/data/old:\nx\n")?;
    // A guest that is lost has told nothing, and the file that was there stays.
    let crash = "sh -c 'echo c >/proc/sysrq-trigger'";
    run(room, "--export-changes out.tar --root root", crash)?.code(120)?;
    room.shell("tar tf out.tar data/large && ls -A")?.says("data/large\nout.tar\nresult\nroot\n")?;
    run(room, "--export-changes no/out.tar --root root", "true")?
        .code(125)?
        .complains("error: export changes to ")
        .map(drop)
}

/// A package is installed over this machine's own files, and leaves them as they are.
fn package(room: &mut Room<'_>) -> Verdict {
    room.shell(
        "mkdir -p p/DEBIAN p/usr/share/mayfly-test && echo by-the-package >p/usr/share/mayfly-test/file && \
         printf 'Package: mayfly-test\\nVersion: 1.0\\nArchitecture: all\\nMaintainer: nobody <nobody@example.org>\\nDescription: a test\\n' >p/DEBIAN/control && \
         printf '#!/bin/sh\\necho configured >/etc/mayfly-test\\n' >p/DEBIAN/postinst && chmod 755 p/DEBIAN/postinst && \
         dpkg-deb --root-owner-group -b p test.deb >/dev/null",
    )?
    .code(0)?;
    let sums = "find /etc /var/lib/dpkg -xdev -type f | LC_ALL=C sort | xargs sha256sum | sha256sum; stat -c '%Y %n' /etc /var/lib/dpkg /usr/share";
    let before = room.shell(sums)?.code(0)?.text();
    let script = "dpkg -i test.deb >log 2>&1 || { cat log; exit 1; }
        echo file=$(cat /usr/share/mayfly-test/file); echo configured=$(cat /etc/mayfly-test)
        echo status=$(dpkg-query -W -f '${db:Status-Abbrev}' mayfly-test); sync";
    let output = run(room, "--memory 1G --export-changes out.tar", &format!("sh -c {}", quote(script)))?;
    output.code(0)?;
    expect(&output, "file", "by-the-package")?;
    expect(&output, "configured", "configured")?;
    expect(&output, "status", "ii")?;
    let after = room.shell(sums)?.code(0)?.text();
    if after != before {
        return Err(Stop::Failed(format!(
            "the host's own files have changed: before {before}, after {after}"
        )));
    }
    let listed = room.shell("tar tf out.tar; ls /usr/share/mayfly-test /etc/mayfly-test 2>&1 | grep -c 'No such' | sed 's/^/absent=/'")?;
    listed
        .mentions("usr/share/mayfly-test/file\n")?
        .mentions("etc/mayfly-test\n")?
        .mentions("var/lib/dpkg/status\n")?;
    value(&listed, "absent").and_then(|_| expect(&listed, "absent", "2"))
}
