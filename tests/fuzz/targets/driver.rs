//! An honest driver over mmio, for targets where the requests are what is fuzzed: rings are in order, and buffers are
//! in memory.
#![allow(dead_code, reason = "each target uses a part of it")]

use std::sync::Arc;

use base::bus::Registers;
use base::irq::FakeLine;
use devices::virtio::Device;
use devices::virtio::mmio::Mmio;
use vm_memory::{Bytes, GuestAddress};

use crate::world::World;

/// Chains of a queue, each of at most [`PARTS`] descriptors, which are its own.
pub const CHAINS: u16 = 16;
const PARTS: u16 = 4;
/// Where the rings lie, 64 KiB for each queue; what is below is the target's.
pub const RINGS: u64 = 1 << 20;
/// Queues at the most.
const QUEUES: usize = 4;
/// `DEVICE_NEEDS_RESET`, section 2.1 of virtio 1.2.
const NEEDS_RESET: u8 = 0x40;

/// A buffer: address, length, and whether the device writes to it.
pub type Part = (u64, u32, bool);

/// The driver of one device.
pub struct Driver<'a> {
    world: &'a World,
    mmio: Mmio,
    queues: Vec<Queue>,
}

#[derive(Clone, Copy, Default)]
struct Queue {
    size: u16,
    offered: u16,
    taken: u16,
    /// Chains with the device, a bit for each.
    away: u16,
}

impl<'a> Driver<'a> {
    /// Sets the device up to DRIVER_OK (section 3.1.1) with what it offers of the low `features`, and all its queues.
    pub fn start(world: &'a World, device: Box<dyn Device>, features: u32) -> Driver<'a> {
        let count = device.queues().len().min(QUEUES);
        let line = Arc::new(FakeLine::default());
        let mmio = Mmio::attach("fuzzed", device, &world.memory, line, &world.lane).expect("attach a device");
        let mut driver = Driver { world, mmio, queues: vec![Queue::default(); count] };
        for status in [0, 1, 3] {
            driver.set(0x70, status);
        }
        let mut offered = [0; 4];
        driver.mmio.read(0x10, &mut offered);
        // No EVENT_IDX and no INDIRECT, which are the ring's concern; VERSION_1.
        for (select, value) in [(0, u32::from_le_bytes(offered) & features & 0xff_ffff), (1, 1)] {
            driver.set(0x24, select);
            driver.set(0x20, value);
        }
        driver.set(0x70, 11);
        for (queue, ring) in (0..count).zip((RINGS..).step_by(0x1_0000)) {
            let _ = world.memory.ram().write_slice(&[0; 0xb000], GuestAddress(ring));
            driver.set(0x30, u32::try_from(queue).expect("there are few queues"));
            let mut max = [0; 4];
            driver.mmio.read(0x34, &mut max);
            let most = u32::from(CHAINS * PARTS).min(u32::from_le_bytes(max));
            let size = u16::try_from(most).expect("a queue is small");
            driver.queues[queue].size = size;
            driver.set(0x38, size.into());
            for (at, place) in [(0x80, ring), (0x90, ring + 0x8000), (0xa0, ring + 0xa000)] {
                driver.set(at, u32::try_from(place).expect("rings are below 4 GiB"));
            }
            driver.set(0x44, 1);
        }
        driver.set(0x70, 15);
        driver
    }

    /// Writes a register.
    pub fn set(&mut self, at: u64, value: u32) {
        self.mmio.write(at, &value.to_le_bytes());
    }

    /// The window of registers.
    pub fn registers(&mut self) -> &mut dyn Registers {
        &mut self.mmio
    }

    /// Whether the device asks for a reset.
    pub fn is_broken(&mut self) -> bool {
        let mut status = [0; 4];
        self.mmio.read(0x70, &mut status);
        status[0] & NEEDS_RESET != 0
    }

    /// A chain of `queue` that the device does not have: its number.
    pub fn spare(&self, queue: usize) -> Option<u16> {
        let Queue { size, away, .. } = *self.queues.get(queue)?;
        (0..size / PARTS).find(|chain| away >> chain & 1 == 0)
    }

    /// Whether the device has chains of `queue`.
    pub fn is_waiting(&self, queue: usize) -> bool {
        self.queues.get(queue).is_some_and(|state| state.away != 0)
    }

    /// Offers a chain, and rings.
    pub fn offer(&mut self, queue: usize, chain: u16, parts: &[Part]) {
        let Some(state) = self.queues.get_mut(queue) else { return };
        let (ram, ring) = (self.world.memory.ram(), RINGS + 0x1_0000 * queue as u64);
        let parts = parts.get(..usize::from(PARTS)).unwrap_or(parts);
        for (n, (addr, len, write)) in (chain * PARTS..).zip(parts) {
            let more = usize::from(n - chain * PARTS) + 1 < parts.len();
            let entry = ring + 16 * u64::from(n);
            let _ = ram.write_obj(*addr, GuestAddress(entry));
            let _ = ram.write_obj(*len, GuestAddress(entry + 8));
            let _ =
                ram.write_obj([u16::from(more) | u16::from(*write) << 1, n + 1], GuestAddress(entry + 12));
        }
        let slot = u64::from(state.offered % state.size);
        let _ = ram.write_obj(chain * PARTS, GuestAddress(ring + 0x8004 + 2 * slot));
        state.offered = state.offered.wrapping_add(1);
        state.away |= 1 << chain;
        let _ = ram.write_obj(state.offered, GuestAddress(ring + 0x8002));
        self.set(0x50, u32::try_from(queue).unwrap_or(0));
    }

    /// Waits until the lane has served what there was.
    pub fn settle(&self) {
        self.mmio.front().visit(|_, _| ());
    }

    /// The next chain that came back, and how many bytes were written to it. One that was not with the device is a bug.
    pub fn take(&mut self, queue: usize) -> Option<(u16, u32)> {
        let state = self.queues.get_mut(queue)?;
        let (ram, ring) = (self.world.memory.ram(), RINGS + 0x1_0000 * queue as u64 + 0xa000);
        let index: u16 = ram.read_obj(GuestAddress(ring + 2)).expect("the ring is in memory");
        if index == state.taken {
            return None;
        }
        let slot = u64::from(state.taken % state.size);
        let [head, len]: [u32; 2] =
            ram.read_obj(GuestAddress(ring + 4 + 8 * slot)).expect("the ring is in memory");
        state.taken = state.taken.wrapping_add(1);
        let chain = u16::try_from(head).expect("a head is a small number") / PARTS;
        assert_eq!(state.away >> chain & 1, 1, "queue {queue}: chain {chain} comes back twice");
        state.away &= !(1 << chain);
        Some((chain, len))
    }

    /// Resets the device: it lets go of all.
    pub fn stop(mut self) {
        self.set(0x70, 0);
    }
}
