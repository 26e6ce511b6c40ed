//! The balloon: what goes back to the host, what the driver is told, and lies about either.

use base::host::fake::FakeHost;
use base::memory::Memory;
use vm_memory::{Bytes, GuestAddress};

use super::driver::{NEEDS_RESET, RAM, Rig, Virtq, build, reg};

const STATS: u64 = 1 << 1;
const DEFLATE_ON_OOM: u64 = 1 << 2;
const REPORTING: u64 = 1 << 5;

const INFLATE: u16 = 0;
const DEFLATE: u16 = 1;
/// Lists and reports of the test are here.
const LIST: u64 = 0x1000;
/// Memory that the tests give back, a page and a mebibyte.
const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;

fn rig(text: &str) -> Rig {
    let rig = Rig::of("balloon", text, &FakeHost::default());
    rig.ram().write_obj(0u64, GuestAddress(LIST)).unwrap();
    for page in 256..1024u64 {
        rig.ram().write_obj(page, GuestAddress(page * PAGE)).unwrap();
    }
    rig
}

/// Offers the page frames `list` in `queue`, and waits until they are taken.
fn offer(rig: &mut Rig, queue: &mut Virtq, list: &[u32]) {
    let bytes: Vec<u8> = list.iter().flat_map(|frame| frame.to_le_bytes()).collect();
    rig.ram().write_slice(&bytes, GuestAddress(LIST)).unwrap();
    queue.push(rig.ram(), &[(LIST, u32::try_from(bytes.len()).unwrap(), false)]);
    rig.notify(queue.index);
    assert_eq!(rig.wait_used(queue).1, 0, "nothing is written into a list");
}

fn number(rig: &Rig, at: u64) -> u64 {
    rig.ram().read_obj(GuestAddress(at)).unwrap()
}

fn resident(rig: &Rig) -> u64 {
    rig.memory.resident().unwrap()
}

#[test]
fn pages_in_the_balloon_go_back_to_the_host() {
    let mut rig = rig("size=3M");
    let mut queue = rig.start(0, 64);
    let before = resident(&rig);
    // 2 MiB up to 3 MiB, from both ends to the middle, and one of them twice.
    let mut list: Vec<u32> = (0..128).flat_map(|n| [512 + n, 767 - n]).collect();
    list.push(512);
    offer(&mut rig, &mut queue, &list);
    assert_eq!(resident(&rig), before - MIB);
    assert_eq!(rig.meter("inflated_bytes"), MIB);
    assert_eq!([number(&rig, 2 * MIB), number(&rig, 3 * MIB - PAGE)], [0, 0], "their content is gone");
    let beside = [number(&rig, 2 * MIB - PAGE), number(&rig, 3 * MIB)];
    assert_eq!(beside, [511, 768], "pages beside them are as they were");
}

#[test]
fn pages_out_of_the_balloon_are_memory_again() {
    let mut rig = rig("size=1M");
    let mut inflate = rig.start(0, 64);
    offer(&mut rig, &mut inflate, &[600, 601]);
    let mut deflate = rig.start_with(DEFLATE, 0, 64);
    offer(&mut rig, &mut deflate, &[601, 600]);
    assert_eq!((rig.meter("inflated_bytes"), rig.meter("deflated_bytes")), (2 * PAGE, 2 * PAGE));
    rig.ram().write_obj(7u64, GuestAddress(600 * PAGE)).unwrap();
    assert_eq!(number(&rig, 600 * PAGE), 7);
}

#[test]
fn the_driver_reads_the_target_and_writes_what_it_has_reached() {
    let mut rig = rig("size=3M,deflate_on_oom=on");
    assert_eq!(rig.offered() & 0x3f, DEFLATE_ON_OOM);
    rig.start(u64::MAX, 64);
    let numbers = |rig: &mut Rig| {
        let mut config = [0xff; 12];
        rig.config(0, &mut config);
        [0, 4, 8].map(|at| u32::from_le_bytes(config[at..at + 4].try_into().unwrap()))
    };
    assert_eq!(numbers(&mut rig), [768, 0, 0]);
    rig.configure(4, &0x1ffu32.to_le_bytes());
    assert_eq!(numbers(&mut rig), [768, 0x1ff, 0]);
    assert_eq!(rig.meter("actual_bytes"), 0x1ff * PAGE);
    // The target is not the driver's to write; a write across both changes its half.
    rig.configure(0, &[0xff; 4]);
    rig.configure(2, &[1, 1, 1, 1]);
    rig.configure(7, &[0x80]);
    assert_eq!(numbers(&mut rig), [768, 0x8000_0101, 0]);
    assert_eq!(rig.meter("actual_bytes"), 0x8000_0101 * PAGE);
    rig.set(reg::STATUS, 0);
    assert_eq!(rig.meter("actual_bytes"), 0, "a driver that goes takes its pages along");
}

#[test]
fn free_memory_that_is_reported_goes_back_in_whole_pages() {
    // Linux numbers the queues that exist: without statistics reports come in queue 2.
    for (text, accepted, index) in [
        ("reporting=on", REPORTING, 2),
        ("reporting=on,stats=100", REPORTING, 2),
        ("reporting=on,stats=100", REPORTING | STATS, 3),
    ] {
        let mut rig = rig(text);
        let mut queue = rig.start_with(index, accepted, 64);
        let before = resident(&rig);
        let parts = [
            (3 * MIB, 0x8_0000, true),
            // Two that touch, of which the first begins within a page.
            (2 * MIB + 1, 0xf_ffff, true),
            (7 * MIB / 2, 0x8_0000, true),
            // Nothing whole in it.
            (MIB + 1, 0x1ffe, true),
        ];
        queue.push(rig.ram(), &parts);
        rig.notify(index);
        assert_eq!(rig.wait_used(&mut queue).1, 0, "{text}");
        assert_eq!(rig.meter("reported_bytes"), 2 * MIB - PAGE, "{text}");
        assert_eq!(resident(&rig), before - (2 * MIB - PAGE), "{text}");
        let kept = [number(&rig, MIB), number(&rig, MIB + PAGE), number(&rig, 2 * MIB)];
        assert_eq!(kept, [256, 257, 512], "{text}: what is not whole is kept");
        assert_eq!([number(&rig, 2 * MIB + PAGE), number(&rig, 4 * MIB - PAGE)], [0, 0], "{text}");
    }
}

#[test]
fn statistics_are_asked_for_again_and_again() {
    let mut rig = rig("stats=1");
    let mut queue = rig.start_with(2, STATS, 64);
    // Each is a tag of 2 bytes and a value of 8, packed.
    let report = |rig: &mut Rig, queue: &mut Virtq, statistics: &[(u16, u64)]| {
        let bytes: Vec<u8> = statistics
            .iter()
            .flat_map(|(tag, value)| tag.to_le_bytes().into_iter().chain(value.to_le_bytes()))
            .collect();
        rig.ram().write_slice(&bytes, GuestAddress(LIST)).unwrap();
        let head = queue.push(rig.ram(), &[(LIST, u32::try_from(bytes.len()).unwrap(), false)]);
        rig.notify(2);
        rig.settle();
        u32::from(head)
    };
    let first = report(&mut rig, &mut queue, &[(4, 1000), (5, u64::MAX), (99, 5), (6, 700)]);
    let read = |rig: &Rig| {
        ["guest_free_bytes", "guest_total_bytes", "guest_available_bytes", "guest_minor_faults", "statistics"]
            .map(|name| rig.meter(name))
    };
    assert_eq!(read(&rig), [1000, u64::MAX, 700, 0, 1]);
    assert!(queue.is_empty(rig.ram()), "the buffer is kept until the next question");
    assert_eq!(rig.wait_used(&mut queue), (first, 0));
    let second = report(&mut rig, &mut queue, &[(4, 500), (3, 1)]);
    assert_eq!(read(&rig), [500, u64::MAX, 700, 1, 2], "a level may fall");
    // A driver that gives two buffers, against section 5.5.6.3: the older comes back at once.
    let third = report(&mut rig, &mut queue, &[(4, 400)]);
    assert_eq!(queue.pop(rig.ram()), Some((second, 0)));
    assert_eq!(rig.wait_used(&mut queue), (third, 0));
    report(&mut rig, &mut queue, &[(4, 300)]);
    rig.set(reg::STATUS, 0);
    let mut queue = rig.start_with(2, STATS, 64);
    report(&mut rig, &mut queue, &[(4, 200)]);
    assert!(queue.is_empty(rig.ram()), "a buffer from before the reset is forgotten");
    assert_eq!(rig.meter("guest_free_bytes"), 200);
}

#[test]
fn lies_about_pages_break_the_device_and_no_memory() {
    let mut rig = rig("size=1M");
    // Beyond the first piece of RAM, in the hole, beyond all addresses; and half a number.
    for (list, len) in [([600, 1024], 8), ([600, 2048], 8), ([600, u32::MAX], 8), ([600, 601], 6)] {
        let mut queue = rig.start(0, 64);
        let bytes: Vec<u8> = list.iter().flat_map(|frame: &u32| frame.to_le_bytes()).collect();
        rig.ram().write_slice(&bytes, GuestAddress(LIST)).unwrap();
        queue.push(rig.ram(), &[(LIST, len, false)]);
        rig.notify(INFLATE);
        rig.settle();
        assert_ne!(rig.get(reg::STATUS) & NEEDS_RESET, 0, "{list:?} of {len} bytes");
        assert_eq!(number(&rig, 600 * PAGE), 600, "a list with a lie in it is not begun");
    }
    assert_eq!(rig.meter("faults"), 4);
    let mut queue = rig.start(0, 64);
    offer(&mut rig, &mut queue, &[600]);
    assert_eq!(number(&rig, 600 * PAGE), 0, "after a reset it works again");
}

#[test]
fn an_endless_list_is_answered_and_its_end_not_looked_at() {
    let mut rig = rig("size=1M");
    let mut queue = rig.start(0, 64);
    let list: Vec<u8> = (0..1024u32).flat_map(|n| (512 + n % 8).to_le_bytes()).collect();
    rig.ram().write_slice(&list, GuestAddress(LIST)).unwrap();
    // The first 1024, then the same memory again and again, and at last something that is no list of pages.
    let mut parts = vec![(LIST, 4096, false); 60];
    parts.push((MIB, 3 << 20, false));
    queue.push(rig.ram(), &parts);
    rig.notify(INFLATE);
    assert_eq!(rig.wait_used(&mut queue).1, 0);
    assert_eq!(rig.meter("inflated_bytes"), 8 * PAGE);
}

#[test]
fn what_makes_no_sense_is_refused() {
    let memory = Memory::new(&RAM).unwrap();
    for (text, wanted) in [
        ("size=5000", "set up test0: size=5000 is no whole number of pages of 4K"),
        ("size=8M", "set up test0: size=8M is not less than the guest's memory, 8M"),
        ("reporting=on,stats=0", "set up test0: stats=0 is no time between two questions"),
    ] {
        let refused = build("balloon", text, &FakeHost::default(), &memory).err().expect(text).to_string();
        assert!(refused.contains(wanted), "{text}: {refused}");
    }
}
