//! What the transport and the engine do for every device, seen through a device that only counts.

use std::sync::Arc;
use std::time::Duration;

use base::memory::Memory;
use base::meter::Counter;
use base::Fault;
use devices::virtio::{Device, Io, Meters};
use vm_memory::{Bytes, GuestAddress};

use super::driver::*;
use crate::echo::{Echo, Keeper};

fn rig() -> Rig {
    Rig::new(Box::new(Echo::default()), Memory::new(&RAM).unwrap())
}

const ALL: u32 = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;

#[test]
fn names_itself() {
    let mut rig = rig();
    assert_eq!(rig.get(reg::DEVICE_ID), 42);
    assert_eq!(rig.offered(), VERSION_1 | INDIRECT | EVENT_IDX | 1 << 3);
    rig.set(reg::DEVICE_SELECT, 2);
    assert_eq!(rig.get(reg::DEVICE_FEATURES), 0, "there are 64 features");
}

#[test]
fn refuses_features_it_did_not_offer_and_legacy_drivers() {
    let mut rig = rig();
    assert!(!rig.negotiate(VERSION_1 | 1 << 5), "a feature not offered");
    assert!(!rig.negotiate(1 << 3), "a legacy driver");
    assert!(rig.negotiate(VERSION_1 | 1 << 3));
    rig.set(reg::DRIVER_SELECT, 0);
    rig.set(reg::DRIVER_FEATURES, 1 << 28);
    assert_eq!(rig.get(reg::DRIVER_FEATURES), 1 << 3, "features are settled with FEATURES_OK");
}

#[test]
fn status_bits_come_in_order_and_go_by_reset_only() {
    let mut rig = rig();
    rig.set(reg::STATUS, ACKNOWLEDGE | DRIVER | DRIVER_OK);
    assert_eq!(rig.get(reg::STATUS), ACKNOWLEDGE | DRIVER, "no DRIVER_OK before FEATURES_OK");
    rig.set(reg::STATUS, ACKNOWLEDGE);
    assert_eq!(rig.get(reg::STATUS), ACKNOWLEDGE | DRIVER, "a bit is not cleared by a write");
    rig.start(0, 8);
    rig.set(reg::STATUS, ALL | NEEDS_RESET);
    assert_eq!(rig.get(reg::STATUS), ALL, "the driver cannot ask for NEEDS_RESET");
    for _ in 0..2 {
        rig.set(reg::STATUS, 0);
        assert_eq!(rig.get(reg::STATUS), 0);
    }
}

#[test]
fn queues_are_set_up_between_features_ok_and_driver_ok() {
    let mut rig = rig();
    rig.set(reg::QUEUE_SIZE, 8);
    assert_eq!(rig.get(reg::QUEUE_SIZE), 64, "too early");
    assert!(rig.negotiate(VERSION_1));
    rig.queue(1, 16, 0);
    rig.set(reg::QUEUE_SIZE, 4);
    assert_eq!(rig.get(reg::QUEUE_SIZE), 16, "an enabled queue stays as it is");
    rig.go();
    rig.set(reg::QUEUE_READY, 0);
    assert_eq!(rig.get(reg::QUEUE_READY), 1, "too late");
    rig.set(reg::QUEUE_SELECT, 2);
    assert_eq!(rig.get(reg::QUEUE_MAX), 0, "there is no third queue");
    rig.set(reg::QUEUE_READY, 1);
    assert_eq!(rig.get(reg::QUEUE_READY), 0);
}

#[test]
fn impossible_queues_ask_for_a_reset() {
    type Lie = (u32, u64, u64, u64);
    let lies: [Lie; 8] = [
        (0, RINGS, RINGS + 0x8000, RINGS + 0xa000),
        (3, RINGS, RINGS + 0x8000, RINGS + 0xa000),
        (128, RINGS, RINGS + 0x8000, RINGS + 0xa000),
        (8, 8 << 20, RINGS + 0x8000, RINGS + 0xa000),
        (8, RINGS, (4 << 20) - 4, RINGS + 0xa000),
        (8, RINGS, RINGS + 0x8000, u64::MAX - 3),
        (8, RINGS + 8, RINGS + 0x8000, RINGS + 0xa000),
        (8, RINGS, RINGS + 0x8001, RINGS + 0xa002),
    ];
    let mut rig = rig();
    for (size, desc, avail, used) in lies {
        assert!(rig.negotiate(VERSION_1));
        rig.set(reg::QUEUE_SIZE, size);
        for (at, value) in [(reg::DESC, desc), (reg::AVAIL, avail), (reg::USED, used)] {
            rig.set64(at, value);
        }
        rig.set(reg::QUEUE_READY, 1);
        assert_eq!(rig.get(reg::QUEUE_READY), 0, "{size} {desc:#x} {avail:#x} {used:#x}");
        assert_ne!(rig.get(reg::STATUS) & NEEDS_RESET, 0);
    }
    assert_eq!(rig.meter("faults"), 8);
    rig.start(0, 8);
}

#[test]
fn a_broken_device_gives_back_what_it_has_and_takes_no_more() {
    use rustix::event::{EventfdFlags, eventfd};
    let bell = Arc::new(eventfd(0, EventfdFlags::NONBLOCK).unwrap());
    let mut rig = Rig::new(Box::new(Keeper::new(bell.clone())), Memory::new(&RAM).unwrap());
    let mut queue = rig.start(0, 8);
    let kept = queue.push(rig.memory.ram(), &[(0x1000, 4, true)]);
    rig.notify(0);
    rig.settle();
    Virtq::describe(rig.ram(), queue.desc, 0, 0x1000, 16, 1, 0);
    queue.offer(rig.memory.ram(), 0);
    queue.push(rig.memory.ram(), &[(0x2000, 4, true)]);
    rig.notify(0);
    rig.settle();
    assert_eq!(rig.get(reg::STATUS), ALL | NEEDS_RESET, "a loop in the ring");
    rustix::io::write(&bell, &1u64.to_ne_bytes()).unwrap();
    rig.settle();
    assert_eq!(queue.pop(rig.ram()), Some((kept.into(), 4)));
    assert_eq!((rig.meter("chains"), rig.meter("faults"), queue.pop(rig.ram())), (1, 1, None));
}

#[test]
fn one_visit_gives_one_interrupt() {
    for features in [0, EVENT_IDX] {
        let mut rig = rig();
        let mut queue = rig.start(features, 8);
        for n in 0..5 {
            queue.push(rig.ram(), &[(0x1000, 10 + n, false)]);
        }
        rig.notify(0);
        rig.settle();
        assert_eq!((rig.bell.edges(), rig.meter("chains")), (1, 5), "features {features:#x}");
        let lens: Vec<u32> = std::iter::from_fn(|| queue.pop(rig.memory.ram())).map(|(_, len)| len).collect();
        assert_eq!(lens, [10, 11, 12, 13, 14]);
    }
}

#[test]
fn the_driver_can_do_without_interrupts() {
    let mut rig = rig();
    let mut queue = rig.start(0, 8);
    queue.set_flags(rig.ram(), 1);
    queue.push(rig.ram(), &[(0x1000, 1, false)]);
    rig.notify(0);
    rig.settle();
    assert_eq!((rig.bell.edges(), rig.meter("chains")), (0, 1), "NO_INTERRUPT");

    let mut queue = rig.start(EVENT_IDX, 8);
    queue.want_interrupt_after(rig.ram(), 1);
    for edges in [0, 1] {
        queue.push(rig.ram(), &[(0x1000, 1, false)]);
        rig.notify(0);
        rig.settle();
        assert_eq!(rig.bell.edges(), edges, "used_event 1 means: after the second chain");
    }
}

#[test]
fn a_driver_that_may_do_without_an_interrupt_gets_it_late_or_never() {
    let mut rig = Rig::new(Box::new(Echo::patient(Duration::from_secs(3600))), Memory::new(&RAM).unwrap());
    let mut queue = rig.start(EVENT_IDX, 64);
    for n in 0..40 {
        queue.push(rig.ram(), &[(0x1000, 1, false)]);
        rig.notify(0);
        rig.settle();
        // It finds it by itself, and asks to hear of the next.
        assert_eq!(queue.pop(rig.ram()).map(|(_, len)| len), Some(1), "chain {n} is back at once");
    }
    assert_eq!(rig.bell.edges(), 0);
    (0..16).for_each(|_| _ = queue.push(rig.ram(), &[(0x1000, 1, false)]));
    rig.notify(0);
    rig.settle();
    assert_eq!(rig.bell.edges(), 1, "a quarter of the ring is too much to wait for");

    let mut rig = Rig::new(Box::new(Echo::patient(Duration::from_micros(1))), Memory::new(&RAM).unwrap());
    let mut queue = rig.start(EVENT_IDX, 64);
    for edges in 0..3 {
        queue.want_interrupt_after(rig.ram(), edges);
        queue.push(rig.ram(), &[(0x1000, 1, false)]);
        rig.notify(0);
        rig.bell.wait(edges.into());
    }
    rig.set(reg::STATUS, 0);
    assert_eq!(rig.bell.edges(), 3, "one for each, and none after the reset");
}

#[test]
fn the_device_says_when_it_wants_a_doorbell() {
    let mut rig = rig();
    let mut queue = rig.start(EVENT_IDX, 8);
    for _ in 0..3 {
        queue.push(rig.ram(), &[(0x1000, 1, false)]);
    }
    rig.notify(0);
    rig.settle();
    assert_eq!(queue.avail_event(rig.ram()), 3);

    let mut queue = rig.start(0, 8);
    queue.push(rig.ram(), &[(0x1000, 1, false)]);
    rig.notify(0);
    rig.settle();
    assert_eq!(queue.used_flags(rig.ram()), 0, "it listens when the ring is empty");
}

#[test]
fn chains_offered_before_driver_ok_are_served_at_the_start() {
    let mut rig = rig();
    assert!(rig.negotiate(VERSION_1));
    let mut queue = rig.queue(0, 8, 0);
    queue.push(rig.ram(), &[(0x1000, 7, true)]);
    rig.notify(0);
    rig.settle();
    assert_eq!(queue.pop(rig.ram()), None, "not yet");
    rig.go();
    assert_eq!(rig.wait_used(&mut queue), (0, 7));
}

#[test]
fn a_device_that_cannot_start_asks_for_a_reset() {
    let mut rig = Rig::new(Box::new(Echo::lame()), Memory::new(&RAM).unwrap());
    assert!(rig.negotiate(VERSION_1));
    rig.queue(0, 8, 0);
    rig.go();
    assert_eq!(rig.get(reg::STATUS), ALL | NEEDS_RESET);
    assert_eq!((rig.get(reg::CAUSES), rig.bell.edges()), (2, 1));
    rig.notify(0);
    rig.settle();
    assert_eq!(rig.meter("device_kicks"), 0);
    rig.set(reg::STATUS, 0);
    assert_eq!(rig.get(reg::STATUS), 0);
}

#[test]
fn queues_work_on_their_own_and_strange_doorbells_do_nothing() {
    let mut rig = rig();
    assert!(rig.negotiate(VERSION_1));
    let mut second = rig.queue(1, 16, 0);
    rig.go();
    second.push(rig.ram(), &[(0x1000, 7, true)]);
    for strange in [0, 2, u16::MAX] {
        rig.notify(strange);
    }
    rig.settle();
    assert_eq!(second.pop(rig.ram()), None);
    rig.notify(1);
    assert_eq!(rig.wait_used(&mut second), (0, 7));
}

/// Plays a vCPU that adds a chain for each one that is answered, up to [`Feeder::TOTAL`].
struct Feeder {
    avail: u64,
    chains: Arc<Counter>,
    most_in_a_kick: Arc<Counter>,
}

impl Feeder {
    const TOTAL: u64 = 10_000;
}

impl Device for Feeder {
    fn id(&self) -> u32 {
        42
    }
    fn queues(&self) -> &[u16] {
        &[8]
    }
    fn kick(&mut self, queue: u16, io: &mut Io<'_>) -> Result<(), Fault> {
        let before = self.chains.get();
        while let Some(chain) = io.next(queue)? {
            self.chains.add(1);
            if self.chains.get() < Self::TOTAL {
                let next = u16::try_from((self.chains.get() + 1) & 0xffff).unwrap();
                io.ram().write_obj(next.to_le(), GuestAddress(self.avail + 2)).unwrap();
            }
            io.done(chain, 0);
        }
        let now = self.chains.get() - before;
        self.most_in_a_kick.add(now.saturating_sub(self.most_in_a_kick.get()));
        Ok(())
    }
    fn meters(&self) -> Meters {
        vec![("chains", self.chains.clone()), ("most_in_a_kick", self.most_in_a_kick.clone())]
    }
}

#[test]
fn a_guest_that_never_stops_gets_its_turns_and_no_more() {
    let avail = Virtq::new(0, 8, true).avail;
    let device = Feeder { avail, chains: Arc::default(), most_in_a_kick: Arc::default() };
    let mut rig = Rig::new(Box::new(device), Memory::new(&RAM).unwrap());
    let mut queue = rig.start(EVENT_IDX, 8);
    Virtq::describe(rig.ram(), queue.desc, 0, 0x1000, 1, 0, 0);
    queue.offer(rig.ram(), 0);
    rig.notify(0);
    // The doorbell was rung once; the engine rings it again for itself.
    for _ in 0..Feeder::TOTAL {
        rig.settle();
    }
    assert_eq!((rig.meter("chains"), rig.meter("most_in_a_kick")), (Feeder::TOTAL, 8));
    assert_eq!(rig.meter("faults"), 0);
}

#[test]
fn a_broken_ring_is_a_fault_and_a_reset_repairs_it() {
    let mut rig = rig();
    let mut queue = rig.start(EVENT_IDX, 8);
    // A loop: descriptor 0 names itself as its next.
    Virtq::describe(rig.ram(), queue.desc, 0, 0x1000, 16, 1, 0);
    queue.offer(rig.ram(), 0);
    rig.notify(0);
    rig.settle();
    assert_eq!(rig.get(reg::STATUS), ALL | NEEDS_RESET);
    assert_eq!((rig.get(reg::CAUSES), rig.bell.edges()), (2, 1), "announced as a configuration change");
    assert_eq!(rig.meter("faults"), 1);
    rig.notify(0);
    rig.settle();
    assert_eq!(rig.meter("device_kicks"), 2, "a broken device is not kicked");
    let mut queue = rig.start(EVENT_IDX, 8);
    assert_eq!(rig.get(reg::CAUSES), 0);
    queue.push(rig.ram(), &[(0x1000, 3, false)]);
    rig.notify(0);
    assert_eq!(rig.wait_used(&mut queue), (0, 3));
}

#[test]
fn configuration_is_written_through_the_device() {
    let mut rig = rig();
    let generation = rig.get(reg::GENERATION);
    rig.configure(2, &[7]);
    rig.start(0, 8);
    rig.configure(4, &[1, 2, 3, 4]);
    let mut bytes = [0xff; 10];
    rig.config(0, &mut bytes);
    assert_eq!(bytes, [0, 0, 7, 0, 1, 2, 3, 4, 0, 0], "zeros beyond its end");
    assert_eq!(rig.get(reg::GENERATION), generation + 2);
    rig.configure(6, &[9; 4]);
    rig.configure(u64::MAX, &[9; 4]);
    rig.config(0, &mut bytes);
    assert_eq!(bytes[4..8], [1, 2, 3, 4], "a write across the end is refused");
}
