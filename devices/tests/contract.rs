//! What every device of the catalogue promises, whatever it is. A new device is tested here without a new line.

#[path = "virtio/driver.rs"]
mod driver;
#[path = "contract/lies.rs"]
mod lies;

use std::sync::atomic::Ordering;

use base::bus::Registers;
use base::memory::Memory;
use devices::catalog::{self, Body, CATALOG, Entry, Presence};
use devices::virtio::Device;
use driver::*;
use lies::*;
use vm_memory::{Bytes, GuestAddress};

/// Rounds of each random test, for each device.
const ROUNDS: u64 = 3000;

/// Numbers that look random and are the same in every run (xorshift64*).
struct Dice(u64);

impl Dice {
    fn new(name: &str) -> Dice {
        let seed =
            name.bytes().fold(0x9e37_79b9_7f4a_7c15, |n: u64, byte| n.rotate_left(9) ^ u64::from(byte));
        Dice(seed)
    }

    fn roll(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `end`.
    fn below(&mut self, end: u64) -> u64 {
        self.roll() % end
    }

    fn pick<T: Copy>(&mut self, among: &[T]) -> T {
        among[usize::try_from(self.below(among.len() as u64)).unwrap()]
    }

    fn word(&mut self) -> u16 {
        u16::try_from(self.below(1 << 16)).unwrap()
    }
}

fn build_on(entry: &dyn Entry, memory: &Memory) -> Body {
    // It outlives the device, which may hold one end of its pipes.
    let host = Box::leak(Box::default());
    build(entry.name(), entry.example(), host, memory).unwrap_or_else(|fail| panic!("{fail}"))
}

/// The virtio devices among them, each behind a transport.
fn virtio<V: Via>() -> impl Iterator<Item = (&'static str, Over<V>)> {
    CATALOG.iter().filter_map(|entry| {
        let memory = Memory::new(&RAM).unwrap();
        match build_on(*entry, &memory) {
            Body::Virtio(device) => Some((entry.name(), Over::new(device, memory))),
            Body::Chip(_) | Body::Absent => None,
        }
    })
}

#[test]
fn every_setting_is_described_and_unknown_ones_are_refused_by_name() {
    for entry in CATALOG {
        let name = entry.name();
        assert!(!entry.summary().is_empty(), "{name} has a summary");
        assert!(std::ptr::eq(catalog::find(name).unwrap(), *entry), "{name} is the only one of its name");
        let schema = entry.schema().to_value();
        let known = schema["properties"].as_object().unwrap_or_else(|| panic!("{name} has settings"));
        for (key, property) in known {
            let words = property["description"].as_str().unwrap_or_default();
            assert!(words.len() > 10, "{name}: {key} has a description: {property}");
        }
        let spec = entry.parse(entry.example()).unwrap_or_else(|fail| panic!("example of {name}: {fail}"));
        assert_eq!(entry.check(&spec, name).unwrap(), spec, "{name}: the filled-in settings are settings");
        if let Presence::Standard(text) = entry.presence() {
            entry.parse(text).unwrap_or_else(|fail| panic!("standard form of {name}: {fail}"));
        }

        let mut json = spec.clone();
        json["no_such_key"] = true.into();
        let flag = entry.parse(&format!("{},no_such_key=on", entry.example()));
        for refused in [flag, entry.check(&json, name)] {
            let words = refused.expect_err("an unknown key is refused").to_string();
            for key in known.keys().map(String::as_str).chain(["no_such_key"]) {
                assert!(words.contains(&format!("`{key}`")), "{name}: {key} is named in: {words}");
            }
        }
    }
}

#[test]
fn every_device_builds_from_its_example() {
    let memory = Memory::new(&RAM).unwrap();
    for entry in CATALOG {
        match build_on(*entry, &memory) {
            Body::Virtio(device) => check_shape(entry.name(), device.as_ref()),
            Body::Chip(chip) => assert!(!chip.windows.is_empty(), "{} has registers", entry.name()),
            Body::Absent => panic!("the example of {} gives no device", entry.name()),
        }
    }
}

fn check_shape(name: &str, device: &dyn Device) {
    assert_ne!(device.id(), 0, "{name} has a device ID");
    assert!(device.queues().iter().all(|size| size.is_power_of_two() && *size <= 32768), "{name}: sizes");
    let own: u64 = ((1 << 24) - 1) | (u64::MAX << 50);
    assert_eq!(device.features() & !own, 0, "{name} leaves ring and transport features to the engine");
    assert!(device.config().len() <= 0xf00, "{name}: its configuration fits into the window");
}

/// Sets up all queues, starts the device, offers a polite request in each and has it answer one: the queue it was in.
/// Of the others some wait for what the host has for the guest.
fn works<V: Via>(name: &str, rig: &mut Over<V>) -> u16 {
    rig.via.recover();
    let features = rig.offered();
    assert!(rig.negotiate(features), "{name} accepts what it offers");
    let mut queues = Vec::new();
    for index in 0.. {
        rig.set(reg::QUEUE_SELECT, u32::from(index));
        let max = u16::try_from(rig.get(reg::QUEUE_MAX)).unwrap();
        if max == 0 {
            break;
        }
        queues.push(rig.queue(index, max.min(128), features));
    }
    rig.go();
    let all = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;
    assert_eq!(rig.get(reg::STATUS), all, "{name} starts");
    // 16 bytes of zeros and room: entropy, or the first sectors of a disk.
    rig.ram().write_slice(&[0; 16], GuestAddress(0x1000)).unwrap();
    for queue in &mut queues {
        queue.push(rig.ram(), &[(0x1000, 16, false), (0x2000, 4097, true)]);
        rig.notify(queue.index);
    }
    loop {
        let seen = rig.bell.edges();
        assert_eq!(rig.get(reg::STATUS), all, "{name} is well after a request");
        if let Some(queue) = queues.iter_mut().find_map(|queue| queue.pop(rig.ram()).map(|_| queue.index)) {
            return queue;
        }
        rig.bell.wait(seen);
    }
}

fn every_virtio_device_works_and_survives_resets<V: Via>() {
    for (name, mut rig) in virtio::<V>() {
        for _ in 0..3 {
            works(name, &mut rig);
            for _ in 0..2 {
                rig.set(reg::STATUS, 0);
                assert_eq!((rig.get(reg::STATUS), rig.get(reg::CAUSES)), (0, 0), "{name}: reset");
            }
        }
    }
}

/// One access of any width, alignment and value in a window of `len` bytes.
fn random_access(dice: &mut Dice, registers: &mut dyn Registers, len: u64) {
    let width = dice.pick(&[1, 1, 2, 4, 4, 4, 8]);
    let at = if dice.below(4) == 0 { dice.below(len) } else { dice.below(len) & !3 };
    let mut data = dice.pick(&[0, 1, 2, 7, 0xf, 0x80, 0xffff_ffff, u64::MAX]).to_le_bytes();
    if dice.below(2) == 0 {
        data = dice.roll().to_le_bytes();
    }
    let data = &mut data[..width];
    if dice.below(2) == 0 {
        registers.read(at, data);
    } else {
        // What it asks of the machine is no concern of this test.
        let _ = registers.write(at, data);
    }
}

fn virtio_registers_take_any_access<V: Via>() {
    for (name, mut rig) in virtio::<V>() {
        let mut dice = Dice::new(name);
        for round in 0..ROUNDS {
            let (registers, len) = rig.via.any(dice.roll());
            random_access(&mut dice, registers, len);
            if round % 100 == 0 {
                works(name, &mut rig);
            }
        }
        works(name, &mut rig);
    }
}

#[test]
fn registers_of_chips_take_any_access() {
    let memory = Memory::new(&RAM).unwrap();
    for entry in CATALOG {
        let Body::Chip(chip) = build_on(*entry, &memory) else { continue };
        let mut dice = Dice::new(entry.name());
        for mut window in chip.windows {
            for _ in 0..ROUNDS {
                random_access(&mut dice, window.registers.as_mut(), window.len);
            }
        }
    }
}

const HOLE: u64 = 8 << 20;
const MMIO: u64 = 0xd000_0000;

/// Addresses of which most are lies: in RAM, at its ends, across them, in the hole, in registers, beyond everything.
fn address(dice: &mut Dice) -> u64 {
    let ends = [0, 1, (4 << 20) - 1, (4 << 20) - 16, HOLE, MMIO, 1 << 40, u64::MAX, u64::MAX - 15];
    if dice.below(3) == 0 { dice.pick(&ends) } else { dice.below(4 << 20) }
}

/// A descriptor that may say anything, in the table at `table`.
fn lie<V: Via>(dice: &mut Dice, rig: &Over<V>, queue: &Virtq, table: u64, at: u16) {
    let lens = [0, 1, 15, 16, 17, 512, 513, 4096, 1 << 20, u32::MAX, u32::MAX - 15];
    let flags = dice.pick(&[0, 1, 1, 2, 3, 3, 4, 5, 6, 7, 0xffff]);
    let next = if dice.below(8) == 0 { dice.word() } else { dice.word() % queue.size };
    let (mut addr, len) = (address(dice), dice.pick(&lens));
    if flags & 4 != 0 && dice.below(2) == 0 {
        // An indirect table made of lies, or of the ring itself.
        addr = dice.pick(&[queue.desc, queue.desc + 0x4000, queue.avail]);
    }
    // A block request may well have a header that is believed.
    if dice.below(2) == 0 {
        let _ = rig.ram().write_obj([dice.pick(&[0u32, 1, 4, 8, 11, 13, 99]), 0], GuestAddress(addr));
    }
    Virtq::describe(rig.ram(), table, at, addr, len, flags, next);
}

/// Lies about one ring, some of them while the device is looking at it.
fn lie_about_ring<V: Via>(dice: &mut Dice, rig: &mut Over<V>, queue: &mut Virtq) {
    for _ in 0..dice.below(12) {
        let at = dice.word() % queue.size;
        lie(dice, rig, queue, queue.desc, at);
        let at = dice.word() % 64;
        lie(dice, rig, queue, queue.desc + 0x4000, at);
    }
    for _ in 0..dice.below(6) {
        let head = if dice.below(16) == 0 { dice.word() } else { dice.word() % queue.size };
        queue.offer(rig.ram(), head);
    }
    match dice.below(24) {
        0 => rig.ram().store(dice.word(), GuestAddress(queue.avail + 2), Ordering::SeqCst).unwrap(),
        1 => queue.set_flags(rig.ram(), dice.word()),
        2 => queue.want_interrupt_after(rig.ram(), dice.word()),
        3 => rig.ram().write_obj(dice.roll(), GuestAddress(queue.used)).unwrap(),
        _ => {}
    }
    rig.notify(queue.index);
}

/// A queue somewhere, of some size.
fn lie_about_addresses<V: Via>(dice: &mut Dice, rig: &mut Over<V>) {
    let offered = rig.offered();
    rig.negotiate(offered & (dice.roll() | VERSION_1));
    rig.set(reg::QUEUE_SIZE, dice.pick(&[0, 1, 2, 3, 8, 64, 256, 0x8000, 0x1_0000, u32::MAX]));
    for at in [reg::DESC, reg::AVAIL, reg::USED] {
        let addr = address(dice) & !dice.pick(&[0, 1, 15]);
        rig.set64(at, addr);
    }
    rig.set(reg::QUEUE_READY, dice.pick(&[0, 1, 2]));
    rig.go();
    rig.notify(0);
    rig.settle();
}

fn resident_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap();
    text.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

fn lying_rings_break_nothing_but_themselves<V: Via>() {
    for (name, mut rig) in virtio::<V>() {
        let mut dice = Dice::new(name);
        let busy = works(name, &mut rig);
        let before = resident_bytes();
        let mut queue = rig.start_with(busy, u64::MAX, 64);
        for round in 0..ROUNDS {
            lie_about_ring(&mut dice, &mut rig, &mut queue);
            if dice.below(3) == 0 {
                rig.settle();
            }
            // A fault is repaired by a reset; resets also come in the middle of work.
            if rig.get(reg::STATUS) & NEEDS_RESET != 0 || dice.below(32) == 0 {
                let features = if dice.below(2) == 0 { u64::MAX } else { !(EVENT_IDX | INDIRECT) };
                let size = dice.pick(&[1, 2, 16, 64]);
                queue = rig.start_with(busy, features, size);
            }
            if round % 16 == 0 {
                lie_about_addresses(&mut dice, &mut rig);
                queue = rig.start_with(busy, u64::MAX, 64);
            }
            if round % 250 == 0 {
                works(name, &mut rig);
                queue = rig.start_with(busy, u64::MAX, 64);
            }
        }
        works(name, &mut rig);
        assert!(rig.meter("faults") > ROUNDS / 20, "{name} noticed {} lies", rig.meter("faults"));
        let grown = resident_bytes().saturating_sub(before);
        assert!(grown < 64 << 20, "{name} has grown by {grown} bytes");
    }
}

fn a_guest_that_never_stops_leaves_the_lane_to_others<V: Via>() {
    for (name, mut rig) in virtio::<V>() {
        let busy = works(name, &mut rig);
        let queue = rig.start_with(busy, EVENT_IDX, 64);
        Virtq::describe(rig.ram(), queue.desc, 0, 0x1000, 16, 1, 1);
        Virtq::describe(rig.ram(), queue.desc, 1, 0x2000, 513, 2, 0);
        let (memory, stop) = (rig.memory.clone(), std::sync::atomic::AtomicBool::new(false));
        std::thread::scope(|scope| {
            let (stop, avail, used) = (&stop, queue.avail, queue.used);
            scope.spawn(move || {
                // The available ring holds zeros: chain 0 again and again, always one ring ahead of the device.
                while !stop.load(Ordering::SeqCst) {
                    let done: u16 = memory.ram().load(GuestAddress(used + 2), Ordering::SeqCst).unwrap();
                    memory
                        .ram()
                        .store(done.wrapping_add(63), GuestAddress(avail + 2), Ordering::SeqCst)
                        .unwrap();
                }
            });
            // Each `settle` waits for the lane, which has to come back from the device for it.
            while rig.meter("kicks") < 1000 {
                rig.notify(busy);
                rig.settle();
            }
            stop.store(true, Ordering::SeqCst);
        });
        assert_eq!(rig.meter("faults"), 0, "{name}");
        works(name, &mut rig);
    }
}

/// Each promise of virtio devices is kept over each transport.
macro_rules! over_each_transport {
    ($($promise:ident)*) => {
        mod over_mmio {
            $(#[test] fn $promise() { super::$promise::<super::Mmio>(); })*
        }
        mod over_pci {
            $(#[test] fn $promise() { super::$promise::<super::Pci>(); })*
        }
    };
}

over_each_transport! {
    every_virtio_device_works_and_survives_resets
    virtio_registers_take_any_access
    lying_rings_break_nothing_but_themselves
    a_guest_that_never_stops_leaves_the_lane_to_others
    each_lie_is_one_fault
    queues_that_are_not_in_memory_are_refused
    nothing_comes_back_into_memory_after_a_reset
    storms_pass
}
