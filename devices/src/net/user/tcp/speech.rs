//! The half of a connection that speaks to the guest: greetings, data, acknowledgements, the end, and what is sent again.

use std::io::{self, ErrorKind};
use std::os::fd::AsFd;
use std::time::Duration;

use base::Fault;
use base::sys::iovec::Iovecs;
use rustix::net::sockopt;

use super::super::packet::{Builder, ETHERNET, TCP, flag, tcp_header};
use super::super::wire::Wire;
use super::{BUFFERED, Connection, Ends, LIMIT, Lost, Phase, SCALE, Turn, ahead, bytes, size};
use crate::net::HEADER;

/// Large segments sent in one turn.
const SHARE: usize = 4;
/// Data in the largest IP packet behind headers of 60 bytes.
const LARGEST: usize = 65_535 - 60;
/// Attempts to reach a guest that does not answer: 1, 2, 4, ... seconds apart.
const TRIES: u8 = 7;

impl Connection {
    /// The window field, and takes note of what it says.
    fn window_field(&mut self, buffered: usize) -> u16 {
        let room = LIMIT.saturating_sub(self.waiting.len()).min(BUFFERED.saturating_sub(buffered));
        let shift = if self.scale.is_some() { SCALE } else { 0 };
        let field = u16::try_from(bytes(room) >> shift).unwrap_or(u16::MAX);
        self.shown = u32::from(field) << shift;
        field
    }

    fn segment(
        &mut self,
        wire: &Wire<'_, '_>,
        number: u32,
        flags: u8,
        len: usize,
        buffered: usize,
    ) -> Builder {
        let Ends { guest, remote } = self.ends;
        let window = self.window_field(buffered);
        let header = tcp_header(remote.port(), guest.port(), number, self.wanted, flags, window);
        let packet = wire.packet(remote.ip(), guest.ip(), TCP, header.len().saturating_add(len));
        packet.with(&header)
    }

    /// Sends our SYN; whether there was room.
    fn greet(&mut self, wire: &mut Wire<'_, '_>) -> Result<bool, Fault> {
        let Ends { guest, remote } = self.ends;
        let (flags, wanted) = match self.phase {
            Phase::Inviting => (flag::SYN, 0),
            _ => (flag::SYN | flag::ACK, self.wanted),
        };
        let headers = if guest.is_ipv6() { 60 } else { 40 };
        let [high, low] = wire.card.mtu.saturating_sub(headers).to_be_bytes();
        let mut options = vec![2, 4, high, low];
        if self.phase == Phase::Inviting || self.scale.is_some() {
            options.extend([1, 3, 3, SCALE]);
        }
        // A window in a SYN is never scaled.
        let mut header = tcp_header(remote.port(), guest.port(), self.acked, wanted, flags, u16::MAX);
        if let (Some(offset), Ok(words)) = (header.get_mut(12), u8::try_from(options.len() / 4)) {
            *offset = words.saturating_add(5) << 4;
        }
        self.shown = u16::MAX.into();
        let len = header.len().saturating_add(options.len());
        let packet = wire.packet(remote.ip(), guest.ip(), TCP, len).with(&header).with(&options);
        if !wire.whole(packet, 16)? {
            return Ok(false);
        }
        self.next = self.acked.wrapping_add(1);
        self.top = self.next;
        Ok(true)
    }

    /// Sends the guest what there is for it.
    ///
    /// # Errors
    /// The guest's ring is broken.
    pub fn pump(&mut self, wire: &mut Wire<'_, '_>, buffered: &mut usize) -> Result<Turn, Fault> {
        if self.phase != Phase::Open {
            if self.due && self.phase != Phase::Connecting {
                if !self.greet(wire)? {
                    return Ok(Turn::Starved);
                }
                self.due = false;
            }
            return Ok(Turn::Idle);
        }
        let mut turn = Turn::Again;
        for _ in 0..SHARE {
            match self.push(wire, buffered)? {
                None => {}
                Some(other) => {
                    turn = other;
                    break;
                }
            }
        }
        if turn == Turn::Idle && self.due {
            let number = if std::mem::take(&mut self.probe) { self.acked.wrapping_sub(1) } else { self.next };
            let packet = self.segment(wire, number, flag::ACK, 0, *buffered);
            if !wire.whole(packet, 16)? {
                return Ok(Turn::Starved);
            }
            self.due = false;
        }
        let over = self.fin.is_some_and(|fin| self.acked == fin.wrapping_add(1)) && self.shut;
        Ok(if over && turn == Turn::Idle { Turn::Gone } else { turn })
    }

    /// Sends one segment of data, or the FIN behind all of it. `None`: there may be more.
    fn push(&mut self, wire: &mut Wire<'_, '_>, buffered: &mut usize) -> Result<Option<Turn>, Fault> {
        if self.fin.is_some_and(|fin| self.next == fin.wrapping_add(1)) || !self.readable {
            return Ok(Some(Turn::Idle));
        }
        if self.fin == Some(self.next) {
            return self.finish(wire, *buffered);
        }
        let flight = self.next.wrapping_sub(self.acked);
        let open = size(self.window.saturating_sub(flight));
        if open == 0 {
            return Ok(Some(Turn::Idle));
        }
        let v6 = self.ends.guest.is_ipv6();
        let head = if v6 { 60 } else { 40usize }.saturating_add(ETHERNET);
        let one = usize::from(self.size);
        let again = self.kept.len().saturating_sub(size(flight));
        let may = if again > 0 { again } else { self.may_keep(*buffered) };
        let want = open.min(may).min(if wire.large(v6) { LARGEST } else { one });
        if want == 0 {
            return Ok(Some(Turn::Idle));
        }
        let before = HEADER.saturating_add(head as u64);
        let room = wire.inbox.room(before.saturating_add(want as u64), wire.io)?;
        let room = usize::try_from(room.saturating_sub(before)).unwrap_or(0);
        if room < want.min(one) {
            return Ok(Some(Turn::Starved));
        }
        let want = want.min(room);
        let answer = if again > 0 {
            let piece: Vec<u8> = self.kept.iter().skip(size(flight)).take(want).copied().collect();
            wire.inbox.write(wire.io.ram(), before, &piece);
            Ok(piece.len())
        } else {
            self.receive(wire, before, want, buffered)
        };
        let len = match answer {
            Ok(len) => {
                self.host_ended |= len == 0;
                len
            }
            Err(cause) if cause.kind() == ErrorKind::WouldBlock => 0,
            Err(cause) if cause.kind() == ErrorKind::Interrupted => return Ok(None),
            Err(_) => {
                self.refuse(wire)?;
                return Ok(Some(Turn::Gone));
            }
        };
        if len > 0 {
            let flags = if len < want { flag::ACK | flag::PSH } else { flag::ACK };
            let packet = self.segment(wire, self.next, flags, len, *buffered);
            wire.segment(packet, len, self.size);
            self.due = false;
            self.sent(bytes(len));
        }
        if len < want {
            self.readable = false;
            if self.host_ended {
                self.fin = Some(self.next);
                return self.finish(wire, *buffered);
            }
        }
        Ok(if len == want { None } else { Some(Turn::Idle) })
    }

    /// Bytes that may be kept beside those that are. A connection that keeps none gets one packet's worth whatever the others
    /// have, or it would never be heard of again.
    fn may_keep(&self, buffered: usize) -> usize {
        let room = LIMIT.saturating_sub(self.kept.len()).min(BUFFERED.saturating_sub(buffered));
        if self.kept.is_empty() { room.max(self.size.into()) } else { room }
    }

    /// Moves up to `want` bytes from the socket into the inbox at `at`, and keeps a copy of them.
    fn receive(
        &mut self,
        wire: &Wire<'_, '_>,
        at: u64,
        want: usize,
        buffered: &mut usize,
    ) -> io::Result<usize> {
        let into = Iovecs::guest(wire.io.memory(), wire.inbox.parts(at, want as u64))?;
        let len = into.receive(self.socket.as_fd())?;
        // What the guest does to its memory meanwhile is its own affair.
        let mut copy = vec![0; len];
        wire.inbox.read(wire.io.ram(), at, &mut copy);
        self.kept.extend(copy);
        *buffered = buffered.saturating_add(len);
        Ok(len)
    }

    fn sent(&mut self, count: u32) {
        if self.next == self.acked {
            self.progress = self.used.max(self.progress);
        }
        self.next = self.next.wrapping_add(count);
        if ahead(self.next, self.top).is_some() {
            self.top = self.next;
        }
    }

    fn finish(&mut self, wire: &mut Wire<'_, '_>, buffered: usize) -> Result<Option<Turn>, Fault> {
        let packet = self.segment(wire, self.next, flag::FIN | flag::ACK, 0, buffered);
        self.readable = true;
        if !wire.whole(packet, 16)? {
            return Ok(Some(Turn::Starved));
        }
        self.due = false;
        self.readable = false;
        self.sent(1);
        Ok(Some(Turn::Idle))
    }

    /// Tells the guest that there is no such connection any more.
    ///
    /// # Errors
    /// The guest's ring is broken.
    pub fn refuse(&self, wire: &mut Wire<'_, '_>) -> Result<(), Fault> {
        let Ends { guest, remote } = self.ends;
        let header =
            tcp_header(remote.port(), guest.port(), self.next, self.wanted, flag::RST | flag::ACK, 0);
        let packet = wire.packet(remote.ip(), guest.ip(), TCP, header.len()).with(&header);
        wire.whole(packet, 16)?;
        Ok(())
    }

    /// Makes the other side see a reset when the socket is closed, as the guest wanted it or as it has no other way to
    /// learn of the guest's end.
    pub fn abort(&self) {
        let _ = sockopt::set_socket_linger(&self.socket, Some(Duration::ZERO));
    }

    /// A second or so has passed. What it wants: to be pumped, or nothing. `Err`: it has waited long enough.
    pub fn tick(&mut self, now: Duration) -> Result<bool, Lost> {
        let idle = now.saturating_sub(self.used);
        let half = self.guest_ended || self.fin.is_some();
        if idle > Duration::from_secs(if half { 600 } else { 7440 }) {
            return Err(Lost::Tell);
        }
        let open = self.phase == Phase::Open;
        let unanswered = self.next != self.acked;
        // RFC 9293, section 3.8.6.1: the news of an opened window may have been lost.
        let probing = open && !unanswered && self.readable && self.window == 0;
        let patience = Duration::from_secs(1 << self.tries.min(6));
        if self.phase == Phase::Connecting || !(unanswered || probing) {
            return Ok(false);
        }
        if now.saturating_sub(self.progress) < patience {
            return Ok(false);
        }
        self.tries = self.tries.saturating_add(1);
        if self.tries > TRIES {
            return Err(Lost::Tell);
        }
        self.progress = now;
        if !open || probing {
            (self.due, self.probe) = (true, probing);
        } else {
            self.rewind();
        }
        Ok(true)
    }
}
