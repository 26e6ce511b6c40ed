//! Network cards: a stock kernel's own driver and stack on the NAT and on a tap, against servers on the ground.

use std::path::Path;
use std::time::Duration;

use super::{expect, stock};
use crate::ground::{Output, quote};
use crate::harness::{Case, Room, Stop, Verdict};
use crate::initramfs;
use crate::kernels::{Flavour, Kernel};

pub fn cases() -> Vec<Case> {
    let mut cases: Vec<Case> = Flavour::ALL.into_iter().map(|flavour| nat(flavour, "mmio")).collect();
    cases.push(nat(Flavour::Cloud, "pci"));
    cases.push(Case::new("real::network::tap_of_its_own", |room| tap(room, Tap::Own)));
    cases.push(Case::new("real::network::tap_that_stays", |room| tap(room, Tap::Named)));
    cases.push(Case::new("real::network::tap_without_rights", refused));
    cases
}

/// What takes longer.
pub fn soak() -> Vec<Case> {
    vec![
        Case::new("soak::network::hundred_mebibytes_through_the_nat", |room| bulk(room, &Bulk::NAT)),
        Case::new("soak::network::hundred_mebibytes_through_a_tap", |room| bulk(room, &Bulk::TAP)),
    ]
}

/// Bytes of the files that are fetched.
const LARGE: u32 = 12 << 20;
const SMALL: u32 = 200_000;

/// A network of the ground's own for one case, with its loopback up: servers there meet nobody else's.
const ALONE: &str = "unshare -n sh -c";

/// Starts servers on `address`: files at port 8000, and at port 8001 one that takes a stream (its own input never ends, or
/// it would end the stream; no FIFO can be made in a shared directory of the emulated host). Then `run` with its
/// output in `out`, with `beside` going on meanwhile.
fn script(address: &str, before: &str, run: &str, beside: &str, after: &str) -> String {
    serve(LARGE, address, before, run, beside, after)
}

/// The same with a large file of so many bytes.
pub(super) fn serve(large: u32, address: &str, before: &str, run: &str, beside: &str, after: &str) -> String {
    let inner = format!(
        "ip link set lo up; mkdir -p www; head -c {large} /dev/urandom >www/data; head -c {SMALL} /dev/urandom >www/small
         {before}
         busybox httpd -f -p {address}:8000 -h www & h=$!
         busybox httpd -f -p [::1]:8000 -h www & g=$!
         hold=/dev/shm/hold.$$; mkfifo $hold; busybox nc -l -p 8001 >up <>$hold & n=$!
         ( {beside} ) & b=$!
         {run} >out 2>err; s=$?
         kill $b 2>/dev/null; kill $h $g $n 2>/dev/null; wait; rm -f $hold
         cat out; cat err >&2
         echo data=$(sha256sum <www/data | cut -c1-64); echo small=$(sha256sum <www/small | cut -c1-64)
         echo sent=$(sha256sum <up | cut -c1-64); echo published=$(cat published 2>/dev/null | head -n 1)
         {after}
         exit $s"
    );
    format!("{ALONE} {}", quote(&inner))
}

pub(super) fn mayfly(room: &Room<'_>, kernel: &Kernel, initrd: &Path, arguments: &str) -> String {
    format!(
        "{} run {} --kernel {} --initrd {} --timeout {}s {arguments}",
        room.mayfly.display(),
        room.ground.options(),
        kernel.bzimage().display(),
        initrd.display(),
        // The servers need some of it, before and after.
        room.limit.as_secs().saturating_sub(20),
    )
}

/// The guest got what the ground has, and the other way round.
pub(super) fn same(output: &Output, theirs: &str, ours: &str) -> Verdict {
    let wanted = super::value(output, ours)?;
    expect(output, theirs, &wanted)
}

fn nat(flavour: Flavour, transport: &'static str) -> Case {
    Case::new(format!("real::network::nat_{}_{transport}", flavour.name()), move |room| {
        let (kernel, initrd) = stock(flavour)?;
        let net = "user,loopback=on,dns=127.0.0.1,publish=8080:80,allow=10.0.2.2:8000,allow=10.0.2.2:8001,\
                   allow=fd6d:6179:666c:7900::2";
        let run = mayfly(
            room,
            &kernel,
            &initrd,
            &format!("--transport {transport} --net {net} --cmdline 'quiet test.do=nat'"),
        );
        // Before somebody listens in the guest, it resets the connection.
        let beside = "until busybox nc 127.0.0.1 8080 </dev/null >published 2>/dev/null && [ -s published ]; do sleep 0.3; done";
        let output = room.shell(&script("127.0.0.1", "", &run, beside, ""))?;
        output.code(0)?;
        expect(&output, "address", "10.0.2.15/24")?;
        expect(&output, "resolver", "nameserver 10.0.2.2")?;
        same(&output, "down", "data")?;
        expect(&output, "many", "40")?;
        same(&output, "v6", "small")?;
        expect(&output, "ping", "yes")?;
        expect(&output, "served", "yes")?;
        expect(&output, "published", "#!/bin/busybox sh")?;
        expect(&output, "up", "sent")?;
        same(&output, "sent", "data")
    })
}

enum Tap {
    Own,
    Named,
}

/// The tun driver, where it is not there yet. Debian has it as a module.
pub(super) fn driver() -> Result<String, Stop> {
    let kernel = Kernel::fetch(Flavour::Generic).map_err(Stop::Skipped)?;
    let files = kernel.modules(&["tun"]).map_err(Stop::Skipped)?;
    let load = files.iter().map(|file| format!("insmod {} 2>/dev/null;", file.display()));
    Ok(format!("[ -c /dev/net/tun ] && [ -e /sys/class/misc/tun ] || {{ {} }}", load.collect::<String>()))
}

fn tap(room: &mut Room<'_>, which: Tap) -> Verdict {
    let (kernel, initrd) = stock(Flavour::Cloud)?;
    let load = driver()?;
    let (before, net, beside, after) = match which {
        // It appears when the machine starts, and nobody can give it an address before.
        Tap::Own => (
            "",
            "tap,vhost=off",
            "until ip addr add 192.168.77.1/24 dev mayfly0 2>/dev/null; do sleep 0.1; done",
            "echo left=$(ip -o link show mayfly0 2>/dev/null | wc -l)",
        ),
        Tap::Named => (
            "ip tuntap add tap7 mode tap multi_queue && ip addr add 192.168.77.1/24 dev tap7 && ip link set tap7 up",
            "tap=tap7,queues=2,vhost=off",
            "true",
            "echo left=$(ip -o link show tap7 2>/dev/null | wc -l)",
        ),
    };
    let run = mayfly(room, &kernel, &initrd, &format!("--cpus 2 --net {net} --cmdline 'quiet test.do=tap'"));
    let output = room.shell(&script("0.0.0.0", &format!("{load}\n{before}"), &run, beside, after))?;
    output.code(0)?;
    same(&output, "down", "data")?;
    expect(&output, "up", "sent")?;
    same(&output, "sent", "data")?;
    match which {
        Tap::Own => expect(&output, "left", "0"),
        Tap::Named => expect(&output, "left", "1").and_then(|()| expect(&output, "queues", "2")),
    }
}

/// A way to move a lot.
struct Bulk {
    /// How the guest's card comes up, and where it then finds the ground.
    up: &'static str,
    to: &'static str,
    /// Where servers listen, and what the card is.
    at: &'static str,
    before: &'static str,
    net: &'static str,
    /// How many connections there are at the same time: the server itself resets more where nobody takes them in for it.
    crowd: u32,
}

impl Bulk {
    const NAT: Bulk = Bulk {
        up: "$B udhcpc -q -n -i eth0 -s /bin/lease >/dev/null 2>&1",
        to: "10.0.2.2",
        at: "127.0.0.1",
        before: "",
        net: "user,loopback=on",
        crowd: 200,
    };
    const TAP: Bulk = Bulk {
        up: "$B ip addr add 192.168.77.2/24 dev eth0",
        to: "192.168.77.1",
        at: "0.0.0.0",
        before: "ip tuntap add tap7 mode tap; ip addr add 192.168.77.1/24 dev tap7; ip link set tap7 up",
        net: "tap=tap7",
        crowd: 8,
    };
}

/// 100 MiB into the guest; many connections at the same time; 100 MiB in and out again at the same time. What the guest
/// has counted and sent back is what the ground has.
fn bulk(room: &mut Room<'_>, way: &Bulk) -> Verdict {
    room.limit = Duration::from_secs(400);
    let (kernel, initrd) = stock(Flavour::Cloud)?;
    let Bulk { up, to, at, before, net, crowd } = way;
    let more = room.dir.join("more.cpio");
    let words = format!(
        "$B mkdir -p /etc /got; $B ip link set lo up; $B ip link set eth0 up; {up}; H=http://{to}:8000
         until $B wget -q -O /dev/null $H/small; do $B usleep 200000; done
         echo down=$($B wget -q -O - $H/data | $B sha256sum | $B cut -c1-64)
         n=0; while [ $n -lt {crowd} ]; do n=$((n+1)); $B wget -q -O - $H/small | $B sha256sum >/got/$n & done; wait
         echo kinds=$($B cat /got/* | $B sort -u | $B wc -l); echo many=$($B cat /got/* | $B sort -u | $B cut -c1-64)
         $B wget -q -O - $H/data | $B nc {to} 8001 && echo up=sent"
    );
    initramfs::write_more(&kernel, &more, "bulk", &words, &[], &[])?;
    let options = "--initrd more.cpio --memory 512M --cmdline 'quiet test.do=bulk'";
    let run = mayfly(room, &kernel, &initrd, &format!("--net {net} {options}"));
    let output = room.shell(&serve(100 << 20, at, &format!("{}\n{before}", driver()?), &run, "true", ""))?;
    output.code(0)?;
    same(&output, "down", "data")?;
    expect(&output, "kinds", "1")?;
    same(&output, "many", "small")?;
    expect(&output, "up", "sent")?;
    same(&output, "sent", "data")
}

/// Who may not make a tap is told what to do instead.
fn refused(room: &mut Room<'_>) -> Verdict {
    let (kernel, initrd) = stock(Flavour::Cloud)?;
    let run = mayfly(room, &kernel, &initrd, "--net tap=tap9");
    // Root without its capabilities.
    let output = room.shell(&format!("{}; setpriv --bounding-set -all --inh-caps -all {run}", driver()?))?;
    output.code(125)?;
    output.complains("error: open tap tap9 for net0: Operation not permitted")?;
    output.complains("ip tuntap add tap9 mode tap user $USER")?;
    output.complains("--net user")?;
    Ok(())
}
