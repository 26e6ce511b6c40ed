//! What happens on the host's side: sockets change, somebody knocks at a published port, time passes.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::time::Duration;

use base::Fault;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SocketFlags, acceptfrom_with, recvfrom};

use super::guest::{reason, wire};
use super::neighbour::{GATEWAY4, GUEST4, Unreachable, quote, unreachable};
use super::packet::{TCP, UDP};
use super::table::{FLOWS, Flow};
use super::tcp::{Connection, Ends, Lost};
use super::udp::Association;
use super::wire::Wire;
use super::{LATER, SOON, TICK, User};
use crate::net::Inbox;
use crate::virtio::Io;

/// Connections and datagrams taken from a published port in one visit.
const SHARE: usize = 32;

impl User {
    /// The socket of a flow has changed.
    pub(super) fn changed(&mut self, number: u16, inbox: &mut Inbox, io: &mut Io<'_>) -> Result<(), Fault> {
        let (ended, now) = (io.ended(), self.now());
        let Some(slot) = self.table.get(number) else { return Ok(()) };
        match &mut slot.flow {
            Flow::Udp(flow) => flow.changed(),
            Flow::Tcp(connection) => {
                if let Err((cause, connecting)) = connection.changed(ended, &mut self.buffered, now) {
                    let ends = connection.ends();
                    let why = if connecting { reason(cause) } else { Unreachable::Port };
                    let wire = wire!(self, inbox, io);
                    match why {
                        Unreachable::Port => connection.refuse(wire)?,
                        why => {
                            let first = quote(ends.guest, ends.remote, connection.first());
                            unreachable(wire, ends, TCP, &first, why)?;
                        }
                    }
                    self.counts.refused.add(u64::from(connecting));
                    self.remove(number);
                    return Ok(());
                }
            }
        }
        self.queue(number);
        Ok(())
    }

    /// Somebody wants something of a published port.
    pub(super) fn knock(&mut self, at: usize, inbox: &mut Inbox, io: &mut Io<'_>) -> Result<(), Fault> {
        for _ in 0..SHARE {
            let Some(port) = self.ports.get(at) else { return Ok(()) };
            let guest = SocketAddr::new(GUEST4.into(), port.guest);
            if !port.udp {
                let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
                match acceptfrom_with(&*port.socket, flags) {
                    Ok((socket, peer)) => {
                        let peer = peer.and_then(|peer| SocketAddr::try_from(peer).ok());
                        self.welcome(socket, guest, peer, io);
                    }
                    Err(Errno::INTR | Errno::CONNABORTED) => {}
                    Err(Errno::AGAIN) => return Ok(()),
                    Err(cause) => {
                        // Out of descriptors: it is asked again with the next one who knocks, or in a while.
                        log::debug!(target: "guest", "{}: take a connection: {cause}", self.name);
                        return Ok(());
                    }
                }
                continue;
            }
            let socket = port.socket.clone();
            let mut scratch = std::mem::take(&mut self.scratch);
            let answer = recvfrom(&*socket, scratch.as_mut_slice(), RecvFlags::DONTWAIT);
            self.scratch = scratch;
            match answer {
                Ok((len, _, Some(peer))) => {
                    let Ok(peer) = SocketAddr::try_from(peer) else { continue };
                    let Some(number) = self.acquaint(&socket, at, guest, peer, io) else { continue };
                    let ends = match self.table.get(number).map(|slot| &mut slot.flow) {
                        Some(Flow::Udp(flow)) => flow.ends(),
                        _ => continue,
                    };
                    let data = self.scratch.get(..len).unwrap_or_default();
                    wire!(self, inbox, io).datagram(ends.remote, ends.guest, data)?;
                }
                Ok((_, _, None)) | Err(Errno::INTR | Errno::CONNREFUSED) => {}
                Err(_) => return Ok(()),
            }
        }
        Ok(())
    }

    /// Ends of a new flow from outside: the gateway speaks, from the peer's own port if that is free.
    fn name(&mut self, protocol: u8, guest: SocketAddr, port: u16) -> Option<Ends> {
        let first = port.max(1024);
        for try_ in 0..64u16 {
            let port = if try_ == 0 { first } else { 1024 | u16::try_from(self.roll() >> 16).unwrap_or(0) };
            let ends = Ends { guest, remote: SocketAddr::new(GATEWAY4.into(), port) };
            if self.table.find(&(protocol, ends)).is_none() {
                return Some(ends);
            }
        }
        None
    }

    /// Begins a connection into the guest.
    fn welcome(&mut self, socket: OwnedFd, guest: SocketAddr, peer: Option<SocketAddr>, io: &mut Io<'_>) {
        let Some(ends) = self.name(TCP, guest, peer.map_or(0, |peer| peer.port())) else { return };
        let (roll, now) = (self.roll(), self.now());
        let new = Connection::incoming(socket, ends, roll, self.card.mtu, now);
        if self.table.is_full() {
            // It sees that it is not wanted.
            new.abort();
            self.counts.refused.add(1);
        } else if let Some(number) = self.begin((TCP, ends), Flow::Tcp(new), io) {
            self.queue(number);
        }
    }

    /// The flow of datagrams between `peer` and the guest.
    fn acquaint(
        &mut self,
        socket: &std::sync::Arc<OwnedFd>,
        at: usize,
        guest: SocketAddr,
        peer: SocketAddr,
        io: &mut Io<'_>,
    ) -> Option<u16> {
        let now = self.now();
        if let Some(number) = self.peers.get(&(at, peer)).copied()
            && let Some(Flow::Udp(flow)) = self.table.get(number).map(|slot| &mut slot.flow)
            && flow.peer() == Some(peer)
            && flow.ends().guest == guest
        {
            flow.touch(now);
            return Some(number);
        }
        if self.table.is_full() {
            self.evict();
        }
        let ends = self.name(UDP, guest, peer.port())?;
        let flow = Association::published(socket.clone(), ends, peer, now);
        let number = self.begin((UDP, ends), Flow::Udp(flow), io)?;
        if self.peers.len() >= usize::from(FLOWS) {
            self.peers.retain(|_, number| self.table.get(*number).is_some());
        }
        self.peers.insert((at, peer), number);
        Some(number)
    }

    /// Ends one flow of datagrams for another: the one that has been quiet for longest.
    pub(super) fn evict(&mut self) {
        let mut oldest: Option<(Duration, u16)> = None;
        for number in self.table.numbers() {
            if let Some(Flow::Udp(flow)) = self.table.get(number).map(|slot| &slot.flow)
                && oldest.is_none_or(|(used, _)| flow.used() < used)
            {
                oldest = Some((flow.used(), number));
            }
        }
        if let Some((_, number)) = oldest {
            self.remove(number);
        }
    }

    /// Some time has passed: what has waited for too long ends, what was not answered is sent again.
    pub(super) fn tick(&mut self, inbox: &mut Inbox, io: &mut Io<'_>) -> Result<(), Fault> {
        let now = self.now();
        let mut busy = !self.assemblies.is_empty();
        self.assemblies.expire(now);
        for number in self.table.numbers() {
            let Some(slot) = self.table.get(number) else { continue };
            match &mut slot.flow {
                Flow::Udp(flow) => {
                    if flow.is_over(now) {
                        self.remove(number);
                    }
                }
                Flow::Tcp(connection) => match connection.tick(now) {
                    Ok(wants) => {
                        busy |= connection.is_waiting();
                        if wants {
                            self.queue(number);
                        }
                    }
                    Err(lost) => {
                        connection.abort();
                        if lost == Lost::Tell {
                            connection.refuse(wire!(self, inbox, io))?;
                        }
                        self.remove(number);
                    }
                },
            }
        }
        self.peers.retain(|_, number| self.table.get(*number).is_some());
        self.soon = busy;
        if busy || !self.table.is_empty() {
            io.arm(TICK, if busy { SOON } else { LATER });
        }
        Ok(())
    }
}
