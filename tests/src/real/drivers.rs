//! Drivers that come and go while their devices are at work: unloaded and loaded again, torn from devices that have requests
//! in flight, and the transport itself taken away; after each of these all devices do their work.

use super::{expect, stock};
use crate::ground::quote;
use crate::harness::{Case, Room, Verdict};
use crate::initramfs;
use crate::kernels::Flavour;

const MODULES: [&str; 4] = ["virtio_balloon", "vmw_vsock_virtio_transport", "virtio_console", "virtiofs"];

/// For each device: its module, whether it works (`works_...`), and work that goes on in the background (`busy_...`).
const SCRIPT: &str = r#"word() { for w in $($B cat /proc/cmdline); do case $w in $1=*) echo ${w#*=};; esac; done; }
rounds=$(word test.rounds); transport=$(word test.transport)
sum() { $B sha256sum | $B cut -c1-64; }
wait_for() { n=0; until "$@"; do n=$((n + 1)); [ $n = 300 ] && return 1; $B usleep 20000; done; }
balloon() { $B awk '/^balloon_inflate/ {n += $2} /^balloon_deflate/ {n -= $2} END {print n / 256}' /proc/vmstat; }
filled() { [ $(balloon) = 16 ]; }
small=$(word test.small)
$B ip link set lo up

works_virtio_blk() {
  wait_for [ -b /dev/vda ] || return 1
  $B dd if=/dev/urandom of=/pattern bs=4k count=16 2>/dev/null
  $B dd if=/pattern of=/dev/vda bs=4k seek=$((512 + round % 100)) oflag=direct 2>/dev/null
  $B dd if=/dev/vda of=/back bs=4k skip=$((512 + round % 100)) count=16 iflag=direct 2>/dev/null
  $B cmp /pattern /back && [ $($B dd if=/dev/vda bs=64k count=32 iflag=direct 2>/dev/null | sum) = $(word test.disk) ]
}
works_virtio_net() {
  wait_for [ -e /sys/class/net/eth0 ] || return 1
  $B ip addr add 10.0.2.15/24 dev eth0; $B ip link set eth0 up
  [ "$($B wget -q -O - http://10.0.2.2:8000/small | sum)" = $small ]
}
works_virtio_rng() { [ $($B head -c 64 /dev/hwrng | $B wc -c) = 64 ]; }
works_virtio_balloon() { wait_for filled; }
works_vmw_vsock_virtio_transport() { /bin/peer echo 1 | $B grep -q '^echo=................$'; }
works_virtio_console() {
  wait_for [ -c /dev/hvc0 ] || return 1
  echo "line $((lines += 1))" >/dev/hvc0
}
works_virtiofs() {
  $B umount /torn 2>/dev/null
  $B mount -t virtiofs src /share && [ $(sum </share/small) = $small ]
  found=$?; $B umount /share && return $found
}

busy_virtio_blk() { while $B dd if=/dev/vda of=/dev/null bs=256k iflag=direct 2>/dev/null; do :; done; }
busy_virtio_net() { $B wget -q -O /dev/null http://10.0.2.2:8000/data; }
busy_virtio_rng() { $B cat /dev/hwrng >/dev/null; }
busy_virtio_balloon() { :; }
busy_vmw_vsock_virtio_transport() { /bin/peer streams 64 >/dev/null; }
busy_virtio_console() { :; }
busy_virtiofs() { $B mount -t virtiofs src /torn && while $B cat /torn/data >/dev/null; do :; done 2>/dev/null; }

all="virtio_blk virtio_net virtio_rng virtio_balloon vmw_vsock_virtio_transport virtio_console virtiofs"
$B mkdir /share /torn
lines=0; wrong=0
file() { case $1 in virtio_rng) echo virtio-rng;; *) echo $1;; esac; }
load() { $B insmod /modules/$(file $1).ko || echo "wrong=load $1 in round $round"; }
# A socket that has just been closed uses its driver until both ends know.
gone() { $B rmmod $1 2>/dev/null; }
unload() { wait_for gone $1 || echo "wrong=unload $1 in round $round"; }
try() { works_$1 && good=$((good + 1)) || echo "wrong=$1 $2 in round $round"; }
tear() {
  d=/sys/bus/virtio/drivers/$1
  busy_$1 & busy=$!
  $B usleep $((round * 7919 % 50000))
  device=$($B basename $(echo $d/virtio[0-9]*))
  echo $device >$d/unbind; echo $device >$d/bind
  $B kill $busy 2>/dev/null; $B killall peer dd wget cat 2>/dev/null; wait $busy 2>/dev/null
}
good=0; round=0
for m in $all; do try $m "at first"; done
while [ $round -lt $rounds ]; do
  round=$((round + 1))
  for m in $all; do unload $m; load $m; try $m reloaded; done
  for m in $all; do tear $m; try $m torn; done
  unload virtio_$transport; load virtio_$transport
  for m in $all; do try $m "on a new bus"; done
done
echo good=$good; echo lines=$lines
"#;

pub fn cases() -> Vec<Case> {
    [("mmio", Flavour::Cloud), ("pci", Flavour::Cloud)]
        .map(|(transport, flavour)| {
            let name = format!("real::drivers::come_and_go_{transport}");
            Case::new(name, move |room| come_and_go(room, flavour, transport, 1))
        })
        .into()
}

/// So many rounds of it over this transport.
pub(crate) fn come_and_go(room: &mut Room<'_>, flavour: Flavour, transport: &str, rounds: usize) -> Verdict {
    let (kernel, initrd) = stock(flavour)?;
    let more = room.dir.join("more.cpio");
    initramfs::write_more(&kernel, &more, "drivers", SCRIPT, &MODULES, &["peer"])?;
    let peer = quote(&initramfs::program_path("peer")?.display().to_string());
    let mayfly = quote(&room.mayfly.display().to_string());
    let seconds = room.limit.as_secs().saturating_sub(20);
    let inner = format!(
        "ip link set lo up; d=$(mktemp -d /dev/shm/r.XXXXXX); mkfifo $d/hold; mkdir www
         head -c 20M /dev/urandom >www/data; head -c 100000 /dev/urandom >www/small; head -c 4M /dev/urandom >disk.img
         busybox httpd -f -p 127.0.0.1:8000 -h www & h=$!
         {peer} serve $d/v.sock 1 <>$d/hold >host & p=$!
         until grep -q host=ready host; do sleep 0.1; done
         {mayfly} run {} --kernel {} --initrd {} --initrd more.cpio --memory 512M --timeout {seconds}s --transport {transport} \
           --disk disk.img --net user,loopback=on,allow=10.0.2.2:8000 --vsock $d/v.sock --balloon size=16M \
           --console file=hvc0 --share path=www,tag=src,readonly=on --cmdline \"loglevel=5 test.do=drivers test.rounds={rounds} test.transport={transport} \
           test.small=$(sha256sum <www/small | cut -c1-64) test.disk=$(head -c 2M disk.img | sha256sum | cut -c1-64)\"
         s=$?; kill $h $p; wait; echo heard=$(grep -c ^line hvc0); rm -r $d; exit $s",
        room.ground.options(),
        kernel.bzimage().display(),
        initrd.display(),
    );
    let output = room.shell(&format!("unshare -n sh -c {}", quote(&inner)))?;
    output.code(0)?;
    if output.text().lines().any(|line| line.starts_with("wrong=")) {
        return Err(output.differs("no line wrong=..."));
    }
    expect(&output, "good", &(7 + rounds * 21).to_string())?;
    let lines = (1 + rounds * 3).to_string();
    expect(&output, "lines", &lines)?;
    expect(&output, "heard", &lines)?;
    super::boots::healthy(&output)
}
