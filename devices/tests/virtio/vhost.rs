//! Cards and sockets whose rings the host's kernel works: a played driver at one end, a kernel that remembers at the other.

use base::host::fake::{Bell, FakeHost, Kernel};
use base::memory::Memory;
use rustix::io::{Errno, read};
use vm_memory::{Bytes, GuestAddress};

use super::driver::*;

const RINGS_OF_ALL: u64 = VERSION_1 | INDIRECT | EVENT_IDX;
const MERGEABLE: u64 = 1 << 15;
const SEVERAL: u64 = 1 << 22;
const CONTROL: u64 = 1 << 17;
/// And one that no driver is offered.
const LOG: u64 = 1 << 26;

fn kernel() -> Kernel {
    Kernel::new(RINGS_OF_ALL | MERGEABLE | LOG)
}

/// Starts a driver with these queues.
fn start(rig: &mut Rig, features: u64, queues: &[u16]) -> Vec<Virtq> {
    let features = (features | VERSION_1) & rig.offered();
    assert!(rig.negotiate(features), "features {features:#x} are accepted");
    let queues = queues.iter().map(|queue| rig.queue(*queue, 16, features)).collect();
    rig.go();
    queues
}

/// Whether an eventfd of the kernel's was written to.
fn rung(kernel: &Kernel, device: usize, ring: u32, bell: Bell) -> bool {
    let fd = kernel.bell(device, ring, bell).expect("the kernel has it");
    match read(fd, &mut [0; 8]) {
        Ok(len) => len == 8,
        Err(cause) => {
            assert_eq!(cause, Errno::AGAIN);
            false
        }
    }
}

fn ring(kernel: &Kernel, device: usize, ring: u32, bell: Bell) {
    let fd = kernel.bell(device, ring, bell).expect("the kernel has it");
    rustix::io::write(fd, &1u64.to_ne_bytes()).unwrap();
}

fn is_broken(rig: &mut Rig) -> bool {
    rig.settle();
    rig.get(reg::STATUS) & NEEDS_RESET != 0
}

/// What the kernel is told of one ring of those that the played driver lays.
fn told(device: usize, number: u32, queue: u64) -> Vec<String> {
    let desc = RINGS + 0x1_0000 * queue;
    [
        format!("ring {number} 16 {desc:#x} {:#x} {:#x}", desc + 0x8000, desc + 0xa000),
        format!("error {number}"),
        format!("call {number}"),
        format!("kick {number}"),
    ]
    .map(|words| format!("{device}: {words}"))
    .to_vec()
}

fn with<const N: usize>(before: Vec<String>, more: [&str; N]) -> Vec<String> {
    before.into_iter().chain(more.map(str::to_owned)).collect()
}

/// How a device lets go of two rings.
const GONE: [&str; 6] =
    ["0: no kick 0", "0: no call 0", "0: no error 0", "0: no kick 1", "0: no call 1", "0: no error 1"];

#[test]
fn the_kernel_gets_the_rings_of_a_card_and_lets_go_of_them() {
    let kernel = kernel();
    let mut rig = Rig::of("net", "tap=tap7,vhost=on", &FakeHost::with_vhost(&kernel));
    assert_eq!(kernel.take(), ["0: open /dev/vhost-net", "0: features", "0: own"]);
    for life in 0..2 {
        let mut queues = start(&mut rig, RINGS_OF_ALL | MERGEABLE | CONTROL | 1, &[0, 1, 2]);
        let accepted = vec![format!("0: accept {:#x}", RINGS_OF_ALL | MERGEABLE)];
        let rings = [accepted, told(0, 0, 0), told(0, 1, 1)].concat();
        assert_eq!(kernel.take(), with(rings, ["0: backend 0", "0: backend 1"]), "life {life}");
        for number in 0..2 {
            assert!(rung(&kernel, 0, number, Bell::Kick), "what was there before is looked at");
            assert!(!rung(&kernel, 0, number, Bell::Kick), "ring {number}");
        }
        let (kicks, seen) = (rig.meter("kicks"), rig.bell.edges());
        rig.notify(1);
        rig.settle();
        assert!(rung(&kernel, 0, 1, Bell::Kick) && !rung(&kernel, 0, 0, Bell::Kick));
        assert_eq!(rig.meter("kicks"), kicks, "a doorbell wakes nobody here");
        ring(&kernel, 0, 0, Bell::Call);
        rig.bell.wait(seen);
        // The control queue is the device's own as ever.
        rig.ram().write_slice(&[0, 0, 1], GuestAddress(0x1000)).unwrap();
        queues[2].push(rig.memory.ram(), &[(0x1000, 3, false), (0x1100, 1, true)]);
        rig.notify(2);
        assert_eq!(rig.wait_used(&mut queues[2]).1, 1);
        assert!(!is_broken(&mut rig));
        rig.set(reg::STATUS, 0);
        assert_eq!(kernel.take(), with(vec!["0: no backend 0".into(), "0: no backend 1".into()], GONE));
        assert_eq!(kernel.holds(), 0);
    }
    drop(rig);
    assert_eq!(kernel.take(), ["0: close"]);
}

#[test]
fn a_card_shows_no_counters_of_frames_that_do_not_come_by() {
    let rig = Rig::of("net", "tap=tap7,vhost=on", &FakeHost::with_vhost(&kernel()));
    let names: Vec<_> = rig.via.meters().into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["kicks", "interrupts", "faults"]);
}

#[test]
fn a_ring_that_the_kernel_cannot_read_breaks_the_device() {
    let kernel = kernel();
    let mut rig = Rig::of("net", "tap=tap7,vhost=on", &FakeHost::with_vhost(&kernel));
    for life in 1..3 {
        start(&mut rig, MERGEABLE, &[0, 1]);
        assert!(!is_broken(&mut rig), "what was said of other rings is forgotten");
        let seen = rig.bell.edges();
        kernel.take();
        ring(&kernel, 0, 1, Bell::Error);
        rig.bell.wait(seen);
        assert!(is_broken(&mut rig));
        assert_eq!((kernel.take(), rig.meter("faults")), (["0: no backend 0", "0: no backend 1"].map(str::to_owned).to_vec(), life));
        // Late words about rings that are on their way out.
        ring(&kernel, 0, 0, Bell::Call);
        ring(&kernel, 0, 0, Bell::Error);
        rig.set(reg::STATUS, 0);
        assert_eq!(kernel.take(), GONE);
    }
}

#[test]
fn the_kernel_hears_of_no_ring_that_is_not_in_memory() {
    let kernel = kernel();
    let mut rig = Rig::of("net", "tap=tap7,vhost=on", &FakeHost::with_vhost(&kernel));
    // In the hole, over the end of a piece, around the end of addresses, misaligned, and too long for the device.
    let good = RINGS + 0x1_0000;
    for (size, desc, avail, used) in [
        (16, 8 << 20, good + 0x8000, good + 0xa000),
        (16, (4 << 20) - 16, good + 0x8000, good + 0xa000),
        (16, good, u64::MAX - 1, good + 0xa000),
        (16, good, good + 0x8000, u64::MAX - 3),
        (256, good, good + 0x8000, (20 << 20) - 2048),
        (16, good + 8, good + 0x8000, good + 0xa000),
        (16, good, good + 0x8000, good + 0xa002),
        (15, good, good + 0x8000, good + 0xa000),
        (512, good, good + 0x8000, good + 0xa000),
    ] {
        assert!(rig.negotiate(VERSION_1));
        rig.queue(0, 16, 0);
        rig.set(reg::QUEUE_SELECT, 1);
        rig.set(reg::QUEUE_SIZE, size);
        rig.set64(reg::DESC, desc);
        rig.set64(reg::AVAIL, avail);
        rig.set64(reg::USED, used);
        rig.set(reg::QUEUE_READY, 1);
        assert_eq!(rig.get(reg::QUEUE_READY), 0, "{size} {desc:#x} {avail:#x} {used:#x}");
        rig.go();
        let asked = kernel.take();
        assert!(!asked.iter().any(|words| words.contains("ring 1") || words.contains("backend 1")), "{asked:?}");
        rig.set(reg::STATUS, 0);
        kernel.take();
        assert_eq!(kernel.holds(), 0);
    }
}

#[test]
fn each_pair_has_a_worker_that_begins_when_the_driver_uses_it() {
    let kernel = kernel();
    let mut rig = Rig::of("net", "tap=tap7,vhost=on,queues=2", &FakeHost::with_vhost(&kernel));
    let opened = kernel.take();
    assert_eq!(opened.iter().filter(|words| words.ends_with("open /dev/vhost-net")).count(), 2);
    let mut queues = start(&mut rig, SEVERAL | CONTROL, &[0, 1, 2, 3, 4]);
    let accept = |device| vec![format!("{device}: accept {VERSION_1:#x}")];
    let rings = [accept(0), told(0, 0, 0), told(0, 1, 1), accept(1), told(1, 0, 2), told(1, 1, 3)].concat();
    assert_eq!(kernel.take(), with(rings, ["0: backend 0", "0: backend 1"]));
    let mut command = |rig: &mut Rig, pairs: u8| {
        rig.ram().write_slice(&[4, 0, pairs, 0], GuestAddress(0x1000)).unwrap();
        queues[4].push(rig.memory.ram(), &[(0x1000, 4, false), (0x1100, 1, true)]);
        rig.notify(4);
        rig.wait_used(&mut queues[4]);
        rig.ram().read_obj::<u8>(GuestAddress(0x1100)).unwrap()
    };
    assert_eq!((command(&mut rig, 2), kernel.take()), (0, ["1: backend 0", "1: backend 1"].map(str::to_owned).to_vec()));
    assert_eq!((command(&mut rig, 2), kernel.take()), (0, vec![]), "nothing new");
    assert_eq!((command(&mut rig, 1), kernel.take()), (0, ["1: no backend 0", "1: no backend 1"].map(str::to_owned).to_vec()));
    kernel.refuse(Some("backend"));
    assert_eq!(command(&mut rig, 2), 1, "the driver hears that it cannot have them");
    assert_eq!(command(&mut rig, 3), 1);
    kernel.refuse(None);
    // A driver that knows of one pair: the control queue is behind that.
    rig.set(reg::STATUS, 0);
    kernel.take();
    start(&mut rig, CONTROL, &[0, 1, 2]);
    let rings = [accept(0), told(0, 0, 0), told(0, 1, 1)].concat();
    assert_eq!(kernel.take(), with(rings, ["0: backend 0", "0: backend 1"]));
}

#[test]
fn a_kernel_that_refuses_leaves_a_device_that_needs_a_reset() {
    let kernel = kernel();
    let mut rig = Rig::of("net", "tap=tap7,vhost=on", &FakeHost::with_vhost(&kernel));
    for refused in ["accept", "ring 1", "kick 0", "backend 1"] {
        kernel.refuse(Some(refused));
        start(&mut rig, 0, &[0, 1]);
        assert!(is_broken(&mut rig), "{refused}");
        kernel.refuse(None);
        rig.set(reg::STATUS, 0);
        assert_eq!(kernel.holds(), 0, "{refused}");
        start(&mut rig, 0, &[0, 1]);
        assert!(!is_broken(&mut rig), "{refused}");
    }
    // One that does not let go is closed, and opened again.
    kernel.take();
    kernel.refuse(Some("no backend 0"));
    rig.set(reg::STATUS, 0);
    let asked = kernel.take();
    assert_eq!(asked[..2], ["0: no backend 0", "0: no backend 1"], "the other ring is asked for all the same");
    assert_eq!(asked[asked.len() - 2..], ["0: renew", "0: own"]);
    start(&mut rig, 0, &[0, 1]);
    assert!(!is_broken(&mut rig));
}

fn refused(kind: &str, text: &str, host: &FakeHost) -> String {
    match build(kind, text, host, &Memory::new(&RAM).unwrap()) {
        Ok(_) => panic!("{text} is accepted"),
        Err(fail) => fail.to_string(),
    }
}

#[test]
fn without_a_kernel_that_can_it_is_this_process_unless_that_is_asked_for() {
    for (kernel, on) in [
        (None, "open /dev/vhost-net for test0"),
        (Some(Kernel::new(RINGS_OF_ALL)), "have the host's kernel work for test0: it lacks the features 0x8000"),
        (Some(Kernel::new(MERGEABLE | VERSION_1)), "it lacks the features 0x30000000"),
    ] {
        let host = kernel.as_ref().map_or_else(FakeHost::default, FakeHost::with_vhost);
        let text = refused("net", "tap=tap7,vhost=on", &host);
        assert!(text.contains(on), "{text}");
        let rig = Rig::of("net", "tap=tap7,vhost=auto", &host);
        assert!(rig.via.meters().iter().any(|(name, _)| *name == "sent_frames"));
    }
    let kernel = kernel();
    let host = FakeHost::with_vhost(&kernel);
    for text in ["tap=tap7", "tap=tap7,vhost=auto,packets=100", "tap=tap7,vhost=auto,bandwidth=1M", "user"] {
        Rig::of("net", text, &host);
        assert_eq!(kernel.take(), Vec::<String>::new(), "{text}");
    }
    Rig::of("net", "tap=tap7,vhost=auto", &host);
    assert_eq!(kernel.take().first().map(String::as_str), Some("0: open /dev/vhost-net"), "auto is on");
    for (text, cause) in [
        ("tap=tap7,vhost=on,packets=100", "the host's kernel knows no limits"),
        ("user,vhost=on", "the host's kernel works the rings of a tap only"),
    ] {
        let told = refused("net", text, &host);
        assert!(told.contains(cause) && told.contains("\n  hint: "), "{told}");
    }
}

#[test]
fn the_kernel_gets_the_rings_of_sockets_and_forgets_all_with_the_driver() {
    let kernel = Kernel::new(RINGS_OF_ALL | 2);
    let mut rig = Rig::of("vsock", "vhost=on,cid=77", &FakeHost::with_vhost(&kernel));
    assert_eq!(kernel.take(), ["0: open /dev/vhost-vsock", "0: features", "0: own", "0: guest 77"]);
    assert_eq!(rig.offered() & 0xffff, 3, "streams, and packets that keep their borders");
    let mut cid = [0; 8];
    rig.config(0, &mut cid);
    assert_eq!(u64::from_le_bytes(cid), 77);
    for _ in 0..2 {
        start(&mut rig, EVENT_IDX | 3, &[0, 1, 2]);
        let accepted = vec![format!("0: accept {:#x}", VERSION_1 | EVENT_IDX | 2)];
        assert_eq!(kernel.take(), with([accepted, told(0, 0, 0), told(0, 1, 1)].concat(), ["0: run true"]));
        let seen = rig.bell.edges();
        ring(&kernel, 0, 0, Bell::Call);
        rig.bell.wait(seen);
        rig.set(reg::STATUS, 0);
        let gone = with(vec!["0: run false".into()], GONE);
        assert_eq!(kernel.take(), with(gone, ["0: renew", "0: own", "0: guest 77"]));
    }
    start(&mut rig, 0, &[0, 1, 2]);
    kernel.refuse(Some("guest"));
    rig.set(reg::STATUS, 0);
    start(&mut rig, 0, &[0, 1, 2]);
    assert!(is_broken(&mut rig), "another guest has taken the context ID meanwhile");
    kernel.refuse(None);
    rig.set(reg::STATUS, 0);
    start(&mut rig, 0, &[0, 1, 2]);
    assert!(!is_broken(&mut rig));
    ring(&kernel, 0, 1, Bell::Error);
    rig.settle();
    assert!(is_broken(&mut rig));
}

#[test]
fn a_context_id_that_is_taken_is_said_so() {
    let kernel = Kernel::new(RINGS_OF_ALL);
    kernel.refuse(Some("guest"));
    let told = refused("vsock", "vhost=on", &FakeHost::with_vhost(&kernel));
    assert_eq!(told, "give test0 the context ID 3: another guest of this host has it\n  hint: choose another one: cid=N");
    let told = refused("vsock", "path=a,vhost=on", &FakeHost::default());
    assert!(told.starts_with("use a Unix socket for test0 with vhost=on: "), "{told}");
}
