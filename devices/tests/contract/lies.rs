//! Drivers that lie in ways with a name, and drivers that do everything at once.

use std::sync::atomic::{AtomicBool, Ordering};

use base::memory::Ram;
use vm_memory::{Bytes, GuestAddress};

use super::driver::*;
use super::{Dice, HOLE, MMIO, address, random_access, resident_bytes, virtio, works};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT_FLAG: u16 = 4;
/// Entries of the ring that the lies are told in.
const SIZE: u16 = 64;
/// Where the first piece of RAM ends.
const END: u64 = 4 << 20;

/// What is wrong, and descriptors of the ring: address, length, flags, next. The first one is offered.
type Lie = (&'static str, &'static [(u64, u32, u16, u16)]);

const LIES: &[Lie] = &[
    ("a descriptor leads to itself", &[(0x1000, 16, NEXT, 0)]),
    ("two lead to each other", &[(0x1000, 16, NEXT, 1), (0x2000, 16, NEXT | WRITE, 0)]),
    ("two of no length lead to each other", &[(0x1000, 0, NEXT, 1), (0x2000, 0, NEXT, 0)]),
    ("the next one is beyond the table", &[(0x1000, 16, NEXT, SIZE)]),
    ("the next one is far beyond the table", &[(0x1000, 16, NEXT, u16::MAX)]),
    ("one to read follows one to write", &[(0x1000, 16, NEXT | WRITE, 1), (0x2000, 16, 0, 0)]),
    ("a buffer crosses the end of memory", &[(END - 16, 17, 0, 0)]),
    ("a buffer crosses the hole", &[(END - 16, 13 << 20, WRITE, 0)]),
    ("a buffer is in the hole", &[(HOLE, 1, 0, 0)]),
    ("a buffer is in registers", &[(0x1000, 16, NEXT, 1), (MMIO, 4, WRITE, 0)]),
    ("a buffer is that of the local APIC", &[(0xfee0_0000, 4, WRITE, 0)]),
    ("a buffer wraps", &[(u64::MAX - 7, 16, WRITE, 0)]),
    ("a buffer is as large as can be", &[(0x1000, u32::MAX, WRITE, 0)]),
    ("two buffers have 8 GiB", &[(0x1000, u32::MAX, NEXT, 1), (0x1000, u32::MAX, 0, 0)]),
    ("an indirect table is empty", &[(0x3000, 0, INDIRECT_FLAG, 0)]),
    ("an indirect table has half an entry", &[(0x3000, 24, INDIRECT_FLAG, 0)]),
    ("an indirect table is in the hole", &[(HOLE, 32, INDIRECT_FLAG, 0)]),
    ("an indirect table has no end", &[(END - 16, 1 << 20, INDIRECT_FLAG, 0)]),
    ("an indirect table leads to itself", &[(0x3000, 16, INDIRECT_FLAG, 0)]),
    ("an indirect table has 4 GiB", &[(0x3000, u32::MAX - 15, INDIRECT_FLAG, 0)]),
    ("an indirect table holds another", &[(0x4000, 16, INDIRECT_FLAG, 0)]),
];

/// Tables that lies lead to: one that has a loop, one whose entry is a table.
fn lay_tables(ram: &Ram) {
    for at in 0..16 {
        Virtq::describe(ram, 0x3000, at, 0x1000, 16, NEXT, 0);
    }
    Virtq::describe(ram, END - 16, 0, 0x1000, 16, NEXT, 1);
    Virtq::describe(ram, 0x4000, 0, 0x5000, 16, INDIRECT_FLAG, 0);
    Virtq::describe(ram, 0x5000, 0, 0x1000, 16, 0, 0);
}

pub fn each_lie_is_one_fault<V: Via>() {
    for (name, mut rig) in virtio::<V>() {
        let busy = works(name, &mut rig);
        for features in [u64::MAX, !(EVENT_IDX | INDIRECT)] {
            for (what, descriptors) in LIES {
                let mut queue = rig.start_with(busy, features, SIZE);
                lay_tables(rig.ram());
                for (at, (addr, len, flags, next)) in (0..).zip(*descriptors) {
                    Virtq::describe(rig.ram(), queue.desc, at, *addr, *len, *flags, *next);
                }
                expect_fault(name, what, &mut rig, |ram| queue.offer(ram, 0));
            }
            for head in [SIZE, SIZE + 1, u16::MAX] {
                let mut queue = rig.start_with(busy, features, SIZE);
                expect_fault(name, "a head is beyond the table", &mut rig, |ram| queue.offer(ram, head));
            }
            for ahead in [SIZE + 1, 0x8000, u16::MAX] {
                let queue = rig.start_with(busy, features, SIZE);
                expect_fault(name, "the available index runs ahead", &mut rig, |ram| {
                    ram.store(ahead, GuestAddress(queue.avail + 2), Ordering::SeqCst).unwrap();
                });
            }
        }
        works(name, &mut rig);
    }
}

/// The device breaks, and once: honest chains behind the lie, and doorbells for them, change nothing more.
fn expect_fault<V: Via>(name: &str, what: &str, rig: &mut Over<V>, tell: impl FnOnce(&Ram)) {
    let before = rig.meter("faults");
    tell(rig.ram());
    for _ in 0..3 {
        for bell in rig.via.bells() {
            rig.notify(bell.doorbell.queue);
        }
        rig.settle();
    }
    assert_ne!(rig.get(reg::STATUS) & NEEDS_RESET, 0, "{name} believes that {what}");
    assert_eq!(rig.meter("faults") - before, 1, "{name}: {what}");
}

pub fn queues_that_are_not_in_memory_are_refused<V: Via>() {
    let nowhere = [HOLE, MMIO, MMIO + 0x50, 0xe000_0000, 0xfec0_0000, 0xfee0_0000, END - 16, 1 << 52];
    for (name, mut rig) in virtio::<V>() {
        for part in [reg::DESC, reg::AVAIL, reg::USED] {
            for wrong in nowhere {
                assert!(rig.negotiate(VERSION_1), "{name}");
                rig.set(reg::QUEUE_SELECT, 0);
                rig.set(reg::QUEUE_SIZE, 16);
                for (at, place) in [(reg::DESC, 0x1000), (reg::AVAIL, 0x2000), (reg::USED, 0x3000)] {
                    rig.set64(at, if at == part { wrong } else { place });
                }
                rig.set(reg::QUEUE_READY, 1);
                assert_eq!(rig.get(reg::QUEUE_READY), 0, "{name}: a queue with a part at {wrong:#x}");
                assert_ne!(rig.get(reg::STATUS) & NEEDS_RESET, 0, "{name}");
                rig.go();
                rig.notify(0);
            }
        }
        works(name, &mut rig);
    }
}

/// Requests that device and host may well believe.
fn ask_a_lot<V: Via>(dice: &mut Dice, rig: &mut Over<V>, queue: &mut Virtq) {
    for n in 0..1 + dice.below(16) {
        // Read, write, flush, serial number, discard, zeros; other devices see bytes.
        let kind = dice.pick(&[0u32, 0, 0, 1, 4, 8, 11, 13]);
        let header = 0x1000 + n * 64;
        rig.ram()
            .write_obj([kind, 0, u32::try_from(dice.below(64)).unwrap(), 0], GuestAddress(header))
            .unwrap();
        let len = dice.pick(&[1, 512, 1024, 4096]);
        let data = TARGET + n * 4096;
        queue.push(rig.ram(), &[(header, 16, false), (data, len, kind != 1), (header + 32, 1, true)]);
    }
    rig.notify(queue.index);
}

/// Where answers go.
const TARGET: u64 = 2 << 20;
const TARGET_LEN: usize = 64 << 10;

pub fn nothing_comes_back_into_memory_after_a_reset<V: Via>() {
    for (name, mut rig) in virtio::<V>() {
        let mut dice = Dice::new(name);
        let busy = works(name, &mut rig);
        let mut found = vec![0; TARGET_LEN];
        for round in 0..500 {
            let features = if dice.below(2) == 0 { u64::MAX } else { !(EVENT_IDX | INDIRECT) };
            let mut queue = rig.start_with(busy, features, SIZE);
            ask_a_lot(&mut dice, &mut rig, &mut queue);
            if dice.below(4) == 0 {
                rig.settle();
            }
            rig.set(reg::STATUS, 0);
            let canary = u8::try_from(round % 255).unwrap() + 1;
            rig.ram().write_slice(&vec![canary; TARGET_LEN], GuestAddress(TARGET)).unwrap();
            rig.ram().write_slice(&[canary; 4096], GuestAddress(queue.used)).unwrap();
            rig.notify(busy);
            rig.settle();
            rig.ram().read_slice(&mut found, GuestAddress(TARGET)).unwrap();
            assert!(found.iter().all(|byte| *byte == canary), "{name} writes answers after reset {round}");
            rig.ram().read_slice(&mut found[..4096], GuestAddress(queue.used)).unwrap();
            assert!(
                found[..4096].iter().all(|byte| *byte == canary),
                "{name} uses the ring of reset {round}"
            );
        }
        works(name, &mut rig);
    }
}

/// Sets up a queue somewhere that may be a ring, and starts the device if it likes that.
fn start_anyhow<V: Via>(dice: &mut Dice, rig: &mut Over<V>, queue: u16) {
    let offered = rig.offered();
    rig.negotiate(offered & (dice.roll() | VERSION_1));
    let lies = dice.below(4) == 0;
    rig.set(reg::QUEUE_SELECT, queue.into());
    rig.set(reg::QUEUE_SIZE, dice.pick(&[1, 8, 64]));
    for (at, place) in [(reg::DESC, 0), (reg::AVAIL, 0x8000), (reg::USED, 0xa000)] {
        rig.set64(at, if lies { address(dice) } else { RINGS + place });
    }
    rig.set(reg::QUEUE_READY, 1);
    rig.go();
}

/// Everything at once: one thread rings, one scribbles on the rings, and the third resets and reconfigures.
pub fn storms_pass<V: Via>() {
    for (name, mut rig) in virtio::<V>() {
        let mut dice = Dice::new(name);
        let busy = works(name, &mut rig);
        let before = resident_bytes();
        let (bells, memory, stop) = (rig.via.bells(), rig.memory.clone(), AtomicBool::new(false));
        std::thread::scope(|scope| {
            let (stop, bells, memory) = (&stop, &bells, &memory);
            scope.spawn(move || {
                while !stop.load(Ordering::SeqCst) {
                    bells.iter().for_each(|bell| bell.doorbell.ring());
                    std::thread::yield_now();
                }
            });
            scope.spawn(move || {
                let mut dice = Dice::new("scribbler");
                while !stop.load(Ordering::SeqCst) {
                    // Descriptors that lead to something, indices, and noise.
                    let (at, entry) =
                        (dice.below(64) * 16, [address(&mut dice), dice.roll() & 0x3f_0007_0000_0fff]);
                    memory.ram().write_obj(entry, GuestAddress(RINGS + at)).unwrap();
                    let index = dice.word() % 64;
                    memory.ram().store(index, GuestAddress(RINGS + 0x8002), Ordering::SeqCst).unwrap();
                    let noise = RINGS + 0x8004 + dice.below(128);
                    memory.ram().write_obj(dice.word() % 80, GuestAddress(noise)).unwrap();
                }
            });
            for _ in 0..600 {
                for _ in 0..dice.below(8) {
                    let (registers, len) = rig.via.any(dice.roll());
                    random_access(&mut dice, registers, len);
                }
                start_anyhow(&mut dice, &mut rig, busy);
                for _ in 0..dice.below(4) {
                    rig.notify(busy);
                    rig.settle();
                }
            }
            stop.store(true, Ordering::SeqCst);
        });
        assert!(rig.meter("faults") > 10, "{name} noticed {} lies", rig.meter("faults"));
        works(name, &mut rig);
        let grown = resident_bytes().saturating_sub(before);
        assert!(grown < 64 << 20, "{name} has grown by {grown} bytes");
    }
}
