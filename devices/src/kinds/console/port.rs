//! The control messages of a named port (section 5.3.6.2): its name, and who has it open.

use std::collections::VecDeque;

/// Messages that may wait for a guest that gives no buffers for them.
const MOST: usize = 32;

const DEVICE_READY: u16 = 0;
const PORT_ADD: u16 = 1;
const PORT_READY: u16 = 3;
const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;

/// The one port of a device.
pub struct Port {
    name: String,
    /// Messages for the guest.
    messages: VecDeque<Vec<u8>>,
    /// The guest has made a device file of it.
    ready: bool,
    /// A program of the guest has it open.
    pub open: bool,
    /// Somebody on the host has.
    connected: bool,
}

impl Port {
    /// A port called `name`.
    pub fn new(name: &str) -> Port {
        Port { name: name.to_owned(), messages: VecDeque::new(), ready: false, open: false, connected: false }
    }

    /// The driver begins anew.
    pub fn reset(&mut self) {
        self.messages.clear();
        (self.ready, self.open) = (false, false);
    }

    fn tell(&mut self, event: u16, value: u16, more: &[u8]) {
        let id = 0u32.to_le_bytes();
        self.messages.push_back([id.as_slice(), &event.to_le_bytes(), &value.to_le_bytes(), more].concat());
    }

    /// Takes a message of the guest.
    pub fn hear(&mut self, message: [u8; 8]) {
        let [a, b, c, d, e, f, g, h] = message;
        let (id, event, value) =
            (u32::from_le_bytes([a, b, c, d]), u16::from_le_bytes([e, f]), u16::from_le_bytes([g, h]));
        match (event, id, value) {
            (DEVICE_READY, _, 1) => self.tell(PORT_ADD, 1, &[]),
            (PORT_READY, 0, 1) => {
                self.ready = true;
                let name = self.name.clone();
                self.tell(PORT_NAME, 1, name.as_bytes());
                self.tell(PORT_OPEN, self.connected.into(), &[]);
            }
            (PORT_OPEN, 0, value) => self.open = value == 1,
            // The guest has no such port, or no use for it.
            _ => {}
        }
    }

    /// Whether it takes messages: what they lead to has room.
    pub fn has_room(&self) -> bool {
        self.messages.len() < MOST
    }

    /// Somebody on the host has come, or gone.
    pub fn connect(&mut self, connected: bool) {
        self.connected = connected;
        if self.ready {
            // Of those that wait only the last one counts.
            self.messages.retain(|message| message.get(4..6) != Some(&PORT_OPEN.to_le_bytes()));
            self.tell(PORT_OPEN, connected.into(), &[]);
        }
    }

    /// Whether a message waits.
    pub fn has_message(&self) -> bool {
        !self.messages.is_empty()
    }

    /// The next message.
    pub fn next(&mut self) -> Option<Vec<u8>> {
        self.messages.pop_front()
    }
}
