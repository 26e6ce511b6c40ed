//! The PCI transport: a function whose one window holds everything, as a table of offsets over the [`Front`]
//! (section 4.1, without legacy interface).

mod signals;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use base::Result;
use base::bus::{Effect, Move, Registers};
use base::irq::{Messages, SharedLine};
use base::lane::LaneHandle;
use base::memory::Memory;

use self::signals::Signals;
use super::front::{Front, Register};
use super::{Bell, Device, Knob, Meters};
use crate::pci::config::{Config, Identity};
use crate::pci::msix::{CONTROL_WRITABLE, VECTORS_MAX};
use crate::pci::{Function, overlay};

/// Length of the window in bytes.
pub const WINDOW_LEN: u64 = 0x4000;

const VENDOR: u16 = 0x1af4;
/// Added to the device ID (section 4.1.2.1).
const FIRST_DEVICE: u16 = 0x1040;
/// Section 4.1.2.1: 1 or more, and a subsystem ID of 0x40 or more, so that no legacy driver takes it.
const REVISION: u8 = 1;
const SUBSYSTEM: u16 = 0x40;
/// A device that fits in no class: drivers go by the IDs.
const CLASS: [u8; 3] = [0xff, 0, 0];

/// Capability IDs: vendor-specific, and MSI-X.
const VIRTIO_CAPABILITY: u8 = 0x09;
const MSIX_CAPABILITY: u8 = 0x11;
/// Bytes between the doorbells of two queues.
const BELL_LEN: u32 = 4;

/// A part of the window: where it begins, its length, and what there is.
type Part = (u32, u32, Area);

#[derive(Clone, Copy)]
enum Area {
    Common,
    Isr,
    Device,
    Bells,
    Table,
    Pending,
}

const COMMON: Part = (0x0000, 0x38, Area::Common);
const ISR: Part = (0x0100, 1, Area::Isr);
const DEVICE: Part = (0x1000, 0x1000, Area::Device);
const BELLS: Part = (0x2000, 0x1000, Area::Bells);
const TABLE: Part = (0x3000, 0x800, Area::Table);
const PENDING: Part = (0x3800, 16, Area::Pending);

/// The parts that capabilities of section 4.1.4 lead to, with their types. The fifth is [`Access`].
const PARTS: [(u8, Part); 4] = [(1, COMMON), (2, BELLS), (3, ISR), (4, DEVICE)];
const ACCESS_TYPE: u8 = 5;

/// Common configuration (section 4.1.4.3): offset, width in bytes, the register and its first bit. A 64-bit register is
/// written in halves, or whole.
const FIELDS: &[(u64, usize, Register, u32)] = &[
    (0x00, 4, Register::DeviceFeaturesSelect, 0),
    (0x04, 4, Register::DeviceFeatures, 0),
    (0x08, 4, Register::DriverFeaturesSelect, 0),
    (0x0c, 4, Register::DriverFeatures, 0),
    (0x10, 2, Register::ConfigVector, 0),
    (0x12, 2, Register::QueueCount, 0),
    (0x14, 1, Register::Status, 0),
    (0x15, 1, Register::ConfigGeneration, 0),
    (0x16, 2, Register::QueueSelect, 0),
    (0x18, 2, Register::QueueSize, 0),
    (0x1a, 2, Register::QueueVector, 0),
    (0x1c, 2, Register::QueueReady, 0),
    (0x1e, 2, Register::QueueNotify, 0),
    (0x20, 4, Register::QueueDesc, 0),
    (0x24, 4, Register::QueueDesc, 32),
    (0x28, 4, Register::QueueAvail, 0),
    (0x2c, 4, Register::QueueAvail, 32),
    (0x30, 4, Register::QueueUsed, 0),
    (0x34, 4, Register::QueueUsed, 32),
];

/// What a function is given by the board it is put on.
pub struct Place {
    /// Its device number, which is also that of its window in [`Move`]s.
    pub device: u8,
    /// Where its window is for a start, once the guest has it decoded: a multiple of [`WINDOW_LEN`].
    pub base: u64,
    /// Its interrupt pin, and the GSI that it leads to.
    pub pin: (SharedLine, u8),
    /// Where its messages go.
    pub messages: Arc<dyn Messages>,
}

/// A virtio device as a PCI function. Clones are the same one: one goes on the PCI bus, one answers in the window.
#[derive(Clone)]
pub struct Pci(Arc<Mutex<Inner>>);

struct Inner {
    front: Front,
    config: Config,
    signals: Arc<Signals>,
    /// Offset of the MSI-X capability in the configuration space.
    msix: usize,
    access: Access,
    window: u32,
    turn: u64,
}

impl Pci {
    /// Makes `device` a function at `place`; `lane` is where its work will be done from its driver's DRIVER_OK on.
    ///
    /// Costs one eventfd for each queue and nothing else.
    ///
    /// # Errors
    /// The host is out of file descriptors.
    pub fn attach(
        name: &str,
        device: Box<dyn Device>,
        memory: &Memory,
        place: Place,
        lane: &LaneHandle,
    ) -> Result<Pci> {
        let queues = device.queues().len();
        // One for each queue and one for changes of the configuration, as far as they go.
        let vectors = u16::try_from(queues).unwrap_or(VECTORS_MAX).saturating_add(1).min(VECTORS_MAX);
        let id = u16::try_from(device.id()).unwrap_or(0);
        let mut config = Config::new(&Identity {
            ids: [VENDOR, FIRST_DEVICE.saturating_add(id)],
            subsystem: [VENDOR, SUBSYSTEM],
            revision: REVISION,
            class: CLASS,
        });
        let (pin, gsi) = place.pin;
        config.add_window(place.base, WINDOW_LEN);
        config.add_pin(gsi);
        let msix = add_msix(&mut config, vectors);
        for (kind, part) in PARTS {
            config.add_capability(VIRTIO_CAPABILITY, &capability(kind, part));
        }
        let access = Access::new(&mut config);
        let signals = Arc::new(Signals::new(vectors, queues, place.messages, pin));
        let mut front = Front::new(name, device, memory, signals.clone(), lane)?;
        front.set_master(false);
        let window = place.device.into();
        Ok(Pci(Arc::new(Mutex::new(Inner { front, config, signals, msix, access, window, turn: 0 }))))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The doorbells. Without ioeventfds nothing is lost: the registers ring them.
    pub fn bells(&self) -> Vec<Bell> {
        let inner = self.lock();
        let places = (u64::from(BELLS.0)..).step_by(4);
        let bells = inner.front.doorbells().iter().zip(places);
        bells.map(|(doorbell, at)| Bell { at, value: None, doorbell: doorbell.clone() }).collect()
    }

    /// Counters of the engine and the device.
    pub fn meters(&self) -> Meters {
        self.lock().front.meters().clone()
    }

    /// What an operator can do with the device.
    pub fn knob(&self) -> Knob {
        self.lock().front.knob().clone()
    }

    /// Gives `f` the front, for who needs to wait for the engine.
    pub fn with_front<T>(&self, f: impl FnOnce(&mut Front) -> T) -> T {
        f(&mut self.lock().front)
    }
}

/// The MSI-X capability (PCI 3.0, section 6.8.2): message control, where the table is, where the pending bits are.
fn add_msix(config: &mut Config, vectors: u16) -> usize {
    let (last, table, pending) =
        (vectors.saturating_sub(1).to_le_bytes(), TABLE.0.to_le_bytes(), PENDING.0.to_le_bytes());
    let at = config.add_capability(MSIX_CAPABILITY, &[last.as_slice(), &table, &pending].concat());
    config.allow(at.saturating_add(2)..at.saturating_add(4), &CONTROL_WRITABLE.to_le_bytes());
    at
}

/// A capability that leads to a part of the window (section 4.1.4), without ID and link: its length, its type, where.
fn capability(kind: u8, (at, len, area): Part) -> Vec<u8> {
    let doorbells = matches!(area, Area::Bells);
    let mut body = vec![if doorbells { 20 } else { 16 }, kind, 0, 0, 0, 0];
    body.extend([at, len].map(u32::to_le_bytes).as_flattened());
    if doorbells {
        body.extend(BELL_LEN.to_le_bytes());
    }
    body
}

/// The way to the window through the configuration space alone (section 4.1.4.9): the guest says where, of which width,
/// and an access to the data goes there.
struct Access {
    at: usize,
}

impl Access {
    const BAR: usize = 4;
    const OFFSET: usize = 8;
    const LENGTH: usize = 12;
    const DATA: usize = 16;
    const END: usize = 20;

    fn new(config: &mut Config) -> Access {
        let mut body = [0; Access::END - 2];
        body.iter_mut().zip([20, ACCESS_TYPE]).for_each(|(to, from)| *to = from);
        let at = config.add_capability(VIRTIO_CAPABILITY, &body);
        let from = |offset: usize| at.saturating_add(offset);
        config.allow(from(Access::BAR)..from(Access::BAR + 1), &[0xff]);
        config.allow(from(Access::OFFSET)..from(Access::END), &[0xff; Access::END - Access::OFFSET]);
        Access { at }
    }

    fn data(&self) -> usize {
        self.at.saturating_add(Access::DATA)
    }

    /// Whether an access to the configuration space touches the data.
    fn is_meant(&self, at: usize, len: usize) -> bool {
        at < self.data().saturating_add(4) && at.saturating_add(len) > self.data()
    }

    /// Offset and width of the access to the window that the guest has described, if it makes sense.
    fn target(&self, config: &Config) -> Option<(u64, usize)> {
        let [bar] = config.get(self.at.saturating_add(Access::BAR));
        let offset = u64::from(u32::from_le_bytes(config.get(self.at.saturating_add(Access::OFFSET))));
        let len = u32::from_le_bytes(config.get(self.at.saturating_add(Access::LENGTH)));
        let fits = matches!(len, 1 | 2 | 4)
            && offset.is_multiple_of(len.into())
            && offset.saturating_add(len.into()) <= WINDOW_LEN;
        (bar == 0 && fits).then_some((offset, usize::try_from(len).ok()?))
    }
}

/// The part of the window that `at` lies in, and the offset there.
fn locate(at: u64) -> Option<(Area, u64)> {
    [COMMON, ISR, DEVICE, BELLS, TABLE, PENDING].into_iter().find_map(|(start, len, area)| {
        let offset = at.checked_sub(start.into())?;
        (offset < u64::from(len)).then_some((area, offset))
    })
}

impl Inner {
    fn read_window(&mut self, at: u64, data: &mut [u8]) {
        let Some((area, at)) = locate(at) else { return };
        match area {
            Area::Common => self.read_common(at, data),
            Area::Isr => {
                // Reading clears (section 4.1.4.5).
                let causes = self.front.get(Register::InterruptStatus).unwrap_or(0);
                self.front.set(Register::InterruptAck, causes, u64::MAX);
                data.fill(0);
                overlay(0, &causes.to_le_bytes(), at, data);
            }
            Area::Device => self.front.read_config(at, data),
            Area::Bells => {}
            Area::Table => self.signals.with_msix(|msix, _| msix.read_table(at, data)),
            Area::Pending => self.signals.with_msix(|msix, _| msix.read_pending(at, data)),
        }
    }

    fn write_window(&mut self, at: u64, data: &[u8]) {
        let Some((area, at)) = locate(at) else { return };
        match area {
            Area::Common => self.write_common(at, data),
            Area::Device => self.front.write_config(at, data),
            // Each queue has a place of its own; what is written there says no more.
            Area::Bells => self.front.set(Register::Notify, at / u64::from(BELL_LEN), u64::MAX),
            Area::Table => self.signals.with_msix(|msix, messages| msix.write_table(at, data, messages)),
            Area::Isr | Area::Pending => {}
        }
    }

    /// Any width: the bytes of all registers that the access touches.
    fn read_common(&self, at: u64, data: &mut [u8]) {
        data.fill(0);
        let end = at.saturating_add(data.len() as u64);
        for (of, width, register, shift) in FIELDS {
            if *of < end && of.saturating_add(*width as u64) > at {
                let value = self.front.get(*register).unwrap_or(0) >> shift;
                overlay(*of, value.to_le_bytes().get(..*width).unwrap_or_default(), at, data);
            }
        }
    }

    /// Any width: each register that is written whole, in order. A part of a register has no effect (section 4.1.3.1: a
    /// driver accesses a register by its own width).
    fn write_common(&mut self, at: u64, data: &[u8]) {
        for (of, width, register, shift) in FIELDS {
            let from = of.checked_sub(at).and_then(|from| usize::try_from(from).ok());
            let whole = from.and_then(|from| data.get(from..)?.get(..*width));
            if let Some(bytes) = whole {
                let mut value = [0; 8];
                value.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
                let mask = u64::MAX.checked_shr(64 - 8 * u32::try_from(*width).unwrap_or(8)).unwrap_or(0);
                self.front.set(*register, u64::from_le_bytes(value) << shift, mask << shift);
            }
        }
    }
}

impl Registers for Pci {
    fn read(&mut self, at: u64, data: &mut [u8]) {
        self.lock().read_window(at, data);
    }

    fn write(&mut self, at: u64, data: &[u8]) -> Effect {
        self.lock().write_window(at, data);
        Effect::None
    }
}

impl Function for Pci {
    fn read_config(&mut self, at: usize, data: &mut [u8]) {
        let mut inner = self.lock();
        let pending = inner.signals.is_pending();
        inner.config.show_interrupt(pending);
        if inner.access.is_meant(at, data.len())
            && let Some((offset, len)) = inner.access.target(&inner.config)
        {
            let mut bytes = [0xff; 4];
            let bytes = bytes.get_mut(..len).unwrap_or_default();
            inner.read_window(offset, bytes);
            let place = inner.access.data();
            inner.config.put(place, bytes);
        }
        inner.config.read(at, data);
    }

    fn write_config(&mut self, at: usize, data: &[u8]) -> Effect {
        let mut inner = self.lock();
        let place = inner.config.place();
        inner.config.write(at, data);
        let control = u16::from_le_bytes(inner.config.get(inner.msix.saturating_add(2)));
        let (master, may_assert) = (inner.config.is_master(), inner.config.may_assert());
        inner.signals.switch(control, master, may_assert);
        inner.front.set_master(master);
        if inner.access.is_meant(at, data.len())
            && let Some((offset, len)) = inner.access.target(&inner.config)
        {
            let bytes: [u8; 4] = inner.config.get(inner.access.data());
            inner.write_window(offset, bytes.get(..len).unwrap_or_default());
        }
        let now = inner.config.place();
        if now == place {
            return Effect::None;
        }
        inner.turn = inner.turn.saturating_add(1);
        Effect::Move(Move { window: inner.window, to: now, turn: inner.turn })
    }
}
