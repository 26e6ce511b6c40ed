//! One connection: a stream of the guest's joined to a Unix socket of the host.
//!
//! Each side may end its half on its own. What the guest has sent is kept until the host takes it, never more than
//! the guest was promised; what the host has sent stays in the host's socket until the guest has room.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use base::host::socket::is_hung_up;
use base::memory::Memory;
use base::sys::iovec::Iovecs;
use rustix::io::Errno;
use rustix::net::{SendFlags, Shutdown, send, shutdown};

use super::packet::{HEADER_LEN, Header, Op, SHUT_RECEIVE, SHUT_SEND};
use crate::virtio::{Chain, Io};

/// The ports of a connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Pair {
    /// On the host's side.
    pub host: u32,
    /// On the guest's side.
    pub guest: u32,
}

/// How far a connection has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// A program of the host has connected and is yet to say to which port.
    Greeting,
    /// The guest has been asked, and is yet to answer.
    Asking,
    /// The guest has asked; the program of the host has no room for one more yet.
    Dialing,
    /// Bytes go both ways.
    Open,
    /// Both ways have ended; the guest is yet to say that it knows.
    Lingering,
    /// The guest has forgotten it; the host is yet to take the last bytes.
    Draining,
}

/// The guest has broken a rule of the protocol: the connection is to be reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Breach;

/// A connection.
pub struct Connection {
    /// Its ports; zeros while it is greeting.
    pub pair: Pair,
    /// How far it has come.
    pub phase: Phase,
    /// When it has come to that phase.
    pub since: Duration,
    /// It is in the list of those that have something for the guest.
    pub queued: bool,
    /// The host's end. `None`: there is none yet, or no longer.
    pub socket: Option<OwnedFd>,

    /// From the guest, not taken by the host yet.
    waiting: VecDeque<u8>,
    /// The most bytes that may wait: what the guest was promised.
    pub promised: u32,
    /// Bytes from the guest, modulo 2^32.
    received: u32,
    /// Those that the host has taken.
    forwarded: u32,
    /// The value of that in the last packet to the guest.
    told: u32,
    /// The host may take more.
    writable: bool,

    /// The guest's promise, and how much its program has taken.
    guest_room: u32,
    guest_taken: u32,
    /// Bytes to the guest, modulo 2^32.
    sent: u32,
    /// The guest was asked for more room since there was none.
    asked: bool,
    /// The host may have something.
    readable: bool,

    /// What the guest has ended: [`SHUT_SEND`], [`SHUT_RECEIVE`].
    guest_ended: u32,
    /// What the host has ended, seen as the guest's peer, and what of it the guest knows.
    host_ended: u32,
    host_said: u32,
    /// Packets owed to the guest.
    pub owed: Owed,
}

/// Packets without bytes that are owed to the guest.
#[derive(Clone, Copy, Debug, Default)]
pub struct Owed {
    /// [`Op::Request`].
    pub request: bool,
    /// [`Op::Response`].
    pub response: bool,
    /// [`Op::CreditUpdate`], in answer to a request.
    pub credit: bool,
}

impl Connection {
    /// A connection in `phase`.
    pub fn new(phase: Phase, since: Duration) -> Connection {
        Connection {
            pair: Pair::default(),
            phase,
            since,
            queued: false,
            socket: None,
            waiting: VecDeque::new(),
            promised: 0,
            received: 0,
            forwarded: 0,
            told: 0,
            writable: true,
            guest_room: 0,
            guest_taken: 0,
            sent: 0,
            asked: false,
            readable: true,
            guest_ended: 0,
            host_ended: 0,
            host_said: 0,
            owed: Owed::default(),
        }
    }

    /// Takes note of the room that a packet of the guest tells of.
    pub fn hear_credit(&mut self, header: &Header) {
        (self.guest_room, self.guest_taken) = (header.buf_alloc, header.fwd_cnt);
        if self.credit() > 0 {
            self.asked = false;
        }
    }

    /// Bytes that the guest has room for. A guest that has shrunk its room below what is under way, or that claims
    /// to have taken more than it got, has none.
    pub fn credit(&self) -> u32 {
        self.guest_room.saturating_sub(self.sent.wrapping_sub(self.guest_taken))
    }

    /// Takes note that something may have changed at the host's end.
    pub fn stir(&mut self) {
        (self.readable, self.writable) = (true, true);
        if self.phase == Phase::Open && self.host_ended & SHUT_SEND != 0 && self.is_hung_up() {
            self.refuse();
        }
    }

    fn is_hung_up(&self) -> bool {
        self.socket.as_ref().is_none_or(is_hung_up)
    }

    /// The host takes nothing any more: what waits for it is forgotten.
    fn refuse(&mut self) {
        self.host_ended |= SHUT_RECEIVE;
        self.waiting = VecDeque::new();
        self.forwarded = self.received;
    }

    /// Bytes from the guest: the `len` that follow the header in `chain`.
    ///
    /// # Errors
    /// The guest has no right to send so many, or any.
    pub fn take(&mut self, chain: &Chain, len: u32, memory: &Memory, io: &Io<'_>) -> Result<(), Breach> {
        let held = self.received.wrapping_sub(self.forwarded);
        let joined = matches!(self.phase, Phase::Open | Phase::Lingering);
        let right = joined && self.guest_ended & SHUT_SEND == 0;
        if !right || len > self.promised.saturating_sub(held) {
            return Err(Breach);
        }
        self.received = self.received.wrapping_add(len);
        if self.host_ended & SHUT_RECEIVE != 0 {
            self.forwarded = self.received;
            return Ok(());
        }
        let mut at = 0;
        if self.waiting.is_empty() && self.writable {
            at = self.pass(chain, len, memory);
        }
        if self.host_ended & SHUT_RECEIVE == 0 && at < u64::from(len) {
            let rest = u64::from(len).saturating_sub(at);
            let mut bytes = vec![0; usize::try_from(rest).unwrap_or(0)];
            chain.readable().read(io.ram(), HEADER_LEN.saturating_add(at), &mut bytes);
            self.waiting.extend(bytes);
        }
        Ok(())
    }

    /// Hands bytes on from guest memory to the host; how many it took.
    fn pass(&mut self, chain: &Chain, len: u32, memory: &Memory) -> u64 {
        let parts = chain.readable().parts(HEADER_LEN, len.into()).map(|part| (part.addr.0, part.len));
        let Ok(mut pieces) = Iovecs::guest(memory, parts) else { return 0 };
        let mut done = 0u64;
        while !pieces.is_empty() {
            let Some(socket) = &self.socket else { break };
            let moved = pieces.send(socket.as_fd()).map(|moved| moved as u64);
            match moved.map_err(|error| Errno::from_io_error(&error)) {
                Ok(moved) => {
                    pieces.advance(moved);
                    done = done.saturating_add(moved);
                    self.forwarded = self.forwarded.wrapping_add(u32::try_from(moved).unwrap_or(0));
                }
                Err(error) => {
                    if !self.stumble(error) {
                        break;
                    }
                }
            }
        }
        done
    }

    /// What a refused write means; whether to try again at once.
    fn stumble(&mut self, error: Option<Errno>) -> bool {
        match error {
            Some(Errno::INTR) => return true,
            Some(Errno::AGAIN) => self.writable = false,
            // The reader has gone. What it has sent before is still to be read.
            _ => self.refuse(),
        }
        false
    }

    /// Hands on what waits, and the end of the guest's half behind it.
    pub fn flush(&mut self) {
        while self.writable && !self.waiting.is_empty() {
            let Some(socket) = &self.socket else { return };
            let (front, _) = self.waiting.as_slices();
            match send(socket, front, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(moved) => {
                    self.waiting.drain(..moved.min(self.waiting.len()));
                    self.forwarded = self.forwarded.wrapping_add(u32::try_from(moved).unwrap_or(0));
                }
                Err(error) => {
                    self.stumble(Some(error));
                }
            }
        }
        if self.waiting.is_empty() && self.waiting.capacity() > 0 {
            self.waiting = VecDeque::new();
            self.end_halves();
        }
    }

    /// Tells a program of the host that the guest has accepted it.
    pub fn greet(&mut self) {
        let text = format!("OK {}\n", self.pair.host);
        let Some(socket) = &self.socket else { return };
        // The first bytes in a socket always fit.
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        if !matches!(send(socket, text.as_bytes(), flags), Ok(sent) if sent == text.len()) {
            self.refuse();
        }
    }

    /// The guest ends one of its halves, or both.
    pub fn hear_end(&mut self, flags: u32) {
        self.guest_ended |= flags & (SHUT_SEND | SHUT_RECEIVE);
        self.end_halves();
    }

    /// Whether the guest has ended both.
    pub fn guest_is_through(&self) -> bool {
        self.guest_ended == SHUT_SEND | SHUT_RECEIVE
    }

    fn end_halves(&self) {
        let Some(socket) = &self.socket else { return };
        // It may have gone already: then there is nobody to tell.
        if self.guest_ended & SHUT_SEND != 0 && self.waiting.is_empty() {
            let _ = shutdown(socket, Shutdown::Write);
        }
        if self.guest_ended & SHUT_RECEIVE != 0 {
            let _ = shutdown(socket, Shutdown::Read);
        }
    }

    /// Whether bytes from the guest still wait for the host.
    pub fn holds_bytes(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Whether nothing can go either way any more.
    pub fn is_over(&self) -> bool {
        let to_guest = self.host_ended & SHUT_SEND != 0 || self.guest_ended & SHUT_RECEIVE != 0;
        let sent_all = self.guest_ended & SHUT_SEND != 0 && self.waiting.is_empty();
        to_guest && (sent_all || self.host_ended & SHUT_RECEIVE != 0)
    }

    /// Whether there is something for the guest, or may be.
    pub fn has_news(&self) -> bool {
        self.next_op().is_some() || self.may_read() && (self.credit() > 0 || !self.asked)
    }

    fn may_read(&self) -> bool {
        self.phase == Phase::Open
            && self.readable
            && self.host_ended & SHUT_SEND == 0
            && self.guest_ended & SHUT_RECEIVE == 0
    }

    /// Whether bytes may be read for the guest now.
    pub fn can_read(&self) -> bool {
        self.may_read() && self.credit() > 0
    }

    /// The packet without bytes that is due.
    fn next_op(&self) -> Option<Op> {
        let open = matches!(self.phase, Phase::Open | Phase::Lingering);
        if self.owed.request {
            Some(Op::Request)
        } else if self.owed.response {
            Some(Op::Response)
        } else if open && self.host_ended != self.host_said {
            Some(Op::Shutdown)
        } else if open && (self.owed.credit || self.owes_credit()) {
            Some(Op::CreditUpdate)
        } else {
            None
        }
    }

    /// Whether the guest should hear of the room it has: a quarter of it is new, or it believes that there is none.
    fn owes_credit(&self) -> bool {
        let freed = self.forwarded.wrapping_sub(self.told);
        let believed = self.promised.saturating_sub(self.received.wrapping_sub(self.told));
        freed > 0 && (freed >= self.promised / 4 || believed == 0) && self.guest_ended & SHUT_SEND == 0
    }

    /// The packet without bytes that is due; it counts as sent.
    pub fn next_packet(&mut self) -> Option<(Op, u32)> {
        let op = match self.next_op() {
            Some(op) => op,
            None if self.may_read() && self.credit() == 0 && !self.asked => Op::CreditRequest,
            None => return None,
        };
        match op {
            Op::Request => self.owed.request = false,
            Op::Response => self.owed.response = false,
            Op::Shutdown => self.host_said = self.host_ended,
            Op::CreditUpdate => self.owed.credit = false,
            Op::CreditRequest => self.asked = true,
            Op::Reset | Op::Data => {}
        }
        Some((op, if op == Op::Shutdown { self.host_said } else { 0 }))
    }

    /// The credit for the header of a packet, which tells the guest.
    pub fn tell_credit(&mut self) -> (u32, u32) {
        self.told = self.forwarded;
        (self.promised, self.told)
    }

    /// Reads from the host into `pieces`; how many bytes. 0: there are none now, or there will be none.
    pub fn read(&mut self, pieces: &Iovecs) -> u32 {
        loop {
            let Some(socket) = &self.socket else { return 0 };
            match pieces.receive(socket.as_fd()) {
                Ok(0) => self.hear_host_end(),
                Ok(moved) => {
                    let moved = u32::try_from(moved).unwrap_or(0);
                    self.sent = self.sent.wrapping_add(moved);
                    return moved;
                }
                Err(error) => match Errno::from_io_error(&error) {
                    Some(Errno::INTR) => continue,
                    Some(Errno::AGAIN) => return self.rest(),
                    // It has closed with bytes of the guest unread.
                    _ => {
                        self.host_ended |= SHUT_SEND;
                        self.refuse();
                    }
                },
            }
            return 0;
        }
    }

    /// Reads no more until something changes at the host's end; how many bytes that gave.
    pub fn rest(&mut self) -> u32 {
        self.readable = false;
        0
    }

    /// The end of the host's stream: of its half only, if it still reads.
    fn hear_host_end(&mut self) {
        self.host_ended |= SHUT_SEND;
        if self.is_hung_up() {
            self.refuse();
        }
    }
}
