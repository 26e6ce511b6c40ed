//! A hostile driver on the PCI bus: configuration space by all its ways, base addresses, masks and vectors, registers in
//! the window wherever it is now, of every virtio device of the catalogue.
//!
//! The first byte chooses the device; the rest is a list of accesses: which way, width, address, value.
#![no_main]

mod world;

use std::sync::{Arc, OnceLock};

use base::bus::{Bus, Effect};
use base::host::fake::FakeHost;
use base::irq::{FakeLine, Messages, Msi, SharedLine};
use devices::catalog::CATALOG;
use devices::pci::{Root, root};
use devices::virtio::Device;
use devices::virtio::pci::{Pci, Place, WINDOW_LEN};
use libfuzzer_sys::fuzz_target;
use world::World;

const ECAM: u64 = 0xe000_0000;
const WINDOW: u64 = 0xc000_4000;

fn world() -> &'static World {
    static WORLD: OnceLock<World> = OnceLock::new();
    WORLD.get_or_init(|| World::new(&[(0, 2 << 20)]))
}

/// Messages that go nowhere.
struct Void;

impl Messages for Void {
    fn send(&self, _: Msi) {}
    fn watch(&self, _: u32, _: Option<Msi>) {}
}

/// The virtio device of the catalogue that `choice` falls on.
fn device(world: &World, choice: u8) -> Option<Box<dyn Device>> {
    let entry = CATALOG.get(usize::from(choice) % CATALOG.len().max(1))?;
    world.build(*entry, entry.example(), &FakeHost::default())
}

/// Memory and ports of a machine with this one device.
fn board(world: &World, device: Box<dyn Device>) -> Option<(Bus, Bus, Pci)> {
    let bus = Root::default();
    let pin = (Arc::new(FakeLine::default()) as SharedLine, 5);
    let place = Place { device: bus.next().ok()?, base: WINDOW, pin, messages: Arc::new(Void) };
    let function = Pci::attach("fuzzed", device, &world.memory, place, &world.lane).ok()?;
    bus.add(Box::new(function.clone()));
    let (mut memory, mut ports) = (Bus::new("memory"), Bus::new("port"));
    memory.insert("ecam", ECAM, root::ECAM_LEN, bus.ecam()).ok()?;
    memory.insert_movable(1, WINDOW_LEN, Box::new(function.clone()));
    let [address, data] = bus.ports();
    ports.insert("address", root::ADDRESS_PORT, 1, address).ok()?;
    ports.insert("data", root::DATA_PORT, root::DATA_LEN, data).ok()?;
    Some((memory, ports, function))
}

fuzz_target!(|data: &[u8]| {
    let Some((choice, mut accesses)) = data.split_first() else { return };
    let world = world();
    let Some(device) = device(world, *choice) else { return };
    let Some((memory, ports, function)) = board(world, device) else { return };
    let (mut window, mut turn) = (WINDOW, 0);
    for _ in 0..256 {
        let Some((&[kind, low, high], rest)) = accesses.split_first_chunk::<3>() else { break };
        let Some((value, rest)) = rest.split_first_chunk::<8>() else { break };
        accesses = rest;
        let at = u64::from(u16::from_le_bytes([low, high]));
        let width = usize::from(kind >> 4 & 7) + 1;
        let (bus, address) = match kind & 3 {
            0 => (&memory, ECAM + (at & 0x1fff) + 0x7000),
            1 => (&ports, root::ADDRESS_PORT + (at & 7)),
            _ => (&memory, window.wrapping_add(at % WINDOW_LEN)),
        };
        if kind & 0x80 != 0 {
            let mut answer = [0xff; 8];
            bus.read(address, &mut answer[..width]);
        } else {
            match bus.write(address, &value[..width]) {
                Effect::None => {}
                Effect::Move(to) => {
                    assert!(to.window == 1 && to.turn > turn, "moves are counted");
                    turn = to.turn;
                    memory.place(to.window, to.to);
                    window = to.to.unwrap_or(window);
                }
                other => panic!("a virtio device asks for {other:?}"),
            }
        }
    }
    // The lane has served everything, and the device lets go of its chains.
    function.with_front(|front| front.reset());
});
