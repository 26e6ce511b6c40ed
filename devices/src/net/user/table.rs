//! All flows of the guest, found by their ends or by their number.

use std::collections::HashMap;

use super::tcp::{Connection, Ends};
use super::udp::Association;

/// Flows at the most. Each costs one descriptor and a few hundred bytes.
pub const FLOWS: u16 = 4096;

/// A flow.
pub enum Flow {
    /// A TCP connection.
    Tcp(Connection),
    /// UDP or echo.
    Udp(Association),
}

/// What a flow is found by: the IP protocol and who speaks to whom. For echo the guest's port is the identifier.
pub type Key = (u8, Ends);

/// A flow in its place.
pub struct Slot {
    /// See [`Key`].
    pub key: Key,
    /// The flow.
    pub flow: Flow,
    /// It is on the list of those that have something to do.
    pub queued: bool,
}

/// The flows.
#[derive(Default)]
pub struct Table {
    slots: Vec<Option<Slot>>,
    free: Vec<u16>,
    keys: HashMap<Key, u16>,
}

impl Table {
    /// Puts a flow in; its number, or the flow back if there are too many.
    pub fn insert(&mut self, key: Key, flow: Flow) -> Option<u16> {
        let number = match self.free.pop() {
            Some(number) => number,
            None => {
                let number = u16::try_from(self.slots.len()).ok().filter(|number| *number < FLOWS)?;
                self.slots.push(None);
                number
            }
        };
        *self.slots.get_mut(usize::from(number))? = Some(Slot { key, flow, queued: false });
        self.keys.insert(key, number);
        Some(number)
    }

    /// Whether no flow more can be put in.
    pub fn is_full(&self) -> bool {
        self.keys.len() >= usize::from(FLOWS)
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// The number of the flow with this key.
    pub fn find(&self, key: &Key) -> Option<u16> {
        self.keys.get(key).copied()
    }

    /// The flow with this number.
    pub fn get(&mut self, number: u16) -> Option<&mut Slot> {
        self.slots.get_mut(usize::from(number))?.as_mut()
    }

    /// Takes a flow out.
    pub fn remove(&mut self, number: u16) -> Option<Slot> {
        let slot = self.slots.get_mut(usize::from(number))?.take()?;
        self.keys.remove(&slot.key);
        self.free.push(number);
        Some(slot)
    }

    /// The numbers of all places, with and without a flow.
    pub fn numbers(&self) -> std::ops::Range<u16> {
        0..u16::try_from(self.slots.len()).unwrap_or(FLOWS)
    }

    /// Drops all flows.
    pub fn clear(&mut self) {
        *self = Table::default();
    }
}
