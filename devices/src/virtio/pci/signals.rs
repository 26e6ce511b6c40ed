//! How a virtio function interrupts: by MSI-X, or by its pin with the causes in the ISR status (section 4.1.4.5).

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use base::irq::{Messages, SharedLine, Wire};

use crate::pci::msix::Msix;
use crate::virtio::interrupt::{CHANGED, Interrupt, NO_VECTOR, Source, USED};

/// One mutex guards all: vCPUs come in through the registers, the lane through the engine. It is held while a message
/// is sent, so that none overtakes a change of its mask; [`Messages`] and lines never call back.
pub(super) struct Signals {
    state: Mutex<State>,
    messages: Arc<dyn Messages>,
    pin: SharedLine,
}

struct State {
    msix: Msix,
    causes: u32,
    /// The pin may be asserted.
    may_assert: bool,
    /// The pin is asserted.
    high: bool,
    config_vector: u16,
    queue_vectors: Vec<u16>,
    /// Eventfds that others write to: the queue, and the message that the hypervisor sends for it now.
    calls: Vec<(u16, Wire)>,
}

impl Signals {
    pub(super) fn new(vectors: u16, queues: usize, messages: Arc<dyn Messages>, pin: SharedLine) -> Signals {
        let state = State {
            msix: Msix::new(vectors),
            causes: 0,
            may_assert: true,
            high: false,
            config_vector: NO_VECTOR,
            queue_vectors: vec![NO_VECTOR; queues],
            calls: Vec::new(),
        };
        Signals { state: Mutex::new(state), messages, pin }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes over the switches of the configuration space.
    pub(super) fn switch(&self, control: u16, master: bool, may_assert: bool) {
        let mut state = self.lock();
        state.msix.switch(control, master, &*self.messages);
        state.may_assert = may_assert;
        self.drive(&mut state);
        self.rewire(&mut state);
    }

    /// Whether the pin would be asserted if it might be (section 4.1.4.5.1).
    pub(super) fn is_pending(&self) -> bool {
        self.lock().wants_pin()
    }

    /// Gives `access` the table of vectors.
    pub(super) fn with_msix<T>(&self, access: impl FnOnce(&mut Msix, &dyn Messages) -> T) -> T {
        let mut state = self.lock();
        let answer = access(&mut state.msix, &*self.messages);
        self.rewire(&mut state);
        answer
    }

    /// Has the hypervisor send what is not masked, without the lane; what is masked, the lane hears of, and it becomes
    /// pending as ever.
    fn rewire(&self, state: &mut State) {
        let mut changes = Vec::new();
        for (queue, (call, now)) in &mut state.calls {
            let vector = state.queue_vectors.get(usize::from(*queue)).copied().unwrap_or(NO_VECTOR);
            let wanted = state.msix.message(vector);
            if wanted != *now {
                *now = wanted;
                changes.push((call.clone(), wanted));
            }
        }
        if !changes.is_empty() {
            self.messages.wire(&changes);
        }
    }

    /// Brings the pin to its level.
    fn drive(&self, state: &mut State) {
        let high = state.wants_pin() && state.may_assert;
        if high != state.high {
            state.high = high;
            self.pin.set(high);
        }
    }
}

impl State {
    fn wants_pin(&self) -> bool {
        !self.msix.is_on() && self.causes != 0
    }

    fn chosen(&mut self, source: Source) -> Option<&mut u16> {
        match source {
            Source::Config => Some(&mut self.config_vector),
            Source::Queue(queue) => self.queue_vectors.get_mut(usize::from(queue)),
        }
    }
}

impl Interrupt for Signals {
    fn used(&self, queues: &[u16]) {
        let mut state = self.lock();
        if !state.msix.is_on() {
            state.causes |= USED;
            return self.drive(&mut state);
        }
        // Queues that share a vector get one message. Vectors are fewer than 128.
        let mut fired = 0u128;
        for queue in queues {
            let vector = state.chosen(Source::Queue(*queue)).map_or(NO_VECTOR, |vector| *vector);
            let bit = 1u128.checked_shl(vector.into()).unwrap_or(0);
            if fired & bit == 0 {
                fired |= bit;
                state.msix.fire(vector, &*self.messages);
            }
        }
    }

    fn changed(&self) {
        let mut state = self.lock();
        state.causes |= CHANGED;
        let vector = state.config_vector;
        state.msix.fire(vector, &*self.messages);
        self.drive(&mut state);
    }

    fn causes(&self) -> u32 {
        self.lock().causes
    }

    fn clear(&self, causes: u32) {
        let mut state = self.lock();
        state.causes &= !causes;
        self.drive(&mut state);
    }

    fn vector(&self, source: Source) -> u16 {
        self.lock().chosen(source).map_or(NO_VECTOR, |vector| *vector)
    }

    fn choose(&self, source: Source, vector: u16) {
        let mut state = self.lock();
        let vector = if state.msix.has(vector) { vector } else { NO_VECTOR };
        if let Some(chosen) = state.chosen(source) {
            *chosen = vector;
        }
        self.rewire(&mut state);
    }

    fn lend(&self, calls: &[(u16, Arc<OwnedFd>)]) {
        let mut state = self.lock();
        let old = std::mem::take(&mut state.calls).into_iter().map(|(_, wire)| wire);
        let wired: Vec<_> = old.filter(|(_, msi)| msi.is_some()).map(|(call, _)| (call, None)).collect();
        if !wired.is_empty() {
            self.messages.wire(&wired);
        }
        state.calls = calls.iter().map(|(queue, call)| (*queue, (call.clone(), None))).collect();
        self.rewire(&mut state);
    }

    fn reset(&self) {
        let mut state = self.lock();
        state.causes = 0;
        state.config_vector = NO_VECTOR;
        state.queue_vectors.fill(NO_VECTOR);
        state.msix.forget();
        self.drive(&mut state);
    }
}
