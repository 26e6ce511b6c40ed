//! One TCP connection of the guest, ended here and carried on by a socket of the host.
//!
//! Bytes go straight from the socket into guest memory, and from there a copy is kept until the guest acknowledges it; on
//! the way from the guest they go straight from its memory into the socket. What a slow socket does not take waits in a
//! bounded buffer, and the window that the guest is shown shrinks by it. The wire to the guest loses nothing but what
//! its driver drops, so a lost segment is sent again from the first missing byte on (RFC 9293 without SACK).
//!
//! To leave what is not acknowledged in the socket, and peek at it, would save the copy. But before Linux 6.9 each peek
//! copies all that was sent before once more, which costs more than all else.

mod speech;

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use base::sys::iovec::Iovecs;
use base::sys::socket;
use rustix::io::Errno;
use rustix::net::{SendFlags, Shutdown, sockopt};

use super::packet::{self, flag};
use super::wire::Wire;
use crate::virtio::Chain;

/// Bytes of one connection that may wait for a slow socket, and for the guest's acknowledgement; also the window that the
/// guest is shown.
const LIMIT: usize = 512 << 10;
/// The same of all connections together.
pub const BUFFERED: usize = 64 << 20;
/// Bytes of room for what is sent that a quiet connection holds on to.
const SPARE: usize = 16 << 10;
/// The scale of our window.
const SCALE: u8 = 4;

/// How far a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The host's socket is being connected; the guest waits for its SYN to be answered.
    Connecting,
    /// It is connected; our SYN and ACK are on their way.
    Greeting,
    /// Somebody has connected from outside; our SYN is on its way.
    Inviting,
    /// Data flows.
    Open,
}

/// What is to become of a connection after a turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// It waits for something to happen.
    Idle,
    /// It has more for the guest, who has no buffers.
    Starved,
    /// It has had its share and has more.
    Again,
    /// It is over.
    Gone,
}

/// Who speaks to whom, as the guest sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ends {
    /// The guest's.
    pub guest: SocketAddr,
    /// The other.
    pub remote: SocketAddr,
}

/// Data of a segment in guest memory.
pub struct Data<'a> {
    /// The chain it lies in.
    pub chain: &'a Chain,
    /// Where it begins, from the virtio header on.
    pub at: u64,
    /// Its length in bytes.
    pub len: u32,
}

/// A connection.
pub struct Connection {
    socket: OwnedFd,
    ends: Ends,
    phase: Phase,
    /// Number of the next byte to send; of the first that the guest has not acknowledged; behind the last ever sent.
    next: u32,
    acked: u32,
    top: u32,
    /// Number of our FIN, when the end of what the other side says is known.
    fin: Option<u32>,
    /// Number of the next byte from the guest.
    wanted: u32,
    /// Bytes that the guest takes from `acked` on, and how its window field is scaled.
    window: u32,
    scale: Option<u8>,
    /// Data in a packet.
    size: u16,
    /// From the guest, for a socket that took no more.
    waiting: VecDeque<u8>,
    /// The window last shown to the guest.
    shown: u32,
    guest_ended: bool,
    host_ended: bool,
    /// The socket has been told of the guest's end.
    shut: bool,
    /// Sent, from `acked` on: to be sent again if it gets lost.
    kept: VecDeque<u8>,
    /// There may be something to receive, or to send again.
    readable: bool,
    /// The guest is owed an answer.
    due: bool,
    /// Sooner than it is due: the guest is asked for its window.
    probe: bool,
    repeats: u8,
    tries: u8,
    /// When the guest last moved on, and when anything last happened.
    progress: Duration,
    used: Duration,
}

/// `a - b`, if it is not negative on the circle of sequence numbers.
fn ahead(a: u32, b: u32) -> Option<u32> {
    let by = a.wrapping_sub(b);
    (by < 1 << 31).then_some(by)
}

fn bytes(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

fn size(count: u32) -> usize {
    usize::try_from(count).unwrap_or(usize::MAX)
}

impl Connection {
    fn new(socket: OwnedFd, ends: Ends, phase: Phase, number: u32, mtu: u16, now: Duration) -> Connection {
        let headers = if ends.guest.is_ipv6() { 60 } else { 40 };
        // A wait for more small writes is the guest's own choice, and already behind it.
        let _ = sockopt::set_tcp_nodelay(&socket, true);
        let _ = sockopt::set_socket_keepalive(&socket, true);
        // Urgent data are data.
        let _ = sockopt::set_socket_oobinline(&socket, true);
        Connection {
            socket,
            ends,
            phase,
            next: number,
            acked: number,
            top: number,
            fin: None,
            wanted: 0,
            window: 0,
            scale: None,
            size: mtu.saturating_sub(headers),
            waiting: VecDeque::new(),
            shown: 0,
            guest_ended: false,
            host_ended: false,
            shut: false,
            kept: VecDeque::new(),
            readable: true,
            due: false,
            probe: false,
            repeats: 0,
            tries: 0,
            progress: now,
            used: now,
        }
    }

    /// One that the guest begins with `syn`; the socket is being connected, or is already.
    pub fn outgoing(
        socket: OwnedFd,
        ends: Ends,
        number: u32,
        syn: &packet::Tcp,
        mtu: u16,
        now: Duration,
    ) -> Self {
        let mut new = Connection::new(socket, ends, Phase::Connecting, number, mtu, now);
        new.learn(syn);
        new
    }

    /// One that somebody outside began: the guest is invited.
    pub fn incoming(socket: OwnedFd, ends: Ends, number: u32, mtu: u16, now: Duration) -> Self {
        let mut new = Connection::new(socket, ends, Phase::Inviting, number, mtu, now);
        new.due = true;
        new
    }

    /// Takes what the guest's SYN says.
    fn learn(&mut self, syn: &packet::Tcp) {
        self.wanted = syn.sequence.wrapping_add(1);
        self.window = syn.window.into();
        self.scale = syn.scale;
        // RFC 9293, section 3.7.1; a segment without room for data would never end.
        self.size = self.size.min(syn.segment.unwrap_or(536)).max(64);
    }

    /// The socket.
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Who speaks to whom.
    pub fn ends(&self) -> Ends {
        self.ends
    }

    /// The number of the guest's SYN, while it has said nothing else.
    pub fn first(&self) -> u32 {
        self.wanted.wrapping_sub(1)
    }

    /// Whether the guest owes an answer, or would if it were asked.
    pub fn is_waiting(&self) -> bool {
        self.next != self.acked || self.readable
    }

    /// Bytes that wait for the socket, or for the guest to say that it has them.
    pub fn waiting(&self) -> usize {
        self.waiting.len().saturating_add(self.kept.len())
    }

    /// The socket has changed; `ended` says that its other side has said its last word. The error it has had, if any,
    /// and whether the guest was still waiting for its connection.
    pub fn changed(&mut self, ended: bool, buffered: &mut usize, now: Duration) -> Result<(), (Errno, bool)> {
        self.used = now;
        self.readable = true;
        self.host_ended |= ended;
        let connecting = self.phase == Phase::Connecting;
        if ended || connecting {
            match sockopt::socket_error(&self.socket) {
                Ok(Ok(())) => {}
                Ok(Err(cause)) | Err(cause) => return Err((cause, connecting)),
            }
        }
        if connecting {
            if matches!(rustix::net::getpeername(&self.socket), Err(Errno::NOTCONN)) {
                return Ok(());
            }
            self.connected();
        }
        self.drain(buffered).map_err(|cause| (cause, false))
    }

    /// The socket is connected: the guest is told.
    pub fn connected(&mut self) {
        self.phase = Phase::Greeting;
        self.due = true;
    }

    /// Hands the socket what waits for it.
    fn drain(&mut self, buffered: &mut usize) -> Result<(), Errno> {
        while !self.waiting.is_empty() {
            let (front, _) = self.waiting.as_slices();
            match rustix::net::send(&self.socket, front, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(len) => {
                    self.waiting.drain(..len.min(self.waiting.len()));
                    *buffered = buffered.saturating_sub(len);
                }
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => {}
                Err(cause) => return Err(cause),
            }
        }
        if self.waiting.is_empty() {
            self.waiting = VecDeque::new();
            if self.guest_ended && !self.shut {
                self.shut = true;
                // ENOTCONN: the other side is gone, which its own event tells.
                let _ = rustix::net::shutdown(&self.socket, Shutdown::Write);
            }
        }
        // The guest stopped for a full window; there is room again.
        let room = bytes(LIMIT.saturating_sub(self.waiting.len()));
        self.due |= self.shown < bytes(LIMIT / 4) && room >= bytes(LIMIT / 2);
        Ok(())
    }

    /// A segment of the guest. `Err`: the connection has failed, and the guest is to be told unless it said so itself.
    pub fn input(
        &mut self,
        segment: &packet::Tcp,
        data: &Data<'_>,
        wire: &Wire<'_, '_>,
        buffered: &mut usize,
    ) -> Result<(), Lost> {
        self.used = wire.card.clock.monotonic();
        if segment.flags & flag::RST != 0 {
            return self.reset_by(segment);
        }
        if segment.flags & flag::SYN != 0 {
            self.greeted(segment);
            return Ok(());
        }
        if segment.flags & flag::ACK == 0 || !self.acknowledge(segment, data.len, buffered) {
            return Ok(());
        }
        if self.phase != Phase::Open {
            return Ok(());
        }
        let fin = segment.flags & flag::FIN != 0;
        if data.len == 0 && !fin {
            return Ok(());
        }
        self.due = true;
        // What is behind a gap, or was here before, is only answered.
        let Some(skip) = ahead(self.wanted, segment.sequence).filter(|skip| *skip <= data.len) else {
            return Ok(());
        };
        if self.guest_ended {
            return Ok(());
        }
        let fresh = Data {
            chain: data.chain,
            at: data.at.saturating_add(skip.into()),
            len: data.len.saturating_sub(skip),
        };
        let taken = self.take(&fresh, wire, buffered).map_err(|_| Lost::Tell)?;
        self.wanted = self.wanted.wrapping_add(taken);
        if fin && taken == fresh.len {
            self.wanted = self.wanted.wrapping_add(1);
            self.guest_ended = true;
            self.drain(buffered).map_err(|_| Lost::Tell)?;
        }
        Ok(())
    }

    /// RFC 5961, section 3.2: only a reset at the very place counts.
    fn reset_by(&mut self, segment: &packet::Tcp) -> Result<(), Lost> {
        let refused = self.phase == Phase::Inviting && segment.acknowledged == self.next;
        if refused || segment.sequence == self.wanted {
            return Err(Lost::Known);
        }
        self.due |= self.phase == Phase::Open;
        Ok(())
    }

    fn greeted(&mut self, segment: &packet::Tcp) {
        match self.phase {
            Phase::Connecting => {}
            Phase::Inviting => {
                if segment.flags & flag::ACK != 0
                    && segment.acknowledged == self.top
                    && self.top != self.acked
                {
                    self.learn(segment);
                    self.acked = segment.acknowledged;
                    self.phase = Phase::Open;
                    self.due = true;
                    self.tries = 0;
                }
            }
            // Our answer was lost, or this is none of this connection's: either way it is told where we are.
            Phase::Greeting | Phase::Open => self.due = true,
        }
    }

    /// Takes note of what the guest has received; whether the segment is one of this connection's.
    fn acknowledge(&mut self, segment: &packet::Tcp, len: u32, buffered: &mut usize) -> bool {
        let sent = self.top.wrapping_sub(self.acked);
        let Some(mut done) = ahead(segment.acknowledged, self.acked).filter(|done| *done <= sent) else {
            // An old one may still bring data; one for what was never sent may not (RFC 9293, section 3.10.7.4).
            let old = ahead(self.acked, segment.acknowledged).is_some();
            self.due |= !old;
            return old && self.phase == Phase::Open;
        };
        let before = self.window;
        self.window = u32::from(segment.window) << self.scale.unwrap_or(0);
        if self.phase == Phase::Greeting && done == 1 {
            (self.phase, self.acked, self.tries) = (Phase::Open, segment.acknowledged, 0);
            return true;
        }
        if self.phase != Phase::Open {
            return false;
        }
        self.tries = 0;
        if done == 0 {
            let repeated = len == 0 && self.window == before && self.next != self.acked;
            if repeated && segment.flags & flag::FIN == 0 {
                self.repeats = self.repeats.saturating_add(1);
                if self.repeats == 3 {
                    self.rewind();
                }
            }
            return true;
        }
        self.repeats = 0;
        self.progress = self.used;
        self.acked = segment.acknowledged;
        if ahead(self.next, self.acked).is_none() {
            self.next = self.acked;
        }
        if self.fin.is_some_and(|fin| ahead(segment.acknowledged, fin.wrapping_add(1)).is_some()) {
            done = done.saturating_sub(1);
        }
        let gone = size(done).min(self.kept.len());
        self.kept.drain(..gone);
        *buffered = buffered.saturating_sub(gone);
        if self.kept.is_empty() && self.kept.capacity() > SPARE {
            self.kept = VecDeque::new();
        }
        true
    }

    /// Everything from the first byte that is not acknowledged is to be sent again.
    fn rewind(&mut self) {
        self.next = self.acked;
        self.readable = true;
    }

    /// Hands data to the socket, or keeps what it does not take; how much was taken.
    fn take(&mut self, data: &Data<'_>, wire: &Wire<'_, '_>, buffered: &mut usize) -> Result<u32, Errno> {
        let mut sent = 0u32;
        let span = data.chain.readable();
        if self.waiting.is_empty() && data.len > 0 {
            let parts = span.parts(data.at, data.len.into()).map(|part| (part.addr.0, part.len));
            let answer =
                Iovecs::guest(wire.io.memory(), parts).and_then(|from| socket::send(&self.socket, &from));
            match answer {
                Ok(len) => sent = bytes(len),
                Err(cause) => match Errno::from_io_error(&cause) {
                    Some(Errno::AGAIN | Errno::INTR | Errno::NOBUFS | Errno::NOMEM) => {}
                    cause => return Err(cause.unwrap_or(Errno::IO)),
                },
            }
        }
        let room = LIMIT.saturating_sub(self.waiting.len()).min(BUFFERED.saturating_sub(*buffered));
        let rest = data.len.saturating_sub(sent).min(bytes(room));
        if rest > 0 {
            let mut copy = vec![0; size(rest)];
            span.read(wire.io.ram(), data.at.saturating_add(sent.into()), &mut copy);
            self.waiting.extend(copy);
            *buffered = buffered.saturating_add(size(rest));
        }
        Ok(sent.saturating_add(rest))
    }
}

/// A connection is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lost {
    /// The guest knows.
    Known,
    /// The guest is to be told.
    Tell,
}
