//! Network cards: a stock kernel's own driver and stack on the NAT and on a tap, against servers on the ground.

use std::path::Path;

use super::{expect, stock};
use crate::ground::{Output, quote};
use crate::harness::{Case, Room, Stop, Verdict};
use crate::kernels::{Flavour, Kernel};

pub fn cases() -> Vec<Case> {
    let mut cases: Vec<Case> = Flavour::ALL.into_iter().map(|flavour| nat(flavour, "mmio")).collect();
    cases.push(nat(Flavour::Cloud, "pci"));
    cases.push(Case::new("real::network::tap_of_its_own", |room| tap(room, Tap::Own)));
    cases.push(Case::new("real::network::tap_that_stays", |room| tap(room, Tap::Named)));
    cases.push(Case::new("real::network::tap_without_rights", refused));
    cases
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
    let inner = format!(
        "ip link set lo up; mkdir -p www; head -c {LARGE} /dev/urandom >www/data; head -c {SMALL} /dev/urandom >www/small
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

fn mayfly(room: &Room<'_>, kernel: &Kernel, initrd: &Path, arguments: &str) -> String {
    format!(
        "{} run {} --kernel {} --initrd {} --timeout 100s {arguments}",
        room.mayfly.display(),
        room.ground.options(),
        kernel.bzimage().display(),
        initrd.display()
    )
}

/// The guest got what the ground has, and the other way round.
fn same(output: &Output, theirs: &str, ours: &str) -> Verdict {
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
fn driver() -> Result<String, Stop> {
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
            "tap",
            "until ip addr add 192.168.77.1/24 dev mayfly0 2>/dev/null; do sleep 0.1; done",
            "echo left=$(ip -o link show mayfly0 2>/dev/null | wc -l)",
        ),
        Tap::Named => (
            "ip tuntap add tap7 mode tap multi_queue && ip addr add 192.168.77.1/24 dev tap7 && ip link set tap7 up",
            "tap=tap7,queues=2",
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
