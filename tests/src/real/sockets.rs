//! Sockets between guest and host, both ways at once and by the hundred, and streams that arrive whole.

use super::{expect, stock, value};
use crate::ground::quote;
use crate::harness::{Case, Room, Verdict};
use crate::initramfs;
use crate::kernels::Flavour;

const MODULES: [&str; 1] = ["vmw_vsock_virtio_transport"];
const SCRIPT: &str =
    "word() { for w in $($B cat /proc/cmdline); do case $w in $1=*) echo ${w#*=};; esac; done; }
ulimit -n 20000
/bin/peer guest $(word test.count) $(word test.mib)
";

pub fn cases() -> Vec<Case> {
    let mut cases: Vec<Case> = Flavour::ALL
        .into_iter()
        .map(|flavour| {
            let name = format!("real::sockets::streams_{}", flavour.name());
            Case::new(name, move |room| talk(room, flavour, 200, 16, ""))
        })
        .collect();
    cases.push(Case::new("real::sockets::streams_cloud_pci", |room| {
        talk(room, Flavour::Cloud, 200, 16, "--transport pci")
    }));
    cases.push(Case::new("real::sockets::thousands_of_connections", |room| {
        talk(room, Flavour::Cloud, 3000, 1, "--cpus 2")
    }));
    cases.push(Case::new("real::sockets::left_by_a_killed_run", left_behind));
    cases
}

/// `count` connections each way at the same time, and `mib` MiB in each kind of stream.
fn talk(room: &mut Room<'_>, flavour: Flavour, count: u32, mib: u32, arguments: &str) -> Verdict {
    let (kernel, initrd) = stock(flavour)?;
    let more = room.dir.join("more.cpio");
    initramfs::write_more(&kernel, &more, "sockets", SCRIPT, &MODULES, &["peer"])?;
    let peer = initramfs::program_path("peer")?;
    let (peer, mayfly) = (quote(&peer.display().to_string()), quote(&room.mayfly.display().to_string()));
    let (kernel, initrd) = (kernel.bzimage(), initrd.display());
    let options = room.ground.options();
    let output = room.shell(&format!(
        "ulimit -n 20000; d=$(mktemp -d /dev/shm/s.XXXXXX); {peer} host $d/v.sock {count} {mib} >host & h=$!
         until grep -q = host; do sleep 0.1; done
         {mayfly} run {options} --kernel {} --initrd {initrd} --initrd more.cpio --memory 1G --timeout 100s \
           --vsock $d/v.sock {arguments} \
           --cmdline 'quiet test.do=sockets test.count={count} test.mib={mib}'; code=$?
         wait $h; echo host=$?; cat host; ls $d | grep -c '^v.sock$'; rm -rf $d; exit $code",
        kernel.display()
    ))?;
    output.code(0)?;
    let all = count.to_string();
    for (key, wanted) in [
        ("calls", all.as_str()),
        ("called", &all),
        ("refused", "true"),
        ("nobody", "true"),
        ("guest", "done"),
    ] {
        expect(&output, key, wanted)?;
    }
    // Sums are of the same bytes, wherever they were taken.
    let sum = value(&output, "up")?;
    if sum.len() != 16 {
        return Err(output.differs("a sum that both ends agree on"));
    }
    for key in ["down", "given", "echo"] {
        expect(&output, key, &sum)?;
    }
    output.mentions("\n0\n")?;
    Ok(())
}

/// A killed run leaves its socket; the next one replaces it, and refuses one that is in use.
fn left_behind(room: &mut Room<'_>) -> Verdict {
    let (kernel, initrd) = stock(Flavour::Cloud)?;
    let mayfly = quote(&room.mayfly.display().to_string());
    let run = format!(
        "{mayfly} run {} --kernel {} --initrd {} --timeout 60s --serial none --vsock $d/v.sock",
        room.ground.options(),
        kernel.bzimage().display(),
        initrd.display()
    );
    let output = room.shell(&format!(
        "d=$(mktemp -d /dev/shm/s.XXXXXX)
         {run} --cmdline test.end=hang & p=$!
         until [ -S $d/v.sock ]; do sleep 0.1; done
         {run}; echo second=$?
         kill -9 $p; wait $p 2>/dev/null; [ -S $d/v.sock ] && echo stale=yes
         {run} --cmdline quiet; echo third=$?
         ls $d | wc -l; rm -rf $d"
    ))?;
    output.code(0)?.complains("v.sock: another program listens there\n  hint: ")?;
    expect(&output, "stale", "yes")?;
    expect(&output, "third", "0")?;
    if value(&output, "second")? == "0" {
        return Err(output.differs("a second run that is refused"));
    }
    output.mentions("\n0\n")?;
    Ok(())
}
