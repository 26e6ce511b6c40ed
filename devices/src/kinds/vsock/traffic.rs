//! Packets from the guest and to it: connections take turns, so that none waits for another that is slow.

use base::Fault;
use base::sys::iovec::Iovecs;

use super::connection::{Breach, Pair, Phase};
use super::device::{RX, TX, Vsock};
use super::packet::{HEADER, HEADER_LEN, HOST_CID, Header, Op, STREAM};
use crate::virtio::{Chain, Io};

/// The most bytes in a packet of the guest's, and to the guest in one turn of a connection (Linux sends that many).
const LARGEST: u32 = 64 << 10;
/// Buffers of the guest for one turn of a connection.
const BUFFERS: usize = 20;
/// Replies that may wait for a guest that gives no buffers, before its own packets wait too.
const REPLIES: usize = 256;

impl Vsock {
    /// Brings news to the guest, and takes up its packets again if they had to wait.
    pub(super) fn turn(&mut self, io: &mut Io<'_>) -> Result<(), Fault> {
        self.pump(io)?;
        while self.held && self.replies.len() < REPLIES {
            self.take(io)?;
            self.pump(io)?;
        }
        self.listen(io);
        Ok(())
    }

    /// Takes packets from the guest.
    pub(super) fn take(&mut self, io: &mut Io<'_>) -> Result<(), Fault> {
        while self.replies.len() < REPLIES {
            let Some(chain) = io.next(TX)? else {
                self.held = false;
                return Ok(());
            };
            let mut bytes = [0; HEADER];
            if chain.readable().read(io.ram(), 0, &mut bytes) == HEADER {
                self.hear(&Header::read(&bytes), &chain, io);
            } else {
                self.counts.dropped.add(1);
            }
            io.done(chain, 0);
        }
        self.held = true;
        Ok(())
    }

    /// What a packet of the guest means.
    fn hear(&mut self, header: &Header, chain: &Chain, io: &mut Io<'_>) {
        if header.src_cid != self.cid {
            return self.counts.dropped.add(1);
        }
        if header.dst_cid != HOST_CID || header.kind != STREAM {
            return self.refuse(header);
        }
        let pair = Pair { host: header.dst_port, guest: header.src_port };
        let token = self.table.find(pair);
        match (header.op, token) {
            (Some(Op::Reset), Some(token)) => self.forget(token, io),
            (Some(Op::Request), None) => self.dial_anew(pair, header, io),
            (Some(Op::Request), Some(token)) => {
                // A guest that asks anew has forgotten a connection that was over.
                if self.table.get(token).is_some_and(|old| old.phase == Phase::Lingering) {
                    self.table.remove(token);
                    self.dial_anew(pair, header, io);
                } else {
                    self.reset(token);
                }
            }
            (_, None) => self.refuse(header),
            (op, Some(token)) => {
                if self.hear_of(token, op, header, chain, io).is_err() {
                    self.reset(token);
                }
                self.settle(token, io);
            }
        }
    }

    /// A connection between ports that may have had another one before: a reset of that one would end this.
    fn dial_anew(&mut self, pair: Pair, header: &Header, io: &mut Io<'_>) {
        self.replies.retain(|reply| (reply.src_port, reply.dst_port) != (pair.host, pair.guest));
        self.dial(pair, header, io);
    }

    /// A packet for a connection there is.
    fn hear_of(
        &mut self,
        token: u16,
        op: Option<Op>,
        header: &Header,
        chain: &Chain,
        io: &mut Io<'_>,
    ) -> Result<(), Breach> {
        let Some(connection) = self.table.get(token) else { return Ok(()) };
        connection.hear_credit(header);
        let joined = matches!(connection.phase, Phase::Open | Phase::Lingering);
        match op {
            Some(Op::Response) if connection.phase == Phase::Asking => {
                connection.phase = Phase::Open;
                connection.greet();
                self.counts.opened.add(1);
            }
            Some(Op::Data) => {
                let there = chain.readable().len().saturating_sub(HEADER_LEN);
                if header.len > LARGEST || u64::from(header.len) > there {
                    return Err(Breach);
                }
                connection.take(chain, header.len, &self.site.memory, io)?;
                self.counts.tx_bytes.add(header.len.into());
            }
            Some(Op::Shutdown) if joined => {
                connection.hear_end(header.flags);
                if connection.guest_is_through() {
                    let pair = connection.pair;
                    self.forget(token, io);
                    self.replies.push_back(Header { op: Some(Op::Reset), ..self.header(pair) });
                }
            }
            Some(Op::CreditUpdate) if joined => {}
            Some(Op::CreditRequest) if joined => connection.owed.credit = true,
            _ => return Err(Breach),
        }
        Ok(())
    }

    /// Answers a packet that belongs to no connection. A reset is not answered: its connection may already have a
    /// successor between the same ports.
    fn refuse(&mut self, header: &Header) {
        if header.op != Some(Op::Reset) {
            self.counts.reset.add(1);
            self.replies.push_back(header.reset());
        }
    }

    /// Brings the guest what there is for it, as far as it gives buffers.
    fn pump(&mut self, io: &mut Io<'_>) -> Result<(), Fault> {
        while !(self.replies.is_empty() && self.ready.is_empty()) {
            let Some(chain) = self.buffer(io)? else { return Ok(()) };
            if let Some(reply) = self.replies.pop_front() {
                send(io, chain, &reply);
                continue;
            }
            let Some(token) = self.ready.pop_front() else { break };
            self.serve(token, chain, io)?;
            self.settle(token, io);
        }
        Ok(())
    }

    /// One turn of a connection.
    fn serve(&mut self, token: u16, chain: Chain, io: &mut Io<'_>) -> Result<(), Fault> {
        let packet = self.table.get(token).and_then(|connection| {
            connection.queued = false;
            connection.next_packet().map(|packet| (packet, connection.pair, connection.tell_credit()))
        });
        if let Some(((op, flags), pair, (buf_alloc, fwd_cnt))) = packet {
            let header = Header { op: Some(op), flags, buf_alloc, fwd_cnt, ..self.header(pair) };
            send(io, chain, &header);
            return Ok(());
        }
        self.spare.push_front(chain);
        if self.table.get(token).is_some_and(|connection| connection.can_read()) {
            self.carry(token, io)?;
        }
        Ok(())
    }

    /// A buffer of the guest's that holds a header and a byte at least; smaller ones go back as they came.
    fn buffer(&mut self, io: &mut Io<'_>) -> Result<Option<Chain>, Fault> {
        if let Some(chain) = self.spare.pop_front() {
            return Ok(Some(chain));
        }
        while let Some(chain) = io.next(RX)? {
            if chain.writable().len() > HEADER_LEN {
                return Ok(Some(chain));
            }
            io.done(chain, 0);
        }
        Ok(None)
    }

    /// Reads what the host has sent straight into buffers of the guest, with one call for all of them.
    fn carry(&mut self, token: u16, io: &mut Io<'_>) -> Result<(), Fault> {
        let Some(connection) = self.table.get(token) else { return Ok(()) };
        let want = u64::from(connection.credit().min(LARGEST));
        let (mut chains, mut room) = (Vec::new(), 0u64);
        while chains.len() < BUFFERS && room < want {
            let Some(chain) = self.buffer(io)? else { break };
            room = room.saturating_add(chain.writable().len().saturating_sub(HEADER_LEN));
            chains.push(chain);
        }
        let mut left = want;
        let parts = chains.iter().flat_map(|chain| {
            let parts = chain.writable().parts(HEADER_LEN, left);
            left = left.saturating_sub(chain.writable().len().saturating_sub(HEADER_LEN));
            parts.map(|part| (part.addr.0, part.len))
        });
        let moved = Iovecs::guest(&self.site.memory, parts);
        let Some(connection) = self.table.get(token) else { return Ok(()) };
        let mut moved = match moved {
            Ok(pieces) => connection.read(&pieces),
            Err(_) => connection.rest(),
        };
        let pair = connection.pair;
        // Without a packet to tell it in, nothing is told.
        let (buf_alloc, fwd_cnt) = if moved > 0 { connection.tell_credit() } else { (0, 0) };
        self.counts.rx_bytes.add(moved.into());
        let header = Header { op: Some(Op::Data), buf_alloc, fwd_cnt, ..self.header(pair) };
        let mut unused = Vec::new();
        for chain in chains {
            let room = chain.writable().len().saturating_sub(HEADER_LEN);
            let len = moved.min(u32::try_from(room).unwrap_or(u32::MAX));
            moved = moved.saturating_sub(len);
            if len == 0 {
                unused.push(chain);
            } else {
                send(io, chain, &Header { len, ..header });
            }
        }
        for chain in unused.into_iter().rev() {
            self.spare.push_front(chain);
        }
        Ok(())
    }
}

/// Gives a buffer back with a packet in it, whose bytes are already there.
fn send(io: &mut Io<'_>, chain: Chain, header: &Header) {
    chain.writable().write(io.ram(), 0, &header.bytes());
    io.done(chain, header.len.saturating_add(u32::try_from(HEADER).unwrap_or(0)));
}
