//! What only the PCI transport does.

use base::bus::{Effect, Move};
use base::host::fake::{Bell, FakeHost, Kernel};
use base::memory::Memory;
use devices::pci::Function;
use devices::virtio::pci::WINDOW_LEN;
use vm_memory::{Bytes, GuestAddress};

use crate::driver::via::at;
use crate::driver::*;
use crate::echo::{Echo, Keeper};

const ALL: u32 = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;
const NO_VECTOR: u64 = 0xffff;
/// Command register: memory, bus master, no INTx.
const COMMAND: usize = 4;

fn rig() -> Over<Pci> {
    Over::new(Box::new(Echo::default()), Memory::new(&RAM).unwrap())
}

impl Over<Pci> {
    fn command(&mut self, bits: u16) -> Effect {
        self.via.function.write_config(COMMAND, &bits.to_le_bytes())
    }

    /// Has the device answer one chain of `queue`.
    fn work(&mut self, queue: &mut Virtq) {
        queue.push(self.memory.ram(), &[(0x1000, 8, false)]);
        self.notify(queue.index);
        self.settle();
    }

    fn sent(&self) -> Vec<u32> {
        self.via.post.sent.lock().unwrap().drain(..).map(|msi| msi.data).collect()
    }
}

#[test]
fn the_function_is_found_as_the_specification_says() {
    let mut rig = rig();
    let via = &mut rig.via;
    assert_eq!((via.config(0, 4), via.config(8, 4)), (0x106a_1af4, 0xff00_0001), "vendor, device, revision");
    assert_eq!(
        (via.config(0x0e, 1), via.config(0x3d, 1), via.config(0x3c, 1)),
        (0, 1, 5),
        "type 0, INTA, GSI"
    );
    for (kind, len, offset, size) in
        [(1, 16, 0, 56), (2, 20, at::BELLS, 0x1000), (3, 16, at::ISR, 1), (4, 16, at::CONFIG, 0x1000)]
    {
        let cap = via.capability(9, Some(kind));
        assert_eq!((via.config(cap + 2, 1), via.config(cap + 4, 1)), (len, 0), "length, BAR");
        assert_eq!((via.config(cap + 8, 4), via.config(cap + 12, 4)), (offset, size), "type {kind}");
    }
    let notify = via.capability(9, Some(2));
    assert_eq!(via.config(notify + 16, 4), 4, "notify_off_multiplier");
    let msix = via.capability(0x11, None);
    assert_eq!(via.config(msix + 2, 2), 0x8002, "enabled; three vectors: two queues and the configuration");
    assert_eq!((via.config(msix + 4, 4), via.config(msix + 8, 4)), (at::TABLE, at::PENDING), "in BAR 0");
    assert_eq!(via.read(0x12, 2), 2, "num_queues");
    for queue in 0..3 {
        via.write(0x16, queue, 2);
        let found = (via.read(0x18, 2), via.read(0x1e, 2), via.read(at::QUEUE_VECTOR, 2));
        assert_eq!(found, [(64, 0, 1), (16, 1, 1), (0, 0, NO_VECTOR)][usize::try_from(queue).unwrap()]);
    }
}

#[test]
fn registers_are_read_at_any_width_and_written_whole() {
    let mut rig = rig();
    assert!(rig.negotiate(VERSION_1));
    let via = &mut rig.via;
    via.write(0x16, 1, 2);
    via.write(0x18, 0x0001_0008, 4);
    assert_eq!((via.read(0x18, 2), via.read(0x1a, 2)), (8, 1), "two registers with one write");
    via.write(0x20, 0x1_2345_6780, 8);
    assert_eq!((via.read(0x20, 4), via.read(0x24, 4), via.read(0x22, 4)), (0x2345_6780, 1, 0x1_2345));
    via.write(0x18, 2, 1);
    via.write(0x21, 0, 4);
    via.write(0x17, 0, 1);
    assert_eq!(
        (via.read(0x18, 2), via.read(0x20, 8)),
        (8, 0x1_2345_6780),
        "a part of a register has no effect"
    );
    assert_eq!(via.read(0x14, 4), 0x0001_000b, "status, generation and the selected queue");
    assert_eq!((via.read(0x36, 4), via.read(0x200, 4), via.read(0x7fff, 8)), (0, 0, 0));
    // Status is one byte: with its neighbours it is written all the same.
    via.write(0x14, 0, 4);
    assert_eq!(via.read(0x14, 1), 0);
}

#[test]
fn each_queue_has_the_vector_it_was_given() {
    let mut rig = rig();
    rig.via.vectors = false;
    assert!(rig.negotiate(VERSION_1));
    let (mut first, mut second) = (rig.queue(0, 8, 0), rig.queue(1, 8, 0));
    assert_eq!(rig.via.read(at::QUEUE_VECTOR, 2), NO_VECTOR, "a reset takes them away");
    for (queue, vector, found) in [(0, 2, 2), (1, 3, NO_VECTOR), (1, 0, 0)] {
        rig.via.write(0x16, queue, 2);
        rig.via.write(at::QUEUE_VECTOR, vector, 2);
        assert_eq!(rig.via.read(at::QUEUE_VECTOR, 2), found);
    }
    rig.via.write(at::TABLE + 2 * 16, 0xfee0_0000, 8);
    rig.via.write(at::TABLE + 2 * 16 + 8, 0x42, 8);
    rig.go();
    rig.work(&mut second);
    rig.work(&mut first);
    assert_eq!(rig.sent(), [0x40, 0x42]);
    rig.via.write(at::QUEUE_VECTOR, NO_VECTOR, 2);
    rig.work(&mut second);
    assert_eq!(rig.sent(), [0u32; 0], "no vector, no message");
    assert_eq!(rig.via.read(at::ISR, 1), 0, "and no cause: the pin is not in use");
    assert!(!rig.via.pin.is_high());
}

#[test]
fn masked_messages_wait_in_the_pending_bits() {
    let mut rig = rig();
    let mut queue = rig.start(0, 8);
    let msix = rig.via.capability(0x11, None);
    rig.via.function.write_config(msix + 3, &[0xc0]);
    rig.work(&mut queue);
    rig.work(&mut queue);
    assert_eq!((rig.sent(), rig.via.read(at::PENDING, 8)), (vec![], 2), "the function is masked");
    rig.via.write(at::PENDING, 0, 8);
    rig.via.write(at::TABLE + 16 + 12, 1, 4);
    rig.via.function.write_config(msix + 3, &[0x80]);
    assert_eq!((rig.sent(), rig.via.read(at::PENDING, 8)), (vec![], 2), "its vector is masked");
    rig.via.write(at::TABLE + 16 + 12, 0, 4);
    assert_eq!((rig.sent(), rig.via.read(at::PENDING, 8)), (vec![0x41], 0));
    rig.via.function.write_config(msix + 3, &[0xc0]);
    rig.work(&mut queue);
    rig.set(reg::STATUS, 0);
    rig.via.function.write_config(msix + 3, &[0x80]);
    assert_eq!(rig.sent(), [0u32; 0], "a reset forgets what is pending");
}

#[test]
fn without_msix_the_pin_follows_the_isr_status() {
    let mut rig = rig();
    let msix = rig.via.capability(0x11, None);
    rig.via.function.write_config(msix + 2, &[0, 0]);
    let mut queue = rig.start(0, 8);
    rig.work(&mut queue);
    assert!(rig.via.pin.is_high());
    assert_eq!(rig.via.config(6, 1) & 8, 8, "interrupt status");
    rig.command(0x406);
    assert_eq!((rig.via.pin.is_high(), rig.via.config(6, 1) & 8), (false, 8), "INTx disable");
    rig.command(6);
    assert!(rig.via.pin.is_high());
    assert_eq!((rig.via.read(at::ISR, 1), rig.via.read(at::ISR, 1)), (1, 0), "reading clears");
    assert_eq!((rig.via.pin.is_high(), rig.via.config(6, 1) & 8), (false, 0));
    // A loop in the ring: the change of the status is announced.
    Virtq::describe(rig.ram(), queue.desc, 5, 0x1000, 16, 1, 5);
    queue.offer(rig.memory.ram(), 5);
    rig.notify(0);
    rig.settle();
    assert!(rig.via.pin.is_high());
    rig.via.function.write_config(msix + 2, &[0, 0x80]);
    assert!(!rig.via.pin.is_high(), "MSI-X in use, the pin is not");
    rig.via.function.write_config(msix + 2, &[0, 0]);
    rig.set(reg::STATUS, 0);
    assert_eq!((rig.via.pin.is_high(), rig.via.read(at::ISR, 1)), (false, 0), "a reset clears it");
    assert_eq!(rig.sent(), [0u32; 0]);
}

#[test]
fn the_window_goes_where_the_guest_says() {
    let mut rig = rig();
    let moved = |to, turn| Effect::Move(Move { window: 1, to, turn });
    assert_eq!(rig.command(6), Effect::None, "as it is");
    assert_eq!(rig.via.function.write_config(0x10, &[0xff; 4]), moved(Some(0xffff_c000), 2));
    assert_eq!(rig.via.config(0x10, 4), 0x1_0000_0000 - WINDOW_LEN + 4, "64 bits, not prefetchable");
    assert_eq!(rig.command(4), moved(None, 3));
    assert_eq!(rig.via.function.write_config(0x14, &[0x12, 0, 0, 0]), Effect::None, "it decodes nothing");
    assert_eq!(rig.command(6), moved(Some(0x12_ffff_c000), 4));
    // Through the other ways too, and in odd pieces.
    let ecam = &mut rig.via.ecam;
    assert_eq!(ecam.write(0x8012, &[0x34, 0x12, 0, 0, 0, 0]), moved(Some(0x1234_c000), 5));
    rig.via.ports[0].write(0, &0x8000_0810u32.to_le_bytes());
    assert_eq!(rig.via.ports[1].write(1, &[0x80]), moved(Some(0x1234_8000), 6));
    assert_eq!(rig.via.config(0x10, 8), 0x1234_8004);
}

#[test]
fn without_bus_mastering_it_touches_no_memory() {
    let mut rig = rig();
    rig.command(2);
    assert!(rig.negotiate(VERSION_1));
    let mut queue = rig.queue(0, 8, 0);
    queue.push(rig.ram(), &[(0x1000, 7, true)]);
    rig.go();
    rig.notify(0);
    rig.settle();
    assert_eq!((rig.get(reg::STATUS), queue.pop(rig.memory.ram())), (ALL, None), "it waits");
    rig.command(6);
    assert_eq!(rig.wait_used(&mut queue), (0, 7), "and starts when it may");
    rig.sent();

    let before: [u64; 8] = rig.ram().read_obj(GuestAddress(queue.used)).unwrap();
    rig.command(2);
    queue.push(rig.memory.ram(), &[(0x1000, 7, true)]);
    rig.notify(0);
    rig.settle();
    assert_eq!(rig.ram().read_obj::<[u64; 8]>(GuestAddress(queue.used)).unwrap(), before);
    assert_eq!(rig.get(reg::STATUS), ALL | NEEDS_RESET, "its rings are lost");
    assert_eq!((rig.sent(), rig.via.read(at::PENDING, 8)), (vec![], 1), "messages are memory accesses too");
    rig.command(6);
    assert_eq!(rig.sent(), [0x40]);
    let mut queue = rig.start(0, 8);
    rig.work(&mut queue);
    assert!(queue.pop(rig.ram()).is_some());
    assert_eq!(rig.meter("faults"), 1);
}

#[test]
fn a_broken_device_without_bus_mastering_touches_no_memory() {
    use rustix::event::{EventfdFlags, eventfd};
    let bell = std::sync::Arc::new(eventfd(0, EventfdFlags::NONBLOCK).unwrap());
    let mut rig: Over<Pci> = Over::new(Box::new(Keeper::new(bell.clone())), Memory::new(&RAM).unwrap());
    let mut queue = rig.start(0, 8);
    queue.push(rig.memory.ram(), &[(0x1000, 4, true)]);
    rig.notify(0);
    rig.settle();
    Virtq::describe(rig.ram(), queue.desc, 0, 0x1000, 16, 1, 0);
    queue.offer(rig.memory.ram(), 0);
    rig.notify(0);
    rig.settle();
    assert_eq!((rig.get(reg::STATUS), rig.meter("chains")), (ALL | NEEDS_RESET, 1));
    rig.command(2);
    rustix::io::write(&bell, &1u64.to_ne_bytes()).unwrap();
    rig.settle();
    let found: [u8; 4] = rig.ram().read_obj(GuestAddress(0x1000)).unwrap();
    assert_eq!((found, queue.pop(rig.ram())), ([0; 4], None), "its chain has come back");
    assert_eq!(rig.meter("faults"), 1);
}

#[test]
fn the_window_is_reached_through_the_configuration_space() {
    let mut rig = rig();
    rig.command(4);
    let cap = rig.via.capability(9, Some(5));
    assert_eq!(rig.via.config(cap + 2, 1), 20, "length of the capability");
    let describe = |rig: &mut Over<Pci>, bar: u8, offset: u64, len: u32| {
        rig.via.function.write_config(cap + 4, &[bar]);
        rig.via.function.write_config(cap + 8, &u32::try_from(offset).unwrap().to_le_bytes());
        rig.via.function.write_config(cap + 12, &len.to_le_bytes());
    };
    describe(&mut rig, 0, 0x18, 2);
    assert_eq!(rig.via.config(cap + 16, 2), 64, "queue_size");
    describe(&mut rig, 0, at::STATUS, 1);
    rig.via.function.write_config(cap + 16, &[1, 0xff, 0xff, 0xff]);
    assert_eq!((rig.get(reg::STATUS), rig.via.config(cap + 16, 1)), (1, 1));
    let mut queue = rig.start(0, 8);
    queue.push(rig.memory.ram(), &[(0x1000, 8, false)]);
    rig.command(6);
    describe(&mut rig, 0, at::BELLS, 4);
    rig.via.function.write_config(cap + 16, &[0; 4]);
    rig.wait_used(&mut queue);
    // Nonsense reads as what was written last, and does nothing.
    for (bar, offset, len) in [
        (1, at::STATUS, 1),
        (0, at::STATUS, 3),
        (0, at::STATUS, 8),
        (0, 0x13, 2),
        (0, WINDOW_LEN, 4),
        (0, 0xffff_fffc, 4),
    ] {
        describe(&mut rig, bar, offset, len);
        rig.via.function.write_config(cap + 16, &[0; 4]);
        assert_eq!((rig.via.config(cap + 16, 4), rig.get(reg::STATUS)), (0, ALL), "{bar} {offset:#x} {len}");
    }
}

#[test]
fn doorbells_are_told_apart_by_their_place() {
    let mut rig = rig();
    let places: Vec<_> =
        rig.via.bells().iter().map(|bell| (bell.at, bell.value, bell.doorbell.queue)).collect();
    assert_eq!(places, [(at::BELLS, None, 0), (at::BELLS + 4, None, 1)]);
    assert!(rig.negotiate(VERSION_1));
    let mut second = rig.queue(1, 16, 0);
    rig.go();
    second.push(rig.ram(), &[(0x1000, 7, true)]);
    for (place, width) in [(0, 2), (8, 2), (0xffc, 4)] {
        rig.via.write(at::BELLS + place, 1, width);
    }
    rig.settle();
    assert_eq!(second.pop(rig.ram()), None);
    rig.via.write(at::BELLS + 4, 0, 4);
    assert_eq!(rig.wait_used(&mut second), (0, 7));
}

#[test]
fn what_the_kernel_says_goes_round_the_lane_unless_it_is_masked() {
    let kernel = Kernel::new(VERSION_1 | INDIRECT | EVENT_IDX | 1 << 15);
    let mut rig = Over::<Pci>::of("net", "tap=tap7,vhost=on", &FakeHost::with_vhost(&kernel));
    let wired = |rig: &Over<Pci>| std::mem::take(&mut *rig.via.post.wired.lock().unwrap());
    let say =
        |ring| rustix::io::write(kernel.bell(0, ring, Bell::Call).unwrap(), &1u64.to_ne_bytes()).unwrap();
    let start = |rig: &mut Over<Pci>| {
        assert!(rig.negotiate(VERSION_1));
        assert_eq!(wired(rig), Vec::<Vec<_>>::new(), "nothing before the driver is ready");
        rig.queue(0, 16, 0);
        rig.queue(1, 16, 0);
        rig.go();
    };
    start(&mut rig);
    assert_eq!(wired(&rig), [[Some(0x41), Some(0x41)]], "in one go");
    let control = at::TABLE + 16 + 12;
    rig.via.write(control, 1, 4);
    assert_eq!(wired(&rig), [[None, None]]);
    say(1);
    rig.settle();
    assert_eq!((rig.sent(), rig.via.read(at::PENDING, 8)), (vec![], 2), "masked: it is pending");
    // Another message, and unmasked with the same write.
    rig.via.write(at::TABLE + 16 + 8, 0x50, 8);
    assert_eq!((rig.sent(), wired(&rig)), (vec![0x50], vec![vec![Some(0x50), Some(0x50)]]));
    rig.via.write(0x16, 1, 2);
    rig.via.write(at::QUEUE_VECTOR, NO_VECTOR, 2);
    assert_eq!(wired(&rig), [[None]], "one queue wants no interrupts any more");
    rig.set(reg::STATUS, 0);
    assert_eq!(wired(&rig), [[None]]);
    start(&mut rig);
    assert_eq!(wired(&rig), [[Some(0x50), Some(0x50)]]);
    rig.command(2);
    assert_eq!(
        (wired(&rig), kernel.holds()),
        (vec![vec![None, None]], 0),
        "without bus mastering there is nothing"
    );
}
