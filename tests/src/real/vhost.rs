//! Cards and sockets whose rings the host's kernel works: everything passes, also after the guest's drivers have come and gone,
//! and a run that is killed leaves nothing of it behind.

use std::time::Duration;

use super::network::{driver, mayfly, same, serve};
use super::{expect, stock, value};
use crate::ground::quote;
use crate::harness::{Case, Room, Stop, Verdict};
use crate::initramfs;
use crate::kernels::Flavour;

const MODULES: [&str; 1] = ["vmw_vsock_virtio_transport"];

/// A file comes in over the tap and goes out again; streams go both ways over the sockets, and calls come in. Then the
/// drivers go and come, one while a program of the host holds a connection.
const SCRIPT: &str = r#"H=http://192.168.77.1:8000; rounds=2
sum() { $B sha256sum | $B cut -c1-64; }
up() {
  $B ip addr add 192.168.77.2/24 dev eth0; $B ip link set eth0 up
  n=0; until $B ping -c 1 -W 1 192.168.77.1 >/dev/null; do n=$((n + 1)); [ $n = 100 ] && return 1; $B usleep 100000; done
}
again() { n=0; until $B rmmod $1 2>/dev/null; do n=$((n + 1)); [ $n = 100 ] && return 1; $B usleep 50000; done; $B insmod /modules/$1.ko; }
$B ip link set lo up; up
echo pairs=$($B ls /sys/class/net/eth0/queues | $B grep -c rx)
echo down=$($B wget -q -O - $H/data | sum)
$B wget -q -O - $H/data | $B nc 192.168.77.1 8001 && echo up=sent
/bin/peer streams 2 | $B sed s/^/stream_/; /bin/peer echo 2; /bin/peer many 40
/bin/peer answer; /bin/peer answer & a=$!
until /bin/peer many 1 && [ -e /proc/$a ] && $B wget -q -O /dev/null $H/held; do $B usleep 100000; done
d=/sys/bus/virtio/drivers/vmw_vsock_virtio_transport; device=$($B basename $(echo $d/virtio[0-9]*))
echo $device >$d/unbind; echo $device >$d/bind; $B kill $a
n=0; until $B wget -q -O /dev/null $H/ended; do n=$((n + 1)); [ $n = 100 ] && break; $B usleep 100000; done 2>/dev/null
[ $n -lt 100 ] && echo heard=yes
round=0; while [ $round -lt $rounds ]; do
  round=$((round + 1))
  again virtio_net && up && [ "$($B wget -q -O - $H/small | sum)" = "$($B wget -q -O - $H/small | sum)" ] && cards=$round
  again vmw_vsock_virtio_transport && /bin/peer echo 1 >/last && sockets=$round
done
echo cards=$cards; echo sockets=$sockets
"#;

pub fn cases() -> Vec<Case> {
    // Each has a context ID of its own; ports are the host's for all, so one waits for the other.
    [("mmio", 33, "queues=1"), ("pci", 34, "queues=2")]
        .map(|(transport, cid, queues)| {
            let name = format!("real::vhost::frames_and_streams_{transport}");
            Case::new(name, move |room| carry(room, transport, cid, queues))
        })
        .into()
}

fn carry(room: &mut Room<'_>, transport: &str, cid: u32, queues: &str) -> Verdict {
    room.limit = Duration::from_secs(300);
    let (kernel, initrd) = stock(Flavour::Cloud)?;
    let more = room.dir.join("more.cpio");
    initramfs::write_more(&kernel, &more, "vhost", SCRIPT, &MODULES, &["peer"])?;
    let peer = quote(&initramfs::program_path("peer")?.display().to_string());
    let run = |word: &str| {
        let words = format!(
            "--cpus 2 --transport {transport} --initrd more.cpio --net tap=tap7,vhost=on,{queues} --vsock vhost=on,cid={cid} \
             --cmdline 'quiet {word}'"
        );
        mayfly(room, &kernel, &initrd, &words)
    };
    // The first is killed when it has the kernel's help; the second finds tap and context ID free.
    let before = format!(
        "{}
         [ -c /dev/vhost-net ] && [ -c /dev/vhost-vsock ] || {{ echo skipped=vhost; exit 0; }}
         exec 9>/run/vhost.lock; flock 9
         ip tuntap add tap7 mode tap multi_queue; ip addr add 192.168.77.1/24 dev tap7; ip link set tap7 up
         {} >/dev/null & k=$!
         until ls -l /proc/$k/fd 2>/dev/null | grep -q vhost-vsock || ! kill -0 $k; do sleep 0.1; done
         kill -9 $k; wait $k; echo killed=$?; echo left=$(grep -l \"^vhost-$k\" /proc/[0-9]*/comm 2>/dev/null | wc -l)
         f=/dev/shm/p.$$; mkfifo $f; ( {peer} serve vsock:{cid} 2 <>$f >peer.out & echo $! >pid )",
        driver()?,
        run("test.end=hang"),
    );
    let beside = format!(
        "{peer} call vsock:{cid} 40 >called; {peer} hold vsock:{cid} >held & h=$!
         until grep -q begun held; do sleep 0.1; done; echo >www/held; wait $h; echo >www/ended"
    );
    let after = "kill $(cat pid); rm -f $f; sed s/many/called/ called; cat held peer.out";
    let output = room.shell(&serve(3 << 20, "0.0.0.0", &before, &run("test.do=vhost"), &beside, after))?;
    if output.text().contains("skipped=vhost") {
        return Err(Stop::Skipped("this host has no vhost-net or no vhost-vsock".to_owned()));
    }
    output.code(0)?;
    expect(&output, "killed", "137")?;
    expect(&output, "left", "0")?;
    expect(&output, "pairs", queues.trim_start_matches("queues="))?;
    same(&output, "down", "data")?;
    expect(&output, "up", "sent")?;
    same(&output, "sent", "data")?;
    // Sums are of the same bytes, wherever they were taken.
    let sum = value(&output, "stream_up")?;
    if sum.len() != 16 {
        return Err(output.differs("a sum that both ends agree on"));
    }
    for key in ["stream_down", "echo", "given"] {
        expect(&output, key, &sum)?;
    }
    for (key, wanted) in [("many", "40"), ("called", "40"), ("cards", "2"), ("sockets", "2")] {
        expect(&output, key, wanted)?;
    }
    // While the guest goes on: by a reset, or in good order where the guest got that far.
    expect(&output, "heard", "yes")
}
