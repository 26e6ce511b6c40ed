//! A hostile driver: registers in any order, rings and buffers with any content, against every virtio device of the
//! catalogue.
//!
//! The input is a list of moves. The first two bytes choose the device and whether it is set up properly before the
//! moves begin, since a driver that never reaches DRIVER_OK never reaches the rings.
#![no_main]

mod world;

use std::sync::{Arc, OnceLock};

use base::bus::Registers;
use base::host::fake::FakeHost;
use base::irq::FakeLine;
use base::memory::Memory;
use devices::catalog::CATALOG;
use devices::virtio::Device;
use devices::virtio::mmio::Mmio;
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress};
use world::World;

/// Where the rings lie, 64 KiB for each queue, and how many of them are reset between inputs.
const RINGS: u64 = 1 << 20;
const QUEUES: u64 = 4;

fn world() -> &'static World {
    static WORLD: OnceLock<World> = OnceLock::new();
    WORLD.get_or_init(|| World::new(&[(0, 2 << 20), (4 << 20, 1 << 20)]))
}

/// The virtio device of the catalogue that `choice` falls on.
fn device(world: &World, choice: u8) -> Option<Box<dyn Device>> {
    let entry = CATALOG.get(usize::from(choice) % CATALOG.len().max(1))?;
    world.build(*entry, entry.example(), &FakeHost::default())
}

fn set(mmio: &mut Mmio, at: u64, value: u32) {
    mmio.write(at, &value.to_le_bytes());
}

/// What a driver does up to DRIVER_OK (virtio 1.2, section 3.1.1).
fn set_up(mmio: &mut Mmio, size: u32, features: u32) {
    for status in [0, 1, 3] {
        set(mmio, 0x70, status);
    }
    for (select, value) in [(0, features), (1, 1)] {
        set(mmio, 0x24, select);
        set(mmio, 0x20, value);
    }
    set(mmio, 0x70, 11);
    for queue in 0..4 {
        set(mmio, 0x30, queue);
        set(mmio, 0x38, size);
        let base = 0x10_0000 + queue * 0x1_0000;
        for (at, value) in [(0x80, base), (0x90, base + 0x8000), (0xa0, base + 0xa000)] {
            set(mmio, at, value);
            set(mmio, at + 4, 0);
        }
        set(mmio, 0x44, 1);
    }
    set(mmio, 0x70, 15);
}

/// Takes moves until the input is at its end.
fn play(mmio: &mut Mmio, memory: &Memory, mut moves: &[u8]) {
    let mut left = 256;
    while let Some((kind, rest)) = moves.split_first() {
        left -= 1;
        let (Some((argument, rest)), true) = (rest.split_first_chunk::<6>(), left > 0) else { return };
        moves = rest;
        let [a, b, value @ ..] = *argument;
        let at = u64::from(u16::from_le_bytes([a, b]));
        match kind % 8 {
            // Any register, any width from 1 to 8.
            0 => drop(mmio.write(at % 0x200, &value[..])),
            1 => drop(mmio.write(at % 0x200, &[value, value].concat()[..usize::from(b % 8) + 1])),
            2 => mmio.read(at % 0x200, &mut [0xff; 8][..usize::from(b % 8) + 1]),
            3 => set(mmio, 0x50, u32::from(a % 4)),
            4 => drop(mmio.front().visit(|_, _| ())),
            // Bytes from the input into a ring or a buffer.
            5 => {
                let len = usize::from(value[0]).min(moves.len());
                let (bytes, rest) = moves.split_at(len);
                moves = rest;
                let _ = memory
                    .ram()
                    .write_slice(bytes, GuestAddress(RINGS + u64::from(value[1] % 4) * 0x1_0000 + at));
            }
            // A chain offered in the usual way: descriptor `a % 8` is the head.
            6 => {
                let ring = RINGS + u64::from(b % 4) * 0x1_0000 + 0x8000;
                let index: u16 = memory.ram().read_obj(GuestAddress(ring + 2)).unwrap_or(0);
                let _ = memory
                    .ram()
                    .write_obj(u16::from(a % 8), GuestAddress(ring + 4 + 2 * u64::from(index % 8)));
                let _ = memory.ram().write_obj(index.wrapping_add(1), GuestAddress(ring + 2));
            }
            // A descriptor: address and length from a few bytes, so that most of them are nearly right.
            _ => {
                let entry = RINGS + u64::from(b % 4) * 0x1_0000 + 16 * u64::from(a % 8);
                let addr = u64::from(value[0]) << 13 | u64::from(value[1] & 15);
                let len = u32::from(value[1]) << (value[2] & 15);
                let flags = u16::from(value[2] >> 4 & 7);
                let _ = memory.ram().write_obj(addr, GuestAddress(entry));
                let _ = memory.ram().write_obj(len, GuestAddress(entry + 8));
                let _ = memory.ram().write_obj(flags, GuestAddress(entry + 12));
                let _ = memory.ram().write_obj(u16::from(value[3] & 15), GuestAddress(entry + 14));
            }
        }
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((&[choice, how], moves)) = data.split_first_chunk::<2>() else { return };
    let world = world();
    let Some(device) = device(world, choice) else { return };
    for queue in 0..QUEUES {
        let _ = world.memory.ram().write_slice(&[0; 0xb000], GuestAddress(RINGS + queue * 0x1_0000));
    }
    let line = Arc::new(FakeLine::default());
    let Ok(mut mmio) = Mmio::attach("fuzzed", device, &world.memory, line, &world.lane) else { return };
    if how & 3 != 0 {
        set_up(&mut mmio, 8, u32::from(how >> 2) << 24);
    }
    play(&mut mmio, &world.memory, moves);
    // The lane has served everything, and the device lets go of its chains.
    mmio.front().visit(|_, _| ());
    set(&mut mmio, 0x70, 0);
});
