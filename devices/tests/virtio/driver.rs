//! A driver played by the test: it drives the registers of a virtio device, over either transport, and lays rings in
//! guest memory.
#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use base::bus::Effect;
use base::clock::{Clock, HostClock};
use base::host::fake::FakeHost;
use base::irq::{FakeLine, Line, SharedLine};
use base::lane::{Lane, LaneHandle};
use base::memory::{Memory, Ram};
use devices::catalog::{self, Body, Kit};
use devices::virtio::Device;
use vm_memory::{Bytes, GuestAddress};

#[path = "via.rs"]
pub mod via;

pub use via::{Mmio, Pci, Via};

pub const ACKNOWLEDGE: u32 = 1;
pub const DRIVER: u32 = 2;
pub const DRIVER_OK: u32 = 4;
pub const FEATURES_OK: u32 = 8;
pub const NEEDS_RESET: u32 = 0x40;

pub const VERSION_1: u64 = 1 << 32;
pub const INDIRECT: u64 = 1 << 28;
pub const EVENT_IDX: u64 = 1 << 29;

/// Registers, by their offsets over mmio.
pub mod reg {
    pub const MAGIC: u64 = 0x0;
    pub const DEVICE_ID: u64 = 0x8;
    pub const DEVICE_FEATURES: u64 = 0x10;
    pub const DEVICE_SELECT: u64 = 0x14;
    pub const DRIVER_FEATURES: u64 = 0x20;
    pub const DRIVER_SELECT: u64 = 0x24;
    pub const QUEUE_SELECT: u64 = 0x30;
    pub const QUEUE_MAX: u64 = 0x34;
    pub const QUEUE_SIZE: u64 = 0x38;
    pub const QUEUE_READY: u64 = 0x44;
    pub const NOTIFY: u64 = 0x50;
    pub const CAUSES: u64 = 0x60;
    pub const ACK: u64 = 0x64;
    pub const STATUS: u64 = 0x70;
    pub const DESC: u64 = 0x80;
    pub const AVAIL: u64 = 0x90;
    pub const USED: u64 = 0xa0;
    pub const GENERATION: u64 = 0xfc;
    pub const CONFIG: u64 = 0x100;
}

/// RAM of the played guest: two pieces with a hole between.
pub const RAM: [(u64, u64); 2] = [(0, 4 << 20), (16 << 20, 4 << 20)];
/// Rings are laid here, 64 KiB for each queue; buffers below [`RINGS`] are the test's.
pub const RINGS: u64 = 16 << 20;

/// An interrupt line that a test can wait for.
#[derive(Default)]
pub struct Bell {
    edges: Mutex<u64>,
    rung: Condvar,
}

impl Line for Bell {
    fn set(&self, high: bool) {
        if high {
            *self.edges.lock().unwrap() += 1;
            self.rung.notify_all();
        }
    }
}

impl Bell {
    pub fn edges(&self) -> u64 {
        *self.edges.lock().unwrap()
    }

    /// Waits until there were more than `seen` edges, or for so long.
    pub fn wait_at_most(&self, seen: u64, limit: Duration) {
        let guard = self.edges.lock().unwrap();
        drop(self.rung.wait_timeout_while(guard, limit, |edges| *edges <= seen).unwrap());
    }

    /// Waits until there were more than `seen` edges.
    pub fn wait(&self, seen: u64) {
        let guard = self.edges.lock().unwrap();
        let limit = Duration::from_secs(20);
        let (_guard, answer) = self.rung.wait_timeout_while(guard, limit, |edges| *edges <= seen).unwrap();
        assert!(!answer.timed_out(), "no interrupt within {limit:?} after edge {seen}");
    }
}

/// A device behind a transport, with memory, an interrupt line and a lane of its own.
pub struct Over<V: Via> {
    pub memory: Memory,
    pub via: V,
    pub bell: Arc<Bell>,
    lane: LaneHandle,
    effects: Receiver<Effect>,
}

/// Builds what `text` asks of `kind`, on a made-up host.
pub fn build(kind: &str, text: &str, host: &FakeHost, memory: &Memory) -> base::Result<Body> {
    build_at(kind, text, host, memory, Arc::new(HostClock::default()))
}

/// The same, with a clock of the test's own.
pub fn build_at(
    kind: &str,
    text: &str,
    host: &FakeHost,
    memory: &Memory,
    clock: Arc<dyn Clock>,
) -> base::Result<Body> {
    let (_lane, lane) = Lane::new(|_| ()).unwrap();
    let line = |_| Arc::new(FakeLine::default()) as SharedLine;
    let kit =
        Kit { name: "test0", host, clock, memory, lines: &line, overhear: Arc::new(|_| ()), lane: &lane };
    let entry = catalog::find(kind).unwrap();
    entry.build(&entry.parse(text)?, &kit)
}

impl<V: Via> Over<V> {
    /// A rig around the device that `text` asks of `kind`.
    pub fn of(kind: &str, text: &str, host: &FakeHost) -> Self {
        let memory = Memory::new(&RAM).unwrap();
        match build(kind, text, host, &memory) {
            Ok(Body::Virtio(device)) => Self::new(device, memory),
            Ok(_) => panic!("{kind} is no virtio device"),
            Err(fail) => panic!("{fail}"),
        }
    }

    pub fn new(device: Box<dyn Device>, memory: Memory) -> Self {
        let (heard, effects) = channel();
        let lane = Lane::spawn("test", move |effect| heard.send(effect).unwrap_or_default()).unwrap();
        let bell = Arc::new(Bell::default());
        let via = V::attach(device, &memory, bell.clone(), &lane);
        Over { memory, via, bell, lane, effects }
    }

    pub fn ram(&self) -> &Ram {
        self.memory.ram()
    }

    pub fn get(&mut self, at: u64) -> u32 {
        self.via.get(at)
    }

    pub fn set(&mut self, at: u64, value: u32) {
        self.via.set(at, value);
    }

    pub fn set64(&mut self, at: u64, value: u64) {
        let [low, high] = [value & 0xffff_ffff, value >> 32].map(|half| u32::try_from(half).unwrap());
        self.set(at, low);
        self.set(at + 4, high);
    }

    pub fn config(&mut self, at: u64, data: &mut [u8]) {
        self.via.registers().read(V::CONFIG + at, data);
    }

    pub fn configure(&mut self, at: u64, data: &[u8]) {
        self.via.registers().write(V::CONFIG.saturating_add(at), data);
    }

    pub fn offered(&mut self) -> u64 {
        self.set(reg::DEVICE_SELECT, 0);
        let low = self.get(reg::DEVICE_FEATURES);
        self.set(reg::DEVICE_SELECT, 1);
        u64::from(self.get(reg::DEVICE_FEATURES)) << 32 | u64::from(low)
    }

    /// Up to FEATURES_OK; whether the device agreed.
    pub fn negotiate(&mut self, features: u64) -> bool {
        self.set(reg::STATUS, 0);
        assert_eq!(self.get(reg::STATUS), 0, "a reset clears the status");
        self.set(reg::STATUS, ACKNOWLEDGE);
        self.set(reg::STATUS, ACKNOWLEDGE | DRIVER);
        for (select, shift) in [(0, 0), (1, 32)] {
            self.set(reg::DRIVER_SELECT, select);
            self.set(reg::DRIVER_FEATURES, u32::try_from(features >> shift & 0xffff_ffff).unwrap());
        }
        self.set(reg::STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        self.get(reg::STATUS) & FEATURES_OK != 0
    }

    /// Sets up queue `index` with `size` entries at the usual place.
    pub fn queue(&mut self, index: u16, size: u16, features: u64) -> Virtq {
        let queue = Virtq::new(index, size, features & EVENT_IDX != 0);
        self.memory.ram().write_slice(&[0; 0x1_0000], GuestAddress(queue.desc)).unwrap();
        self.set(reg::QUEUE_SELECT, index.into());
        self.set(reg::QUEUE_SIZE, size.into());
        self.set64(reg::DESC, queue.desc);
        self.set64(reg::AVAIL, queue.avail);
        self.set64(reg::USED, queue.used);
        self.set(reg::QUEUE_READY, 1);
        assert_eq!(self.get(reg::QUEUE_READY), 1, "queue {index} of {size} entries is accepted");
        queue
    }

    pub fn go(&mut self) {
        self.set(reg::STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    }

    /// All of it, with queue 0 of `size` entries: features that are not offered are left out.
    pub fn start(&mut self, features: u64, size: u16) -> Virtq {
        self.start_with(0, features, size)
    }

    /// The same with queue `index` and no other.
    pub fn start_with(&mut self, index: u16, features: u64, size: u16) -> Virtq {
        let features = (features | VERSION_1) & self.offered();
        assert!(self.negotiate(features), "features {features:#x} are accepted");
        let queue = self.queue(index, size, features);
        self.go();
        assert_eq!(self.get(reg::STATUS), ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        queue
    }

    pub fn notify(&mut self, queue: u16) {
        self.via.notify(queue);
    }

    /// Returns when the lane has served all doorbells rung so far.
    pub fn settle(&self) {
        self.via.settle();
    }

    /// Waits for a chain to come back: its head and the length written.
    pub fn wait_used(&mut self, queue: &mut Virtq) -> (u32, u32) {
        loop {
            let seen = self.bell.edges();
            if let Some(used) = queue.pop(self.memory.ram()) {
                return used;
            }
            self.bell.wait(seen);
        }
    }

    /// Waits for what the device asks of the machine.
    pub fn effect(&self) -> Effect {
        self.effects.recv_timeout(Duration::from_secs(20)).expect("the device asks for something")
    }

    pub fn meter(&self, name: &str) -> u64 {
        let meters = self.via.meters();
        let (_, counter) = meters.iter().find(|(known, _)| *known == name).unwrap();
        counter.get()
    }
}

impl<V: Via> Drop for Over<V> {
    fn drop(&mut self) {
        let orderly = self.lane.stop();
        assert!(orderly || std::thread::panicking(), "the lane has panicked");
        if let (Ok(effect), false) = (self.effects.try_recv(), std::thread::panicking()) {
            panic!("unexpected {effect:?}");
        }
    }
}

/// A buffer of a request: address, length, and whether the device writes it.
pub type Part = (u64, u32, bool);

/// The driver's side of a split virtqueue.
pub struct Virtq {
    pub index: u16,
    pub size: u16,
    pub desc: u64,
    pub avail: u64,
    pub used: u64,
    event_idx: bool,
    free: Vec<u16>,
    chains: std::collections::HashMap<u16, Vec<u16>>,
    next_avail: u16,
    last_used: u16,
}

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT_FLAG: u16 = 4;

impl Virtq {
    pub fn new(index: u16, size: u16, event_idx: bool) -> Virtq {
        let desc = RINGS + 0x1_0000 * u64::from(index);
        let (avail, used) = (desc + 0x8000, desc + 0xa000);
        let free = (0..size).rev().collect();
        let chains = std::collections::HashMap::new();
        Virtq { index, size, desc, avail, used, event_idx, free, chains, next_avail: 0, last_used: 0 }
    }

    /// Writes descriptor `at` of the table at `table`.
    pub fn describe(ram: &Ram, table: u64, at: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let entry = GuestAddress(table + 16 * u64::from(at));
        ram.write_obj(addr.to_le(), entry).unwrap();
        ram.write_obj(len.to_le(), GuestAddress(entry.0 + 8)).unwrap();
        ram.write_obj(flags.to_le(), GuestAddress(entry.0 + 12)).unwrap();
        ram.write_obj(next.to_le(), GuestAddress(entry.0 + 14)).unwrap();
    }

    /// Offers the chain that begins at `head`.
    pub fn offer(&mut self, ram: &Ram, head: u16) {
        let slot = self.avail + 4 + 2 * u64::from(self.next_avail % self.size);
        ram.write_obj(head.to_le(), GuestAddress(slot)).unwrap();
        self.next_avail = self.next_avail.wrapping_add(1);
        ram.store(self.next_avail.to_le(), GuestAddress(self.avail + 2), std::sync::atomic::Ordering::SeqCst)
            .unwrap();
    }

    fn lay(ram: &Ram, table: u64, places: &[u16], parts: &[Part]) {
        for (n, (addr, len, write)) in parts.iter().enumerate() {
            let next = places.get(n + 1).copied();
            let flags = if *write { WRITE } else { 0 } | if next.is_some() { NEXT } else { 0 };
            Self::describe(ram, table, places[n], *addr, *len, flags, next.unwrap_or(0));
        }
    }

    /// Lays a request and offers it; its head.
    pub fn push(&mut self, ram: &Ram, parts: &[Part]) -> u16 {
        let places: Vec<u16> = parts.iter().map(|_| self.free.pop().expect("the ring has room")).collect();
        Self::lay(ram, self.desc, &places, parts);
        let head = places[0];
        self.chains.insert(head, places);
        self.offer(ram, head);
        head
    }

    /// The same through an indirect table at `table`.
    pub fn push_indirect(&mut self, ram: &Ram, table: u64, parts: &[Part]) -> u16 {
        let places: Vec<u16> = (0..).zip(parts).map(|(n, _)| n).collect();
        Self::lay(ram, table, &places, parts);
        let head = self.free.pop().expect("the ring has room");
        let len = 16 * u32::try_from(parts.len()).unwrap();
        Self::describe(ram, self.desc, head, table, len, INDIRECT_FLAG, 0);
        self.chains.insert(head, vec![head]);
        self.offer(ram, head);
        head
    }

    /// Takes a chain that came back: its head and the length written.
    pub fn pop(&mut self, ram: &Ram) -> Option<(u32, u32)> {
        let index: u16 = ram.load(GuestAddress(self.used + 2), std::sync::atomic::Ordering::SeqCst).unwrap();
        if u16::from_le(index) == self.last_used {
            return None;
        }
        let slot = self.used + 4 + 8 * u64::from(self.last_used % self.size);
        let [head, len] = ram.read_obj::<[u32; 2]>(GuestAddress(slot)).unwrap().map(u32::from_le);
        self.last_used = self.last_used.wrapping_add(1);
        let places = u16::try_from(head).ok().and_then(|head| self.chains.remove(&head));
        self.free.extend(places.unwrap_or_else(|| panic!("chain {head} came back but was never offered")));
        if self.event_idx {
            self.want_interrupt_after(ram, self.last_used);
        }
        Some((head, len))
    }

    /// Whether no chain has come back since the last [`Virtq::pop`].
    pub fn is_empty(&self, ram: &Ram) -> bool {
        let index: u16 = ram.load(GuestAddress(self.used + 2), std::sync::atomic::Ordering::SeqCst).unwrap();
        u16::from_le(index) == self.last_used
    }

    /// Sets `used_event`.
    pub fn want_interrupt_after(&self, ram: &Ram, index: u16) {
        ram.write_obj(index.to_le(), GuestAddress(self.avail + 4 + 2 * u64::from(self.size))).unwrap();
    }

    /// The device's `avail_event`.
    pub fn avail_event(&self, ram: &Ram) -> u16 {
        u16::from_le(ram.read_obj(GuestAddress(self.used + 4 + 8 * u64::from(self.size))).unwrap())
    }

    /// The flags that the device shows in the used ring.
    pub fn used_flags(&self, ram: &Ram) -> u16 {
        u16::from_le(ram.read_obj(GuestAddress(self.used)).unwrap())
    }

    /// Sets the flags of the available ring.
    pub fn set_flags(&self, ram: &Ram, flags: u16) {
        ram.write_obj(flags.to_le(), GuestAddress(self.avail)).unwrap();
    }
}
