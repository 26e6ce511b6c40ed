//! The two transports, as the played driver uses them.

use std::sync::{Arc, Mutex};

use base::bus::{Effect, Registers};
use base::irq::{Line, Messages, Msi, SharedLine, Wire};
use base::lane::LaneHandle;
use base::memory::Memory;
use devices::pci::{Function, Root};
use devices::virtio::pci::{Place, WINDOW_LEN};
use devices::virtio::{Bell as Doorbell, Device, Knob, Meters, mmio, pci};

use super::reg;

/// A transport.
pub trait Via: Sized + 'static {
    /// Where the configuration of the device is in the window.
    const CONFIG: u64;
    /// Puts a device behind it.
    fn attach(device: Box<dyn Device>, memory: &Memory, line: SharedLine, lane: &LaneHandle) -> Self;
    /// The window.
    fn registers(&mut self) -> &mut dyn Registers;
    /// One of all the registers there are, with their length: `which` chooses.
    fn any(&mut self, which: u64) -> (&mut dyn Registers, u64);
    /// Reads a register by its offset over mmio.
    fn get(&mut self, at: u64) -> u32;
    /// Writes it.
    fn set(&mut self, at: u64, value: u32);
    /// Brings it back to the state in which drivers have it, whatever was done to it.
    fn recover(&mut self);
    /// Rings a doorbell.
    fn notify(&mut self, queue: u16);
    /// Waits for the lane.
    fn settle(&self);
    /// What an operator can do with the device.
    fn knob(&self) -> Knob;
    /// Has the device look again at what it stands on.
    fn refresh(&mut self) -> base::Result<()> {
        self.knob().refresh()
    }
    /// The counters.
    fn meters(&self) -> Meters;
    /// Where doorbells can be wired.
    fn bells(&self) -> Vec<Doorbell>;
}

/// The memory-mapped transport.
pub struct Mmio(mmio::Mmio);

impl Via for Mmio {
    const CONFIG: u64 = reg::CONFIG;

    fn attach(device: Box<dyn Device>, memory: &Memory, line: SharedLine, lane: &LaneHandle) -> Mmio {
        Mmio(mmio::Mmio::attach("test0", device, memory, line, lane).unwrap())
    }
    fn registers(&mut self) -> &mut dyn Registers {
        &mut self.0
    }
    fn any(&mut self, _: u64) -> (&mut dyn Registers, u64) {
        (&mut self.0, 0x140)
    }
    fn get(&mut self, at: u64) -> u32 {
        let mut data = [0xff; 4];
        self.0.read(at, &mut data);
        u32::from_le_bytes(data)
    }
    fn set(&mut self, at: u64, value: u32) {
        self.0.write(at, &value.to_le_bytes());
    }
    fn recover(&mut self) {}
    fn notify(&mut self, queue: u16) {
        self.set(reg::NOTIFY, queue.into());
    }
    fn settle(&self) {
        self.0.front().visit(|_, _| ());
    }
    fn knob(&self) -> Knob {
        self.0.knob().clone()
    }
    fn meters(&self) -> Meters {
        self.0.meters().clone()
    }
    fn bells(&self) -> Vec<Doorbell> {
        self.0.bells()
    }
}

/// Interrupt messages, in the order they came; each is an edge of the line that tests look at.
pub struct Post {
    pub sent: Mutex<Vec<Msi>>,
    /// What was asked to be wired, by the data of the messages; each list is one call.
    pub wired: Mutex<Vec<Vec<Option<u32>>>>,
    line: SharedLine,
}

impl Messages for Post {
    fn send(&self, msi: Msi) {
        self.sent.lock().unwrap().push(msi);
        self.line.pulse();
    }
    fn watch(&self, pin: u32, _: Option<Msi>) {
        panic!("pin {pin} of no I/O APIC is watched");
    }
    fn wire(&self, wires: &[Wire]) {
        let data = wires.iter().map(|(_, msi)| msi.map(|msi| msi.data)).collect();
        self.wired.lock().unwrap().push(data);
    }
}

/// A pin that a test can look at.
#[derive(Default)]
pub struct Pin(Mutex<bool>);

impl Pin {
    pub fn is_high(&self) -> bool {
        *self.0.lock().unwrap()
    }
}

impl Line for Pin {
    fn set(&self, high: bool) {
        *self.0.lock().unwrap() = high;
    }
}

/// The PCI transport: a function on a bus of its own, bus mastering and MSI-X switched on as drivers do. Vector `n` is
/// the message with the data `0x40 + n`; 0 is for the configuration, 1 for all queues.
pub struct Pci {
    pub function: pci::Pci,
    space: Space,
    pub ecam: Box<dyn Registers>,
    pub ports: [Box<dyn Registers>; 2],
    pub post: Arc<Post>,
    pub pin: Arc<Pin>,
    /// Whether queues and configuration get vectors again after each reset.
    pub vectors: bool,
}

/// Its configuration space alone: of ECAM it is but a small part.
struct Space(pci::Pci);

impl Registers for Space {
    fn read(&mut self, at: u64, data: &mut [u8]) {
        self.0.read_config(usize::try_from(at).unwrap(), data);
    }
    fn write(&mut self, at: u64, data: &[u8]) -> Effect {
        self.0.write_config(usize::try_from(at).unwrap(), data)
    }
}

/// Where the window of the function is at first.
const BASE: u64 = 0xc000_4000;

/// Offsets in the window, as the device says them in its capabilities.
pub mod at {
    pub const ISR: u64 = 0x100;
    pub const CONFIG: u64 = 0x1000;
    pub const BELLS: u64 = 0x2000;
    pub const TABLE: u64 = 0x3000;
    pub const PENDING: u64 = 0x3800;
    pub const CONFIG_VECTOR: u64 = 0x10;
    pub const STATUS: u64 = 0x14;
    pub const QUEUE_VECTOR: u64 = 0x1a;
}

/// Offset and width over PCI of a register over mmio.
fn translate(at: u64) -> Option<(u64, usize)> {
    Some(match at {
        reg::DEVICE_SELECT => (0x00, 4),
        reg::DEVICE_FEATURES => (0x04, 4),
        reg::DRIVER_SELECT => (0x08, 4),
        reg::DRIVER_FEATURES => (0x0c, 4),
        reg::STATUS => (at::STATUS, 1),
        reg::GENERATION => (0x15, 1),
        reg::QUEUE_SELECT => (0x16, 2),
        reg::QUEUE_SIZE => (0x18, 2),
        reg::QUEUE_READY => (0x1c, 2),
        reg::CAUSES => (at::ISR, 1),
        _ if (reg::DESC..reg::DESC + 8).contains(&at) => (at - reg::DESC + 0x20, 4),
        _ if (reg::AVAIL..reg::AVAIL + 8).contains(&at) => (at - reg::AVAIL + 0x28, 4),
        _ if (reg::USED..reg::USED + 8).contains(&at) => (at - reg::USED + 0x30, 4),
        _ => return None,
    })
}

impl Pci {
    pub fn read(&mut self, at: u64, width: usize) -> u64 {
        let mut data = [0; 8];
        self.function.read(at, &mut data[..width]);
        u64::from_le_bytes(data)
    }

    pub fn write(&mut self, at: u64, value: u64, width: usize) {
        self.function.write(at, &value.to_le_bytes()[..width]);
    }

    pub fn config(&mut self, at: usize, width: usize) -> u64 {
        let mut data = [0; 8];
        self.function.read_config(at, &mut data[..width]);
        u64::from_le_bytes(data)
    }

    /// Offset of the capability `id`; for virtio's own, of the type `kind`.
    pub fn capability(&mut self, id: u64, kind: Option<u64>) -> usize {
        let mut at = usize::try_from(self.config(0x34, 1)).unwrap();
        while at != 0 {
            if self.config(at, 1) == id && kind.is_none_or(|kind| self.config(at + 3, 1) == kind) {
                return at;
            }
            at = usize::try_from(self.config(at + 1, 1)).unwrap();
        }
        panic!("no capability {id:#x} of type {kind:?}");
    }

    /// Brings the function to the state in which drivers have it.
    pub fn enable(&mut self) {
        self.function.write_config(4, &[6, 0]);
        for vector in 0..2 {
            let entry = at::TABLE + vector * 16;
            self.write(entry, 0xfee0_0000, 8);
            self.write(entry + 8, 0x40 + vector, 8);
        }
        let msix = self.capability(0x11, None);
        self.function.write_config(msix + 2, &0x8000u16.to_le_bytes());
        self.vectors = true;
        self.choose();
    }

    fn choose(&mut self) {
        if self.vectors {
            let selected = self.read(0x16, 2);
            self.write(at::CONFIG_VECTOR, 0, 2);
            for queue in 0..self.read(0x12, 2) {
                self.write(0x16, queue, 2);
                self.write(at::QUEUE_VECTOR, 1, 2);
            }
            self.write(0x16, selected, 2);
        }
    }
}

impl Via for Pci {
    const CONFIG: u64 = at::CONFIG;

    fn attach(device: Box<dyn Device>, memory: &Memory, line: SharedLine, lane: &LaneHandle) -> Pci {
        let root = Root::default();
        let post = Arc::new(Post { sent: Mutex::default(), wired: Mutex::default(), line });
        let pin = Arc::new(Pin::default());
        let place =
            Place { device: root.next().unwrap(), base: BASE, pin: (pin.clone(), 5), messages: post.clone() };
        let function = pci::Pci::attach("test0", device, memory, place, lane).unwrap();
        root.add(Box::new(function.clone()));
        let space = Space(function.clone());
        let mut pci =
            Pci { function, space, ecam: root.ecam(), ports: root.ports(), post, pin, vectors: true };
        pci.enable();
        pci
    }
    fn registers(&mut self) -> &mut dyn Registers {
        &mut self.function
    }
    fn any(&mut self, which: u64) -> (&mut dyn Registers, u64) {
        match which % 8 {
            0 => (self.ecam.as_mut(), 2 << 15),
            1 => (self.ports[0].as_mut(), 1),
            2 => (self.ports[1].as_mut(), 4),
            3 | 4 => (&mut self.space, 0x100),
            _ => (&mut self.function, WINDOW_LEN),
        }
    }
    fn get(&mut self, at: u64) -> u32 {
        if at == reg::QUEUE_MAX {
            // Over PCI the size of a queue that is not set up yet.
            return self.get(reg::QUEUE_SIZE);
        }
        if at == reg::DEVICE_ID {
            return u32::try_from(self.config(2, 2)).unwrap() - 0x1040;
        }
        let (at, width) = translate(at).unwrap();
        u32::try_from(self.read(at, width)).unwrap()
    }
    fn set(&mut self, at: u64, value: u32) {
        let Some((at, width)) = translate(at) else {
            assert_eq!(at, reg::ACK, "causes are cleared when they are read");
            return;
        };
        self.write(at, value.into(), width);
        if at == at::STATUS && value == 0 {
            self.choose();
        }
    }
    fn recover(&mut self) {
        self.enable();
    }
    fn notify(&mut self, queue: u16) {
        self.write(at::BELLS + 4 * u64::from(queue), queue.into(), 2);
    }
    fn settle(&self) {
        self.function.with_front(|front| front.visit(|_, _| ()));
    }
    fn knob(&self) -> Knob {
        self.function.knob()
    }
    fn meters(&self) -> Meters {
        self.function.meters()
    }
    fn bells(&self) -> Vec<Doorbell> {
        self.function.bells()
    }
}
