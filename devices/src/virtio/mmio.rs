//! The memory-mapped transport: a table of offsets over the [`Front`] (section 4.2.2, version 2).

use std::sync::Arc;

use base::Result;
use base::bus::{Effect, Registers};
use base::irq::SharedLine;
use base::lane::LaneHandle;
use base::memory::Memory;

use super::front::{Front, Register};
use super::interrupt::Edge;
use super::{Bell, Device, Knob, Meters};

/// Offset of the doorbell register.
const NOTIFY: u64 = 0x50;
/// Offset of the register by which the driver acknowledges interrupts: it may be written late.
pub const ACK: u64 = 0x64;
/// Offset of the configuration space.
const CONFIG: u64 = 0x100;
/// `virt`, little-endian.
const MAGIC: u32 = 0x7472_6976;
/// The version without legacy interface.
const VERSION: u32 = 2;
/// `MAYF`, little-endian: no registry assigns these.
const VENDOR: u32 = 0x4659_414d;

enum Field {
    Constant(u32),
    /// The register's bits from this one on, 32 of them.
    Part(Register, u32),
}

/// All registers are 32 bits wide (section 4.2.2.2). Shared memory is absent: its length reads as ones, as the bus
/// answers for what nobody claims.
const TABLE: &[(u64, Field)] = &[
    (0x000, Field::Constant(MAGIC)),
    (0x004, Field::Constant(VERSION)),
    (0x008, Field::Part(Register::DeviceId, 0)),
    (0x00c, Field::Constant(VENDOR)),
    (0x010, Field::Part(Register::DeviceFeatures, 0)),
    (0x014, Field::Part(Register::DeviceFeaturesSelect, 0)),
    (0x020, Field::Part(Register::DriverFeatures, 0)),
    (0x024, Field::Part(Register::DriverFeaturesSelect, 0)),
    (0x030, Field::Part(Register::QueueSelect, 0)),
    (0x034, Field::Part(Register::QueueMax, 0)),
    (0x038, Field::Part(Register::QueueSize, 0)),
    (0x044, Field::Part(Register::QueueReady, 0)),
    (NOTIFY, Field::Part(Register::Notify, 0)),
    (0x060, Field::Part(Register::InterruptStatus, 0)),
    (ACK, Field::Part(Register::InterruptAck, 0)),
    (0x070, Field::Part(Register::Status, 0)),
    (0x080, Field::Part(Register::QueueDesc, 0)),
    (0x084, Field::Part(Register::QueueDesc, 32)),
    (0x090, Field::Part(Register::QueueAvail, 0)),
    (0x094, Field::Part(Register::QueueAvail, 32)),
    (0x0a0, Field::Part(Register::QueueUsed, 0)),
    (0x0a4, Field::Part(Register::QueueUsed, 32)),
    (0x0fc, Field::Part(Register::ConfigGeneration, 0)),
];

fn field(at: u64) -> Option<&'static Field> {
    TABLE.iter().find(|(offset, _)| *offset == at).map(|(_, field)| field)
}

/// A virtio device in a window of guest-physical memory.
pub struct Mmio(Front);

impl Mmio {
    /// Puts `device` behind memory-mapped registers; `line` is its interrupt (edge-triggered), `lane` where its
    /// work will be done from its driver's DRIVER_OK on.
    ///
    /// Costs one eventfd for each queue and nothing else.
    ///
    /// # Errors
    /// The host is out of file descriptors.
    pub fn attach(
        name: &str,
        device: Box<dyn Device>,
        memory: &Memory,
        line: SharedLine,
        lane: &LaneHandle,
    ) -> Result<Mmio> {
        Front::new(name, device, memory, Arc::new(Edge::new(line)), lane).map(Mmio)
    }

    /// The doorbells: 4 bytes at [`NOTIFY`], matching the queue index. Without ioeventfds nothing is lost: the register
    /// rings them itself.
    pub fn bells(&self) -> Vec<Bell> {
        let bell = |doorbell: &super::doorbell::Doorbell| Bell {
            at: NOTIFY,
            value: Some(doorbell.queue.into()),
            doorbell: doorbell.clone(),
        };
        self.0.doorbells().iter().map(bell).collect()
    }

    /// Counters of the engine and the device.
    pub fn meters(&self) -> &Meters {
        self.0.meters()
    }

    /// What an operator can do with the device.
    pub fn knob(&self) -> &Knob {
        self.0.knob()
    }

    /// The front, for who needs to wait for the engine.
    pub fn front(&self) -> &Front {
        &self.0
    }
}

impl Registers for Mmio {
    fn read(&mut self, at: u64, data: &mut [u8]) {
        if let Some(at) = at.checked_sub(CONFIG) {
            return self.0.read_config(at, data);
        }
        let value = match field(at) {
            Some(Field::Constant(value)) => Some(u64::from(*value)),
            Some(Field::Part(register, shift)) => self.0.get(*register).map(|value| value >> shift),
            None => None,
        };
        if let Some(value) = value.filter(|_| data.len() == 4) {
            data.iter_mut().zip(value.to_le_bytes()).for_each(|(to, from)| *to = from);
        }
    }

    fn write(&mut self, at: u64, data: &[u8]) -> Effect {
        if let Some(at) = at.checked_sub(CONFIG) {
            self.0.write_config(at, data);
        } else if let (Some(Field::Part(register, shift)), Ok(data)) = (field(at), data.try_into()) {
            let value = u64::from(u32::from_le_bytes(data)) << shift;
            self.0.set(*register, value, u64::from(u32::MAX) << shift);
        }
        Effect::None
    }
}
