//! The device: who comes and goes at the host's end, and how long each may take.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use base::clock::Clock;
use base::host::socket::is_hung_up;
use base::lane::Interest;
use base::memory::Memory;
use base::meter::Counter;
use base::{Fault, Result};
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;

use super::connection::{Connection, Pair, Phase};
use super::gate::Gate;
use super::packet::{HOST_CID, Header, Op, STREAM};
use super::table::{FIRST_TOKEN, Table};
use crate::virtio::{Chain, Device, Io, Meters};

/// Packets to the guest.
pub const RX: u16 = 0;
/// Packets from the guest.
pub const TX: u16 = 1;
/// Entries of the queues; events (a migration) never happen here, the third queue keeps what it is given.
pub const QUEUES: [u16; 3] = [256, 256, 16];
/// `VIRTIO_VSOCK_F_STREAM`, section 5.10.3.
const F_STREAM: u64 = 1;

/// Tokens of the device itself.
const LISTENER: u16 = 0;
const SWEEP: u16 = 1;
const REDIAL: u16 = 2;
const CALM: u16 = 3;

/// Connections taken from the host in one visit: the guest's packets are not to wait for thousands of them.
const ACCEPTS: usize = 64;
/// How often it is looked who has taken too long.
const SWEEP_PAUSE: Duration = Duration::from_secs(1);
/// How soon a program of the host that has no room for one more connection is asked again.
const REDIAL_PAUSE: Duration = Duration::from_millis(5);
/// How soon a host without descriptors is asked again for one.
const CALM_PAUSE: Duration = Duration::from_millis(100);
/// The longest `CONNECT port`, with its line feed.
const GREETING: usize = 32;

/// How long a phase may last.
fn limit(phase: Phase) -> Option<Duration> {
    match phase {
        // A person may be typing.
        Phase::Greeting => Some(Duration::from_secs(60)),
        Phase::Asking => Some(Duration::from_secs(30)),
        Phase::Dialing => Some(Duration::from_secs(10)),
        // As long as Linux waits for the same.
        Phase::Lingering => Some(Duration::from_secs(8)),
        Phase::Open | Phase::Draining => None,
    }
}

/// What the device has of the world.
pub struct Site {
    /// Where the host's end is reached.
    pub gate: Gate,
    pub clock: Arc<dyn Clock>,
    pub memory: Memory,
}

/// Counters.
#[derive(Default)]
pub struct Counts {
    /// Connections that came to be.
    pub opened: Arc<Counter>,
    /// Those that were refused or reset.
    pub reset: Arc<Counter>,
    /// Bytes to and from the guest.
    pub rx_bytes: Arc<Counter>,
    pub tx_bytes: Arc<Counter>,
    /// Packets of the guest that make no sense and have no one to answer to.
    pub dropped: Arc<Counter>,
}

/// The socket device.
pub struct Vsock {
    pub(super) site: Site,
    pub(super) cid: u64,
    pub(super) table: Table,
    /// Connections that have something for the guest, the next one first.
    pub(super) ready: VecDeque<u16>,
    /// Resets of connections that are no more.
    pub(super) replies: VecDeque<Header>,
    /// Buffers of the guest taken for bytes that did not come.
    pub(super) spare: VecDeque<Chain>,
    /// Packets of the guest wait until there is room for replies to them.
    pub(super) held: bool,
    pub(super) counts: Counts,
    dialing: Vec<u16>,
    listening: bool,
    calming: bool,
    sweeping: bool,
}

impl Vsock {
    /// A device for the guest `cid`.
    pub fn new(site: Site, cid: u32) -> Vsock {
        Vsock {
            site,
            cid: cid.into(),
            table: Table::default(),
            ready: VecDeque::new(),
            replies: VecDeque::new(),
            spare: VecDeque::new(),
            held: false,
            counts: Counts::default(),
            dialing: Vec::new(),
            listening: false,
            calming: false,
            sweeping: false,
        }
    }

    fn now(&self) -> Duration {
        self.site.clock.monotonic()
    }

    /// Lets a connection enter a phase.
    fn enter(&mut self, token: u16, phase: Phase, io: &mut Io<'_>) {
        let now = self.now();
        if let Some(connection) = self.table.get(token) {
            (connection.phase, connection.since) = (phase, now);
        }
        if limit(phase).is_some() && !self.sweeping {
            self.sweeping = true;
            io.arm(SWEEP, SWEEP_PAUSE);
        }
    }

    /// After something happened to a connection: its phase, and its place among those with news for the guest.
    pub(super) fn settle(&mut self, token: u16, io: &mut Io<'_>) {
        let Some(connection) = self.table.get(token) else { return };
        match connection.phase {
            Phase::Open if connection.is_over() => {
                connection.socket = None;
                self.enter(token, Phase::Lingering, io);
            }
            Phase::Draining if !connection.holds_bytes() => {
                self.table.remove(token);
                return;
            }
            _ => {}
        }
        let Some(connection) = self.table.get(token) else { return };
        if !connection.queued && connection.has_news() {
            connection.queued = true;
            self.ready.push_back(token);
        }
    }

    /// Ends a connection at once, and tells the guest.
    pub(super) fn reset(&mut self, token: u16) {
        let Some(connection) = self.table.remove(token) else { return };
        self.reply_reset(connection.pair);
    }

    pub(super) fn reply_reset(&mut self, pair: Pair) {
        self.counts.reset.add(1);
        self.replies.push_back(Header { op: Some(Op::Reset), ..self.header(pair) });
    }

    /// The header of a packet to the guest.
    pub(super) fn header(&self, pair: Pair) -> Header {
        Header {
            src_cid: HOST_CID,
            dst_cid: self.cid,
            src_port: pair.host,
            dst_port: pair.guest,
            len: 0,
            kind: STREAM,
            op: None,
            flags: 0,
            buf_alloc: 0,
            fwd_cnt: 0,
        }
    }

    /// The guest knows a connection no more; what it has sent still reaches the host.
    pub(super) fn forget(&mut self, token: u16, io: &mut Io<'_>) {
        self.table.unname(token);
        let Some(connection) = self.table.get(token) else { return };
        if connection.phase == Phase::Open && connection.holds_bytes() {
            connection.owed = super::connection::Owed::default();
            connection.hear_end(u32::MAX);
            self.enter(token, Phase::Draining, io);
        } else {
            self.table.remove(token);
        }
    }

    /// Waits for programs of the host, if there is room for them.
    pub(super) fn listen(&mut self, io: &mut Io<'_>) {
        if !self.listening && !self.calming && !self.table.is_full() {
            self.listening = self.site.gate.watch(LISTENER, io).unwrap_or(false);
        }
    }

    /// Leaves them where they wait by themselves.
    fn unlisten(&mut self, io: &mut Io<'_>) {
        self.site.gate.unwatch(io);
        self.listening = false;
    }

    fn accept(&mut self, io: &mut Io<'_>) {
        for _ in 0..ACCEPTS {
            if self.table.is_full() {
                return self.unlisten(io);
            }
            match self.site.gate.accept() {
                Ok(socket) => {
                    let token = self.table.add(Connection::new(Phase::Greeting, self.now()));
                    let Some(token) = token else { return };
                    self.join(token, socket, Phase::Greeting, io);
                }
                Err(Errno::AGAIN) => return,
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(_) => {
                    self.unlisten(io);
                    self.calming = true;
                    return io.arm(CALM, CALM_PAUSE);
                }
            }
        }
    }

    /// Joins a connection to a socket; whether the host allows it.
    fn join(&mut self, token: u16, socket: OwnedFd, phase: Phase, io: &mut Io<'_>) -> bool {
        if io.watch(&socket, token, Interest::Changes).is_err() {
            self.table.remove(token);
            return false;
        }
        if let Some(connection) = self.table.get(token) {
            connection.socket = Some(socket);
        }
        self.enter(token, phase, io);
        true
    }

    /// Something may have changed at the host's end of a connection.
    fn stir(&mut self, token: u16, io: &mut Io<'_>) {
        let Some(connection) = self.table.get(token) else { return };
        connection.stir();
        match connection.phase {
            Phase::Greeting => self.hear_greeting(token, io),
            Phase::Asking => {
                if connection.socket.as_ref().is_none_or(is_hung_up) {
                    self.reset(token);
                }
            }
            Phase::Open | Phase::Draining => connection.flush(),
            Phase::Dialing | Phase::Lingering => {}
        }
        self.settle(token, io);
    }

    /// Reads the line of a program of the host, and not a byte beyond it: what follows is for the guest.
    fn hear_greeting(&mut self, token: u16, io: &mut Io<'_>) {
        let Some(socket) = self.table.get(token).and_then(|connection| connection.socket.as_ref()) else {
            return;
        };
        let mut bytes = [0; GREETING];
        let seen = match recv(socket, &mut bytes, RecvFlags::PEEK | RecvFlags::DONTWAIT) {
            Ok((seen, _)) if seen > 0 => seen,
            Err(Errno::AGAIN | Errno::INTR) => return,
            _ => return drop(self.table.remove(token)),
        };
        let line = bytes.get(..seen).unwrap_or_default();
        let Some(end) = line.iter().position(|byte| *byte == b'\n') else {
            if seen == GREETING {
                self.table.remove(token);
            }
            return;
        };
        let port = line.get(..end).and_then(port_of);
        let mut read = [0; GREETING];
        let taken = read.get_mut(..=end).map(|read| recv(socket, read, RecvFlags::DONTWAIT));
        match (port, taken) {
            (Some(port), Some(Ok(_))) => {
                let host = self.table.host_port(port);
                self.table.name(token, Pair { host, guest: port });
                if let Some(connection) = self.table.get(token) {
                    connection.owed.request = true;
                }
                self.enter(token, Phase::Asking, io);
            }
            _ => drop(self.table.remove(token)),
        }
    }

    /// The guest asks for a connection to the host's port.
    pub(super) fn dial(&mut self, pair: Pair, header: &Header, io: &mut Io<'_>) {
        let reached = self.site.gate.reach(pair.host);
        let busy = reached.as_ref().is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock);
        let phase = if busy { Phase::Dialing } else { Phase::Open };
        if reached.is_err() && !busy {
            return self.reply_reset(pair);
        }
        let Some(token) = self.table.add(Connection::new(phase, self.now())) else {
            return self.reply_reset(pair);
        };
        self.table.name(token, pair);
        if let Some(connection) = self.table.get(token) {
            connection.hear_credit(header);
        }
        match reached {
            Ok(socket) => self.accept_guest(token, socket, io),
            Err(_) => {
                self.enter(token, Phase::Dialing, io);
                self.dialing.push(token);
                io.arm(REDIAL, REDIAL_PAUSE);
            }
        }
    }

    /// The connection of the guest's has reached a program of the host.
    fn accept_guest(&mut self, token: u16, socket: OwnedFd, io: &mut Io<'_>) {
        let Some(pair) = self.table.get(token).map(|connection| connection.pair) else { return };
        if !self.join(token, socket, Phase::Open, io) {
            return self.reply_reset(pair);
        }
        if let Some(connection) = self.table.get(token) {
            connection.owed.response = true;
        }
        self.counts.opened.add(1);
        self.settle(token, io);
    }

    /// Asks those programs of the host again that had no room.
    fn redial(&mut self, io: &mut Io<'_>) {
        for token in std::mem::take(&mut self.dialing) {
            let Some(connection) = self.table.get(token) else { continue };
            if connection.phase != Phase::Dialing {
                continue;
            }
            let port = connection.pair.host;
            match self.site.gate.reach(port) {
                Ok(socket) => self.accept_guest(token, socket, io),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => self.dialing.push(token),
                Err(_) => self.reset(token),
            }
        }
        if !self.dialing.is_empty() {
            io.arm(REDIAL, REDIAL_PAUSE);
        }
    }

    /// Ends those that have taken too long.
    fn sweep(&mut self, io: &mut Io<'_>) {
        let (overdue, more) = self.table.overdue(self.now(), limit);
        for token in overdue {
            match self.table.get(token).map(|connection| connection.phase) {
                // The guest knows nothing of it.
                Some(Phase::Greeting) => drop(self.table.remove(token)),
                _ => self.reset(token),
            }
        }
        self.sweeping = more;
        if more {
            io.arm(SWEEP, SWEEP_PAUSE);
        }
    }
}

/// The port in `CONNECT port`.
fn port_of(line: &[u8]) -> Option<u32> {
    let mut words = std::str::from_utf8(line).ok()?.split_ascii_whitespace();
    let verb = words.next()?;
    let port = words.next()?.parse().ok()?;
    (verb.eq_ignore_ascii_case("connect") && words.next().is_none()).then_some(port)
}

impl Device for Vsock {
    fn id(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn features(&self) -> u64 {
        F_STREAM
    }

    fn queues(&self) -> &[u16] {
        &QUEUES
    }

    fn config(&self) -> Vec<u8> {
        self.cid.to_le_bytes().to_vec()
    }

    fn start(&mut self, _: u64, io: &mut Io<'_>) -> Result<()> {
        self.listening = self.site.gate.watch(LISTENER, io)?;
        Ok(())
    }

    fn kick(&mut self, queue: u16, io: &mut Io<'_>) -> std::result::Result<(), Fault> {
        if queue == TX {
            self.take(io)?;
        }
        self.turn(io)
    }

    fn ready(&mut self, token: u16, io: &mut Io<'_>) -> std::result::Result<(), Fault> {
        match token {
            LISTENER => self.accept(io),
            SWEEP => self.sweep(io),
            REDIAL => self.redial(io),
            CALM => self.calming = false,
            token if token >= FIRST_TOKEN => self.stir(token, io),
            _ => {}
        }
        self.turn(io)
    }

    fn stop(&mut self, io: &mut Io<'_>) {
        self.unlisten(io);
        for token in [SWEEP, REDIAL, CALM] {
            io.disarm(token);
        }
        // Sockets that are closed are waited for no more.
        self.table.clear();
        self.ready.clear();
        self.replies.clear();
        self.spare.clear();
        self.dialing.clear();
        (self.held, self.calming, self.sweeping) = (false, false, false);
    }

    fn meters(&self) -> Meters {
        vec![
            ("opened", self.counts.opened.clone()),
            ("reset", self.counts.reset.clone()),
            ("rx_bytes", self.counts.rx_bytes.clone()),
            ("tx_bytes", self.counts.tx_bytes.clone()),
            ("dropped", self.counts.dropped.clone()),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_greeting_is_one_word_and_one_port() {
        for (line, port) in [
            ("CONNECT 52", Some(52)),
            ("connect 4294967295", Some(u32::MAX)),
            ("CONNECT 52\r", Some(52)),
            ("CONNECT 4294967296", None),
            ("CONNECT", None),
            ("CONNECT 5 2", None),
            ("CONNECT -1", None),
            ("GET / HTTP/1.1", None),
            ("", None),
        ] {
            assert_eq!(port_of(line.as_bytes()), port, "{line}");
        }
        assert_eq!(port_of(b"CONNECT \xff"), None);
    }
}
