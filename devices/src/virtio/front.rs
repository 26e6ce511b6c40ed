//! The front: the registers that every virtio transport has, with the state machine behind them, on the vCPU side.
//!
//! One vocabulary ([`Register`]) for all transports; a transport is a table of offsets over it. The front believes
//! the driver nothing: writes that are out of order or out of range have no effect (sections 2.1 and 3.1).

use std::sync::Arc;
use std::sync::atomic::Ordering;

use base::lane::{Context, LaneHandle};
use base::memory::Memory;
use base::{Doing, Fault, Result, Why};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK,
    VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};

use super::doorbell::Doorbell;
use super::engine::{Engine, FEATURES, Shared};
use super::interrupt::{Interrupt, NO_VECTOR, Source};
use super::knob::{Home, Knob};
use super::ring::Setup;
use super::{Device, Meters};

/// The registers of a virtio device, whatever the transport.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Register {
    /// Device ID.
    DeviceId,
    /// Which 32 bits of the offered features [`Register::DeviceFeatures`] shows.
    DeviceFeaturesSelect,
    /// 32 bits of the offered features.
    DeviceFeatures,
    /// Which 32 bits of the accepted features [`Register::DriverFeatures`] sets.
    DriverFeaturesSelect,
    /// 32 bits of the accepted features.
    DriverFeatures,
    /// Number of queues.
    QueueCount,
    /// The queue that the queue registers speak of.
    QueueSelect,
    /// Its largest size; 0 if there is no such queue.
    QueueMax,
    /// Its size.
    QueueSize,
    /// Whether it is enabled.
    QueueReady,
    /// Address of its descriptor table, 64 bits.
    QueueDesc,
    /// Address of its available ring, 64 bits.
    QueueAvail,
    /// Address of its used ring, 64 bits.
    QueueUsed,
    /// The interrupt vector chosen for it.
    QueueVector,
    /// Which of the doorbells is its own.
    QueueNotify,
    /// Doorbell: the index of a queue with new chains.
    Notify,
    /// Causes of the interrupt.
    InterruptStatus,
    /// Clears causes.
    InterruptAck,
    /// Device status (section 2.1).
    Status,
    /// The interrupt vector chosen for changes of configuration and status.
    ConfigVector,
    /// Changes whenever the configuration space changes.
    ConfigGeneration,
}

/// One device as its driver sees it.
pub struct Front {
    shared: Arc<Shared>,
    knob: Knob,
    lane: LaneHandle,
    memory: Memory,
    doorbells: Vec<Doorbell>,
    maxima: Vec<u16>,
    meters: Meters,
    id: u32,
    offered: u64,
    accepted: u64,
    status: u32,
    device_select: u32,
    driver_select: u32,
    queue_select: u32,
    queues: Vec<Setup>,
    /// The device may use guest memory.
    master: bool,
}

impl Front {
    /// Puts `device` behind registers that `interrupt` the driver. It moves to `lane` when its driver first starts it.
    ///
    /// # Errors
    /// The host is out of file descriptors.
    pub fn new(
        name: &str,
        device: Box<dyn Device>,
        memory: &Memory,
        interrupt: Arc<dyn Interrupt>,
        lane: &LaneHandle,
    ) -> Result<Front> {
        let maxima = device.queues().to_vec();
        let doorbells = (0..).zip(&maxima).map(|(queue, _)| Doorbell::new(queue));
        let doorbells = doorbells
            .collect::<rustix::io::Result<Vec<_>>>()
            .doing(Why::Host, || format!("make the doorbells of {name}"))?;
        let shared = Arc::new(Shared::new(name, interrupt, device.config()));
        let meters = shared.meters().into_iter().chain(device.meters()).collect();
        let (id, offered) = (device.id(), device.features() | FEATURES);
        let engine = Engine::new(device, shared.clone(), memory.clone(), doorbells.clone());
        let mut front = Front {
            shared,
            knob: Knob::new(engine),
            lane: lane.clone(),
            memory: memory.clone(),
            doorbells,
            maxima,
            meters,
            id,
            offered,
            accepted: 0,
            status: 0,
            device_select: 0,
            driver_select: 0,
            queue_select: 0,
            queues: Vec::new(),
            master: true,
        };
        front.forget();
        Ok(front)
    }

    /// One eventfd for each queue, in order.
    pub fn doorbells(&self) -> &[Doorbell] {
        &self.doorbells
    }

    /// Counters of the engine and the device.
    pub fn meters(&self) -> &Meters {
        &self.meters
    }

    /// All that the driver has said, unsaid.
    fn forget(&mut self) {
        (self.accepted, self.status) = (0, 0);
        (self.device_select, self.driver_select, self.queue_select) = (0, 0, 0);
        self.queues = self.maxima.iter().map(|max| Setup { size: *max, ..Setup::default() }).collect();
    }

    fn has(&self, bit: u32) -> bool {
        self.status & bit != 0
    }

    fn needs_reset(&self) -> bool {
        self.shared.needs_reset.load(Ordering::SeqCst)
    }

    /// The vectors of the selected queue; there is none of a queue that does not exist.
    fn source(&self) -> Option<Source> {
        self.queue()?;
        u16::try_from(self.queue_select).ok().map(Source::Queue)
    }

    fn queue(&self) -> Option<(&Setup, u16)> {
        let at = usize::try_from(self.queue_select).ok()?;
        Some((self.queues.get(at)?, *self.maxima.get(at)?))
    }

    /// Reads a register; `None` if it can only be written.
    pub fn get(&self, register: Register) -> Option<u64> {
        let queue = |f: fn(&Setup) -> u64| Some(self.queue().map_or(0, |(setup, _)| f(setup)));
        match register {
            Register::DeviceId => Some(self.id.into()),
            Register::DeviceFeatures => Some(word(self.offered, self.device_select)),
            Register::QueueMax => Some(self.queue().map_or(0, |(_, max)| max.into())),
            Register::QueueSize => queue(|setup| setup.size.into()),
            Register::QueueReady => queue(|setup| setup.ready.into()),
            Register::QueueDesc => queue(|setup| setup.desc),
            Register::QueueAvail => queue(|setup| setup.avail),
            Register::QueueUsed => queue(|setup| setup.used),
            Register::QueueVector => {
                let vector = |source| self.shared.interrupt.vector(source);
                Some(self.source().map_or(NO_VECTOR, vector).into())
            }
            Register::QueueNotify => Some(self.queue().map_or(0, |_| self.queue_select.into())),
            Register::QueueCount => Some(self.maxima.len() as u64),
            Register::ConfigVector => Some(self.shared.interrupt.vector(Source::Config).into()),
            Register::InterruptStatus => Some(self.shared.interrupt.causes().into()),
            Register::Status => {
                let needs = if self.needs_reset() { VIRTIO_CONFIG_S_NEEDS_RESET } else { 0 };
                Some((self.status | needs).into())
            }
            Register::ConfigGeneration => Some(self.shared.config().generation.into()),
            Register::DriverFeatures => Some(word(self.accepted, self.driver_select)),
            Register::DeviceFeaturesSelect => Some(self.device_select.into()),
            Register::DriverFeaturesSelect => Some(self.driver_select.into()),
            Register::QueueSelect => Some(self.queue_select.into()),
            Register::Notify | Register::InterruptAck => None,
        }
    }

    /// Writes those bits of a register that `mask` covers; `value` is in place already.
    pub fn set(&mut self, register: Register, value: u64, mask: u64) {
        let small = u32::try_from(value & mask).unwrap_or(u32::MAX);
        match register {
            Register::DeviceFeaturesSelect => self.device_select = small,
            Register::DriverFeaturesSelect => self.driver_select = small,
            Register::DriverFeatures => self.accept(small),
            Register::QueueSelect => self.queue_select = small,
            Register::QueueReady => self.enable(small),
            Register::QueueSize => self.set_up(|setup| setup.size = u16::try_from(small).unwrap_or(0)),
            Register::QueueDesc => self.set_up(|setup| merge(&mut setup.desc, value, mask)),
            Register::QueueAvail => self.set_up(|setup| merge(&mut setup.avail, value, mask)),
            Register::QueueUsed => self.set_up(|setup| merge(&mut setup.used, value, mask)),
            Register::Notify => {
                if let Some(doorbell) = usize::try_from(small).ok().and_then(|at| self.doorbells.get(at)) {
                    doorbell.ring();
                }
            }
            Register::InterruptAck => self.shared.interrupt.clear(small),
            Register::QueueVector => {
                if let Some(source) = self.source() {
                    self.shared.interrupt.choose(source, u16::try_from(small).unwrap_or(NO_VECTOR));
                }
            }
            Register::ConfigVector => {
                self.shared.interrupt.choose(Source::Config, u16::try_from(small).unwrap_or(NO_VECTOR));
            }
            Register::Status => self.set_status(small),
            Register::DeviceId
            | Register::DeviceFeatures
            | Register::QueueMax
            | Register::QueueCount
            | Register::QueueNotify
            | Register::InterruptStatus
            | Register::ConfigGeneration => {}
        }
    }

    /// Reads the configuration space; beyond its end there are zeros.
    pub fn read_config(&self, at: u64, data: &mut [u8]) {
        let config = self.shared.config();
        let bytes = usize::try_from(at).ok().and_then(|at| config.bytes.get(at..)).unwrap_or_default();
        let zeros = std::iter::repeat(&0);
        data.iter_mut().zip(bytes.iter().chain(zeros)).for_each(|(to, from)| *to = *from);
    }

    /// Writes the configuration space, and waits for the device to have taken it.
    pub fn write_config(&mut self, at: u64, data: &[u8]) {
        let inside = at.checked_add(data.len() as u64).is_some_and(|end| {
            let len = self.shared.config().bytes.len() as u64;
            end <= len
        });
        if !inside {
            return;
        }
        let data = data.to_vec();
        self.knob.turn(move |engine| engine.configure(at, &data));
    }

    /// What an operator can do with the device.
    pub fn knob(&self) -> &Knob {
        &self.knob
    }

    /// Section 2.2: features are chosen before FEATURES_OK.
    fn accept(&mut self, bits: u32) {
        let shift = match self.driver_select {
            0 => 0,
            1 => 32,
            _ => return,
        };
        if !self.has(VIRTIO_CONFIG_S_FEATURES_OK) {
            merge(&mut self.accepted, u64::from(bits) << shift, u64::from(u32::MAX) << shift);
        }
    }

    /// Section 3.1.1: queues are set up between FEATURES_OK and DRIVER_OK.
    fn may_set_up(&self) -> bool {
        self.has(VIRTIO_CONFIG_S_FEATURES_OK)
            && !self.has(VIRTIO_CONFIG_S_DRIVER_OK)
            && !self.has(VIRTIO_CONFIG_S_FAILED)
            && !self.needs_reset()
    }

    fn set_up(&mut self, change: impl FnOnce(&mut Setup)) {
        let open = self.may_set_up();
        let setup = usize::try_from(self.queue_select).ok().and_then(|at| self.queues.get_mut(at));
        if let Some(setup) = setup.filter(|setup| open && !setup.ready) {
            change(setup);
        }
    }

    fn enable(&mut self, value: u32) {
        if !self.may_set_up() {
            return;
        }
        let Ok(at) = usize::try_from(self.queue_select) else { return };
        let (Some(setup), Some(max)) = (self.queues.get_mut(at), self.maxima.get(at)) else { return };
        setup.ready = false;
        if value == 1 {
            match setup.queue(*max, self.memory.ram()) {
                Ok(_) => setup.ready = true,
                Err(fault) => self.shared.fault(fault),
            }
        }
    }

    fn set_status(&mut self, value: u32) {
        if value == 0 {
            return self.reset();
        }
        let value = value & 0xff & !VIRTIO_CONFIG_S_NEEDS_RESET;
        // Section 2.1.1: the driver clears no bit but by a reset; and a broken device waits for just that.
        if self.status & !value != 0 || self.needs_reset() {
            return;
        }
        let news = value & !self.status;
        self.status |= value & !(VIRTIO_CONFIG_S_FEATURES_OK | VIRTIO_CONFIG_S_DRIVER_OK);
        if news & VIRTIO_CONFIG_S_FEATURES_OK != 0 && self.agree() {
            self.status |= VIRTIO_CONFIG_S_FEATURES_OK;
        }
        let ready = self.has(VIRTIO_CONFIG_S_FEATURES_OK) && !self.has(VIRTIO_CONFIG_S_FAILED);
        if news & VIRTIO_CONFIG_S_DRIVER_OK != 0 && ready {
            self.status |= VIRTIO_CONFIG_S_DRIVER_OK;
            if self.master {
                self.start();
            }
        }
    }

    /// Whether the device may use guest memory (PCI: bus mastering). A device that is started while it may not waits
    /// until it may; one that loses it has lost its rings, and needs a reset. When this returns without, the device
    /// touches guest memory no more.
    pub fn set_master(&mut self, master: bool) {
        let was = std::mem::replace(&mut self.master, master);
        if was == master || !self.has(VIRTIO_CONFIG_S_DRIVER_OK) {
            return;
        }
        if !master {
            // Also when it is broken: what is in flight would come back into memory.
            self.visit(Engine::rest);
        }
        if self.needs_reset() {
            return;
        }
        if master {
            self.start();
        } else {
            self.shared
                .break_down(Fault::new("bus mastering ended while the device ran", self.status.into()));
        }
    }

    /// Section 2.2.2: a device may refuse what it did not offer, and we want no legacy driver (section 6.2).
    fn agree(&self) -> bool {
        self.accepted & !self.offered == 0 && self.accepted & 1 << VIRTIO_F_VERSION_1 != 0
    }

    fn start(&mut self) {
        let (features, queues) = (self.accepted, self.queues.clone());
        {
            let mut home = self.knob.home();
            *home = match std::mem::replace(&mut *home, Home::Moving) {
                Home::Waiting(engine) => Home::Lane(self.lane.adopt(*engine)),
                home => home,
            };
        }
        if self.visit(move |engine, ctx| engine.start(features, &queues, ctx)).is_none() {
            // The machine is ending; the driver sees a device that does not work.
            self.shared.needs_reset.store(true, Ordering::SeqCst);
        }
    }

    /// Back to the start; when it returns, the device touches guest memory no more (section 2.4.1).
    pub fn reset(&mut self) {
        let stopped = self.visit(Engine::stop);
        if stopped.is_none() {
            self.shared.needs_reset.store(false, Ordering::SeqCst);
            self.shared.interrupt.reset();
        }
        self.forget();
    }

    /// Runs `f` where the engine lives and waits for it; `None` if it has not been started, or its lane has ended.
    pub fn visit<R: Send + 'static>(
        &self,
        f: impl FnOnce(&mut Engine, &mut Context<'_>) -> R + Send + 'static,
    ) -> Option<R> {
        let handle = match &*self.knob.home() {
            Home::Lane(engine) => engine.clone(),
            Home::Waiting(_) | Home::Moving => return None,
        };
        handle.visit(f)
    }
}

/// The 32 bits of `features` that `select` picks.
fn word(features: u64, select: u32) -> u64 {
    match select {
        0 => features & u64::from(u32::MAX),
        1 => features >> 32,
        _ => 0,
    }
}

fn merge(field: &mut u64, value: u64, mask: u64) {
    *field = *field & !mask | value & mask;
}

impl Drop for Front {
    fn drop(&mut self) {
        // A lane outlives its devices; what they hold of the host goes with them.
        if let Home::Lane(engine) = &*self.knob.home() {
            engine.retire();
        }
    }
}
