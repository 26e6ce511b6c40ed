//! All connections: by token and by ports, with bounds for their number and for what they may hold.

use std::collections::HashMap;
use std::time::Duration;

use super::connection::{Connection, Pair, Phase};

/// The most connections. Each is a file descriptor of this process.
pub const MOST: usize = 8192;
/// Tokens below this one are the device's own.
pub const FIRST_TOKEN: u16 = 16;
/// Bytes that connections may keep for the host, all together; beyond this each still gets [`LEAST`].
const POOL: u32 = 64 << 20;
/// What one connection gets of the rest of the pool: a 64th, so that a few have all they can use, and thousands
/// have something.
const SHARE: u32 = 64;
/// Bytes that a connection may keep at least.
const LEAST: u32 = 4 << 10;
/// Bytes that are enough for one: four of the largest packets that Linux sends.
const ENOUGH: u32 = 256 << 10;
/// Host ports for connections from the host begin here, beyond those that people choose.
const FIRST_PORT: u32 = 1 << 30;

/// The connections.
pub struct Table {
    slots: Vec<Option<Box<Connection>>>,
    free: Vec<u16>,
    pairs: HashMap<Pair, u16>,
    /// Bytes promised to the guest in all.
    promised: u32,
    next_port: u32,
}

impl Default for Table {
    fn default() -> Self {
        Table {
            slots: Vec::new(),
            free: Vec::new(),
            pairs: HashMap::new(),
            promised: 0,
            next_port: FIRST_PORT,
        }
    }
}

impl Table {
    /// Connections there are.
    pub fn len(&self) -> usize {
        self.slots.len().saturating_sub(self.free.len())
    }

    /// Whether there is no room for one more.
    pub fn is_full(&self) -> bool {
        self.len() >= MOST
    }

    /// Adds a connection; `None`: there is no room.
    pub fn add(&mut self, connection: Connection) -> Option<u16> {
        if self.is_full() {
            return None;
        }
        let slot = match self.free.pop() {
            Some(slot) => slot,
            None => {
                let slot = u16::try_from(self.slots.len()).ok()?;
                self.slots.push(None);
                slot
            }
        };
        *self.slots.get_mut(usize::from(slot))? = Some(Box::new(connection));
        slot.checked_add(FIRST_TOKEN)
    }

    fn slot(&mut self, token: u16) -> Option<&mut Option<Box<Connection>>> {
        self.slots.get_mut(usize::from(token.checked_sub(FIRST_TOKEN)?))
    }

    /// The connection with that token.
    pub fn get(&mut self, token: u16) -> Option<&mut Connection> {
        self.slot(token)?.as_deref_mut()
    }

    /// The token of the connection between these ports.
    pub fn find(&self, pair: Pair) -> Option<u16> {
        self.pairs.get(&pair).copied()
    }

    /// Gives a connection its ports, and its share of the memory there is.
    pub fn name(&mut self, token: u16, pair: Pair) {
        let left = POOL.saturating_sub(self.promised);
        let share = (left / SHARE).clamp(LEAST, ENOUGH);
        let Some(connection) = self.get(token) else { return };
        (connection.pair, connection.promised) = (pair, share);
        self.promised = self.promised.saturating_add(share);
        self.pairs.insert(pair, token);
    }

    /// A port of the host that has no connection to the guest's `port`.
    pub fn host_port(&mut self, port: u32) -> u32 {
        // There are far fewer connections than ports.
        loop {
            let host = self.next_port;
            self.next_port = FIRST_PORT | (host.wrapping_add(1) & (FIRST_PORT - 1));
            if !self.pairs.contains_key(&Pair { host, guest: port }) {
                return host;
            }
        }
    }

    /// Lets the guest forget a connection: its ports are free again.
    pub fn unname(&mut self, token: u16) {
        let Some(pair) = self.get(token).map(|connection| connection.pair) else { return };
        if self.find(pair) == Some(token) {
            self.pairs.remove(&pair);
        }
    }

    /// Removes all. Host ports go on where they were: the next guest may not have forgotten the last ones.
    pub fn clear(&mut self) {
        *self = Table { next_port: self.next_port, ..Table::default() };
    }

    /// Removes a connection.
    pub fn remove(&mut self, token: u16) -> Option<Box<Connection>> {
        self.unname(token);
        let connection = self.slot(token)?.take()?;
        self.promised = self.promised.saturating_sub(connection.promised);
        self.free.push(token.checked_sub(FIRST_TOKEN)?);
        Some(connection)
    }

    /// Those that have been in a phase for longer than it may last, and whether there are more that could be.
    pub fn overdue(&self, now: Duration, limit: impl Fn(Phase) -> Option<Duration>) -> (Vec<u16>, bool) {
        let (mut overdue, mut more) = (Vec::new(), false);
        for (slot, connection) in (0u16..).zip(&self.slots) {
            let Some(connection) = connection else { continue };
            let Some(limit) = limit(connection.phase) else { continue };
            if now.saturating_sub(connection.since) < limit {
                more = true;
            } else {
                overdue.extend(slot.checked_add(FIRST_TOKEN));
            }
        }
        (overdue, more)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_share_a_bounded_memory() {
        let mut table = Table::default();
        let mut tokens = Vec::new();
        while let Some(token) = table.add(Connection::new(Phase::Open, Duration::ZERO)) {
            table.name(token, Pair { host: 1, guest: u32::from(token) });
            tokens.push(token);
        }
        assert_eq!(tokens.len(), MOST);
        let promised: Vec<u32> = tokens.iter().map(|token| table.get(*token).unwrap().promised).collect();
        assert_eq!(promised[..64], [ENOUGH; 64], "a few have all they can use");
        assert_eq!(promised.last(), Some(&LEAST));
        let all: u32 = promised.iter().sum();
        assert!(all < POOL + LEAST * u32::try_from(MOST).unwrap(), "{all}");
        for token in tokens {
            table.remove(token).unwrap();
        }
        assert_eq!((table.len(), table.promised), (0, 0));
        assert!(table.pairs.is_empty());
        let token = table.add(Connection::new(Phase::Open, Duration::ZERO)).unwrap();
        table.name(token, Pair::default());
        assert_eq!(table.get(token).unwrap().promised, ENOUGH, "what was given back is there again");
    }

    #[test]
    fn host_ports_in_use_are_passed_over() {
        let mut table = Table::default();
        let token = table.add(Connection::new(Phase::Open, Duration::ZERO)).unwrap();
        table.name(token, Pair { host: FIRST_PORT + 1, guest: 5 });
        assert_eq!([table.host_port(5), table.host_port(5)], [FIRST_PORT, FIRST_PORT + 2]);
        table.next_port = FIRST_PORT + 1;
        assert_eq!(table.host_port(6), FIRST_PORT + 1, "the same port to another of the guest's");
        table.next_port = 2 * FIRST_PORT - 1;
        table.host_port(5);
        assert_eq!(table.next_port, FIRST_PORT, "it begins anew");
    }
}
