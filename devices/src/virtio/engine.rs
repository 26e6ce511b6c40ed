//! The engine: it owns a device and its rings on a lane, and does for every device what is the same for all.
//!
//! Doorbells wake it; it quiets the ring, lets the device work, listens again, and interrupts the driver at most
//! once for each visit. A [`Fault`] stops the device until the driver resets it; the VM lives on.

mod loan;
mod news;
mod tuning;

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use base::bus::Effect;
use base::lane::{Context, Interest, Work};
use base::memory::{Memory, Ram};
use base::meter::Counter;
use base::{Fail, Fault};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use self::loan::Loan;
use super::chain::{Buffer, Chain};
use super::doorbell::Doorbell;
use super::interrupt::Interrupt;
use super::ring::{Left, Ring, Setup};
use super::{Device, Meters};

pub use self::loan::Lent;

/// Features of the rings, offered by every device.
pub const FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX;

/// Device tokens lie above the queue indices, which share the numbers of a lane's work.
const DEVICE_TOKENS: u32 = 1 << 16;
/// The patience of a driver is at its end; above both.
const TELL: u32 = 1 << 17;
/// Who works the ring of this queue calls.
const CALLS: u32 = 1 << 18;

#[derive(Default)]
pub(super) struct Config {
    pub bytes: Vec<u8>,
    pub generation: u32,
}

/// What both sides of a device see.
pub struct Shared {
    /// The device's name in messages.
    pub name: String,
    pub(super) needs_reset: AtomicBool,
    pub(super) interrupt: Arc<dyn Interrupt>,
    config: Mutex<Config>,
    kicks: Arc<Counter>,
    interrupts: Arc<Counter>,
    faults: Arc<Counter>,
}

impl Shared {
    pub(super) fn new(name: &str, interrupt: Arc<dyn Interrupt>, config: Vec<u8>) -> Self {
        Shared {
            name: name.to_owned(),
            needs_reset: AtomicBool::new(false),
            interrupt,
            config: Mutex::new(Config { bytes: config, generation: 0 }),
            kicks: Arc::default(),
            interrupts: Arc::default(),
            faults: Arc::default(),
        }
    }

    pub(super) fn config(&self) -> MutexGuard<'_, Config> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Shows the driver a new configuration space (section 2.5.1: the generation changes with it); whether it is one.
    pub(super) fn publish(&self, bytes: Vec<u8>) -> bool {
        let mut config = self.config();
        let new = config.bytes != bytes;
        if new {
            *config = Config { bytes, generation: config.generation.wrapping_add(1) };
        }
        new
    }

    /// Interrupts the driver for chains given back to `queues`.
    fn used(&self, queues: &[u16]) {
        self.interrupts.add(1);
        self.interrupt.used(queues);
    }

    /// Interrupts the driver for a change of configuration or status.
    fn changed(&self) {
        self.interrupts.add(1);
        self.interrupt.changed();
    }

    /// Takes note of what the guest broke: the device asks for a reset (section 2.1.2).
    pub(super) fn fault(&self, fault: Fault) {
        self.needs_reset.store(true, Ordering::SeqCst);
        self.faults.add(1);
        let (name, count) = (&self.name, self.faults.get());
        // One line for the 1st, 2nd, 4th, 8th...: a guest that resets and faults in a loop cannot fill the disk.
        if count.is_power_of_two() {
            log::warn!(
                target: "guest",
                "{name}: the guest broke a rule: {fault} (fault {count}); waiting for its reset",
            );
        }
    }

    /// The same of a running device. With DRIVER_OK set, the need of a reset is announced as a configuration change.
    pub(super) fn break_down(&self, fault: Fault) {
        self.fault(fault);
        self.changed();
    }

    /// The host cannot run the device: the guest sees it broken.
    fn fail(&self, fail: &Fail) {
        self.needs_reset.store(true, Ordering::SeqCst);
        self.faults.add(1);
        if self.faults.get().is_power_of_two() {
            log::error!(target: "guest", "{}: {fail}", self.name);
        }
        self.changed();
    }

    pub(super) fn meters(&self) -> Meters {
        vec![
            ("kicks", self.kicks.clone()),
            ("interrupts", self.interrupts.clone()),
            ("faults", self.faults.clone()),
        ]
    }
}

/// What a device can do while it is called.
pub struct Io<'a> {
    rings: &'a mut [Option<Ring>],
    loans: &'a mut Vec<Loan>,
    doorbells: &'a [Doorbell],
    spare: &'a mut Vec<Vec<Buffer>>,
    epoch: u32,
    memory: &'a Memory,
    shared: &'a Shared,
    broken: &'a mut Option<Fault>,
    changed: &'a mut bool,
    asked: &'a mut Effect,
    lane: Context<'a>,
}

impl Io<'_> {
    /// Takes the next chain of `queue`; `None` when there is none now, or the device waits for its reset.
    ///
    /// # Errors
    /// The ring or the chain is broken; the device hands this on as its own answer.
    pub fn next(&mut self, queue: u16) -> Result<Option<Chain>, Fault> {
        if self.shared.needs_reset.load(Ordering::SeqCst) {
            return Ok(None);
        }
        let Some(ring) = self.rings.get_mut(usize::from(queue)).and_then(Option::as_mut) else {
            return Ok(None);
        };
        let chain = ring.next(self.memory, self.spare)?;
        Ok(chain.map(|chain| Chain { queue, epoch: self.epoch, ..chain }))
    }

    /// Gives `chain` back; `written` is how many bytes of its writable part were written, from the start on.
    /// A chain that was taken before a reset is dropped.
    pub fn done(&mut self, chain: Chain, written: u32) {
        let ring = self.rings.get_mut(usize::from(chain.queue)).and_then(Option::as_mut);
        if let Some(ring) = ring.filter(|_| chain.epoch == self.epoch)
            && let Err(fault) = ring.give(self.memory.ram(), &[(chain.head, written)])
        {
            self.broken.get_or_insert(fault);
        }
        let mut buffers = chain.buffers;
        buffers.clear();
        self.spare.push(buffers);
    }

    /// Gives several chains of one queue back, in this order; the driver sees all of them at once. For what has to be
    /// understood together, such as a frame in several buffers (section 5.1.6.4).
    pub fn done_together(&mut self, chains: &mut Vec<(Chain, u32)>) {
        let Some(queue) = chains.first().map(|(chain, _)| chain.queue) else { return };
        let here = |chain: &Chain| chain.queue == queue && chain.epoch == self.epoch;
        let list: Vec<(u16, u32)> =
            chains.iter().filter(|(chain, _)| here(chain)).map(|(chain, len)| (chain.head, *len)).collect();
        if let Some(ring) = self.rings.get_mut(usize::from(queue)).and_then(Option::as_mut)
            && let Err(fault) = ring.give(self.memory.ram(), &list)
        {
            self.broken.get_or_insert(fault);
        }
        for (chain, _) in chains.drain(..) {
            let mut buffers = chain.buffers;
            buffers.clear();
            self.spare.push(buffers);
        }
    }

    /// Guest memory, for the spans of a chain.
    pub fn ram(&self) -> &Ram {
        self.memory.ram()
    }

    /// Guest memory as a whole, for lists of its pieces that the kernel reads or fills.
    pub fn memory(&self) -> &Memory {
        self.memory
    }

    /// Whether the other side of the socket that is the cause of this call has said its last word.
    pub fn ended(&self) -> bool {
        self.lane.ended()
    }

    /// Tells the driver that the configuration space has changed, once the device returns.
    pub fn reconfigured(&mut self) {
        *self.changed = true;
    }

    /// Asks something of the machine, once the device returns. The first wish counts.
    pub fn ask(&mut self, effect: Effect) {
        if *self.asked == Effect::None {
            *self.asked = effect;
        }
    }

    /// Calls [`Device::ready`] with `token` whenever `fd` is ready, until [`Io::unwatch`].
    ///
    /// # Errors
    /// The descriptor cannot be waited for.
    pub fn watch(&mut self, fd: impl AsFd, token: u16, interest: Interest) -> std::io::Result<()> {
        self.lane.watch(fd, DEVICE_TOKENS | u32::from(token), interest)
    }

    /// Stops waiting for `fd`.
    pub fn unwatch(&mut self, fd: impl AsFd) {
        self.lane.unwatch(fd);
    }

    /// Calls [`Device::ready`] with `token` once, `after` from now.
    pub fn arm(&mut self, token: u16, after: Duration) {
        self.lane.arm(DEVICE_TOKENS | u32::from(token), after);
    }

    /// Forgets the deadline of `token`.
    pub fn disarm(&mut self, token: u16) {
        self.lane.disarm(DEVICE_TOKENS | u32::from(token));
    }
}

/// A device with its rings, as work on a lane.
pub struct Engine {
    device: Box<dyn Device>,
    shared: Arc<Shared>,
    memory: Memory,
    doorbells: Vec<Doorbell>,
    rings: Vec<Option<Ring>>,
    /// The rings that somebody else works.
    loans: Vec<Loan>,
    /// Lists for the buffers of chains to come: as many as were ever in flight, so bounded by the device.
    spare: Vec<Vec<Buffer>>,
    /// The queues whose driver wants an interrupt after this visit.
    wanted: Vec<u16>,
    /// An interrupt waits for a driver that may do without it.
    waiting: bool,
    epoch: u32,
    running: bool,
    /// What the device has asked of the machine.
    asked: Effect,
}

impl Engine {
    pub(super) fn new(
        device: Box<dyn Device>,
        shared: Arc<Shared>,
        memory: Memory,
        doorbells: Vec<Doorbell>,
    ) -> Self {
        Engine {
            device,
            shared,
            memory,
            doorbells,
            rings: Vec::new(),
            loans: Vec::new(),
            spare: Vec::new(),
            wanted: Vec::new(),
            waiting: false,
            epoch: 0,
            running: false,
            asked: Effect::None,
        }
    }

    /// The driver wrote to the configuration space.
    pub(super) fn configure(&mut self, at: u64, bytes: &[u8]) {
        self.device.configure(at, bytes);
        self.shared.publish(self.device.config());
    }

    /// DRIVER_OK: builds the rings and starts the device.
    pub(super) fn start(&mut self, features: u64, queues: &[Setup], ctx: &mut Context<'_>) {
        let event_idx = features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let maxima = self.device.queues().iter();
        let ram = self.memory.ram();
        let rings = queues.iter().zip(maxima).map(|(setup, max)| {
            if setup.ready { Ring::new(setup, *max, event_idx, ram).map(Some) } else { Ok(None) }
        });
        match rings.collect::<Result<Vec<_>, Fault>>() {
            Ok(rings) => self.rings = rings,
            Err(fault) => return self.shared.break_down(fault),
        }
        self.running = true;
        let mut failed = None;
        self.call(ctx, |device, io| {
            failed = device.start(features, io).err();
            Ok(())
        });
        if let Some(fail) = failed {
            return self.shared.fail(&fail);
        }
        self.ring_lent();
        // Some drivers fill a ring before DRIVER_OK and ring its doorbell then or never.
        for queue in (0..).zip(queues).filter(|(_, setup)| setup.ready).map(|(queue, _)| queue) {
            self.visit(ctx, |engine, ctx| engine.kick(queue, ctx));
        }
    }

    /// Reset: after it, nothing of the guest's memory is touched any more.
    pub(super) fn stop(&mut self, ctx: &mut Context<'_>) {
        self.rest(ctx);
        self.shared.needs_reset.store(false, Ordering::SeqCst);
        self.shared.interrupt.reset();
    }

    /// Stops the device and forgets the rings.
    pub(super) fn rest(&mut self, ctx: &mut Context<'_>) {
        if std::mem::take(&mut self.running) {
            self.call(ctx, |device, io| {
                device.stop(io);
                Ok(())
            });
        }
        self.take_back(ctx);
        self.rings.clear();
        ctx.disarm(TELL);
        self.waiting = false;
        self.epoch = self.epoch.wrapping_add(1);
    }

    /// Calls the device and takes note of a fault; whether it can go on.
    fn call(
        &mut self,
        ctx: &mut Context<'_>,
        f: impl FnOnce(&mut dyn Device, &mut Io<'_>) -> Result<(), Fault>,
    ) -> bool {
        let (mut broken, mut changed) = (None, false);
        let mut io = Io {
            rings: &mut self.rings,
            loans: &mut self.loans,
            doorbells: &self.doorbells,
            spare: &mut self.spare,
            epoch: self.epoch,
            memory: &self.memory,
            shared: &self.shared,
            broken: &mut broken,
            changed: &mut changed,
            asked: &mut self.asked,
            lane: ctx.reborrow(),
        };
        let answer = f(self.device.as_mut(), &mut io);
        if changed {
            self.shared.publish(self.device.config());
            self.shared.changed();
        }
        if self.asked != Effect::None
            && let Some(doorbell) = self.doorbells.first()
        {
            // The lane obeys what it is answered, and not every call of a device comes from there.
            doorbell.ring();
        }
        match answer.err().or(broken) {
            Some(fault) => {
                self.shared.break_down(fault);
                false
            }
            None => true,
        }
    }

    fn kick(&mut self, queue: u16, ctx: &mut Context<'_>) -> bool {
        let ring = self.rings.get_mut(usize::from(queue)).and_then(Option::as_mut);
        let Some(ring) = ring else { return true };
        if self.shared.needs_reset.load(Ordering::SeqCst) {
            return false;
        }
        self.shared.kicks.add(1);
        let quiet = ring.quiet(self.memory.ram());
        self.call(ctx, |device, io| {
            quiet?;
            device.kick(queue, io)
        })
    }

    /// A queue that was filled while the device worked. The rest of a queue that has had its share of this visit
    /// gets a doorbell, behind everyone else's.
    fn refilled(&mut self) -> Result<Option<u16>, Fault> {
        for (ring, doorbell) in self.rings.iter_mut().zip(&self.doorbells) {
            let Some(ring) = ring else { continue };
            match ring.close(self.memory.ram())? {
                Left::Nothing => {}
                Left::More => return Ok(Some(doorbell.queue)),
                Left::Rest => doorbell.ring(),
            }
        }
        Ok(None)
    }

    /// Serves what came in while the device worked: no more than the share of this visit.
    fn settle(&mut self, ctx: &mut Context<'_>) {
        loop {
            match self.refilled() {
                Ok(None) => return,
                Ok(Some(queue)) => {
                    if !self.kick(queue, ctx) {
                        return;
                    }
                }
                Err(fault) => return self.shared.break_down(fault),
            }
        }
    }

    /// One visit: calls the device by `first`, serves the rest, and interrupts the driver at most once.
    fn visit(&mut self, ctx: &mut Context<'_>, first: impl FnOnce(&mut Self, &mut Context<'_>) -> bool) {
        if self.waiting {
            self.forget_unwanted(ctx);
        }
        self.rings.iter_mut().flatten().for_each(Ring::open);
        if first(self, ctx) {
            self.settle(ctx);
        }
        self.interrupt_if_wanted(false, ctx);
    }
}

impl Work for Engine {
    fn arrive(&mut self, ctx: &mut Context<'_>) -> Effect {
        for doorbell in &self.doorbells {
            if let Err(cause) = ctx.watch(doorbell, u32::from(doorbell.queue), Interest::Rung) {
                return Effect::Broken(format!("wait for the doorbells of {}: {cause}", self.shared.name));
            }
        }
        Effect::None
    }

    fn ready(&mut self, token: u32, ctx: &mut Context<'_>) -> Effect {
        if !self.running {
            return std::mem::take(&mut self.asked);
        }
        if token == TELL {
            self.interrupt_if_wanted(true, ctx);
            return Effect::None;
        }
        if token & CALLS != 0 {
            self.called(u16::try_from(token & !CALLS).unwrap_or(u16::MAX));
            return Effect::None;
        }
        self.visit(ctx, |engine, ctx| match u16::try_from(token) {
            Ok(queue) => engine.kick(queue, ctx),
            Err(_) => {
                let token = u16::try_from(token & (DEVICE_TOKENS - 1)).unwrap_or_default();
                // Also when broken: what is in flight comes back before the reset.
                engine.call(ctx, |device, io| device.ready(token, io))
            }
        });
        std::mem::take(&mut self.asked)
    }
}
