//! Sockets between guest and host by the hundred thousand, one after another, and streams of a gibibyte.

use super::{LIMIT, WAYS};
use crate::ground::{Output, quote};
use crate::harness::{Case, Room, Stop, Verdict};
use crate::initramfs;
use crate::kernels::Flavour;
use crate::real::{expect, stock, value};

const MODULES: [&str; 1] = ["vmw_vsock_virtio_transport"];
const COUNT: &str = "100000";

pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (transport, flavour) in WAYS {
        cases.push(Case::new(format!("soak::sockets::calls_from_the_guest_{transport}"), move |room| {
            let output = talk(room, flavour, transport, &format!("many {COUNT}"), ":")?;
            expect(&output, "many", COUNT)
        }));
        cases.push(Case::new(format!("soak::sockets::calls_from_the_host_{transport}"), move |room| {
            let output = talk(room, flavour, transport, "answer", &format!("$peer call $d/v.sock {COUNT}"))?;
            expect(&output, "answer", "done")?;
            expect(&output, "many", COUNT)
        }));
        cases.push(Case::new(format!("soak::sockets::streams_of_a_gibibyte_{transport}"), move |room| {
            streams(room, flavour, transport)
        }));
    }
    cases
}

fn streams(room: &mut Room<'_>, flavour: Flavour, transport: &str) -> Verdict {
    let output = talk(room, flavour, transport, "streams 1024", ":")?;
    let sum = value(&output, "up")?;
    if sum.len() != 16 {
        return Err(output.differs("a sum that both ends agree on"));
    }
    expect(&output, "down", &sum)?;
    expect(&output, "given", &sum)
}

/// Runs `peer` with `words` in a guest, and `beside` on the ground meanwhile. No connection may be left over.
fn talk(
    room: &mut Room<'_>,
    flavour: Flavour,
    transport: &str,
    words: &str,
    beside: &str,
) -> Result<Output, Stop> {
    room.limit = LIMIT;
    let (kernel, initrd) = stock(flavour)?;
    let more = room.dir.join("more.cpio");
    let script = format!("/bin/peer {words}\n");
    initramfs::write_more(&kernel, &more, "sockets", &script, &MODULES, &["peer"])?;
    let peer = quote(&initramfs::program_path("peer")?.display().to_string());
    let mayfly = quote(&room.mayfly.display().to_string());
    let seconds = LIMIT.as_secs() - 20;
    let output = room.shell(&format!(
        "peer={peer}; d=$(mktemp -d /dev/shm/s.XXXXXX); mkfifo $d/hold; $peer serve $d/v.sock 1024 <>$d/hold >host & h=$!
         until grep -q host=ready host; do sleep 0.1; done
         {mayfly} run {} --kernel {} --initrd {} --initrd more.cpio --timeout {seconds}s --transport {transport} \
           --vsock $d/v.sock --metrics metrics --cmdline 'quiet test.do=sockets' & p=$!
         {beside}
         wait $p; code=$?
         kill $h; wait $h; cat host; rm -rf $d; tail -n 1 metrics; exit $code",
        room.ground.options(),
        kernel.bzimage().display(),
        initrd.display(),
    ))?;
    output.code(0)?;
    Ok(output)
}
