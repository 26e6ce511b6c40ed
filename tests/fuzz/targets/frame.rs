//! A guest that sends any frames to the NAT: the first bytes say how they are cut, the rest is in them.
//!
//! The rules let nothing out, so that no frame reaches a network.
#![no_main]

mod world;

use std::sync::{Arc, OnceLock};

use base::bus::Registers;
use base::host::fake::FakeHost;
use base::irq::FakeLine;
use base::memory::Memory;
use devices::catalog;
use devices::net::user::packet;
use devices::virtio::mmio::Mmio;
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress};
use world::World;

const RINGS: u64 = 1 << 20;
const SIZE: u16 = 16;

fn world() -> &'static World {
    static WORLD: OnceLock<World> = OnceLock::new();
    WORLD.get_or_init(|| World::new(&[(0, 2 << 20)]))
}

fn card(world: &World) -> Option<Mmio> {
    // Shared by all inputs, as a machine's is.
    static HOST: OnceLock<FakeHost> = OnceLock::new();
    let host = HOST.get_or_init(FakeHost::default);
    let device = world.build(catalog::find("net")?, "user,dns=127.0.0.1:1,allow=fuzz.invalid", host)?;
    Mmio::attach("fuzzed", device, &world.memory, Arc::new(FakeLine::default()), &world.lane).ok()
}

fn set(mmio: &mut Mmio, at: u64, value: u32) {
    mmio.write(at, &value.to_le_bytes());
}

/// Up to DRIVER_OK, with receive buffers laid out (virtio 1.2, section 3.1.1).
fn set_up(mmio: &mut Mmio, memory: &Memory) {
    let _ = memory.ram().write_slice(&[0; 0x2_0000], GuestAddress(RINGS));
    for (at, value) in
        [(0x70, 0), (0x70, 1), (0x70, 3), (0x24, 0), (0x20, 1 << 15), (0x24, 1), (0x20, 1), (0x70, 11)]
    {
        set(mmio, at, value);
    }
    for queue in 0..2 {
        let base = 0x10_0000 + queue * 0x1_0000;
        set(mmio, 0x30, queue);
        set(mmio, 0x38, SIZE.into());
        for (at, value) in [(0x80, base), (0x90, base + 0x8000), (0xa0, base + 0xa000)] {
            set(mmio, at, value);
        }
        set(mmio, 0x44, 1);
    }
    set(mmio, 0x70, 15);
    for n in 0..SIZE {
        lay(memory, RINGS, n, (0x8_0000 + u64::from(n) * 0x1000, 0x1000), 2);
    }
    set(mmio, 0x50, 0);
}

/// Offers chain `n` of one descriptor.
fn lay(memory: &Memory, ring: u64, n: u16, (addr, len): (u64, u32), flags: u16) {
    let entry = ring + 16 * u64::from(n % SIZE);
    let _ = memory.ram().write_obj(addr, GuestAddress(entry));
    let _ = memory.ram().write_obj(len, GuestAddress(entry + 8));
    let _ = memory.ram().write_obj(u32::from(flags), GuestAddress(entry + 12));
    let _ = memory.ram().write_obj(n % SIZE, GuestAddress(ring + 0x8004 + 2 * u64::from(n % SIZE)));
    let _ = memory.ram().write_obj(n.wrapping_add(1), GuestAddress(ring + 0x8002));
}

fuzz_target!(|data: &[u8]| {
    let world = world();
    let Some(mut mmio) = card(world) else { return };
    set_up(&mut mmio, &world.memory);
    let mut rest = data;
    for n in 0..64u16 {
        let Some((&[a, b], more)) = rest.split_first_chunk::<2>() else { break };
        let len = usize::from(u16::from_le_bytes([a, b]) & 0x7ff).min(more.len());
        let (frame, more) = more.split_at(len);
        rest = more;
        if let Some(packet::Frame { body: packet::Body::Ip(ip), .. }) = packet::parse(frame, frame.len()) {
            assert!(ip.at + ip.len <= frame.len(), "a packet ends in its frame");
        }
        let place = 0x1_0000 + u64::from(n % SIZE) * 0x1000;
        let _ = world.memory.ram().write_slice(&[0; 12], GuestAddress(place));
        let _ = world.memory.ram().write_slice(frame, GuestAddress(place + 12));
        let len = u32::try_from(frame.len()).unwrap_or(0) + 12;
        lay(&world.memory, RINGS + 0x1_0000, n, (place, len), 0);
        set(&mut mmio, 0x50, 1);
        mmio.front().visit(|_, _| ());
    }
    set(&mut mmio, 0x70, 0);
});
